"""RUN/config.json: what a run folder was begun with; another run does not go on in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from train.config import Config

CONFIG_NAME = "config.json"
FREE_KEYS = {
    "run.dir",
    "run.device",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "run.validate_every_steps",
    "run.log_every_steps",
}
"""What may differ at a resume without changing the run."""
SCHEDULE_KEYS = ("curriculum.", "batch.global_batch", "run.total_tokens", "run.epochs", "run.max_epochs")


def _flat(config: Config) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    pairs = ((section, value if isinstance(value, dict) else {"": value}) for section, value in data.items())
    return {f"{section}.{key}".rstrip("."): value for section, part in pairs for key, value in part.items()}


def check_folder(folder: Path, config: Config, change_schedule: bool) -> None:
    """Raise RunError where the folder holds a run with other settings."""
    path = folder / CONFIG_NAME
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise RunError(
                "the run folder is not empty and holds no run", where=folder, remedy="choose another run.dir"
            )
        return
    there, asked = json.loads(path.read_bytes()), _flat(config)
    keys = [key for key in asked if there.get(key) != asked[key] and key not in FREE_KEYS]
    if change_schedule:
        keys = [key for key in keys if not key.startswith(SCHEDULE_KEYS)]
    if keys:
        scheduled = all(key.startswith(SCHEDULE_KEYS) for key in keys)
        remedy = "choose another run.dir, or start over: --force"
        raise RunError(
            "the run folder holds a run with other settings",
            where=folder,
            found="; ".join(f"{key}: {there.get(key)} there, {asked[key]} asked" for key in keys),
            remedy=remedy + ("; or change its schedule from here on: --reschedule" if scheduled else ""),
        )


def write_config(folder: Path, config: Config) -> None:
    """Write RUN/config.json, whole or not at all."""
    temporary = folder / f".{CONFIG_NAME}.partial"
    temporary.write_text(json.dumps(_flat(config), indent=1))
    temporary.replace(folder / CONFIG_NAME)
