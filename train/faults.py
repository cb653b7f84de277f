"""Updates that are not finite: kept out of the weights on the device, then what `run.on_nonfinite` says.

A step asks the device for nothing, so the host hears of a loss or a gradient norm that is infinite or no number at
the next fetch, up to `run.log_every_steps` steps late. `Guard` keeps the update out at once all the same:

    "skip"               that update alone is left out; more than `run.max_skips` in a row stop the run
    "stop", "rollback"   no update is applied any more until the host has heard: weights and moments are those before
                         the bad step, as if later ones had not been
    "rollback"           then takes weights and moments of a checkpoint at least `run.rollback_steps` before, and goes
                         on with the batch *after* the bad one, at that step's learning rate and length. Steps number
                         batches: none is served twice, and those in between have been served but are in no weights.

All of it is state of the run, so a resumed run does the same. Price: a comparison of two numbers a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.errors import RunError

WATCHED = ("loss", "grad_norm")


class NotFinite(RunError):
    """A run ends because its loss or gradient is not finite."""


class Guard:
    """Says on the device which update to leave out."""

    def __init__(self, policy: str, device: torch.device) -> None:
        self.holds = policy != "skip"
        self.held = torch.zeros((), device=device)

    def judge(self, *figures: Tensor) -> Tensor:
        """float32 []: 1 where the update is to be left out, because one of `figures` ([] each) is not finite."""
        bad = (~torch.stack([figure.float() for figure in figures]).isfinite().all()).float()
        if self.holds:
            bad = self.held = torch.maximum(self.held, bad)
        return bad

    def release(self) -> None:
        """Apply updates again."""
        self.held = torch.zeros_like(self.held)


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """`optimizer.step()` where `bad` [] is 0; else weights, moments and counts of steps stay as they are.

    The optimizer is a fused one, which looks at the flag on the device, as it does for `torch.amp.GradScaler`.
    """
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()


@dataclass
class Faults:
    """What has happened so far; state of a run, kept in checkpoints."""

    skipped: int = 0
    """Updates left out under "skip"."""
    in_a_row: int = 0
    """The latest of those, since the last update that was applied."""
    rollbacks: int = 0
    left_out: list[list[int]] = field(default_factory=list)
    """[first, last] of each run of batches, counted from 0, whose updates were left out."""
    undone: list[list[int]] = field(default_factory=list)
    """The same of those that rollbacks gave up. Both were served and are in no weights."""

    def skip(self, batch: int) -> None:
        """The update of `batch` was left out."""
        self.skipped += 1
        self.in_a_row += 1
        if self.left_out and self.left_out[-1][1] == batch - 1:
            self.left_out[-1][1] = batch
        else:
            self.left_out.append([batch, batch])

    def roll_back(self, to_step: int, batch: int) -> None:
        """Weights are again those after `to_step` updates; `batch` was the bad one."""
        self.rollbacks += 1
        self.in_a_row = 0
        self.left_out, self.undone = (
            [[first, min(last, to_step - 1)] for first, last in ranges if first < to_step]
            for ranges in (self.left_out, self.undone)
        )
        self.undone.append([to_step, batch])

    def is_undone(self, step: int) -> bool:
        """Whether a checkpoint after `step` steps holds weights that were given up."""
        return any(first < step <= last for first, last in self.undone)

    @property
    def unlearnt(self) -> list[list[int]]:
        """[first, last] of all batches that were served and are in no weights, in order."""
        return sorted(self.left_out + self.undone)


def is_bad(figures: Mapping[str, float]) -> bool:
    """Whether the step with these fetched figures was not finite."""
    return not all(math.isfinite(figures[name]) for name in WATCHED)
