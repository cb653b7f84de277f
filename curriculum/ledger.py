"""A rehearsal of a run: every batch is planned as the loader will, and what it serves is counted piece by piece.

Reads no token and no text. Price: planning the run, and 8 bytes a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from curriculum.loader import CurriculumLoader
from curriculum.planner import PLANNERS
from pipeline.packing import least_cuts


@dataclass(frozen=True)
class SourceLedger:
    """What a run serves of one source."""

    source: str
    """"" where sources have no names."""
    documents: int
    tokens: int
    """Tokens of one pass over it."""
    targets: int
    """Tokens served, repeats counted."""
    epochs: float
    """targets / tokens."""


@dataclass(frozen=True)
class Ledger:
    """What a run serves."""

    targets: int
    """Tokens that are a target."""
    padding: int
    """Positions of batches that are none: only the last batch of the data has any."""
    lost: int
    """Tokens passed over for good: none, but where the schedule truncates."""
    served_least: int
    served_most: int
    """How often a document is served, rounded down for the least and up for the most; equal after whole epochs."""
    pieces: int
    cuts: int
    """Pieces beyond one for each document and epoch."""
    least_cuts: int
    """The least possible for what is served, at the longest length throughout; a ramp of short ones needs more."""
    attended: int
    """Sum of squared lengths of pieces: pairs of positions that a document mask lets see each other, both ways."""
    sources: list[SourceLedger]


def rehearse(loader: CurriculumLoader) -> Ledger:
    """Plan all steps of `loader` and count."""
    store, schedule = loader.store, loader.schedule
    served = np.zeros(store.documents, dtype=np.int64)
    pieces = attended = 0
    for _, packed in loader.planned():
        np.add.at(served, packed.document, packed.length)
        pieces += len(packed.document)
        attended += int(np.dot(packed.length, packed.length))
    targets = int(served.sum())
    times = -(-served // store.lengths)  # of a document, the last one perhaps not to its end
    whole, part = np.divmod(served, store.lengths)
    longest = max(phase.seqlen for phase in schedule.phases if phase.first_step < schedule.total_steps)
    return Ledger(
        targets=targets,
        padding=schedule.tokens_before(schedule.total_steps) - targets,
        lost=PLANNERS[schedule.planner].lost(loader.order),
        served_least=int((served // store.lengths).min()),
        served_most=int(times.max()),
        pieces=pieces,
        cuts=pieces - int(times.sum()),
        least_cuts=int(np.dot(whole, (store.lengths - 1) // longest)) + least_cuts(part[part > 0], longest),
        attended=attended,
        sources=[_of_source(loader, name, served) for name in store.sources],
    )


def _of_source(loader: CurriculumLoader, name: str, served: np.ndarray) -> SourceLedger:
    numbers = loader.store.sources[name]
    part = slice(numbers.start, numbers.stop)
    tokens, targets = int(loader.store.lengths[part].sum()), int(served[part].sum())
    return SourceLedger(name, len(numbers), tokens, targets, targets / tokens)
