"""The loader: every stored token a target once, the same batches on any ranks, exact resume from any step."""

import contextlib
import copy
import itertools
import json
import math
from collections import deque
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import EOD, documents_of, write_store

from curriculum.loader import CurriculumLoader, full_length_batches
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError, RunError, SlwError, StoreError
from pipeline.reader import Store

LENGTHS = [1 + (i * 37) % 90 for i in range(60)] + [400, 333, 1]
RAMP = {"seqlen_start": 8, "seqlen_end": 40, "duration_steps": 9, "global_batch_sequences": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of(LENGTHS), shards=3, bos_id=49)
    return Store.open(path)


def batches_of(store, schedule, **options):
    with CurriculumLoader(store, schedule, seed=3, **options) as loader:
        return list(loader)


def same(a, b):
    fields = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return (a.step, a.seqlen, a.targets) == (b.step, b.seqlen, b.targets) and all(
        np.array_equal(getattr(a, field), getattr(b, field)) for field in fields
    )


SCHEDULES = st.one_of(
    st.builds(
        Schedule.linear,
        seqlen_start=st.sampled_from([4, 8, 48]),
        seqlen_end=st.sampled_from([4, 36, 64]),
        duration_steps=st.integers(0, 40),
        seqlen_multiple=st.sampled_from([1, 4]),
        global_batch_sequences=st.integers(3, 9),
        epochs=st.integers(1, 3),
    ),
    st.builds(
        Schedule.staged,
        seqlens=st.just([7, 33, 12]),
        boundaries=st.just([4, 9]),
        global_batch_tokens=st.integers(99, 300),
        epochs=st.integers(1, 2),
    ),
)


@settings(max_examples=40)
@given(schedule=SCHEDULES)
def test_every_stored_token_is_a_target_once_an_epoch_with_its_predecessor_as_input(store, schedule):
    documents = [store.document(i) for i in range(store.documents)]
    counts = [np.zeros(n, dtype=int) for n in store.lengths]
    batches = batches_of(store, schedule)
    for batch in batches:
        labels, inputs = batch.labels.ravel(), batch.input_ids.ravel()
        at = 0
        for d, s, n in zip(batch.pieces.document, batch.pieces.start, batch.pieces.length, strict=True):
            counts[d][s : s + n] += 1
            assert labels[at : at + n].tolist() == documents[d][s : s + n].tolist()
            assert inputs[at : at + n].tolist() == [49, *documents[d].tolist()][s : s + n]
            assert batch.position_ids.ravel()[at : at + n].tolist() == list(range(n))
            at += n
        assert (labels[at:] == -100).all()
        assert at == batch.targets == batch.labels.size or batch is batches[-1]
        spans = np.diff(batch.cu_seqlens)
        assert spans.sum() == batch.labels.size and (spans > 0).all() and spans.max() == batch.max_seqlen
        assert set(range(0, batch.labels.size, batch.seqlen)) <= set(batch.cu_seqlens.tolist())
        assert np.array_equal(np.flatnonzero(batch.position_ids.ravel() == 0), batch.cu_seqlens[:-1])
        assert batch.labels.shape == (schedule.sequences(batch.step), schedule.seqlen(batch.step))
    assert all((count == schedule.epochs).all() for count in counts)
    assert [batch.step for batch in batches] == list(range(len(batches)))


