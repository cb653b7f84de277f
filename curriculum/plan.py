"""A whole run before it starts: its phases as a table. Arithmetic on the schedule; `ledger` rehearses the dealing.

A ramp has too many lengths to list, so neighbouring phases are folded into at most `MOST_ROWS` rows. Where lengths
take turns (buckets), a row is all the steps of one length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from curriculum.ledger import Ledger
from curriculum.phases import Phase
from curriculum.resolve import resolved_for
from curriculum.schedule import Schedule
from pipeline.amount import amount
from pipeline.reader import Store

MOST_ROWS = 16


@dataclass(frozen=True)
class PlanRow:
    """Steps of one length, or of neighbouring phases of a ramp."""

    first_step: int
    last_step: int
    steps: int
    """As many as from the first to the last, but where lengths take turns."""
    seqlen_first: int
    seqlen_last: int
    sequences_first: int
    sequences_last: int
    attention_window_first: int
    """Positions that attention reaches at most: the attention window where there is one, else the seqlen."""
    attention_window_last: int
    tokens: int
    """Tokens of all its batches."""
    share: float
    """Share of the run's tokens."""
    tokens_before: int
    """Tokens served before its first step."""


@dataclass(frozen=True)
class LengthShare:
    """All the steps of one length."""

    seqlen: int
    steps: int
    tokens: int
    share: float


@dataclass(frozen=True)
class Plan:
    """What `slw-train plan` shows of the schedule."""

    rows: list[PlanRow]
    lengths: list[LengthShare]
    """Every length, shortest first."""
    total_steps: int
    total_tokens: int
    store_tokens: int
    documents: int
    epochs: float
    """Passes over the whole store."""
    take_turns: bool
    """True where rows are interleaved."""
    thrown_away_by_truncation: float | None
    """Share of the tokens read that cutting full-length samples down would lose on this schedule; None where the
    number of sequences changes, so that there is nothing to cut."""
    not_reached: str | None = None
    """What of the schedule lies behind the end of the run."""
    ledger: Ledger | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Stretch:
    """A phase up to the next one or to the end of the run."""

    phase: Phase
    end: int

    @property
    def steps(self) -> int:
        """Steps of it that the run takes."""
        return self.end - self.phase.first_step

    @property
    def tokens(self) -> int:
        """Tokens of all its batches."""
        return self.steps * self.phase.batch_tokens


def stretches(schedule: Schedule) -> list[Stretch]:
    """The phases of a resolved schedule that the run comes to, in order; they cover every step once."""
    steps = schedule.total_steps
    phases = [phase for phase in schedule.phases if phase.first_step < steps]
    ends = [phase.first_step for phase in phases[1:]] + [steps]
    return [Stretch(phase, end) for phase, end in zip(phases, ends, strict=True)]


def plan(schedule: Schedule, store: Store) -> Plan:
    """The table of a run of `schedule` over `store`. Raises ConfigError where the data do not suffice."""
    schedule = resolved_for(schedule, store)
    parts = stretches(schedule)
    total = schedule.tokens_before(schedule.total_steps)
    by_length = take_turns(parts)
    read = sum(part.steps * part.phase.sequences for part in parts) * schedule.max_seqlen
    same_batch = len({part.phase.sequences for part in parts}) == 1
    return Plan(
        rows=[_row(schedule, group, total) for group in (_by_length(parts) if by_length else _folded(parts))],
        lengths=[_share(group, total) for group in _by_length(parts)],
        total_steps=schedule.total_steps,
        total_tokens=total,
        store_tokens=store.tokens,
        documents=store.documents,
        epochs=total / store.tokens,
        take_turns=by_length,
        thrown_away_by_truncation=1 - total / read if same_batch else None,
        not_reached=not_reached(schedule),
    )


def not_reached(schedule: Schedule) -> str | None:
    """Where the run ends before its schedule does: a ramp that is too slow for the data."""
    last, steps = schedule.phases[-1], schedule.total_steps
    if last.first_step < steps or schedule.planner == "buckets":
        return None
    now = schedule.phase(steps - 1)
    found = f"seqlen {now.seqlen:,}, where the schedule would come to {last.seqlen:,} at step {last.first_step:,}"
    if now.seqlen == last.seqlen:
        found = f"attention window {now.reach:,}, where it would be {last.reach:,} at step {last.first_step:,}"
    return found


