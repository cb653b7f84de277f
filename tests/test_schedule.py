"""Schedules: the paper's published step counts, and arithmetic equal to counting step by step."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.pacing import PACINGS
from curriculum.saved import from_json, to_json
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("sequences", "duration", "start", "end", "steps"),
    [
        (512, 60_000, 8, 1024, 330_000),
        (4096, 20_000, 8, 1024, 47_500),
        (512, 110_000, 8, 2048, 205_000),
        (512, 270_000, 64, 1024, 427_617),
        (4096, 45_000, 64, 1024, 58_769),
    ],
)
def test_published_step_counts(sequences, duration, start, end, steps):
    schedule = Schedule.linear(
        seqlen_start=start,
        seqlen_end=end,
        duration_steps=duration,
        seqlen_multiple=8,
        global_batch_sequences=sequences,
        total_tokens=157_286_400_000,
    )
    assert schedule.total_steps == steps


RAMP = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))


SHAPES = st.sampled_from(["linear", "root", "sine", "exponential"])


@given(SHAPES, RAMP, st.integers(1, 7), st.integers(1, 5000), st.booleans(), st.booleans())
def test_steps_and_tokens_equal_counting(shape, ramp, batch, total, by_tokens, in_tokens):
    low, high, duration, multiple, _ = ramp
    longest = max(low, high) * multiple
    size = {"global_batch_tokens": longest * batch} if by_tokens else {"global_batch_sequences": batch}
    schedule = getattr(Schedule, shape)(
        seqlen_start=low * multiple,
        seqlen_end=high * multiple,
        seqlen_multiple=multiple,
        total_tokens=total,
        **{"duration_tokens" if in_tokens else "duration_steps": duration * (20 if in_tokens else 1)},
        **size,
    )
    step = tokens = 0
    while tokens < total:
        assert schedule.tokens_before(step) == tokens
        sequences = longest * batch // schedule.seqlen(step) if by_tokens else batch
        assert schedule.sequences(step) == sequences
        end = schedule.end_of_phase(step)
        assert step < end <= schedule.total_steps
        assert schedule.seqlen(end - 1) == schedule.seqlen(step)
        tokens += schedule.seqlen(step) * sequences
        step += 1
    assert schedule.total_steps == step
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule


@given(SHAPES, RAMP, st.integers(1, 7))
def test_a_duration_in_tokens_is_a_function_of_tokens_seen(shape, ramp, batch):
    low, high, duration, multiple, _ = ramp
    ends = {"seqlen_start": low * multiple, "seqlen_end": high * multiple, "seqlen_multiple": multiple}
    pacing = PACINGS[shape](**ends, duration_tokens=duration * 20)
    schedule = getattr(Schedule, shape)(
        **ends, duration_tokens=duration * 20, global_batch_sequences=batch, total_tokens=10**6
    )
    for step in range(100):
        seen = schedule.tokens_before(step)
        assert schedule.seqlen(step) == [seqlen for at, seqlen in pacing.points if at <= seen][-1]


@given(SHAPES, RAMP, st.integers(1, 7), st.booleans())
def test_a_batch_warmup_serves_as_many_tokens_to_half_a_row_at_full_length(shape, ramp, batch, by_tokens):
    low, high, duration, multiple, _ = ramp
    low, high = sorted((low, high))
    full = high * multiple
    settings = {
        "seqlen_start": low * multiple,
        "seqlen_end": full,
        "seqlen_multiple": multiple,
        "duration_steps": duration,
        "total_tokens": 10**5,
        **({"global_batch_tokens": batch * full} if by_tokens else {"global_batch_sequences": batch}),
    }
    warmup = getattr(Schedule, shape)(**settings)
    control = getattr(Schedule, shape)(**settings, control="batch_warmup")
    debt = False
    for step in range(1, duration + 50):
        assert control.seqlen(step - 1) == full
        ahead = control.tokens_before(step) - warmup.tokens_before(step)
        smallest = control.sequences(step - 1) == 1
        assert 2 * ahead >= -full
        assert 2 * ahead <= full or smallest or debt
        debt = 2 * ahead > full
    assert from_json(json.loads(json.dumps(to_json(control)))) == control


def test_the_control_arm_of_the_paper_has_the_same_tokens_at_every_step():
    settings = {"seqlen_start": 8, "seqlen_end": 1024, "duration_steps": 60_000, "global_batch_sequences": 512}
    warmup = Schedule.linear(**settings, total_tokens=157_286_400_000)
    control = Schedule.linear(**settings, total_tokens=157_286_400_000, control="batch_warmup")
    assert control.total_steps == warmup.total_steps == 330_000
    assert all(control.tokens_before(step) == warmup.tokens_before(step) for step in range(0, 330_000, 977))
    assert (control.sequences(0), control.sequences(329_999), control.max_seqlen) == (4, 512, 1024)


def test_a_function_becomes_a_table():
    schedule = Schedule.from_function(
        lambda step: 8 << (step // 3), steps=9, global_batch_sequences=2, total_tokens=9
    )
    assert [schedule.seqlen(step) for step in range(12)] == [8] * 3 + [16] * 3 + [32] * 6
    last = Schedule.from_function([8, 8, 16].__getitem__, steps=3, global_batch_sequences=2, total_tokens=9)
    assert [last.seqlen(step) for step in range(4)] == [8, 8, 16, 16]


@pytest.mark.parametrize("at", [10**30, 10**15])
def test_steps_and_tokens_beyond_64_bits_are_refused(at):
    staged = {"seqlens": [1024, 8], "global_batch_sequences": 1 << 20}
    with pytest.raises(ConfigError, match="beyond what can be counted"):
        _ = Schedule.staged(**staged, boundaries=[at], total_tokens=1).total_steps
    with pytest.raises(ConfigError, match="beyond what can be counted"):
        _ = Schedule.constant(seqlen=1 << 32, global_batch_sequences=1 << 31, total_tokens=1).total_steps
    assert Schedule.staged(**staged, boundaries=[10**9], total_tokens=1).total_steps == 1


def test_state_is_small_for_any_number_of_lengths():
    schedule = Schedule.sine(
        seqlen_start=1,
        seqlen_end=4096,
        duration_steps=10**6,
        seqlen_multiple=1,
        global_batch_sequences=8,
        total_tokens=1,
    )
    assert len(schedule.phases) == 4096
    assert len(json.dumps(to_json(schedule))) < 1000


def test_a_change_keeps_the_past_and_takes_the_new_from_its_step():
    old = Schedule.linear(
        seqlen_start=8, seqlen_end=64, duration_steps=50, global_batch_sequences=4, total_tokens=9000
    )
    new = Schedule.constant(seqlen=128, global_batch_sequences=2, total_tokens=9999)
    both = old.changed_at(20, new)
    assert [both.seqlen(step) for step in range(20)] == [old.seqlen(step) for step in range(20)]
    assert {both.seqlen(20), both.seqlen(40)} == {128}
    assert both.sequences(19) == 4
    assert both.sequences(20) == 2
    assert both.total_tokens == 9999
    assert old.changed_at(20, old).phases == old.phases


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=8), st.data())
def test_shapes_are_those_of_the_steps_whatever_their_attention_windows(runs, data):
    table, steps = [], 0
    for length, seqlen in runs:
        table.append([steps, 16 * seqlen])
        steps += length
    end = {"global_batch_sequences": 2, "total_tokens": 10**4}
    windows = Schedule.skyladder(seqlen=32, attention_window_start=1, attention_window_rate="1/2", **end)
    schedule = Schedule.table(table=table, **end).changed_at(steps, windows)
    shapes = [(schedule.seqlen(step), schedule.sequences(step)) for step in range(steps + 20)]
    borders = [step for step in range(1, len(shapes)) if shapes[step] != shapes[step - 1]]
    for step in range(steps + 10):
        assert schedule.end_of_phase(step) == next((b for b in borders if b > step), schedule.total_steps)
    step = data.draw(st.integers(0, steps + 10))
    until = data.draw(st.integers(step + 1, steps + 15))
    first, seqlens, sequences = schedule.phases.shapes(step, until)
    assert first.tolist() == [step, *(border for border in borders if step < border <= until)]
    assert list(zip(seqlens, sequences, strict=True)) == [shapes[at] for at in first[:-1]]


def test_epochs_become_tokens_and_too_long_schedules_say_how_many_epochs():
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=2, epochs=3)
    with pytest.raises(ConfigError, match=r"epochs = 3\s+to do: .*CurriculumLoader\(store"):
        _ = schedule.total_steps
    assert schedule.resolve(100).total_tokens == 300
    assert schedule.resolve(100).total_steps == 19
    long = Schedule.constant(seqlen=8, global_batch_sequences=2, total_tokens=250)
    with pytest.raises(ConfigError, match=r"2\.50 epochs[\s\S]*max_epochs = 3"):
        long.resolve(100)
    assert dataclasses.replace(long, max_epochs=3).resolve(100).total_steps == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pacing": "cubic"}, "constant, linear, root, sine"),
        ({"pacing": "linear", "seqlen_start": 8}, "seqlen_end missing"),
        ({"pacing": "constant", "seqlen": 8, "degree": 2}, "degree not used"),
        ({"pacing": "constant", "seqlen": 8, "control": "none"}, "batch_warmup"),
        ({"pacing": "adaptive", "seqlen_start": 8, "seqlen_end": 16, "control": "batch_warmup"}, "known beforehand"),
        ({"pacing": "root", "seqlen_start": 8, "seqlen_end": 16, "degree": 1.5}, "degree is a whole number"),
    ],
)
def test_odd_settings_are_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        Schedule.from_settings(settings, {"global_batch_sequences": 1}, total_tokens=10)


def test_an_epoch_of_an_adaptive_length_by_truncation_has_no_end():
    ramp = {"seqlen_start": 8, "seqlen_end": 16, "global_batch_sequences": 2}
    with pytest.raises(ConfigError, match="not known beforehand"):
        Schedule.adaptive(**ramp, epochs=1, dealing="truncate")
    assert Schedule.adaptive(**ramp, total_tokens=64, dealing="truncate").resolve(1000).total_steps == 4


def test_batch_and_end_are_given_once():
    for wrong in ({}, {"global_batch_sequences": 1, "global_batch_tokens": 9}, {"global_batch_sequences": 0}):
        with pytest.raises(ConfigError, match="global_batch"):
            Schedule.constant(seqlen=8, total_tokens=9, **wrong)
    with pytest.raises(ConfigError, match="less than one sequence"):
        Schedule.constant(seqlen=8, total_tokens=9, global_batch_tokens=7)
    with pytest.raises(ConfigError, match="max_epochs must be positive"):
        Schedule.constant(seqlen=8, global_batch_sequences=1, total_tokens=9, max_epochs=0)
    with pytest.raises(ConfigError, match="total_tokens and epochs"):
        Schedule.constant(seqlen=8, global_batch_sequences=1, epochs=1, total_tokens=1)


def test_a_batch_warmup_needs_a_schedule_that_ends_at_its_longest():
    with pytest.raises(ConfigError, match="end at their longest length"):
        Schedule.staged(
            seqlens=[16, 8], boundaries=[5], global_batch_sequences=2, total_tokens=9, control="batch_warmup"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen_start": "8"}, "seqlen_start is a whole number"),
        ({"global_batch_sequences": 6.5}, "global_batch_sequences is a whole number"),
        ({"epochs": None, "total_tokens": 1e6}, r"total_tokens is a whole number[\s\S]*1000000.0"),
        ({"seqlen_multiple": True}, "seqlen_multiple is a whole number"),
        ({"max_epochs": 0}, "max_epochs must be positive"),
        ({"epochs": None, "total_tokens": 1 << 62}, "total_tokens cannot be counted"),
        ({"seqlen_end": 1 << 40}, r"too many lengths[\s\S]*137,438,953,471 from"),
        ({"epoch": 1}, r"epoch not used[\s\S]*epochs"),
    ],
)
def test_what_is_no_whole_number_or_no_keyword_is_refused(changes, message):
    given = {"seqlen_start": 8, "seqlen_end": 64, "duration_steps": 9, "global_batch_sequences": 4, "epochs": 1}
    with pytest.raises(ConfigError, match=message):
        Schedule.linear(**{**given, **changes})


def test_numpy_numbers_become_plain_ones():
    given = {"seqlen_start": 8, "seqlen_end": 64, "duration_steps": 9, "epochs": 1}
    schedule = Schedule.linear(**given, global_batch_sequences=np.int64(4))
    assert json.loads(json.dumps(to_json(schedule)))["settings"]["batch"]["global_batch_sequences"] == 4


@pytest.mark.parametrize("table", [[[0, 8.5]], [["a", 8]], [[0, None]], "8", 8, [[0, True], [2, None]]])
def test_a_table_is_of_whole_numbers(table):
    with pytest.raises(ConfigError, match="table is a list of whole numbers"):
        Schedule.table(table=table, global_batch_sequences=4, epochs=1)


def test_a_table_may_be_an_array_and_its_state_is_plain_json():
    rows = [[0, 8], [3, 16]]
    of_array = Schedule.table(table=np.array(rows), global_batch_sequences=4, epochs=1)
    assert of_array == Schedule.table(table=rows, global_batch_sequences=4, epochs=1)
    assert json.loads(json.dumps(of_array.settings))["curriculum"]["table"] == rows


def test_more_epochs_than_can_be_counted_are_refused():
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=4, epochs=1 << 61)
    with pytest.raises(ConfigError, match="more epochs than can be counted"):
        schedule.resolve(2)
