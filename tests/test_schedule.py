"""Schedules: the paper's published step counts, and arithmetic equal to counting step by step."""

import dataclasses
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.pacing import linear, root, staged
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


@given(RAMP)
def test_ramps_equal_the_published_formula_at_every_step(ramp):
    low, high, duration, multiple, degree = ramp
    low, high = sorted((low, high))
    start, end = low * multiple, high * multiple
    pacing = root(
        seqlen_start=start, seqlen_end=end, duration_steps=duration, seqlen_multiple=multiple, degree=degree
    )
    schedule = Schedule.from_pacing(pacing, global_batch_sequences=1, total_tokens=1)
    for step in range(duration + 3):
        # L <= the formula's value  <=>  ((L - start) / (end - start))**degree <= t / T
        progress = min(Fraction(step + 1, duration), Fraction(1)) if duration else Fraction(1)
        reached = [
            length
            for length in range(start, end + 1, multiple)
            if length == start or Fraction(length - start, end - start) ** degree <= progress
        ]
        assert schedule.seqlen(step) == reached[-1]
    assert linear(seqlen_start=start, seqlen_end=end, duration_steps=duration, seqlen_multiple=multiple) == root(
        seqlen_start=start, seqlen_end=end, duration_steps=duration, seqlen_multiple=multiple, degree=1
    )


@given(RAMP, st.integers(1, 7), st.integers(1, 5000), st.booleans())
def test_steps_and_tokens_equal_counting(ramp, batch, total, by_tokens):
    low, high, duration, multiple, degree = ramp
    longest = max(low, high) * multiple
    size = {"global_batch_tokens": longest * batch} if by_tokens else {"global_batch_sequences": batch}
    schedule = Schedule.root(
        seqlen_start=low * multiple,
        seqlen_end=high * multiple,
        duration_steps=duration,
        seqlen_multiple=multiple,
        degree=degree,
        total_tokens=total,
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
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


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


def test_epochs_become_tokens_and_too_long_schedules_say_how_many_epochs():
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=2, epochs=3)
    with pytest.raises(ConfigError, match="resolve"):
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
        ({"pacing": "cubic"}, "constant, linear, root, staged"),
        ({"pacing": "linear", "seqlen_start": 8}, "seqlen_end missing, duration_steps missing"),
        ({"pacing": "constant", "seqlen": 8, "degree": 2}, "degree not used"),
        ({"pacing": "linear", "seqlen_start": 6, "seqlen_end": 64, "duration_steps": 9}, r"allowed: 8$"),
        ({"pacing": "linear", "seqlen_start": 8, "seqlen_end": 64, "duration_steps": -1}, "0 or more"),
        ({"pacing": "constant", "seqlen": 0}, "1 or more"),
        ({"pacing": "staged", "seqlens": [8, 16], "boundaries": []}, "1 boundaries"),
        ({"pacing": "staged", "seqlens": [8, 16, 8], "boundaries": [5, 5]}, "increasing"),
    ],
)
def test_odd_settings_are_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        Schedule.from_settings(settings, {"global_batch_sequences": 1}, total_tokens=10)


def test_batch_and_end_are_given_once():
    for wrong in ({}, {"global_batch_sequences": 1, "global_batch_tokens": 9}, {"global_batch_sequences": 0}):
        with pytest.raises(ConfigError, match="global_batch"):
            Schedule.constant(seqlen=8, total_tokens=9, **wrong)
    with pytest.raises(ConfigError, match="less than one sequence"):
        Schedule.constant(seqlen=8, total_tokens=9, global_batch_tokens=7)
    with pytest.raises(ConfigError, match="total_tokens and epochs"):
        Schedule.constant(seqlen=8, global_batch_sequences=1, epochs=1, total_tokens=1)


def test_staged_lengths_may_fall():
    assert staged(seqlens=[64, 8], boundaries=[10]) == ((0, 64), (10, 8))
