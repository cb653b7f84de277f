"""A whole run's batches as numbers: step -> (seqlen, sequences), and where it ends.

Steps count from 0. The run ends with the first step at which `total_tokens` have been served, as in the paper; the
batch at a step is `sequences(step)` rows of `seqlen(step)` tokens, either a constant number of sequences (SLW) or
as many as fit a constant number of tokens (SkyLadder, Dataset Decomposition).
"""

from __future__ import annotations

import bisect
import dataclasses
import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from curriculum.pacing import PACINGS, Pacing
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """Consecutive steps with batches of one shape."""

    first_step: int
    seqlen: int
    sequences: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of each of its batches."""
        return self.seqlen * self.sequences


@dataclass(frozen=True)
class Schedule:
    """Immutable; made by `linear`, `root`, `constant`, `staged` or `from_settings`.

    One of `total_tokens` and `epochs` is set. A schedule in epochs knows its end only after `resolve`.
    """

    phases: tuple[Phase, ...]
    total_tokens: int | None = None
    epochs: int | None = None
    max_epochs: int = 1
    """How often the data may be repeated to reach `total_tokens`."""
    planner: str = "dealing"
    """What makes batches of it: a name of `curriculum.planner.PLANNERS`."""

    @classmethod
    def linear(
        cls, *, seqlen_start: int, seqlen_end: int, duration_steps: int, seqlen_multiple: int = 8, **run: Any
    ) -> Schedule:
        """Sequence Length Warmup. `run`: see `from_pacing`."""
        pacing = PACINGS["linear"](
            seqlen_start=seqlen_start,
            seqlen_end=seqlen_end,
            duration_steps=duration_steps,
            seqlen_multiple=seqlen_multiple,
        )
        return cls.from_pacing(pacing, **run)

    @classmethod
    def root(
        cls,
        *,
        seqlen_start: int,
        seqlen_end: int,
        duration_steps: int,
        seqlen_multiple: int = 8,
        degree: int = 2,
        **run: Any,
    ) -> Schedule:
        """Growth as progress**(1/degree). `run`: see `from_pacing`."""
        pacing = PACINGS["root"](
            seqlen_start=seqlen_start,
            seqlen_end=seqlen_end,
            duration_steps=duration_steps,
            seqlen_multiple=seqlen_multiple,
            degree=degree,
        )
        return cls.from_pacing(pacing, **run)

    @classmethod
    def constant(cls, *, seqlen: int, **run: Any) -> Schedule:
        """One length throughout: the baseline. `run`: see `from_pacing`."""
        return cls.from_pacing(PACINGS["constant"](seqlen=seqlen), **run)

    @classmethod
    def staged(cls, *, seqlens: list[int], boundaries: list[int], **run: Any) -> Schedule:
        """Lengths that change at given steps. `run`: see `from_pacing`."""
        return cls.from_pacing(PACINGS["staged"](seqlens=seqlens, boundaries=boundaries), **run)

    @classmethod
    def from_pacing(
        cls,
        pacing: Pacing,
        *,
        global_batch_sequences: int | None = None,
        global_batch_tokens: int | None = None,
        total_tokens: int | None = None,
        epochs: int | None = None,
        max_epochs: int = 1,
    ) -> Schedule:
        """Add the batch size and the end of the run to a pacing.

        Exactly one of `global_batch_sequences` and `global_batch_tokens` (over all ranks), and exactly one of
        `total_tokens` and `epochs`; else ConfigError.
        """
        _exactly_one(global_batch_sequences=global_batch_sequences, global_batch_tokens=global_batch_tokens)
        _exactly_one(total_tokens=total_tokens, epochs=epochs)
        if max_epochs < 1:
            raise ConfigError("max_epochs must be positive", found=max_epochs, allowed="1 or more")
        longest = max(seqlen for _, seqlen in pacing)
        if global_batch_tokens is not None and global_batch_tokens < longest:
            raise ConfigError(
                "global_batch_tokens is less than one sequence",
                found=global_batch_tokens,
                allowed=f"{longest} (the longest sequence) or more",
            )
        phases = tuple(
            Phase(step, seqlen, global_batch_sequences or (global_batch_tokens or 0) // seqlen)
            for step, seqlen in pacing
        )
        return cls(phases, total_tokens, epochs, max_epochs)

    @classmethod
    def from_settings(
        cls,
        curriculum: dict[str, Any],
        batch: dict[str, Any],
        *,
        total_tokens: int | None = None,
        epochs: int | None = None,
        max_epochs: int = 1,
    ) -> Schedule:
        """From the tables [curriculum] and [batch] of a run's TOML; raises ConfigError for what does not fit."""
        settings = dict(curriculum)
        name = settings.pop("pacing", "constant")
        if name not in PACINGS:
            raise ConfigError("unknown pacing", found=name, allowed=", ".join(PACINGS))
        parameters = inspect.signature(PACINGS[name]).parameters
        missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
        surplus = [key for key in settings if key not in parameters]
        if missing or surplus:
            raise ConfigError(
                f"[curriculum] does not fit pacing {name!r}",
                found=", ".join([f"{key} missing" for key in missing] + [f"{key} not used" for key in surplus]),
                allowed=", ".join(parameters),
            )
        return cls.from_pacing(
            PACINGS[name](**settings), **batch, total_tokens=total_tokens, epochs=epochs, max_epochs=max_epochs
        )

    def resolve(self, store_tokens: int) -> Schedule:
        """The same schedule with its end in tokens, for a store of `store_tokens`.

        Raises ConfigError where `total_tokens` is more than `max_epochs` passes over the store give.
        """
        if store_tokens < 1:
            raise ConfigError("the store has no tokens to serve", found=store_tokens)
        if self.epochs is not None:
            tokens = self.epochs * store_tokens
            return dataclasses.replace(self, total_tokens=tokens, epochs=None, max_epochs=self.epochs)
        assert self.total_tokens is not None
        if self.total_tokens > self.max_epochs * store_tokens:
            needed = -(-self.total_tokens // store_tokens)
            raise ConfigError(
                "the schedule is longer than the data",
                found=f"total_tokens = {self.total_tokens:,}: {self.total_tokens / store_tokens:.2f} epochs",
                allowed=f"{self.max_epochs * store_tokens:,} tokens (max_epochs = {self.max_epochs})",
                remedy=f"lower total_tokens, add data, or allow repeated data: max_epochs = {needed}",
            )
        return self

    @cached_property
    def total_steps(self) -> int:
        """Steps until `total_tokens` are served; the last one may go beyond. Raises ConfigError before `resolve`."""
        if self.total_tokens is None:
            raise ConfigError("a schedule in epochs has no end yet", remedy="schedule.resolve(store.tokens)")
        index = bisect.bisect_left(self._starts, self.total_tokens) - 1
        phase = self.phases[index]
        return phase.first_step - (-(self.total_tokens - self._starts[index]) // phase.batch_tokens)

    @cached_property
    def max_seqlen(self) -> int:
        """The longest sequence of the run: what validation uses and the model has positions for."""
        return max(phase.seqlen for phase in self.phases)

    def phase_index(self, step: int) -> int:
        """Index of the phase that `step` belongs to."""
        if step < 0:
            raise ConfigError("steps count from 0", found=step)
        return bisect.bisect_right(self.phases, step, key=lambda phase: phase.first_step) - 1

    def seqlen(self, step: int) -> int:
        """Sequence length of the batch at `step`."""
        return self.phases[self.phase_index(step)].seqlen

    def sequences(self, step: int) -> int:
        """Sequences of the batch at `step`, over all ranks."""
        return self.phases[self.phase_index(step)].sequences

    def tokens_before(self, step: int) -> int:
        """Tokens in all batches before `step`."""
        index = self.phase_index(step)
        phase = self.phases[index]
        return self._starts[index] + (step - phase.first_step) * phase.batch_tokens

    def end_of_phase(self, step: int) -> int:
        """The first step after `step` whose batches have another shape, or `total_steps`."""
        index = self.phase_index(step) + 1
        end = self.phases[index].first_step if index < len(self.phases) else self.total_steps
        return min(end, self.total_steps)

    def changed_at(self, step: int, new: Schedule) -> Schedule:
        """This schedule before `step`, `new` from then on (by its own count of steps, from 0 of the run)."""
        kept = [phase for phase in self.phases if phase.first_step < step]
        current = dataclasses.replace(new.phases[new.phase_index(step)], first_step=step)
        later = [phase for phase in new.phases if phase.first_step > step]
        return dataclasses.replace(new, phases=(*kept, current, *later))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; equal for equal schedules."""
        return {**dataclasses.asdict(self), "phases": [list(dataclasses.astuple(phase)) for phase in self.phases]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Schedule:
        """Inverse of `to_json`."""
        return cls(**{**data, "phases": tuple(Phase(*phase) for phase in data["phases"])})

    @cached_property
    def _starts(self) -> list[int]:
        """Tokens served before each phase."""
        starts = [0]
        for phase, following in pairwise(self.phases):
            starts.append(starts[-1] + (following.first_step - phase.first_step) * phase.batch_tokens)
        return starts


def _exactly_one(**values: int | None) -> None:
    names = " and ".join(values)
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(f"give exactly one of {names}", found=", ".join(given) or "none of them")
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} must be positive", found=value, allowed="1 or more")
