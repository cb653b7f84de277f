"""A watch over a run: says when a figure leaves its band, since which step, and from which documents that step was.

The band of a figure is made of its last `RECENT` values x, in logarithms, since what is watched is positive and moves
by factors: out is what lies above

    median * exp(max(SPREADS * 1.4826 * median |log x - log median|, log floor))

The median and the median deviation do not care for a few wild values (1.4826 makes the latter a standard deviation
where values are normal; Rousseeuw and Croux 1993). Every value goes in, wild ones too: a level that stays becomes the
new band after half of `RECENT` steps, and a figure that leaves its band once is told once, until it has been back
inside for `REST` steps.

Lengths have bands of their own, for a change of length changes every figure. A length that is new takes over the band
of the step before where that was shorter, but at least half as long: so a ramp is watched from its beginning. Else it
starts without, and nothing is said before it has `LEAST` values.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.origin import origin
from pipeline.packing import Packed
from pipeline.reader import Store
from pipeline.shell import pasted

RECENT = 64
LEAST = 20
REST = 32
SPREADS = 8.0
FLOORS = {"variance_max": 2.0, "loss_ratio": 1.3}
"""What is watched, and the least factor above its median that is out of its band."""
LENGTHS = 16
"""Most lengths whose bands are kept: those used last."""
SHOWN = 5
"""Documents of a step that an alarm names: those of its longest pieces."""
NAMED = 2
"""How many of those the sentence names."""


@dataclass(frozen=True)
class Alarm:
    """A figure has left its band."""

    figure: str
    value: float
    limit: float
    median: float


@dataclass
class Watch:
    """Bands and excursions; state of a run, kept in checkpoints."""

    bands: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """seqlen, used last at the end -> figure -> logarithms of its last values."""
    seqlen: int | None = None
    """The length at the step before."""
    out: dict[str, int] = field(default_factory=dict)
    """Figure -> steps for which it has been back inside; it is still told of."""

    def update(self, seqlen: int, figures: Mapping[str, float]) -> list[Alarm]:
        """Take the figures of one step; the excursions that begin with it."""
        band = self._band(seqlen)
        alarms = []
        for name, floor in FLOORS.items():
            value, recent = figures[name], band[name]
            median, limit = _limit(recent, floor)
            if len(recent) >= LEAST and not value <= limit:
                if name not in self.out:
                    alarms.append(Alarm(name, value, limit, median))
                self.out[name] = 0
            elif name in self.out:
                self.out[name] += 1
                if self.out[name] == REST:
                    del self.out[name]
            if 0 < value < math.inf:
                recent.append(math.log(value))
                del recent[:-RECENT]
        return alarms

    def _band(self, seqlen: int) -> dict[str, list[float]]:
        """The band of this step's length, put at the end."""
        band = self.bands.pop(seqlen, None)
        if band is None:
            last = self.seqlen
            before = self.bands[last] if last is not None and last < seqlen <= 2 * last else {}
            band = {name: list(before.get(name, ())) for name in FLOORS}
        self.bands[seqlen] = band
        for old in list(self.bands)[:-LENGTHS]:
            del self.bands[old]
        self.seqlen = seqlen
        return band

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact."""
        return {"bands": list(self.bands.items()), "seqlen": self.seqlen, "out": self.out}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Watch:
        """What `state_dict` gave."""
        return cls({int(seqlen): band for seqlen, band in state["bands"]}, state["seqlen"], state["out"])


def _limit(recent: list[float], floor: float) -> tuple[float, float]:
    """Median of the values whose logarithms are `recent`, and what lies above the band."""
    if not recent:
        return math.nan, math.nan
    median = statistics.median(recent)
    spread = 1.4826 * statistics.median(abs(value - median) for value in recent)
    return math.exp(median), math.exp(median + max(SPREADS * spread, math.log(floor)))


def told(alarm: Alarm, run: str, step: int, tensor: str, pieces: Packed, store: Store) -> dict[str, Any]:
    """An alarm as plain JSON values: with the tensor of the largest variance, and the documents of the step.

    `step` counts updates, as metrics.jsonl does; `pieces` are those of its batch, on all ranks.
    """
    longest = np.argsort(-pieces.length, kind="stable")[:SHOWN]
    documents = []
    for index in longest.tolist():
        known = origin(store, int(pieces.document[index]))
        piece = {"start": int(pieces.start[index]), "length": int(pieces.length[index])}
        documents.append({"document": known.document, **piece, "from": str(known)})
    return {
        "figure": alarm.figure,
        "value": alarm.value,
        "limit": alarm.limit,
        "median": alarm.median,
        "since_step": step,
        "tensor": tensor,
        "pieces": len(pieces.length),
        "documents": documents,
        "trace": f"slw-train trace {pasted(run)} --step {step - 1}",
    }


def sentence(told: dict[str, Any]) -> str:
    """The same for a person."""
    shown = told["documents"][:NAMED]
    named = "; ".join(f"{d['document']:,} ({d['from']})" for d in shown)
    left = told["pieces"] - len(shown)
    what = {"variance_max": "largest Adam variance", "loss_ratio": "loss ratio"}[told["figure"]]
    return (
        f"watch: {what} {told['value']:.3g} since step {told['since_step']:,}, above {told['limit']:.3g} "
        f"(median {told['median']:.3g}); largest variance in {told['tensor']}; "
        f"documents {named}{f' and {left:,} more pieces' if left else ''}; all: {told['trace']}"
    )
