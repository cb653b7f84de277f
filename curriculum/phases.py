"""Pacings and batch sizes into phases: steps whose batches have one shape. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from curriculum.pacing import Pacing
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with batches of one shape."""

    first_step: int
    seqlen: int
    sequences: int
    window: int | None = None
    """Attention stays within blocks of so many positions of a row (SkyLadder); None: no such blocks."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of each of its batches."""
        return self.seqlen * self.sequences

    @property
    def shape(self) -> tuple[int, int]:
        """(seqlen, sequences): what the dealing of its batches depends on."""
        return self.seqlen, self.sequences


def lay_out(pacing: Pacing, sequences: Callable[[int], int]) -> tuple[Phase, ...]:
    """The phases of `pacing` with `sequences(seqlen)` rows a batch.

    In tokens, a length or window begins with the first step before which so many tokens have been served.
    """
    changes = [(at, seqlen, None) for at, seqlen in pacing.points] + [(at, None, w) for at, w in pacing.windows]
    seqlen, window = pacing.points[0][1], None
    step = seen = 0
    phases: dict[int, Phase] = {}
    for at, new_seqlen, new_window in sorted(changes, key=lambda change: change[0]):
        if at > seen:
            size = seqlen * sequences(seqlen) if pacing.unit == "tokens" else 1
            steps = -(-(at - seen) // size)
            step, seen = step + steps, seen + steps * size
        seqlen, window = new_seqlen or seqlen, new_window or window
        within = window if window is not None and window < seqlen else None
        phases[step] = Phase(step, seqlen, sequences(seqlen), within)
    return merged(phases.values())


def merged(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Without phases that only go on with the shape and window before them."""
    kept: list[Phase] = []
    for phase in phases:
        if not kept or (phase.shape, phase.window) != (kept[-1].shape, kept[-1].window):
            kept.append(phase)
    return tuple(kept)


def batch_warmup(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
    """The control arm of `phases`: the same tokens a step, all at the longest length; the number of rows grows.

    Rows are whole, so their number is rounded such that after every step the tokens served so far are those of
    `phases` to the nearest row: they differ by half a row at most. Where a step of `phases` has less than half a row
    a batch still has one, and later ones stay small until that is made up for. Raises ConfigError where `phases` do
    not end at their longest length.
    """
    full = max(phase.seqlen for phase in phases)
    if phases[-1].seqlen != full:
        raise ConfigError(
            "a batch warmup matches schedules that end at their longest length",
            found=f"{phases[-1].seqlen} at the end, {full} before",
        )
    asked = rows = 0  # tokens of `phases` and rows of the result, up to the step
    result: list[Phase] = []
    ends = [following.first_step for _, following in pairwise(phases)]
    for phase, end in zip(phases, [*ends, None], strict=True):
        step, size = phase.first_step, phase.batch_tokens
        while end is None or step < end:
            batch = max((2 * (asked + size) + full) // (2 * full) - rows, 1)
            result.append(Phase(step, full, batch))
            same = batch * full == size  # then every later batch of this phase is like this one
            if same and end is None:
                break
            steps = end - step if same and end is not None else 1
            asked, rows, step = asked + steps * size, rows + steps * batch, step + steps
    return merged(result)
