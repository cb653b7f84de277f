"""Pacings and batch sizes into phases. Pure functions of numbers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import itemgetter

from curriculum.pacing import Pacing
from curriculum.phases import SEQLEN, Phases
from pipeline.errors import ConfigError


def lay_out(pacing: Pacing, sequences: Callable[[int], int]) -> Phases:
    """The phases of `pacing` with `sequences(seqlen)` rows a batch.

    In tokens, a length or attention window begins with the first step before which so many tokens have been served.
    """

    def rows() -> Iterator[tuple[int, int, int, int]]:
        lengths = ((at, seqlen, None) for at, seqlen in pacing.points)
        windows = ((at, None, window) for at, window in pacing.attention_windows)
        step = seen = seqlen = size = batch = window = 0
        for at, new_seqlen, new_window in heapq.merge(lengths, windows, key=itemgetter(0)):
            if at > seen:
                steps = -(-(at - seen) // size)
                step, seen = step + steps, seen + steps * size
            if new_seqlen:
                seqlen, batch = new_seqlen, sequences(new_seqlen)
                size = seqlen * batch if pacing.unit == "tokens" else 1
            window = new_window or window
            yield step, seqlen, batch, window if window < seqlen else 0

    return Phases.of(rows())


def batch_warmup(phases: Phases) -> Phases:
    """The control arm of `phases`: the same tokens a step, all at the longest length; the number of rows grows.

    Rows are whole, so their number is rounded such that after every step the tokens served so far are those of
    `phases` to the nearest row: they differ by half a row at most. Where a step of `phases` has less than half a row
    a batch still has one, and later ones stay small until that is made up for. Raises ConfigError where `phases` do
    not end at their longest length.
    """
    full = int(phases.columns[SEQLEN].max())
    if phases[-1].seqlen != full:
        raise ConfigError(
            "a batch warmup matches schedules that end at their longest length",
            found=f"{phases[-1].seqlen} at the end, {full} before",
        )
    asked = rows = 0  # tokens of `phases` and rows of the result, up to the step
    result: list[tuple[int, int, int, int]] = []
    ends = [following.first_step for _, following in pairwise(phases)]
    for phase, end in zip(phases, [*ends, None], strict=True):
        step, size = phase.first_step, phase.batch_tokens
        while end is None or step < end:
            batch = max((2 * (asked + size) + full) // (2 * full) - rows, 1)
            result.append((step, full, batch, 0))
            same = batch * full == size  # then every later batch of this phase is like this one
            if same and end is None:
                break
            steps = end - step if same and end is not None else 1
            asked, rows, step = asked + steps * size, rows + steps * batch, step + steps
    return Phases.of(result)
