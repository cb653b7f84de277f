"""A whole run's batches as numbers: step -> (seqlen, sequences, attention window), and where it ends.

Steps count from 0. The run ends with the first step at which `total_tokens` have been served, as in the paper; the
batch at a step is `sequences(step)` rows of `seqlen(step)` tokens, either a constant number of sequences (SLW) or
as many as fit a constant number of tokens (SkyLadder, Dataset Decomposition).
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

from curriculum.adaptive import Notches
from curriculum.buckets import Buckets
from curriculum.keywords import Adaptive, Common, Constant, Decomposition, Ramp, Root, SkyLadder, Staged, Table
from curriculum.phases import ATTENTION_WINDOW, SEQLEN, Phase, Phases
from curriculum.settings import BATCH_KEYS, RUN_KEYS, SEQLEN_NOW, as_toml, buckets_of, build, notches_of, tables_of
from pipeline.errors import ConfigError, RunError


@dataclass(frozen=True)
class Schedule:
    """Immutable; made by `linear`, `root`, ... or from the tables of a run's TOML by `from_settings`.

    Constructors take as keywords what the TOML has. Each names its own; all take those of `keywords.Common`:
    one of `total_tokens` and `epochs`, one of `global_batch_sequences` and `global_batch_tokens`, and options.
    Keywords that are missing, unknown or do not fit raise ConfigError. Only `resolve` tells where `epochs` end.
    """

    phases: Phases
    total_tokens: int | None = None
    epochs: int | None = None
    max_epochs: int = 1
    """How often the data may be repeated to reach `total_tokens`."""
    planner: str = "dealing"
    """What makes batches of it: a name of `curriculum.planner.PLANNERS`."""
    first_piece: str = "random"
    """Where documents are first read: "random", at any piece; "beginning": from their beginning to their end."""
    attention_window_positions: str = "kept"
    """"restart": position ids count from 0 in each attention window; "kept": as without them."""
    seqlen_to_come: int | None = None
    """Where lengths follow from the data or the course of the run: the longest there may be."""
    settings: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """{"curriculum": ..., "batch": ...} as in TOML, which it was made from; None where it was changed at a step."""

    @classmethod
    def constant(cls, **keywords: Unpack[Constant]) -> Schedule:
        """`seqlen` throughout: the baseline."""
        return cls._made("constant", keywords)

    @classmethod
    def linear(cls, **keywords: Unpack[Ramp]) -> Schedule:
        """Sequence Length Warmup: `seqlen_start` grows evenly to `seqlen_end`, by multiples of `seqlen_multiple` (8).

        As all ramps, within one of `duration_steps` and `duration_tokens`; formulas are in `curriculum.pacing`.
        """
        return cls._made("linear", keywords)

    @classmethod
    def root(cls, **keywords: Unpack[Root]) -> Schedule:
        """A ramp along progress**(1 / `degree`), the square root where it is not given."""
        return cls._made("root", keywords)

    @classmethod
    def sine(cls, **keywords: Unpack[Ramp]) -> Schedule:
        """A ramp along a quarter of a sine."""
        return cls._made("sine", keywords)

    @classmethod
    def exponential(cls, **keywords: Unpack[Ramp]) -> Schedule:
        """A ramp that grows by equal factors in equal times."""
        return cls._made("exponential", keywords)

    @classmethod
    def staged(cls, **keywords: Unpack[Staged]) -> Schedule:
        """`seqlens`, the next one from each of `boundaries` (steps) or `boundaries_tokens` (tokens seen) on."""
        return cls._made("staged", keywords)

    @classmethod
    def table(cls, **keywords: Unpack[Table]) -> Schedule:
        """`table`: rows of (step, seqlen), or of (tokens seen, seqlen) with `table_unit="tokens"`."""
        return cls._made("table", keywords)

    @classmethod
    def skyladder(cls, **keywords: Unpack[SkyLadder]) -> Schedule:
        """Rows of `seqlen` whose attention windows grow from `attention_window_start` (32) to all of the row.

        How fast, and along which curve: see `curriculum.skyladder`.
        """
        return cls._made("skyladder", keywords)

    @classmethod
    def buckets(cls, **keywords: Unpack[Decomposition]) -> Schedule:
        """Dataset Decomposition: powers of two from `seqlen_start` to `seqlen_end`.

        Drawn by `odds` ("grow-p2") in `cycles` (8). No steps before `resolve`, which counts the pieces of a store.
        """
        return cls._made("buckets", keywords)

    @classmethod
    def adaptive(cls, **keywords: Unpack[Adaptive]) -> Schedule:
        """From `seqlen_start` to `seqlen_end`, a notch longer whenever validation is calm; see `curriculum.adaptive`.

        It stays at `seqlen_start` until whoever validates says `loader.change_schedule(schedule.raised_to(seqlen))`.
        """
        return cls._made("adaptive", keywords)

    @classmethod
    def from_function(cls, seqlen_at: Callable[[int], int], *, steps: int, **run: Unpack[Common]) -> Schedule:
        """`seqlen_at(step)` for steps 0 to `steps` - 1, and its last value from then on.

        It is called here and written down as a table: the schedule is data, whatever the function reads.
        """
        if steps < 1:
            raise ConfigError("a function is asked for one step at least", found=f"steps = {steps}")
        rows: list[list[int]] = []
        for step in range(steps):
            seqlen = seqlen_at(step)
            if not rows or seqlen != rows[-1][1]:
                rows.append([step, seqlen])
        return cls.table(table=rows, **run)

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
        """From the tables [curriculum] and [batch] of a run's TOML; raises ConfigError for what does not fit.

        `curriculum`: `pacing`, its parameters, `control = "batch_warmup"` for the arm with as many tokens a step at
        full length, `dealing = "truncate"` for rows cut out of full-length ones as the SLW paper did it,
        `first_piece` ("random" or "beginning": where documents are first read) and `attention_window_positions`
        ("kept" or "restart"). `batch`: exactly one of `global_batch_sequences` and `global_batch_tokens`, over all
        ranks. Exactly one of `total_tokens` and `epochs`.
        """
        run = {"total_tokens": total_tokens, "epochs": epochs, "max_epochs": max_epochs}
        return cls(**build(curriculum, batch, run))

    @classmethod
    def from_deepspeed(cls, config: dict[str, Any] | str | Path, **run: Unpack[Common]) -> Schedule:
        """The seqlen curriculum of a DeepSpeed config, value for value.

        `global_batch_sequences` is the config's `train_batch_size` where it is not given. Raises ConfigError for what
        DeepSpeed itself does wrong, see `curriculum.deepspeed`.
        """
        from curriculum.deepspeed import translate

        curriculum, batch, _ = translate(config)
        if any(key in run for key in BATCH_KEYS):
            batch = {}
        return cls._made(curriculum.pop("pacing"), {**curriculum, **batch, **run})

    @classmethod
    def _made(cls, name: str, keywords: Mapping[str, Any]) -> Schedule:
        """Of the pacing called `name`."""
        curriculum, batch, end = tables_of(name, keywords)
        return cls.from_settings(curriculum, batch, **end)

    def resolve(self, store_tokens: int, bucket_sequences: list[int] | None = None) -> Schedule:
        """The same schedule with its end in tokens, for a store of `store_tokens`.

        `bucket_sequences`: what `count` of its `decomposition` makes of the store's documents, where it has one.
        Raises ConfigError where more is asked for than `max_epochs` passes over the store give.
        """
        from curriculum.resolve import resolved

        return resolved(self, store_tokens, bucket_sequences)

    @cached_property
    def uncut(self) -> Schedule:
        """The rows at full length that truncation cuts this schedule's out of."""
        phases = self.phases.at_length(self.max_seqlen)
        return dataclasses.replace(self, phases=phases, planner="dealing", settings=None)

    @property
    def notches(self) -> Notches | None:
        """When the length rises, where validation decides that."""
        return notches_of(self.settings)

    def raised_to(self, seqlen: int | None) -> Schedule:
        """An adaptive schedule that has come to `seqlen`; None: at its beginning. Others are returned as they are."""
        if self.settings is None or self.notches is None:
            return self
        curriculum = {**self.settings["curriculum"], SEQLEN_NOW: seqlen}
        run = {key: getattr(self, key) for key in RUN_KEYS}
        return Schedule.from_settings(curriculum, self.settings["batch"], **run)

    def carried_on(self, before: Schedule) -> Schedule:
        """Where this and the schedule `before` it are adaptive: at the length that one has come to, if it allows it.

        Below its `seqlen_start` or above its `seqlen_end` it is there. Others are returned as they are.
        """
        ours, theirs = self.notches, before.notches
        if ours is None or theirs is None or before.settings is None:
            return self
        now = before.settings["curriculum"].get(SEQLEN_NOW) or theirs.seqlen_start
        now = min(max(now, ours.seqlen_start), ours.seqlen_end)
        return self.raised_to(now - now % ours.seqlen_multiple)

    @property
    def decomposition(self) -> Buckets | None:
        """How documents are cut into buckets, where the schedule does that."""
        return buckets_of(self.settings) if self.settings is not None and self.planner == "buckets" else None

    @cached_property
    def total_steps(self) -> int:
        """Steps until `total_tokens` are served; the last one may go beyond. Raises ConfigError before `resolve`."""
        if self.total_tokens is None or not self.phases:
            buckets = "buckets, which the documents fill"
            raise ConfigError(
                "the schedule has no end before it knows the data",
                found=buckets if self.epochs is None else f"epochs = {self.epochs}",
                remedy="ask that of a loader: CurriculumLoader(store, schedule, seed=...).schedule",
            )
        index = bisect.bisect_left(self.phases.starts, self.total_tokens) - 1
        phase, served = self.phases[index], int(self.phases.starts[index])
        return phase.first_step - (-(self.total_tokens - served) // phase.batch_tokens)

    @cached_property
    def max_seqlen(self) -> int:
        """The longest sequence of the run: what validation uses and the model has positions for."""
        return max(int(self.phases.columns[SEQLEN].max(initial=0)), self.seqlen_to_come or 0)

    def phase(self, step: int) -> Phase:
        """The phase that `step` belongs to. As all that asks for a step, raises ConfigError for one below 0."""
        return self.phases[self.phases.number(step)]

    def seqlen(self, step: int) -> int:
        """Sequence length of the batch at `step`."""
        return self.phase(step).seqlen

    def sequences(self, step: int) -> int:
        """Sequences of the batch at `step`, over all ranks."""
        return self.phase(step).sequences

    def attention_window(self, step: int) -> int | None:
        """Block of positions that attention stays within at `step`; None: the whole row."""
        return self.phase(step).attention_window

    @cached_property
    def has_attention_windows(self) -> bool:
        """Whether attention stays within less than a row at any step."""
        return bool(self.phases.columns[ATTENTION_WINDOW].any())

    def tokens_before(self, step: int) -> int:
        """Tokens in all batches before `step`."""
        return self.phases.tokens_before(step)

    def end_of_phase(self, step: int) -> int:
        """The first step after `step` whose batches have another seqlen or sequences, or `total_steps`."""
        return min(self.phases.next_shape(step) or self.total_steps, self.total_steps)

    def changed_at(self, step: int, new: Schedule) -> Schedule:
        """This schedule before `step`, `new` from then on (by its own count of steps, from 0 of the run).

        Raises RunError where batches are made in another way, or are those of buckets, drawn as a whole.
        """
        if self.planner != new.planner or self.decomposition:
            raise RunError(
                "this schedule cannot be changed midway",
                found=f"batches made by {self.planner!r} so far, {new.planner!r} from step {step} on",
                allowed="the same planner before and after, and none of whole buckets",
                remedy="begin another run",
            )
        return dataclasses.replace(new, phases=self.phases.changed_at(step, new.phases), settings=None)

    def to_toml(self) -> str:
        """[curriculum] and [batch] of a run that has this schedule; raises ConfigError where it was changed."""
        if self.settings is None:
            raise ConfigError("a schedule that was changed in its course has no single TOML")
        return as_toml(self.settings)
