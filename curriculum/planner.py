"""Schedules into global batches of pieces: what is served at which step. Pure: reads no token, knows no rank.

A planner holds what has been served; `Schedule.planner` names the one a schedule needs. The loader replays one
to find where it left off, so its batches depend on (lengths, seed, schedules so far) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from curriculum.dealer import DEAL_SEQUENCES, Dealer
from curriculum.schedule import Schedule
from pipeline.packing import Packed


class Planner(Protocol):
    """Plans the batches of one run; made from the lengths of documents (int64 [documents]) and a seed."""

    lost: int
    """Tokens passed over for good so far: none, but where a planner truncates."""

    def steps(self, schedule: Schedule, first: int, end: int) -> Iterator[tuple[int, Packed]]:
        """(step, its global batch) for steps `first` to `end` - 1 of `schedule`, going on where the last call ended.

        A batch holds `schedule.sequences(step)` full sequences of `schedule.seqlen(step)` tokens; only the last one
        of the data may hold less. After exhausting one call another may follow with another schedule.
        """


class Dealing:
    """Every token once an epoch: `Dealer`, in deals as large as the schedule and the epoch allow."""

    lost = 0

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        self.dealer = Dealer(lengths, seed=seed)

    def steps(self, schedule: Schedule, first: int, end: int) -> Iterator[tuple[int, Packed]]:
        """See `Planner`. What was dealt for steps from `end` on goes back to the dealer."""
        step, dealer = first, self.dealer
        dealer.epochs = schedule.max_epochs
        while step < end:
            seqlen, sequences = schedule.seqlen(step), schedule.sequences(step)
            most = min(DEAL_SEQUENCES // sequences, dealer.tokens // (seqlen * sequences))
            batches = min(max(most, 1), schedule.end_of_phase(step) - step)
            dealt = dealer.deal(seqlen, batches * sequences)
            for batch in range(batches):
                if step == end:
                    dealer.take_back(dealt, batch * sequences)
                    return
                yield step, sequences_of(dealt, batch * sequences, (batch + 1) * sequences)
                step += 1


PLANNERS: dict[str, Callable[[np.ndarray, int], Planner]] = {"dealing": Dealing}
"""By name, as in `Schedule.planner`."""


def sequences_of(packed: Packed, first: int, last: int) -> Packed:
    """Sequences `first` to `last` - 1 of `packed`, or those of them that there are."""
    offsets = packed.offsets[min(first, packed.sequences) : min(last, packed.sequences) + 1]
    pieces = slice(int(offsets[0]), int(offsets[-1]))
    return Packed(packed.document[pieces], packed.start[pieces], packed.length[pieces], offsets - offsets[0])
