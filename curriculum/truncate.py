"""Rows cut out of full-length ones, tails dropped: how the SLW paper and DeepSpeed did it (arXiv 2108.06084, 3.1).

    dealt     aaaaaaab bbcccccc        rows of the longest length, whatever the schedule asks for
    served    aaaa     bbcc            their first `seqlen` tokens
    lost          aaab     cccc        read and thrown away

An arm to compare with: it alone loses tokens on purpose, and counts them. (The paper cut rows out of concatenated
documents; these are dealt as all of ours are, so that the arms differ in nothing else.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from curriculum.dealing import dealing
from curriculum.order import Order
from curriculum.schedule import Schedule
from curriculum.window import Expect
from pipeline.packing import Packed


def truncated(order: Order, first: int, expect: Expect) -> Iterator[tuple[int, Packed]]:
    """A planner's `steps`: full-length rows, each cut to the length that the schedule asks for."""
    for step, rows in dealing(_uncut(order), first, expect):
        yield step, cut_rows(rows, order.schedule.seqlen(step))


def lost_by_truncation(order: Order) -> int:
    """Tokens of the tails that are cut off."""
    steps = order.schedule.total_steps
    return _uncut(order).schedule.tokens_before(steps) - order.schedule.tokens_before(steps)


def cut_rows(rows: Packed, seqlen: int) -> Packed:
    """The first `seqlen` tokens of each row."""
    ends = np.cumsum(rows.length)
    before = ends - rows.length  # tokens before each piece, over all rows ...
    row_begins = np.append(0, ends)[rows.offsets[:-1]]
    column = before - np.repeat(row_begins, np.diff(rows.offsets))  # ... and in its row
    length = np.clip(seqlen - column, 0, rows.length)
    kept = length > 0
    offsets = np.append(0, np.cumsum(kept))[rows.offsets]
    return Packed(rows.document[kept], rows.start[kept], length[kept], offsets)


def _uncut(order: Order) -> Order:
    """The same steps with rows as long as truncation cuts them out of."""
    history: list[tuple[int, Schedule]] = []
    for (first, asked), (_, cut) in zip(order.asked, order.history, strict=True):
        whole = history[-1][1].changed_at(first, asked.uncut) if history else asked.uncut
        history.append((first, replace(whole, total_tokens=whole.tokens_before(cut.total_steps))))
    return replace(order, asked=tuple(history), history=tuple(history))
