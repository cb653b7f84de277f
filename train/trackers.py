"""Metrics to TensorBoard or Weights & Biases as well (`run.trackers`); metrics.jsonl stays the truth.

A resumed run repeats the steps after its checkpoint. TensorBoard is told to drop what it has of them. W&B cannot, and
a kill takes what it has not written yet: so it hears the lines of metrics.jsonl from where it says that it stands.
That is the beginning where it is offline, for there each start has a folder of its own.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from pipeline.errors import ConfigError
from train.config import Config
from train.metrics import read_metrics

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_NAME = "wandb_id"
"""RUN/wandb_id: by it a resume goes on with the same W&B run. W&B's own files are in RUN/wandb."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config, lines: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = lines[-1]["step"] + 1 if lines else 0
        self._writer = SummaryWriter(str(config.run.dir / TENSORBOARD_FOLDER), purge_step=purge)

    def write(self, line: dict[str, Any]) -> None:
        """Every number as a scalar of its name."""
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; WANDB_MODE, WANDB_PROJECT and its other variables hold, the project is "slw" without."""

    def __init__(self, config: Config, lines: Sequence[dict[str, Any]]) -> None:
        import wandb

        folder = config.run.dir
        path = folder / WANDB_ID_NAME
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            dir=str(folder),
            id=path.read_text(),
            resume="allow",
            name=folder.name,
            project=os.environ.get("WANDB_PROJECT", "slw"),
            config=config.model_dump(mode="json"),
        )
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Every number, at its step, that is not there yet."""
        if line["step"] >= self._run.starting_step:
            self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_installed(config: Config) -> None:
    """Raise ConfigError where a package is missing."""
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed",
                found=f"run.trackers: {name}",
                remedy=f'pip install "slw[{name}]", or take it out of run.trackers',
            )


def trackers_of(config: Config) -> Sequence[Tracker]:
    """Those of `run.trackers`, told the metrics that the run goes on from: those of its folder."""
    lines = read_metrics(config.run.dir) if config.run.trackers else []
    return [TRACKERS[name](config, lines) for name in config.run.trackers]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