@settings(max_examples=15)
@given(schedule=SCHEDULES, world_size=st.integers(2, 3))
def test_ranks_together_serve_the_batch_of_one_rank(store, schedule, world_size):
    alone = batches_of(store, schedule)
    ranks = [batches_of(store, schedule, rank=rank, world_size=world_size) for rank in range(world_size)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for field in ("input_ids", "labels", "position_ids"):
            assert np.array_equal(getattr(whole, field), np.concatenate([getattr(part, field) for part in parts]))
        assert {part.targets for part in parts} == {whole.targets}


@settings(max_examples=15)
@given(schedule=SCHEDULES, data=st.data())
def test_resume_at_any_step_goes_on_with_the_very_next_batch_on_any_world_size(store, schedule, data):
    expected = batches_of(store, schedule)
    stop = data.draw(st.integers(0, len(expected)))
    with CurriculumLoader(
        store, schedule, seed=3, rank=1, world_size=2, prefetch=data.draw(st.integers(1, 4))
    ) as first:
        for _ in range(stop):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
    with CurriculumLoader(store, schedule, seed=3) as second:
        second.load_state_dict(state)
        rest = list(second)
    assert len(rest) == len(expected) - stop
    assert all(same(a, b) for a, b in zip(expected[stop:], rest, strict=True))


@settings(max_examples=15)
@given(stop=st.integers(0, 12), again=st.integers(1, 6), seqlen=st.sampled_from([8, 24, 64]))
def test_a_schedule_changed_twice_midway_still_serves_every_token_once(store, stop, again, seqlen):
    schedules = [
        Schedule.linear(**RAMP, epochs=1),
        Schedule.constant(seqlen=seqlen, global_batch_sequences=3, epochs=1),
        Schedule.constant(seqlen=10, global_batch_sequences=4, epochs=1),
    ]
    counts = [np.zeros(n, dtype=int) for n in store.lengths]
    state, served = None, []
    for schedule, steps in zip(schedules, (stop, again, 10**6), strict=True):
        with CurriculumLoader(store, schedule, seed=3) as loader:
            if state:
                loader.load_state_dict(state, change_schedule=True)
            for batch, _ in zip(loader, range(steps), strict=False):
                served.append(batch)
            state = loader.state_dict() if steps < 10**6 else state
            # `zip` takes one batch more from the loader than it pairs with a number
            state["step"] = len(served)
    for batch in served:
        for d, s, n in zip(batch.pieces.document, batch.pieces.start, batch.pieces.length, strict=True):
            counts[d][s : s + n] += 1
    assert all((count == 1).all() for count in counts)
    assert {batch.seqlen for batch in served[stop + again :]} <= {10}


def test_batches_made_ahead_are_dropped_where_a_loader_goes_back_or_changes_its_schedule(store):
    schedule, other = (Schedule.linear(**{**RAMP, "seqlen_end": end}, epochs=1) for end in (40, 16))
    with CurriculumLoader(store, schedule, seed=3) as loader:
        state = loader.state_dict()
        first = [next(loader) for _ in range(3)]
        loader.load_state_dict(state)
        assert all(map(same, [next(loader) for _ in range(3)], first))
        state = loader.state_dict()
        loader.change_schedule(other)
        changed = list(loader)
    with CurriculumLoader(store, other, seed=3) as loader:
        loader.load_state_dict(state, change_schedule=True)
        expected = list(loader)
    assert len(changed) == len(expected) and all(map(same, changed, expected))
    assert changed[-1].seqlen == 16


def test_another_store_seed_or_schedule_is_refused_by_name(store, tmp_path):
    schedule = Schedule.linear(**RAMP, epochs=1)
    write_store(tmp_path, documents_of(LENGTHS, seed=9))
    with CurriculumLoader(store, schedule, seed=3) as loader:
        state = loader.state_dict()
    with pytest.raises(RunError, match=rf"another store\s+found: .*\s+allowed: .* \(this loader, {tmp_path}\)"):
        CurriculumLoader(Store.open(tmp_path), schedule, seed=3).load_state_dict(state)
    with pytest.raises(RunError, match="another seed"):
        CurriculumLoader(store, schedule, seed=4).load_state_dict(state)
    other = Schedule.linear(**{**RAMP, "duration_steps": 10}, epochs=1)
    with pytest.raises(
        RunError,
        match=r"saved -> this loader's: duration_steps \d+ -> 10; phase 5 sequences of 32 from step 6 on -> 5 seq",
    ):
        CurriculumLoader(store, other, seed=3).load_state_dict(state)
    other = Schedule.linear(**RAMP, first_piece="beginning", epochs=1)
    with pytest.raises(RunError, match=r"first_piece random -> beginning"):
        CurriculumLoader(store, other, seed=3).load_state_dict(state)


def test_a_step_beyond_the_end_of_the_schedule_is_refused(store):
    schedule = Schedule.constant(seqlen=16, global_batch_sequences=4, epochs=1)
    with CurriculumLoader(store, schedule, seed=1) as loader:
        state, end = loader.state_dict(), loader.schedule.total_steps
        for step in (end + 1, -1):
            with pytest.raises(RunError, match=rf"step {step:,}[\s\S]*0 to {end:,}"):
                loader.load_state_dict({**state, "step": step})
        loader.load_state_dict({**state, "step": end})
        assert next(loader, None) is None
        shorter = Schedule.constant(seqlen=16, global_batch_sequences=4, total_tokens=64)
        with CurriculumLoader(store, shorter, seed=1) as other, pytest.raises(RunError, match="ended before it"):
            other.load_state_dict({**state, "step": end}, change_schedule=True)


def test_damage_found_in_the_thread_reaches_the_caller(tmp_path):
    manifest = write_store(tmp_path, documents_of(LENGTHS))
    path = tmp_path / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    loader = CurriculumLoader(Store.open(tmp_path), Schedule.linear(**RAMP, epochs=1), seed=1)
    with pytest.raises(StoreError, match="damaged"):
        next(loader)


def test_impossible_worlds_are_refused(store):
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=2, epochs=1)
    with pytest.raises(ConfigError, match=r"fewer sequences than there are ranks[\s\S]*start fewer ranks"):
        CurriculumLoader(store, schedule, seed=1, rank=0, world_size=3)
    with pytest.raises(ConfigError, match="rank 3 of 3"):
        CurriculumLoader(store, schedule, seed=1, rank=3, world_size=3)
    with CurriculumLoader(store, Schedule.linear(**RAMP, epochs=1), seed=1, world_size=3) as loader:
        first, state = next(loader), loader.state_dict()
        with pytest.raises(ConfigError, match="fewer sequences than there are ranks"):
            loader.change_schedule(schedule)
        assert (loader.state_dict(), next(loader).step) == (state, first.step + 1), "not as it was"


