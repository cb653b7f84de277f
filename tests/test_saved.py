"""The state of a loader: below 64 KB whatever its schedules, and every batch after it as without a stop."""

import json
import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.loader import CurriculumLoader
from curriculum.order import default_window_tokens
from curriculum.saved import MOST_ROWS, schedules_of, state_of
from curriculum.schedule import Schedule
from pipeline.errors import RunError
from pipeline.reader import Store
from tests.orders import same
from tests.stores import documents_of, write_store

LENGTHS = [100, 7, 300, 41, 1, 88] * 9


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    write_store(path, documents_of(LENGTHS))
    return Store.open(path)


def at_random(steps, seed=1):
    """Another length at every step, with no rule in it that anything could compress."""
    chosen = random.Random(seed)
    table = [[step, seqlen] for step, seqlen in enumerate(chosen.choices(range(100, 10_000), k=steps))]
    return Schedule.table(table=table, global_batch_sequences=8, total_tokens=10**6)


def saved(asked):
    state = json.dumps(state_of(asked))
    assert len(state) < 64_000
    return json.loads(state)


def test_a_schedule_of_a_million_lengths_is_64_kb_at_most_and_another_is_refused():
    schedule, other = at_random(10**6), at_random(9)
    state = saved([(0, schedule)])
    assert schedules_of(state, schedule) == [(0, schedule)]
    with pytest.raises(RunError, match=rf"{schedule.phases.digest}[\s\S]*{other.phases.digest}[\s\S]*earlier="):
        schedules_of(state, other)
    assert schedules_of(state, other, [schedule])[0][1] == schedule
    assert len(schedule.phases) > 9 * 10**5


def test_a_schedule_named_by_its_phases_or_digest_keeps_all_else():
    like = {"first_piece": "beginning", "attention_window_positions": "restart"}
    long = Schedule.table(
        table=[[step, 8 + step % 2] for step in range(MOST_ROWS + 1)],
        global_batch_sequences=8,
        total_tokens=10**6,
        **like,
    )
    short = Schedule.constant(seqlen=16, global_batch_sequences=8, total_tokens=10**6, **like)
    changed = short.changed_at(4, Schedule.constant(seqlen=8, global_batch_sequences=8, total_tokens=10**6, **like))
    state = saved([(0, short), (4, long), (9, changed)])
    assert "digest" in state[1][1]["phases"]
    for key, value in like.items():
        assert [part.get(key) or part["settings"]["curriculum"][key] for _, part in state] == [value] * 3
    stranger = replace(long, settings=None, first_piece="random", attention_window_positions="kept")
    assert schedules_of(state, stranger) == [(0, short), (4, long), (9, changed)]


