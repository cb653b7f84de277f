"""Who makes the batches of a schedule. Planning reads no token and knows no rank.

A planner is a pure function: (order, first step) -> (step, global batch), quick from whichever step on. So a loader
that resumes, a plan and a trace ask for the steps they want and hold no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from curriculum.buckets import Pieces, bucket_batches
from curriculum.dealing import dealing
from curriculum.order import Order
from curriculum.truncate import lost_by_truncation, truncated
from curriculum.window import Expect, expect_nothing
from pipeline.packing import Packed


@dataclass(frozen=True)
class Planner:
    """A way to make batches."""

    steps: Callable[[Order, int, Expect], Iterator[tuple[int, Packed]]]
    """(step, global batch) from a step on; `sequences(step)` sequences of `seqlen(step)` tokens each, but in the last
    batch of the data, which may hold less."""
    lost: Callable[[Order], int] = lambda order: 0
    """Tokens passed over for good in the whole run: none, but where a planner truncates."""


def bucketed(order: Order, first: int, expect: Expect) -> Iterator[tuple[int, Packed]]:
    """Batches of one bucket of Dataset Decomposition each: see `curriculum.buckets`."""
    return bucket_batches(_pieces(order), order.schedule.phases, first, order.schedule.total_steps)


def lost_by_buckets(order: Order) -> int:
    """What `max_epochs` passes over the documents hold beyond the full batches of their buckets."""
    pieces = _pieces(order)
    return pieces.epochs * int(pieces.lengths.sum()) - sum(pieces.full) * pieces.buckets.batch_tokens


PLANNERS: dict[str, Planner] = {
    "dealing": Planner(dealing),
    "truncate": Planner(truncated, lost_by_truncation),
    "buckets": Planner(bucketed, lost_by_buckets),
}
"""Name, as in `Schedule.planner` -> planner."""


def plan_steps(order: Order, first: int = 0, expect: Expect = expect_nothing) -> Iterator[tuple[int, Packed]]:
    """(step, its global batch) from step `first` to the end of the order's schedule.

    `expect` is told which shards are dealt after those of the batches that come, where they are not dealt together.
    """
    return PLANNERS[order.schedule.planner].steps(order, first, expect)


def _pieces(order: Order) -> Pieces:
    lengths = np.concatenate(list(order.corpus.shard_lengths(range(len(order.corpus.shards)))))
    buckets = order.schedule.decomposition
    assert buckets is not None, "a schedule of buckets is never changed"
    return Pieces(buckets, lengths, order.seed, order.schedule.max_epochs)
