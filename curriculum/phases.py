"""A run's steps in phases of one shape, as columns: a schedule may have millions of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, overload

import numpy as np

from pipeline.errors import ConfigError

FIRST_STEP, SEQLEN, SEQUENCES, ATTENTION_WINDOW = range(4)
"""Rows of `Phases.columns`."""
MOST_TOKENS = 1 << 62
"""Largest count of steps and tokens, which are int64."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with batches of one shape."""

    first_step: int
    seqlen: int
    sequences: int
    attention_window: int | None = None
    """Attention stays within blocks of so many positions of a row (SkyLadder); None: no such blocks."""

    def __str__(self) -> str:
        window = f", attention windows of {self.attention_window}" if self.attention_window else ""
        return f"{self.sequences} sequences of {self.seqlen} from step {self.first_step:,} on{window}"

    @property
    def reach(self) -> int:
        """Positions that attention reaches at most."""
        return self.attention_window or self.seqlen

    @property
    def batch_tokens(self) -> int:
        """Tokens of each of its batches."""
        return self.seqlen * self.sequences


class Phases(Sequence[Phase]):
    """Immutable; phases in the order of their first steps, the first at step 0, the last without end."""

    def __init__(self, columns: np.ndarray) -> None:
        self.columns = columns
        """int64 [4, phases]: first step, seqlen, sequences, attention window (0: none) of each."""
        columns.flags.writeable = False

    @classmethod
    def of(cls, rows: Iterable[tuple[int, int, int, int]]) -> Phases:
        """From rows (first step, seqlen, sequences, attention window or 0) in order.

        Of equal first steps the last holds. Rows with the shape and window of the row before are dropped.
        """
        try:
            columns = np.fromiter(chain.from_iterable(rows), dtype=np.int64).reshape(-1, 4).T
        except OverflowError:
            raise ConfigError(_TOO_LONG, allowed=f"{MOST_TOKENS:,} at most") from None
        last = np.append(columns[FIRST_STEP, :-1] != columns[FIRST_STEP, 1:], True)[: columns.shape[1]]
        return cls(columns[:, last]).merged()

    def merged(self) -> Phases:
        """Without phases that have the shape and window of the phase before."""
        return Phases(np.ascontiguousarray(self.columns[:, _changes(self.columns[SEQLEN:])]))

    @overload
    def __getitem__(self, index: int) -> Phase: ...
    @overload
    def __getitem__(self, index: slice) -> Phases: ...
    def __getitem__(self, index: int | slice) -> Phase | Phases:
        if isinstance(index, slice):
            return Phases(self.columns[:, index])
        first_step, seqlen, sequences, window = self.columns[:, index].tolist()
        return Phase(first_step, seqlen, sequences, window or None)

    def __iter__(self) -> Iterator[Phase]:
        return (Phase(step, seqlen, rows, window or None) for step, seqlen, rows, window in self.columns.T.tolist())

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Phases) and np.array_equal(self.columns, other.columns))

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Phases({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the columns, each in the smallest integer type that holds it: fewer bytes to digest."""
        digest = hashlib.sha256()
        for column in (np.diff(self.columns[FIRST_STEP], prepend=0), *self.columns[SEQLEN:]):
            kind = np.min_scalar_type(int(column.max(initial=0))).newbyteorder("<")
            digest.update(kind.str.encode() + column.astype(kind).tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Stands for phases that are too many to list; plain JSON."""
        seqlens = self.columns[SEQLEN]
        return {"count": len(self), "seqlens": [int(seqlens.min()), int(seqlens.max())], "digest": self.digest}

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [phases]: tokens served before each. Raises ConfigError where they cannot be counted."""
        longest, most, last = (int(self.columns[row].max(initial=0)) for row in (SEQLEN, SEQUENCES, FIRST_STEP))
        if longest * most * max(last, 1) > MOST_TOKENS:
            raise ConfigError(_TOO_LONG, allowed=f"{MOST_TOKENS:,} tokens before the last length")
        tokens = np.diff(self.columns[FIRST_STEP], prepend=0)
        tokens[1:] *= self.columns[SEQLEN, :-1]
        tokens[1:] *= self.columns[SEQUENCES, :-1]
        return np.cumsum(tokens, out=tokens)

    def number(self, step: int) -> int:
        """Index of the phase that `step` belongs to."""
        if step < 0:
            raise ConfigError("steps count from 0", found=step)
        return int(self.columns[FIRST_STEP].searchsorted(step, side="right")) - 1

    def tokens_before(self, step: int) -> int:
        """Tokens in all batches before `step`."""
        index = self.number(step)
        first_step, seqlen, sequences, _ = self.columns[:, index].tolist()
        return int(self.starts[index]) + int((step - first_step) * seqlen * sequences)

    def next_shape(self, step: int) -> int | None:
        """The first step after `step` whose batches have another seqlen or sequences; None: there is none."""
        index = self.number(step)
        if index + 1 == len(self):
            return None
        if (self.columns[SEQLEN:ATTENTION_WINDOW, index] != self.columns[SEQLEN:ATTENTION_WINDOW, index + 1]).any():
            return int(self.columns[FIRST_STEP, index + 1])
        steps = self._shape_steps  # attention windows alone change: there may be many such phases
        number = int(steps.searchsorted(step, side="right"))
        return int(steps[number]) if number < len(steps) else None

    def shapes(self, step: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first steps [n + 1], seqlens [n], sequences [n]), int64, of the shapes from `step` on that end by `end`.

        The first is what is left of the one at `step`; the last of the first steps is where they end.
        """
        index = self.number(step)
        phases = self.columns[:, index : self.number(end) + 1]
        new = _changes(phases[SEQLEN:ATTENTION_WINDOW])
        first, seqlen, sequences, _ = phases
        first = np.append(step, first[1:])[new]
        return first, seqlen[new][:-1], sequences[new][:-1]

    def changed_at(self, step: int, new: Phases) -> Phases:
        """These phases before `step`, `new` ones from then on, by their own count of steps."""
        kept = int(self.columns[FIRST_STEP].searchsorted(step))
        columns = np.concatenate([self.columns[:, :kept], new.columns[:, new.number(step) :]], axis=1)
        columns[FIRST_STEP, kept] = step
        return Phases(columns).merged()

    def at_length(self, seqlen: int) -> Phases:
        """As many sequences at each step, all of `seqlen` tokens."""
        columns = self.columns.copy()
        columns[SEQLEN] = seqlen
        return Phases(columns).merged()

    @cached_property
    def _shape_steps(self) -> np.ndarray:
        """int64: steps whose batches have another shape than those of the step before, and 0."""
        steps: np.ndarray = self.columns[FIRST_STEP, _changes(self.columns[SEQLEN:ATTENTION_WINDOW])]
        return steps


_TOO_LONG = "a schedule reaches beyond what can be counted"


def _changes(columns: np.ndarray) -> np.ndarray:
    """bool [phases]: where a column of `columns` differs from the one before; the first does."""
    changes = np.ones(columns.shape[1], dtype=bool)
    changes[1:] = (columns[:, 1:] != columns[:, :-1]).any(axis=0)
    return changes
