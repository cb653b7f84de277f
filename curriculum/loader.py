"""Batches of a schedule from a store: the global batch at a step depends on (store, schedule, seed) alone.

Every rank plans the same deals and gathers only its own rows, in background threads that stay a few batches ahead.
State is the step, the seed and the schedules so far; loading it plans a window of tokens anew without reading one.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any

import numpy as np

from curriculum.batch import Allocate, Batch, make_batches, with_attention_window
from curriculum.dealing import sequences_of
from curriculum.memory import Pool
from curriculum.mixture import Mixture
from curriculum.order import Order
from curriculum.pacing import require_positive
from curriculum.phases import SEQUENCES
from curriculum.planner import plan_steps
from curriculum.prefetch import Prefetch
from curriculum.readahead import ReadAhead
from curriculum.saved import schedules_of, state_of
from curriculum.schedule import Schedule
from curriculum.settings import SEQLEN_NOW
from pipeline.errors import ConfigError, RunError
from pipeline.packing import Packed
from pipeline.reader import Store

STATE_VERSION = 4
"""Raised when the state's form or the order of batches changes; a state of another version is refused."""
CHUNK_TOKENS = 1 << 19
"""Tokens made in one job: smaller batches are made several at a time, so that they share the cost of the job."""
MOST_THREADS = 2
"""More threads only wait for the GIL and for memory."""


