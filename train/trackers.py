"""Metrics to TensorBoard or Weights & Biases as well (`run.trackers`); metrics.jsonl stays the truth.

A resumed run repeats the steps after its checkpoint. TensorBoard is told to drop what it has of them; W&B, which
cannot, is not told again what it was told: no point is there twice.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol

from pipeline.errors import ConfigError
from train.config import Config

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID_NAME = "wandb_id"
"""RUN/wandb_id: by it a resume goes on with the same W&B run. W&B's own files are in RUN/wandb."""


class Tracker(Protocol):
    """Who is told lines of metrics."""

    def write(self, line: dict[str, Any]) -> None:
        """One line, of a step later than the one before."""

    def close(self) -> None:
        """Nothing more comes."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: Config, step: int, _told: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if step else 0
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

    def __init__(self, config: Config, _step: int, told: int) -> None:
        import wandb

        folder = config.run.dir
        path = folder / WANDB_ID_NAME
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        self._told = told
        self._run = wandb.init(
            dir=str(folder),
            id=path.read_text(),
            resume="allow",
            name=folder.name,
            project=os.environ.get("WANDB_PROJECT", "slw"),
            config=config.model_dump(mode="json"),
        )

    def write(self, line: dict[str, Any]) -> None:
        """Every number, at its step."""
        if line["step"] > self._told:
            self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_installed(config: Config) -> None:
    """Raise ConfigError where a package is missing."""
    for name in config.run.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"{name} is not installed",
                found=f"run.trackers: {name}",
                remedy=f'pip install "slw[{name}]", or take it out of run.trackers',
            )


def trackers_of(config: Config, step: int, told: int) -> Sequence[Tracker]:
    """Those of `run.trackers`; `step`: where the run goes on; `told`: the last step told before, -1 for none."""
    return [TRACKERS[name](config, step, told) for name in config.run.trackers]


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
