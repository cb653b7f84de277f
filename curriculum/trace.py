"""What was, or will be, in a batch: from a step to its documents, from a document to its steps.

The steps are planned again exactly as the loader plans them, under all the schedules of its history: no token is
read, nothing needs to have been logged. Price: planning a window for a step, the whole run for a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from curriculum.dealing import sequences_of
from curriculum.loader import CurriculumLoader
from pipeline.errors import ConfigError
from pipeline.origin import Origin, origin
from pipeline.packing import Packed
from pipeline.reader import Store


@dataclass(frozen=True)
class TracedPiece:
    """A piece and its place: `labels[row, column : column + length]` are `tokens[start : start + length]`."""

    step: int
    row: int
    """Row of the global batch."""
    column: int
    document: int
    start: int
    length: int


@dataclass(frozen=True)
class TracedStep:
    """The batch of one step, or one rank's rows of it."""

    step: int
    seqlen: int
    sequences: int
    """Over all ranks."""
    first_row: int
    last_row: int
    """The rows shown, of the global batch."""
    padding: int
    """Positions without a target in these rows: only the last batch of a run has any."""
    pieces: list[TracedPiece]


@dataclass(frozen=True)
class TracedDocument:
    """Where a document is served in a run."""

    document: Origin
    served_least: int
    """How often the token served least is a target, and the one served most."""
    served_most: int
    pieces: list[TracedPiece]


def trace_step(loader: CurriculumLoader, step: int) -> TracedStep:
    """The rows of `loader`'s rank at `step`, counted from 0. Raises ConfigError where the run has no such step."""
    total = loader.schedule.total_steps
    if not 0 <= step < total:
        raise ConfigError(
            "the run has no such step", found=step, allowed=f"0 to {total - 1}: steps count from 0, up to the last"
        )
    _, packed = next(loader.planned(step))
    seqlen, (first, last) = loader.schedule.seqlen(step), loader.own_rows(step)
    pieces = _pieces(loader, step, packed)
    return TracedStep(
        step=step,
        seqlen=seqlen,
        sequences=loader.schedule.sequences(step),
        first_row=first,
        last_row=last - 1,
        padding=(last - first) * seqlen - sum(piece.length for piece in pieces),
        pieces=pieces,
    )


def trace_document(loader: CurriculumLoader, document: int) -> TracedDocument:
    """Every piece of `document` that `loader`'s rank is served. Raises ConfigError for no such document."""
    known = origin(loader.store, document)
    served = np.zeros(known.tokens, dtype=np.int64)
    found = []
    for step, packed in loader.planned():
        if (packed.document == document).any():
            found += [piece for piece in _pieces(loader, step, packed) if piece.document == document]
    for piece in found:
        served[piece.start : piece.start + piece.length] += 1
    return TracedDocument(known, int(served.min()), int(served.max()), found)


def _pieces(loader: CurriculumLoader, step: int, packed: Packed) -> list[TracedPiece]:
    """The pieces in the rows of the loader's rank."""
    first, last = loader.own_rows(step)
    own = sequences_of(packed, first, last)
    row = np.repeat(np.arange(first, first + own.sequences), np.diff(own.offsets))
    ends = np.cumsum(own.length)
    column = ends - own.length - (row - first) * loader.schedule.seqlen(step)
    columns = (row, column, own.document, own.start, own.length)
    return [TracedPiece(step, *values) for values in zip(*(c.tolist() for c in columns), strict=True)]


def to_json(traced: TracedStep | TracedDocument, store: Store, decode: Callable[[list[int]], str] | None) -> Any:
    """Plain JSON values, with the origin of every piece, and its text where `decode` is given."""
    value = asdict(traced)
    for piece, shown in zip(traced.pieces, value["pieces"], strict=True):
        if isinstance(traced, TracedStep):
            shown["origin"] = asdict(origin(store, piece.document))
        if decode:
            shown["text"] = decode(_tokens(store, piece))
    return value


def render(
    traced: TracedStep | TracedDocument, store: Store, decode: Callable[[list[int]], str] | None
) -> Iterator[str]:
    """The same as lines of text."""
    if isinstance(traced, TracedStep):
        yield (
            f"step {traced.step:,}: {traced.sequences:,} sequences of {traced.seqlen:,} tokens; "
            f"rows {traced.first_row:,} to {traced.last_row:,}, {traced.padding:,} padding"
        )
    else:
        times = " to ".join(str(n) for n in sorted({traced.served_least, traced.served_most}))
        known = traced.document
        yield f"document {known.document:,}: {known.tokens:,} tokens, {known}; each token served {times} times here"
        if not traced.pieces:
            return
    yield f"{'step':>9}  {'row':>7}  {'column':>7}  {'document':>10}  {'first':>9}  {'last':>9}  from"
    for piece in traced.pieces:
        whence = str(origin(store, piece.document)) if isinstance(traced, TracedStep) else ""
        yield (
            f"{piece.step:>9,}  {piece.row:>7,}  {piece.column:>7,}  {piece.document:>10,}  "
            f"{piece.start:>9,}  {piece.start + piece.length - 1:>9,}  {whence}"
        ).rstrip()
        if decode:
            yield from ("    | " + line for line in decode(_tokens(store, piece)).splitlines())


def _tokens(store: Store, piece: TracedPiece) -> list[int]:
    """The labels of a piece."""
    labels = np.empty(piece.length, dtype=np.int64)
    document, start, length = np.array([[piece.document], [piece.start], [piece.length]], dtype=np.int64)
    store.gather(document, start, length, np.empty_like(labels), labels)
    return [int(token) for token in labels]
