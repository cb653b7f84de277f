"""A whole run before it starts: its phases as a table, and a rehearsal of the dealing over the real lengths.

The rehearsal reads no token and no text; it plans hundreds of millions of tokens a second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from curriculum.planner import PLANNERS
from curriculum.schedule import Schedule
from pipeline.packing import least_cuts
from pipeline.reader import Store

MOST_ROWS = 16


@dataclass(frozen=True)
class PlanRow:
    """Consecutive steps; of neighbouring phases where a ramp has too many to list."""

    first_step: int
    last_step: int
    seqlen_first: int
    seqlen_last: int
    sequences: int
    tokens: int
    """Tokens of all its batches."""
    tokens_before: int


@dataclass(frozen=True)
class Plan:
    """What `slw-train plan` shows."""

    rows: list[PlanRow]
    total_steps: int
    total_tokens: int
    store_tokens: int
    documents: int
    lengths_in_use: int
    """Distinct sequence lengths: what a compiler has to be told."""
    thrown_away_by_truncation: float
    """Share of the tokens read that cutting full-length samples down would lose on this schedule."""
    ledger: Ledger | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Ledger:
    """What a run serves, counted piece by piece."""

    targets: int
    """Tokens that are a target."""
    padding: int
    """Positions of batches that are none: only the last batch of the data has any."""
    served_least: int
    served_most: int
    """How often a document is served, rounded down for the least and up for the most; equal after whole epochs."""
    pieces: int
    cuts: int
    """Pieces beyond one for each document and epoch."""
    least_cuts: int
    """The least possible with every sequence of the longest length; a ramp of short ones needs more."""


def plan(schedule: Schedule, store: Store) -> Plan:
    """The table of a run of `schedule` over `store`. Raises ConfigError where the data do not suffice."""
    schedule = schedule.resolve(store.tokens)
    steps = schedule.total_steps
    phases = [phase for phase in schedule.phases if phase.first_step < steps]
    bounds = [phase.first_step for phase in phases] + [steps]
    group = max(1, -(-(len(phases) - 2) // MOST_ROWS)) if len(phases) > MOST_ROWS else 1
    # The first and the last phase stand alone; the ramp between them is folded.
    starts = sorted({0, *range(1, len(phases) - 1, group), len(phases) - 1})
    rows = []
    for first, following in zip(starts, [*starts[1:], len(phases)], strict=True):
        begin, end = bounds[first], bounds[following]
        rows.append(
            PlanRow(
                first_step=begin,
                last_step=end - 1,
                seqlen_first=phases[first].seqlen,
                seqlen_last=phases[following - 1].seqlen,
                sequences=phases[first].sequences,
                tokens=schedule.tokens_before(end) - schedule.tokens_before(begin),
                tokens_before=schedule.tokens_before(begin),
            )
        )
    read = sum((end - phase.first_step) * phase.sequences for phase, end in zip(phases, bounds[1:], strict=True))
    return Plan(
        rows=rows,
        total_steps=steps,
        total_tokens=schedule.tokens_before(steps),
        store_tokens=store.tokens,
        documents=store.documents,
        lengths_in_use=len({phase.seqlen for phase in phases}),
        thrown_away_by_truncation=1 - schedule.tokens_before(steps) / (read * schedule.max_seqlen),
    )


def rehearse(schedule: Schedule, store: Store, seed: int) -> Ledger:
    """Deal the whole run, as the loader will, and count what it serves."""
    schedule = schedule.resolve(store.tokens)
    planner = PLANNERS[schedule.planner](store.lengths, seed)
    served = np.zeros(store.documents, dtype=np.int64)
    pieces = 0
    for _, packed in planner.steps(schedule, 0, schedule.total_steps):
        served += np.bincount(packed.document, packed.length, store.documents).astype(np.int64)
        pieces += len(packed.document)
    targets = int(served.sum())
    epochs = max(-(-targets // store.tokens), 1)
    return Ledger(
        targets=targets,
        padding=schedule.tokens_before(schedule.total_steps) - targets,
        served_least=int((served // store.lengths).min()),
        served_most=int((-(-served // store.lengths)).max()),
        pieces=pieces,
        cuts=pieces - int(np.count_nonzero(served)) * epochs,
        least_cuts=least_cuts(store.lengths, schedule.max_seqlen) * epochs,
    )


def render(table: Plan) -> str:
    """The plan as text."""
    heads = ("steps", "seqlen", "sequences", "tokens", "tokens before")
    lines = [heads]
    for row in table.rows:
        seqlens = {row.seqlen_first, row.seqlen_last}
        seqlen = " to ".join(f"{n:,}" for n in (sorted(seqlens) if row.seqlen_first <= row.seqlen_last else seqlens))
        steps = f"{row.first_step:,} to {row.last_step:,}"
        lines.append((steps, seqlen, f"{row.sequences:,}", f"{row.tokens:,}", f"{row.tokens_before:,}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append(
        f"\n{table.total_steps:,} steps, {table.total_tokens:,} tokens: "
        f"{table.total_tokens / table.store_tokens:.2f} epochs of {table.documents:,} documents, "
        f"{table.lengths_in_use} lengths"
    )
    text.append(
        f"cutting full-length samples down would throw away {table.thrown_away_by_truncation:.1%} of what it reads"
    )
    if ledger := table.ledger:
        times = " to ".join(str(n) for n in sorted({ledger.served_least, ledger.served_most}))
        text.append(
            f"dealt: {ledger.targets:,} targets, {ledger.padding:,} padding; each document served {times} times; "
            f"{ledger.cuts:,} cuts ({ledger.least_cuts:,} the least possible at seqlen "
            f"{max(row.seqlen_last for row in table.rows):,} throughout)"
        )
    return "\n".join(text)
