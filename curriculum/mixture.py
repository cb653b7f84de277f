"""Weighted sources: how many rows of each batch come from which, in exact integers.

With weights w_1 ... w_m of sum W and cumulated weights c_i = w_1 + ... + w_i, source i gets

    rows_i(t) = floor((n c_i + u_t) / W) - floor((n c_(i-1) + u_t) / W),    u_t = t g mod W

of the n rows at step t: within one row of its share n w_i / W in every batch, and n in all. As g has no divisor in
common with W, u_t takes each value once in any W steps: over those, each source gets its share exactly. Between, how
far a source runs from its share grows with the partial quotients of the continued fraction of g / W (Kuipers and
Niederreiter 1974, Uniform Distribution of Sequences, chapter 2, theorem 3.4); so g has small ones. So the rows of a
step follow from its number alone, and no carry has to be kept. Rows of a batch are equally long: shares in rows are
shares in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from curriculum.pacing import require_positive
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError

GOLDEN = Fraction(618_034, 1_000_000)
NEAR = 100
"""How far from it a step is looked for."""
MOST_WEIGHT = 10**9
CHUNK = 1 << 20


@dataclass(frozen=True)
class Mixture:
    """Sources by name with integer weights; made by `from_settings`."""

    names: tuple[str, ...]
    weights: tuple[int, ...]
    max_epochs: tuple[int, ...]
    """How often each may be read; 0: as often as the schedule's `max_epochs` says."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Mixture:
        """From {name: {"weight": number, "max_epochs": int}}, as the table [mixture] of a run's TOML.

        Weights are shares of the tokens served, taken as the decimal they are written as; their sum is free, and 0
        leaves a source out. A source is read once unless its max_epochs allows more. Raises ConfigError for a
        negative weight, none above 0, or a max_epochs below 1.
        """
        weights = [_exact(name, source.get("weight")) for name, source in settings.items()]
        if not any(weights):
            raise ConfigError("[mixture] has no source with a weight above 0", found=dict(settings))
        scale = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        divisor = math.gcd(*whole)
        whole = [weight // divisor for weight in whole]
        if sum(whole) > MOST_WEIGHT:
            raise ConfigError(
                "the weights of [mixture] are finer than can be served",
                found=f"{' : '.join(map(str, whole))}",
                allowed=f"whole numbers of this ratio that add up to {MOST_WEIGHT:,} at most",
                remedy="round them",
            )
        caps = [source.get("max_epochs", 1) for source in settings.values()]
        for name, cap in zip(settings, caps, strict=True):
            require_positive(**{f"mixture.{name}.max_epochs": cap})
        return cls(tuple(settings), tuple(whole), tuple(caps))

    def rows(self, source: int, step: int, steps: int, sequences: int | np.ndarray) -> np.ndarray:
        """int64 [steps]: rows of source number `source` at `step`, `step` + 1, ... in batches of `sequences`.

        `sequences`: one number for all of them, or int64 [steps].
        """
        total, before = self.total, sum(self.weights[:source])
        phase = (np.arange(step, step + steps, dtype=np.int64) % total) * self._stride % total
        upper = (sequences * (before + self.weights[source]) + phase) // total
        return np.asarray(upper - (sequences * before + phase) // total)

    @property
    def total(self) -> int:
        """Sum of the weights."""
        return sum(self.weights)

    @cached_property
    def _stride(self) -> int:
        """Near the golden section of `total`, without a divisor in common, its largest partial quotient the least."""
        total, golden = self.total, int(self.total * GOLDEN)
        near = range(max(1, golden - NEAR), max(1, min(total - 1, golden + NEAR)) + 1)
        without = [stride for stride in near if math.gcd(stride, total) == 1]
        return min(without, key=lambda stride: (_largest_quotient(stride, total), abs(stride - golden)))

    def check(self, schedule: Schedule, tokens: Mapping[str, int]) -> None:
        """Raise ConfigError where sources of `tokens` tokens each, or their names, do not suffice for `schedule`.

        A source that would run out is refused before the run; nothing is redistributed silently. The schedule's own
        `max_epochs` does not count.
        """
        if list(tokens) == [""]:
            raise ConfigError(
                "[mixture] needs a store of named sources; this one has none",
                found=", ".join(map(repr, self.names)),
                remedy="leave [mixture] out, or build the store with --source NAME=PATH",
            )
        unknown = [name for name in self.names if name not in tokens]
        if unknown or (missing := [name for name in tokens if name not in self.names]):
            raise ConfigError(
                "[mixture] and the store name different sources",
                found=f"{unknown[0]!r} is not in the store" if unknown else f"no weight for {missing[0]!r}",
                allowed=", ".join(map(repr, tokens)),
                remedy="build with --source NAME; weight = 0 leaves a source out",
            )
        if schedule.total_tokens is None:
            raise ConfigError(
                "a mixture has no common epoch",
                found=f"epochs = {schedule.epochs}",
                remedy="set total_tokens in place of epochs",
            )
        for index, name in enumerate(self.names):
            cap = self.max_epochs[index]
            needed = Share(self, index, schedule).tokens_before(schedule.total_steps)
            if needed > cap * tokens[name]:
                raise ConfigError(
                    f"source {name!r} runs out",
                    found=f"{needed:,} tokens asked, {needed / max(tokens[name], 1):.2f} epochs",
                    allowed=f"{cap * tokens[name]:,} tokens (max_epochs = {cap})",
                    remedy=f"lower its weight or total_tokens, add data, or mixture.{name}.max_epochs = "
                    f"{-(-needed // max(tokens[name], 1))}",
                )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; equal for equal mixtures."""
        columns = zip(self.names, self.weights, self.max_epochs, strict=True)
        return {name: {"weight": weight, "max_epochs": cap} for name, weight, cap in columns}


ALONE = Mixture(("",), (1,), (0,))
"""No mixture: the whole corpus is one source."""


class Share:
    """What one source of a mixture serves on a schedule."""

    def __init__(self, mixture: Mixture, source: int, schedule: Schedule) -> None:
        self.mixture, self.source, self.schedule = mixture, source, schedule

    def tokens_before(self, step: int) -> int:
        """Tokens of the source in all batches before `step`."""
        if self.mixture is ALONE:
            return self.schedule.tokens_before(step)
        index = self.schedule.phases.number(step)
        return self._starts[index] + self._tokens(index, step)

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for index, (_, following) in enumerate(pairwise(self.schedule.phases)):
            starts.append(starts[-1] + self._tokens(index, following.first_step))
        return starts

    def _tokens(self, index: int, end: int) -> int:
        """Tokens in the batches of phase number `index` before step `end`."""
        phase, mixture = self.schedule.phases[index], self.mixture
        periods, rest = divmod(end - phase.first_step, mixture.total)
        rows = periods * phase.sequences * mixture.weights[self.source]
        for first in range(end - rest, end, CHUNK):
            rows += int(mixture.rows(self.source, first, min(CHUNK, end - first), phase.sequences).sum())
        return rows * phase.seqlen


def _largest_quotient(numerator: int, denominator: int) -> int:
    """The largest partial quotient of the continued fraction of `numerator` / `denominator`."""
    largest = 0
    while numerator:
        quotient, rest = divmod(denominator, numerator)
        largest, numerator, denominator = max(largest, quotient), rest, numerator
    return largest


def _exact(name: str, weight: Any) -> Fraction:
    if isinstance(weight, bool) or not isinstance(weight, int | float | Fraction) or not 0 <= weight < math.inf:
        raise ConfigError(f"mixture.{name}.weight is no share", found=weight, allowed="a number of 0 or more")
    return Fraction(str(weight))