def test_validation_batches_hold_every_token_once(store):
    batches = list(full_length_batches(store, 32, 4))
    assert sum(batch.targets for batch in batches) == store.tokens
    assert sum(int((batch.labels == EOD).sum()) for batch in batches) == store.documents


@settings(max_examples=10)
@given(schedule=SCHEDULES, prefetch=st.integers(1, 3))
def test_memory_used_in_a_circle_is_safe_from_prefetch_plus_two_on(store, schedule, prefetch):
    expected = batches_of(store, schedule)
    with mock.patch("curriculum.loader.CHUNK_TOKENS", 300):
        circle = itertools.cycle([np.empty(100_000, dtype=np.int64) for _ in range(prefetch + 2)])
        with CurriculumLoader(
            store,
            schedule,
            seed=3,
            prefetch=prefetch,
            allocate=lambda shape: next(circle)[: math.prod(shape)].reshape(shape),
        ) as loader:
            assert sum(same(batch, known) for batch, known in zip(loader, expected, strict=True)) == len(expected)


@settings(max_examples=20)
@given(schedule=SCHEDULES, held=st.integers(0, 30), every=st.integers(1, 4))
def test_batches_stay_as_they_are_while_they_are_held(store, schedule, held, every):
    expected, kept = batches_of(store, schedule), deque(maxlen=held)
    with (
        mock.patch("curriculum.loader.CHUNK_TOKENS", 300),
        CurriculumLoader(store, schedule, seed=3) as loader,
    ):
        for number, batch in enumerate(loader):
            assert same(batch, expected[number])
            if number % every == 0:
                kept.append((number, batch.labels))
            assert all(np.array_equal(labels, expected[n].labels) for n, labels in kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefetch": 0}, "prefetch must be positive"),
        ({"prefetch": 1.5}, "prefetch is a whole number"),
        ({"rank": "0"}, "rank is a whole number"),
        ({"world_size": 2.0}, "world_size is a whole number"),
        *(({"seed": seed}, "0 to 2\\*\\*63 - 1") for seed in (-1, "1", True, 1.0, 1 << 63)),
        *(({"window_tokens": tokens}, "window_tokens must be positive") for tokens in (0, 1.5)),
        ({"mixture": {"a": 1}}, "mixture is not a Mixture"),
        *(({"allocate": given}, "allocate is not a function") for given in (3, np.zeros(9), False)),
    ],
)
def test_what_no_loader_can_have_is_refused(tmp_path, changes, message):
    write_store(tmp_path, documents_of([9, 9]))
    store = Store.open(tmp_path)
    schedule = Schedule.constant(seqlen=4, global_batch_sequences=1, epochs=1)
    with pytest.raises(ConfigError, match=message):
        CurriculumLoader(store, schedule, **{"seed": 1, **changes})


@pytest.mark.parametrize("given", ["a path", None, 3])
def test_what_is_no_store_and_no_schedule_is_refused_with_how_to_get_one(store, given):
    schedule = Schedule.linear(**RAMP, epochs=1)
    with pytest.raises(ConfigError, match=r"store is not a Store[\s\S]*Store\.open"):
        CurriculumLoader(given, schedule, seed=1)
    with pytest.raises(ConfigError, match=r"schedule is not a Schedule[\s\S]*Schedule\.linear"):
        CurriculumLoader(store, given, seed=1)
    with pytest.raises(ConfigError, match="schedule is not a Schedule"):
        CurriculumLoader(store, schedule, seed=1).change_schedule(given)


NO_SCHEDULES = ([], None, 5, [[0]], [[0, {}]], [[0, None]], [["x", {}]], [[0, 5]], [[0, {"phases": {}}]])
ODD = (None, True, -1, 1, 3, 1.5, math.nan, math.inf, 10**30, "", "x", [], [1], {}, {"a": 1})


@pytest.mark.parametrize(
    "changes",
    [
        *({"step": step} for step in (None, "x", math.nan, 1.5, True)),
        *({"schedules": schedules} for schedules in NO_SCHEDULES),
        {"schedules": [[0, {"total_tokens": 1, "epochs": None, "max_epochs": 1, "settings": {}}]]},
    ],
)
def test_a_state_that_is_damaged_is_refused_and_changes_nothing(store, changes):
    loader = CurriculumLoader(store, Schedule.linear(**RAMP, epochs=1), seed=1)
    state = loader.state_dict()
    for damaged in ({**state, **changes}, {}, None, [], "x"):
        with pytest.raises(RunError, match="not a loader's state, or a damaged one"):
            loader.load_state_dict(damaged)
    assert loader.state_dict() == state


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_state_with_any_value_replaced_is_refused_or_serves(store, odd):
    """No traceback of ours, whatever has become of a value."""
    schedule = Schedule.linear(**RAMP, epochs=1)
    loader = CurriculumLoader(store, schedule, seed=1)
    next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    for path in places_of(state):
        damaged = copy.deepcopy(state)
        node = damaged
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = odd
        with CurriculumLoader(store, schedule, seed=1) as other, contextlib.suppress(SlwError):
            other.load_state_dict(damaged)
            assert next(other).step == other.step - 1


def places_of(data):
    """The path of every value below `data`."""
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in places_of(data[key]))
