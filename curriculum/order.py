"""`Order`: all that determines the batches of a run: corpus, mixture, schedules and seed."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from curriculum.mixture import ALONE, Mixture, Share
from curriculum.resolve import resolved_for
from curriculum.schedule import Schedule
from curriculum.window import WINDOW_SHAPES, WINDOW_TOKENS, Corpus, shards_of
from pipeline.errors import ConfigError

MOST_SEEDS = 1 << 63
"""Others would give the order of one below: keys have so many bits."""


@dataclass(frozen=True)
class Order:
    """Immutable; made by `begin`, and by `changed_at` where the schedule changes midway."""

    corpus: Corpus
    seed: int
    mixture: Mixture | None
    window_tokens: int
    asked: tuple[tuple[int, Schedule], ...]
    """(step, the schedule that was asked for from this step on), the first from step 0."""
    history: tuple[tuple[int, Schedule], ...]
    """The same, each joined to what was served before it: whole schedules from step 0.

    Their `total_tokens` are those asked for and the padding of earlier ends of the data, which were gone beyond.
    """

    @classmethod
    def begin(
        cls,
        corpus: Corpus,
        schedule: Schedule,
        *,
        seed: int,
        mixture: Mixture | None = None,
        window_tokens: int | None = None,
    ) -> Order:
        """`window_tokens`: tokens dealt together; None: see `default_window_tokens`.

        Raises ConfigError where the schedule or the mixture asks for more than there is.
        """
        if type(seed) is not int or not 0 <= seed < MOST_SEEDS:
            raise ConfigError("a seed is a whole number", found=repr(seed), allowed="an int, 0 to 2**63 - 1")
        if window_tokens is not None and (type(window_tokens) is not int or window_tokens < 1):
            raise ConfigError(
                "window_tokens must be positive", found=repr(window_tokens), allowed="an int, 1 or more"
            )
        if mixture and schedule.planner != "dealing":
            raise ConfigError("sources are mixed by dealing alone", found=schedule.planner, allowed="dealing")
        if mixture:
            mixture.check(schedule, source_tokens(corpus))
        else:
            schedule = resolved_for(schedule, corpus)
        start = ((0, schedule),)
        return cls(corpus, seed, mixture, window_tokens or default_window_tokens(schedule), start, start)

    def changed_at(self, step: int, schedule: Schedule) -> Order:
        """This order before `step`, `schedule` from then on (by its own count of steps, from 0 of the run).

        Raises ConfigError where it asks for more than there is, RunError where its batches are made in another way.
        """
        sizes = source_tokens(self.corpus)
        asked = schedule if self.mixture else resolved_for(schedule, self.corpus)
        changed = self.schedule.changed_at(step, asked)
        if self.mixture:
            self.mixture.check(changed, sizes)
        else:
            changed = replace(changed, total_tokens=(asked.total_tokens or 0) + self._padding(step))
        return replace(self, asked=(*self.asked, (step, asked)), history=(*self.history, (step, changed)))

    def _padding(self, step: int) -> int:
        """Positions without a target before `step`: batches in which the data ended, before a change of schedule."""
        earlier = padding_before(self.asked[-1][1], self.schedule)
        most = self.schedule.max_epochs * sum(shard.tokens for shard in self.corpus.shards)
        return earlier + max(self.schedule.tokens_before(step) - earlier - most, 0)

    @property
    def schedule(self) -> Schedule:
        """The schedule in force at last: the whole run's, from step 0."""
        return self.history[-1][1]

    @property
    def shares(self) -> list[tuple[list[int], Served]]:
        """(shards, what it serves) of each source that is served; one of all shards without a mixture."""
        shards = shards_of(self.corpus)
        if self.mixture is None:
            return [(list(range(len(self.corpus.shards))), Served(self, ALONE, 0))]
        return [
            (shards[name], Served(self, self.mixture, index))
            for index, name in enumerate(self.mixture.names)
            if self.mixture.weights[index]
        ]


class Served:
    """How many tokens of one source have been served before each step, the changes of schedule counted in."""

    def __init__(self, order: Order, mixture: Mixture, source: int) -> None:
        self.mixture, self.source = mixture, source
        sizes = source_tokens(order.corpus)
        self.tokens = sum(sizes.values()) if mixture is ALONE else sizes[mixture.names[source]]
        """Tokens of one epoch."""
        self._share = Share(mixture, source, order.schedule)
        self._padded = [
            (first, padding_before(asked, schedule))
            for (_, asked), (first, schedule) in zip(order.asked, order.history, strict=True)
        ]

    def before(self, step: int) -> int:
        """Tokens served before `step`."""
        padding = max(padding for first, padding in self._padded if first <= step)
        return self._share.tokens_before(step) - padding

    def limit(self, schedule: Schedule) -> int:
        """Most tokens that `schedule` may serve of it."""
        return self.tokens * (self.mixture.max_epochs[self.source] or schedule.max_epochs)

    def rows(self, step: int, steps: int, sequences: int | np.ndarray) -> np.ndarray:
        """Rows of it at `step`, `step` + 1, ...: see `Mixture.rows`."""
        return self.mixture.rows(self.source, step, steps, sequences)

    def steps_of(self, rows: Any, sequences: Any) -> Any:
        """In how many batches of `sequences` there are `rows` of it, about; numbers or arrays of them."""
        return rows * self.mixture.total // (sequences * self.mixture.weights[self.source])

    def step_of(self, token: int) -> int:
        """The first step whose batch holds token number `token`, or would if it held any of this source."""
        steps = range(self._share.schedule.total_steps + 1)
        step = bisect.bisect_left(steps, token, key=self.before)
        return step if self.before(step) == token else step - 1


def padding_before(asked: Schedule, joined: Schedule) -> int:
    """Positions without a target in what was served before `asked`, which is `joined` to it: see `Order.history`."""
    return (joined.total_tokens or 0) - (asked.total_tokens or 0)


def default_window_tokens(schedule: Schedule) -> int:
    """WINDOW_TOKENS, or the least tokens that WINDOW_SHAPES shapes of `schedule` have, where that is less."""
    starts = schedule.phases.starts[: 1 + schedule.phases.number(schedule.total_steps)]
    return int((starts[WINDOW_SHAPES:] - starts[:-WINDOW_SHAPES]).min(initial=WINDOW_TOKENS))


def source_tokens(corpus: Corpus) -> dict[str, int]:
    """Tokens of each source."""
    return {name: sum(corpus.shards[i].tokens for i in shards) for name, shards in shards_of(corpus).items()}