@settings(max_examples=25)
@given(
    rows=st.lists(st.sampled_from([1, 2, MOST_ROWS // 2, MOST_ROWS, MOST_ROWS + 1, 5000]), min_size=1, max_size=12),
    data=st.data(),
)
def test_any_history_of_schedules_is_small_and_comes_back(rows, data):
    asked = [(step, at_random(count, seed=step)) for step, count in enumerate(rows)]
    for number in data.draw(st.sets(st.sampled_from(range(len(asked))))):
        asked[number] = (number, replace(asked[number][1], settings=None))
    assert schedules_of(saved(asked), asked[-1][1], [schedule for _, schedule in asked]) == asked
    if sum(rows) <= MOST_ROWS:
        assert schedules_of(saved(asked), asked[-1][1]) == asked


def test_an_adaptive_schedule_is_small_after_a_thousand_rises():
    adaptive = Schedule.adaptive(
        seqlen_start=8, seqlen_end=1024, seqlen_multiple=1, global_batch_sequences=512, total_tokens=10**9
    )
    asked = [(0, adaptive), *((10_000 * i, adaptive.raised_to(8 + i)) for i in range(1, 1017))]
    restored = schedules_of(saved(asked), adaptive)
    assert restored == asked
    assert [schedule.settings for _, schedule in restored] == [schedule.settings for _, schedule in asked]
    other = replace(adaptive.raised_to(24), settings={**adaptive.raised_to(24).settings})
    other.settings["curriculum"] = {**other.settings["curriculum"], "tolerance": 9.0}
    (_, now) = schedules_of(saved([(0, adaptive), (7, other)]), adaptive)[1]
    assert now.notches.tolerance == 9.0


@given(
    table=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=30),
    shapes=st.integers(1, 12),
    total=st.integers(1, 9000),
)
def test_a_window_is_as_large_as_may_be_for_so_many_shapes(table, shapes, total):
    ats = np.cumsum([0] + [steps for steps, _ in table[:-1]]).tolist()
    rows = [[at, seqlen] for at, (_, seqlen) in zip(ats, table, strict=True)]
    schedule = Schedule.table(table=rows, global_batch_sequences=3, total_tokens=total)
    begins = [step for step in ats if step <= schedule.total_steps]
    begins = [step for step in begins if step == 0 or schedule.seqlen(step) != schedule.seqlen(step - 1)]
    begins = [schedule.tokens_before(step) for step in begins]
    with mock.patch("curriculum.order.WINDOW_SHAPES", shapes):
        tokens = default_window_tokens(schedule)
    assert tokens == min([last - first for first, last in zip(begins, begins[shapes:], strict=False)] + [1 << 25])


def test_a_run_keeps_its_window_over_schedules_that_would_have_another(store):
    turns = Schedule.from_function(lambda step: 3 + step % 2, steps=900, global_batch_sequences=2, epochs=2)
    even = Schedule.constant(seqlen=9, global_batch_sequences=3, epochs=2)
    with mock.patch("curriculum.order.WINDOW_SHAPES", 100), CurriculumLoader(store, turns, seed=3) as loader:
        assert loader.order.window_tokens == 700
        for _ in range(50):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.change_schedule(even)
        changed = [packed for _, packed in loader.planned(50)]
    with CurriculumLoader(store, even, seed=3) as loader:
        assert loader.order.window_tokens == 1 << 25
        loader.load_state_dict(state, change_schedule=True)
        assert loader.order.window_tokens == 700
        assert all(map(same, [packed for _, packed in loader.planned(50)], changed))
    other = CurriculumLoader(store, even, seed=3, window_tokens=701)
    with pytest.raises(RunError, match="another window_tokens"):
        other.load_state_dict(state, change_schedule=True)


def test_a_run_whose_table_is_named_by_its_digest_goes_on_and_changes(store):
    lengths = random.Random(3).choices(range(3, 6), k=3 * MOST_ROWS)
    long = Schedule.from_function(lambda step: lengths[step], steps=len(lengths), global_batch_sequences=2, epochs=2)
    short = Schedule.constant(seqlen=9, global_batch_sequences=3, epochs=2)
    assert len(long.phases) > MOST_ROWS
    with CurriculumLoader(store, long, seed=3) as loader:
        whole = [packed for _, packed in loader.planned()]
        for _ in range(50):
            next(loader)
        state = json.loads(json.dumps(loader.state_dict()))
        loader.change_schedule(short)
        changed = [packed for _, packed in loader.planned(50)]
        later = json.loads(json.dumps(loader.state_dict()))

    def resumed(schedule, state, **options):
        with CurriculumLoader(store, schedule, seed=3) as loader:
            loader.load_state_dict(state, **options)
            assert loader.step == 50
            assert loader.state_dict() == state or options.get("change_schedule")
            return [packed for _, packed in loader.planned(50)]

    assert all(map(same, resumed(long, state), whole[50:]))
    for options in ({}, {"change_schedule": True}):
        with pytest.raises(RunError, match="by its digest"):
            resumed(short, state, **options)
    assert all(map(same, resumed(short, state, change_schedule=True, earlier=[long]), changed))
    assert all(map(same, resumed(short, later, earlier=[long]), changed))
    assert not all(map(same, changed, whole[50:])), "the comparison compares nothing"