class CurriculumLoader:
    """Iterate over the batches of `schedule` from `store`, once.

    `rank` of `world_size` gets its contiguous share of each batch's rows. Use as a context manager, or `close()` it:
    it owns threads. `prefetch` runs of batches (see CHUNK_TOKENS) wait ready; `allocate` says in which memory they
    are made, for example pinned memory (docs/serving.md); without it, memory is used again once nobody holds it.
    `mixture` weighs the store's sources; `window_tokens`: tokens dealt together (docs/dealing.md);
    None: `default_window_tokens`, or those of a loaded state. Raises ConfigError where the schedule asks for more
    data than there are, or a batch has fewer sequences than ranks.
    """

    def __init__(
        self,
        store: Store,
        schedule: Schedule,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
        allocate: Allocate | None = None,
        mixture: Mixture | None = None,
        window_tokens: int | None = None,
    ) -> None:
        _check_kind("store", store, Store, "Store.open(PATH)")
        _check_kind("schedule", schedule, Schedule, "Schedule.linear(...)")
        if mixture is not None:
            _check_kind("mixture", mixture, Mixture, "Mixture(...)")
        if not (allocate is None or callable(allocate)):
            raise ConfigError(
                "allocate is not a function",
                found=repr(allocate)[:80],
                allowed="one of a shape that returns an int64 or int32 array of that shape, or None",
            )
        numbers = {"rank": rank, "world_size": world_size, "prefetch": prefetch}
        rank, world_size, prefetch = (_whole(name, given) for name, given in numbers.items())
        if not 0 <= rank < world_size:
            raise ConfigError("rank is outside the world", found=f"rank {rank} of {world_size}")
        require_positive(prefetch=prefetch)
        self.store = store
        self.order = Order.begin(store, schedule, seed=seed, mixture=mixture, window_tokens=window_tokens)
        """What all batches follow from."""
        self._any_window = window_tokens is None
        """A state's window_tokens are taken over."""
        _check_ranks(self.schedule, world_size)
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self.allocate = allocate or Pool(3 * CHUNK_TOKENS)
        self.step = 0
        """Batches handed out so far."""
        self._chunks: Prefetch[list[Batch]] | None = None
        self._chunk: Iterator[Batch] = iter(())
        self._read_ahead = ReadAhead(store)

    @property
    def schedule(self) -> Schedule:
        """The whole run's schedule, with the changes so far."""
        return self.order.schedule

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; StopIteration at the schedule's end."""
        if self.step >= self.schedule.total_steps:
            self.close()
            raise StopIteration
        if self._chunks is None:
            self._chunks = Prefetch(self._chunks_to_make(), self.prefetch, min(MOST_THREADS, _cores()))
        batch = next(self._chunk, None)
        if batch is None:
            try:
                self._chunk = iter(next(self._chunks))
            except BaseException:
                self.close()
                raise
            batch = next(self._chunk)
        assert batch.step == self.step, "the thread is out of step"
        self.step += 1
        return batch

    def __enter__(self) -> CurriculumLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, below 64 KB: where the batch handed out last left off. The same on every rank."""
        return {
            **self._identity(),
            "step": self.step,
            "schedules": state_of(self.order.asked),
        }

    def load_state_dict(
        self, state: dict[str, Any], *, change_schedule: bool = False, earlier: Iterable[Schedule] = ()
    ) -> None:
        """Go on after the last batch of `state`, whatever rank and world size it was taken on.

        Raises RunError where store, seed or schedule are not those of `state`. With `change_schedule` this loader's
        schedule holds from here on: what was served stays served, and an adaptive one goes on at the length reached.
        `earlier`: schedules before this loader's that had too many lengths for a state to list: see `saved`.
        """
        window_tokens = self._check_identity(state)
        step = state["step"]
        asked = self.order.asked[-1][1]
        try:
            schedules = schedules_of(state["schedules"], asked, earlier)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise _no_state(state) from error
        if schedules[0][0] != 0:
            raise _no_state(state)
        if schedules[-1][1].raised_to(None) != asked.raised_to(None):
            if not change_schedule:
                raise RunError(
                    "the schedule is not the one of the saved state",
                    found=f"saved -> this loader's: {_difference(asked, schedules[-1][1])}",
                    remedy="keep it, or change it from here on: load_state_dict(state, change_schedule=True), "
                    "slw-train run --reschedule",
                )
            schedules.append((step, asked.carried_on(schedules[-1][1])))
        start = tuple(schedules[:1])
        order = replace(self.order, window_tokens=window_tokens, asked=start, history=start)
        for first, schedule in schedules[1:]:
            order = order.changed_at(first, schedule)
        if not 0 <= step <= order.schedule.total_steps:
            raise RunError(
                "the state is of a step that the schedule does not have",
                found=f"step {step:,}",
                allowed=f"0 to {order.schedule.total_steps:,}",
                remedy="is the state damaged, or the schedule one that ended before it?",
            )
        _check_ranks(order.schedule, self.world_size)
        self.close()
        self.step, self.order = step, order

    def change_schedule(self, schedule: Schedule) -> None:
        """Go on with `schedule` from the next batch on: what was served stays served. See `Order.changed_at`."""
        _check_kind("schedule", schedule, Schedule, "Schedule.linear(...)")
        order = self.order.changed_at(self.step, schedule)
        _check_ranks(order.schedule, self.world_size)
        self.close()
        self.order = order

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a state to be of this loader."""
        mixture = self.order.mixture
        return {
            "version": STATE_VERSION,
            "store": self.store.fingerprint,
            "seed": self.order.seed,
            "mixture": mixture.to_json() if mixture else None,
            "window_tokens": self.order.window_tokens,
        }

    def _check_identity(self, state: dict[str, Any]) -> int:
        """Raise RunError where `state` is not of this loader's store, seed and mixture; returns its window_tokens."""
        if not isinstance(state, dict) or "version" not in state:
            raise _no_state(state)
        identity = self._identity()
        if self._any_window and isinstance(of_state := state.get("window_tokens"), int) and of_state > 0:
            identity["window_tokens"] = of_state
        for name, value in identity.items():
            if state.get(name) != value:
                raise RunError(
                    f"the loader's state is of another {name}",
                    found=state.get(name),
                    allowed=f"{value} (this loader{f', {self.store.path}' if name == 'store' else ''})",
                    remedy="resume with what the state was made with, or begin another run",
                )
        if not state.get("schedules") or type(state.get("step")) is not int:
            raise _no_state(state)
        return int(identity["window_tokens"])

    def close(self) -> None:
        """Stop the threads; iterating again starts new ones at the next batch."""
        if self._chunks is not None:
            self._chunks.close()
        self._read_ahead.close()
        self._chunks, self._chunk = None, iter(())

    def _chunks_to_make(self) -> Iterator[Callable[[], list[Batch]]]:
        """This rank's batches from `self.step` on, in runs of one shape and about CHUNK_TOKENS, at least one each."""
        schedule, rows, targets, end = self.schedule, list[Packed](), list[int](), 0
        for step, packed in plan_steps(self.order, self.step, self._read_ahead.expect):
            if not rows:
                first, last = self.own_rows(step)
                seqlen, sequences = schedule.seqlen(step), schedule.sequences(step)
                most = max(1, CHUNK_TOKENS // ((last - first) * seqlen))
                end = min(step + most, schedule.end_of_phase(step), schedule.total_steps)
            rows.append(packed if self.world_size == 1 else sequences_of(packed, first, last))
            targets.append(int(packed.length.sum()))
            if step + 1 == end or targets[-1] < sequences * seqlen:
                arrays = self.allocate((3, len(rows), last - first, seqlen))
                yield partial(self._make_chunk, step + 1 - len(rows), rows, targets, arrays)
                rows, targets = [], []

    def _make_chunk(self, step: int, rows: list[Packed], targets: list[int], arrays: np.ndarray) -> list[Batch]:
        """The batches from `step` on, in `arrays`."""
        (first, last), schedule = self.own_rows(step), self.schedule
        shape = {"seqlen": schedule.seqlen(step), "sequences": last - first}
        made = make_batches(self.store, rows, **shape, first_step=step, targets=targets, allocate=lambda _: arrays)
        self._read_ahead.begin()
        if not schedule.has_attention_windows:
            return made
        positions = schedule.attention_window_positions
        return [with_attention_window(batch, schedule.attention_window(batch.step), positions) for batch in made]

    def planned(self, first: int = 0) -> Iterator[tuple[int, Packed]]:
        """(step, global batch) of every step from `first` on; reads no token, quick wherever `first` is."""
        return plan_steps(self.order, first)

    def own_rows(self, step: int) -> tuple[int, int]:
        """Rows `first` to `last` - 1 of the global batch at `step` are this rank's."""
        sequences = self.schedule.sequences(step)
        return sequences * self.rank // self.world_size, sequences * (self.rank + 1) // self.world_size


def full_length_batches(store: Store, seqlen: int, sequences: int) -> Iterator[Batch]:
    """Every token of `store` once, in batches of `sequences` rows of `seqlen`, always the same: for validation."""
    schedule = Schedule.constant(seqlen=seqlen, global_batch_sequences=sequences, epochs=1)
    with CurriculumLoader(store, schedule, seed=0) as loader:
        yield from loader


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_kind(name: str, given: object, kind: type, remedy: str) -> None:
    if not isinstance(given, kind):
        raise ConfigError(f"{name} is not a {kind.__name__}", found=repr(given)[:80], remedy=f"give {remedy}")


def _whole(name: str, given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise ConfigError(f"{name} is a whole number", found=repr(given)) from None


def _no_state(state: Any) -> RunError:
    return RunError(
        "not a loader's state, or a damaged one",
        found=repr(state)[:200],
        allowed="what state_dict() gave, whole: with version, step and schedules",
    )


def _check_ranks(schedule: Schedule, world_size: int) -> None:
    fewest = schedule.phases[int(schedule.phases.columns[SEQUENCES].argmin())]
    if fewest.sequences < world_size:
        raise ConfigError(
            "a batch has fewer sequences than there are ranks",
            where=f"from step {fewest.first_step} on, at seqlen {fewest.seqlen}",
            found=f"{fewest.sequences} sequences",
            allowed=f"{world_size} or more",
            remedy="start fewer ranks, or raise the global batch",
        )


def _difference(ours: Schedule, theirs: Schedule) -> str:
    """What a person needs to see of two schedules that differ: theirs -> ours."""
    names = ("total_tokens", "max_epochs", "planner", "first_piece", "attention_window_positions")
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in names]
    made = [{**one.settings["curriculum"], **one.settings["batch"]} for one in (theirs, ours) if one.settings]
    if len(made) == 2:
        before, now = made
        keys = [key for key in before | now if key not in (*names, "dealing", SEQLEN_NOW)]
        pairs += [(key, before.get(key), now.get(key)) for key in keys if not isinstance(now.get(key), list)]
    else:
        pairs += [("phases", len(theirs.phases), len(ours.phases))]
    unlike = (pair for pair in zip(theirs.phases, ours.phases, strict=False) if pair[0] != pair[1])
    pairs += [("phase", old, new) for old, new in islice(unlike, 1)]
    return "; ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)
