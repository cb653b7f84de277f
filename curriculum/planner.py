"""Who makes the batches of a schedule. Planning reads no token and knows no rank.

A planner is a pure function: (order, first step) -> (step, global batch), quick from whichever step on. So a loader
that resumes, a plan and a trace ask for the steps they want and hold no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from curriculum.dealing import dealing
from curriculum.order import Order
from pipeline.packing import Packed


@dataclass(frozen=True)
class Planner:
    """A way to make batches."""

    steps: Callable[[Order, int], Iterator[tuple[int, Packed]]]
    """(step, global batch) from a step on; `sequences(step)` sequences of `seqlen(step)` tokens each, but in the last
    batch of the data, which may hold less."""
    lost: Callable[[Order], int] = lambda order: 0
    """Tokens passed over for good in the whole run: none, but where a planner truncates."""


PLANNERS: dict[str, Planner] = {"dealing": Planner(dealing)}
"""By name, as in `Schedule.planner`."""


def plan_steps(order: Order, first: int = 0) -> Iterator[tuple[int, Packed]]:
    """(step, its global batch) from step `first` to the end of the order's schedule."""
    return PLANNERS[order.schedule.planner].steps(order, first)