def take_turns(parts: list[Stretch]) -> bool:
    """Whether lengths go up and down so often that only a table by length can show them."""
    seqlens = [part.phase.seqlen for part in parts]
    return len(parts) > MOST_ROWS and seqlens not in (sorted(seqlens), sorted(seqlens, reverse=True))


def _folded(parts: list[Stretch]) -> list[list[Stretch]]:
    """Neighbours together, in at most MOST_ROWS groups and the first and the last phase, which stand alone."""
    group = max(1, -(-(len(parts) - 2) // MOST_ROWS)) if len(parts) > MOST_ROWS else 1
    starts = sorted({0, *range(1, len(parts) - 1, group), len(parts) - 1})
    return [parts[first:following] for first, following in pairwise([*starts, len(parts)])]


def _by_length(parts: list[Stretch]) -> list[list[Stretch]]:
    groups: dict[int, list[Stretch]] = defaultdict(list)
    for part in parts:
        groups[part.phase.seqlen].append(part)
    return [groups[seqlen] for seqlen in sorted(groups)]


def _row(schedule: Schedule, group: list[Stretch], total: int) -> PlanRow:
    first, last, tokens = group[0], group[-1], sum(part.tokens for part in group)
    return PlanRow(
        first_step=first.phase.first_step,
        last_step=last.end - 1,
        steps=sum(part.steps for part in group),
        seqlen_first=first.phase.seqlen,
        seqlen_last=last.phase.seqlen,
        sequences_first=first.phase.sequences,
        sequences_last=last.phase.sequences,
        attention_window_first=first.phase.reach,
        attention_window_last=last.phase.reach,
        tokens=tokens,
        share=tokens / total,
        tokens_before=schedule.tokens_before(first.phase.first_step),
    )


def _share(group: list[Stretch], total: int) -> LengthShare:
    tokens = sum(part.tokens for part in group)
    return LengthShare(group[0].phase.seqlen, sum(part.steps for part in group), tokens, tokens / total)


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


COLUMNS: tuple[tuple[str, Callable[[PlanRow], str]], ...] = (
    ("step", lambda row: _range(row.first_step, row.last_step)),
    ("steps", lambda row: f"{row.steps:,}"),
    ("seqlen", lambda row: _range(row.seqlen_first, row.seqlen_last)),
    ("attention window", lambda row: _range(row.attention_window_first, row.attention_window_last)),
    ("sequences", lambda row: _range(row.sequences_first, row.sequences_last)),
    ("tokens", lambda row: f"{row.tokens:,}"),
    ("share", lambda row: f"{row.share:.1%}"),
    ("tokens before", lambda row: f"{row.tokens_before:,}"),
)


def render(table: Plan) -> str:
    """The plan as text."""
    windows = any(row.attention_window_first < row.seqlen_first for row in table.rows)  # they grow
    columns = [(head, cell) for head, cell in COLUMNS if windows or head != "attention window"]
    text = [aligned([[head for head, _ in columns], *([cell(row) for _, cell in columns] for row in table.rows)])]
    if table.take_turns:
        text.append("lengths take turns: a row is all the steps of one length")
    text.append(
        f"\n{amount(table.total_steps, 'step')}, {table.total_tokens:,} tokens: {table.epochs:.2f} epochs of "
        f"{amount(table.documents, 'document')}, {amount(len(table.lengths), 'length')}"
    )
    if table.not_reached:
        text.append(f"note: the run ends at {table.not_reached}: a shorter duration fits, or more tokens")
    if table.thrown_away_by_truncation:
        share = f"{table.thrown_away_by_truncation:.1%}"
        text.append(f"cutting full-length samples down would throw away {share} of what it reads")
    if table.ledger:
        text += _ledger_lines(table, table.ledger)
    return "\n".join(text)


def _ledger_lines(table: Plan, ledger: Ledger) -> Iterable[str]:
    times = " to ".join(str(n) for n in sorted({ledger.served_least, ledger.served_most}))
    yield (
        f"dealt: {ledger.targets:,} targets, {ledger.padding:,} padding, {ledger.lost:,} lost; each document served "
        f"{times} times; {ledger.cuts:,} cuts ({ledger.least_cuts:,} the least possible at seqlen "
        f"{table.lengths[-1].seqlen:,} throughout)"
    )
    for source in ledger.sources if len(ledger.sources) > 1 else ():
        yield f"  {source.source}: {source.targets:,} targets, {source.epochs:.2f} epochs of {source.tokens:,} tokens"


def aligned(lines: list[list[str]]) -> str:
    """A table whose columns are flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
