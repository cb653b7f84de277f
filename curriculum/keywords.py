"""The keywords of `Schedule`'s constructors, as types: they are the settings of a run's TOML, by the same names.

Defaults are those of the functions in `pacing`, of `skyladder`, `Buckets` and `Notches`; see docs/schedules.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict


class Common(TypedDict, total=False):
    """What every schedule has: where it ends, its batches, how they are made. See `Schedule.from_settings`."""

    total_tokens: int | None
    epochs: int | None
    max_epochs: int
    global_batch_sequences: int | None
    global_batch_tokens: int | None
    control: str | None
    dealing: str
    first_piece: str
    attention_window_positions: str


class Constant(Common, total=False):
    """One length."""

    seqlen: Required[int]


class Ramp(Common, total=False):
    """From one length to another, in steps or in tokens."""

    seqlen_start: Required[int]
    seqlen_end: Required[int]
    duration_steps: int | None
    duration_tokens: int | None
    seqlen_multiple: int


class Root(Ramp, total=False):
    """A ramp along a root."""

    degree: int


class Staged(Common, total=False):
    """Lengths and where they change, in steps or in tokens."""

    seqlens: Required[Sequence[int]]
    boundaries: Sequence[int] | None
    boundaries_tokens: Sequence[int] | None


class Table(Common, total=False):
    """Rows of (step or tokens seen, seqlen)."""

    table: Required[Sequence[Sequence[int]]]
    table_unit: str


class SkyLadder(Common, total=False):
    """Whole rows and attention windows that grow."""

    seqlen: Required[int]
    attention_window_start: int
    attention_window_end: int | None
    attention_window_shape: str
    attention_window_rate: str | float | None
    attention_window_multiple: int
    duration_steps: int | None
    duration_tokens: int | None


class Decomposition(Common, total=False):
    """Buckets of powers of two."""

    seqlen_start: Required[int]
    seqlen_end: Required[int]
    odds: str | Sequence[int]
    cycles: int
    order_seed: int
    carry: bool


class Adaptive(Common, total=False):
    """Lengths that validation raises."""

    seqlen_start: Required[int]
    seqlen_end: Required[int]
    seqlen_multiple: int
    tolerance: float
    patience: int
