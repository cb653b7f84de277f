"""A run folder: config.json tells what it was begun with, so that no other run goes on in it; .lock keeps it to one.

The lock is one that the kernel takes back when its process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import RunError
from pipeline.writer import write_json
from train.config import Config
from train.config_file import parse_config

CONFIG_NAME = "config.json"
LOCK_NAME = ".lock"
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


def config_of_flat(flat: dict[str, Any], *, where: str) -> Config:
    """The inverse of `flat`. Raises ConfigError as `parse_config` does."""
    nested: dict[str, dict[str, object]] = {}
    for key, value in flat.items():
        section, _, leaf = key.partition(".")
        if leaf:
            nested.setdefault(section, {})[leaf] = value
        else:
            nested[section] = value
    return parse_config(nested, where=where)


def config_of_run(run: Path) -> Config:
    """What RUN was started with. Raises RunError where there is no run."""
    if not (run / CONFIG_NAME).is_file():
        raise RunError("not a run", where=run, remedy="train one: slw-train run CONFIG.toml")
    flat = _read(run / CONFIG_NAME)
    if "model_type" in flat:
        raise RunError("not a run but a Hugging Face folder", where=run, remedy="slw-train eval takes it as --hf DIR")
    return config_of_flat(flat, where=str(run / CONFIG_NAME))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError("the run's settings cannot be read", where=path, found=error) from error
    if not isinstance(data, dict):
        raise RunError("the run's settings cannot be read", where=path, found=repr(data)[:80], allowed="an object")
    return data


def check_folder(folder: Path, config: Config, change_schedule: bool, force: bool = False) -> None:
    """Raise RunError where the folder holds something else than a run, or, without `force`, one of other settings."""
    path, remedy = folder / CONFIG_NAME, "choose another run.dir"
    if folder.is_file():
        raise RunError("the run folder is a file", where=folder, remedy=remedy)
    if not path.exists():
        if folder.exists() and any(not entry.name.startswith(OURS) for entry in folder.iterdir()):
            raise RunError("the run folder is not empty and holds no run", where=folder, remedy=remedy)
        return
    if b'"model_type"' in path.read_bytes():
        raise RunError("a Hugging Face folder, not a run", where=folder, remedy=remedy)
    if force:
        return
    there, asked = _read(path), flat(config)
    keys = [key for key in asked if there.get(key) != asked[key] and key not in {*FREE_KEYS, DATA_KEY}]
    if change_schedule:
        keys = [key for key in keys if not key.startswith(SCHEDULE_KEYS)]
    if keys:
        scheduled = all(key.startswith(SCHEDULE_KEYS) for key in keys)
        remedy += ", or start over: --force"
        raise RunError(
            "the run folder holds a run with other settings",
            where=folder,
            found="; ".join(f"{key}: {_told(there.get(key))} there, {_told(asked[key])} asked" for key in keys),
            remedy=remedy + ("; or change its schedule from here on: --reschedule" if scheduled else ""),
        )


def _told(value: Any) -> str:
    """A setting as in TOML, near enough."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {one}" for key, one in value.items())
    return "nothing" if value is None else str(value)


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


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold RUN/.lock, which names us. Raises RunError where another process does, naming that; or cannot write."""
    try:
        Path(os.path.realpath(run)).mkdir(parents=True, exist_ok=True)  # a link may lead to nothing yet
        handle = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError("cannot write here", where=run, found=error, remedy="choose another run.dir") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "another run is at work in this folder",
                where=run,
                found=_holder(handle),
                remedy="wait, or stop it with SIGTERM: it writes a checkpoint, and this command goes on from there; "
                "or choose another run.dir",
            ) from None
        except OSError as error:
            raise RunError(
                "this file system has no locks, by which a second run is kept out",
                where=run,
                found=error,
                remedy="choose a run.dir on another one; or have it mounted with locks (Lustre: -o flock)",
            ) from error
        _sign(handle)
        yield
    finally:
        os.close(handle)  # the file stays: who waits for it must not lock one that is no longer there


def _sign(handle: int) -> None:
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds, and what is really written will say so
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(facts).encode(), 0)


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 1000, 0))
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said which it is"
