"""RUN/config.json: what a run folder was begun with; another run does not go on in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.writer import write_json
from train.config import Config
from train.lock import LOCK_NAME

CONFIG_NAME = "config.json"
OURS = (LOCK_NAME, f".{CONFIG_NAME}.")
"""What a run that was killed at once may have left."""
FREE_KEYS = {
    "batch.micro_batch_tokens",
    "run.dir",
    "run.device",
    "run.checkpoint_every_steps",
    "run.keep_checkpoints",
    "run.keep_every_steps",
    "run.validate_every_steps",
    "run.log_every_steps",
    "run.trackers",
    "run.spike_ratios",
    "run.attention_logits_every_steps",
    "run.peak_tflops",
    "run.parallel",
    "run.activation_checkpointing",
    "run.on_nonfinite",
    "run.max_skips",
    "run.rollback_steps",
    "run.max_rollbacks",
}
"""What may differ at a resume without changing the run."""
DATA_KEY = "store"
"""Where the data lie may change: which they are is in the checkpoint, and compared there."""
SCHEDULE_KEYS = ("curriculum.", "batch.global_batch", "run.total_tokens", "run.epochs", "run.max_epochs")


def flat(config: Config) -> dict[str, Any]:
    """All settings as {"section.key": plain JSON value}."""
    data = config.model_dump(mode="json")
    pairs = ((section, value if isinstance(value, dict) else {"": value}) for section, value in data.items())
    return {f"{section}.{key}".rstrip("."): value for section, part in pairs for key, value in part.items()}


def check_folder(folder: Path, config: Config, change_schedule: bool, force: bool = False) -> None:
    """Raise RunError where the folder holds something else than a run, or, without `force`, one of other settings."""
    path = folder / CONFIG_NAME
    if folder.is_file():
        raise RunError("the run folder is a file", where=folder, remedy="choose another run.dir")
    if path.exists() and b'"model_type"' in path.read_bytes():
        raise RunError("a Hugging Face folder, not a run", where=folder, remedy="choose another run.dir")
    if path.exists() and force:
        return
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(OURS) for entry in folder.iterdir()):
            raise RunError(
                "the run folder is not empty and holds no run", where=folder, remedy="choose another run.dir"
            )
        return
    there, asked = json.loads(path.read_bytes()), flat(config)
    keys = [key for key in asked if there.get(key) != asked[key] and key not in {*FREE_KEYS, DATA_KEY}]
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
    for left in folder.glob(f".{CONFIG_NAME}.*"):  # by a kill
        left.unlink()
    write_json(folder / CONFIG_NAME, flat(config))


def clear(folder: Path) -> None:
    """Delete a run, its configuration last: a kill leaves what can be cleared again. Only for who holds its lock."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == CONFIG_NAME):
        if entry.name != LOCK_NAME:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
