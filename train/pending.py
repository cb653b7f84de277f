"""Figures of steps that are done, left on the device until a fetch takes those of many steps in one transfer.

A step that asked for its own loss would wait for the device, and the device then for the next step. The price: a
figure is known up to `run.log_every_steps` steps late.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.distributed import Ranks


@dataclass(frozen=True)
class Done:
    """A step whose figures are not known yet."""

    facts: dict[str, Any]
    """What the host knows of it: its step, seqlen, learning rate, ..."""
    targets: int
    figures: dict[str, Tensor]
    """[] each, on the device; the same names at every step."""


@dataclass(frozen=True)
class Fetched:
    """A step whose figures are known."""

    facts: dict[str, Any]
    targets: int
    took_s: float
    figures: list[dict[str, float]]
    """Name -> value, for each rank."""


class Pending:
    """Steps that wait for a fetch, and the clock of training.

    The device is asked nothing between two fetches, so nobody knows what one step took: the time between them is
    spread over the steps by their targets, and tokens/s are those of the whole interval.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._steps: list[Done] = []
        self._since = time.perf_counter()

    def add(self, step: Done) -> None:
        """Remember a step."""
        self._steps.append(step)

    def fetch(self) -> list[Fetched]:
        """Wait for the device and return all steps added so far, with the figures of all ranks."""
        steps, self._steps = self._steps, []
        if not steps:
            return []
        flat = torch.stack([figure.float() for step in steps for figure in step.figures.values()])
        rows = self._ranks.gather(flat.view(len(steps), -1)).transpose(0, 1).tolist()  # [steps, ranks, figures]
        took = time.perf_counter() - self._since
        self.restart_clock()
        seconds_per_target = took / max(sum(step.targets for step in steps), 1)
        return [
            Fetched(
                done.facts,
                done.targets,
                seconds_per_target * done.targets,
                [dict(zip(done.figures, r, strict=True)) for r in row],
            )
            for done, row in zip(steps, rows, strict=True)
        ]

    def restart_clock(self) -> None:
        """The time since the last fetch was not training."""
        self._since = time.perf_counter()
