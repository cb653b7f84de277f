"""Pacings: every shape equals its published formula at every step, exactly; bounds, multiples, extremes."""

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.pacing import PACINGS, exponential, linear, root, sine, staged, table
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError

RAMPS = ("linear", "root", "sine", "exponential")
RAMP = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))


def lengths_of(pacing, steps):
    schedule = Schedule.table(table=[list(p) for p in pacing.points], global_batch_sequences=1, total_tokens=1)
    return [schedule.seqlen(step) for step in range(steps)]


@given(RAMP)
def test_ramps_equal_the_published_formula_at_every_step(ramp):
    low, high, duration, multiple, degree = ramp
    low, high = sorted((low, high))
    start, end = low * multiple, high * multiple
    ends = {"seqlen_start": start, "seqlen_end": end, "duration_steps": duration, "seqlen_multiple": multiple}
    pacing = root(**ends, degree=degree)
    for step, seqlen in enumerate(lengths_of(pacing, duration + 3)):
        # L <= the formula's value  <=>  ((L - start) / (end - start))**degree <= t / T
        progress = min(Fraction(step + 1, duration), Fraction(1)) if duration else Fraction(1)
        reached = [
            length
            for length in range(start, end + 1, multiple)
            if length == start or Fraction(length - start, end - start) ** degree <= progress
        ]
        assert seqlen == reached[-1]
    assert linear(**ends) == root(**ends, degree=1)


@given(RAMP)
def test_sine_and_exponential_equal_their_formulas_at_every_step(ramp):
    low, high, duration, multiple, _ = ramp
    low, high = sorted((low, high))
    start, end = low * multiple, high * multiple
    ends = {"seqlen_start": start, "seqlen_end": end, "duration_steps": duration, "seqlen_multiple": multiple}
    formulas = {
        "sine": lambda x: start + (end - start) * mpmath.sin(mpmath.pi / 2 * x),
        "exponential": lambda x: start * mpmath.mpf(end) ** x / mpmath.mpf(start) ** x,
    }
    with mpmath.workdps(60):
        for name, formula in formulas.items():
            for step, seqlen in enumerate(lengths_of(PACINGS[name](**ends), duration + 3)):
                progress = min(mpmath.mpf(step + 1) / duration, mpmath.mpf(1)) if duration else mpmath.mpf(1)
                exact = int(mpmath.floor(formula(progress) + mpmath.mpf(10) ** -25))
                assert seqlen == exact // multiple * multiple


@given(st.sampled_from(RAMPS), RAMP)
def test_ramps_stay_in_bounds_and_go_one_way_from_start_to_end(name, ramp):
    low, high, duration, multiple, _ = ramp
    start, end = low * multiple, high * multiple
    for unit in ("steps", "tokens"):
        pacing = PACINGS[name](
            seqlen_start=start, seqlen_end=end, seqlen_multiple=multiple, **{f"duration_{unit}": duration}
        )
        starts, seqlens = zip(*pacing.points, strict=True)
        assert starts[0] == 0
        assert list(starts) == sorted(set(starts))
        assert starts[-1] <= duration
        assert all(seqlen % multiple == 0 and min(start, end) <= seqlen <= max(start, end) for seqlen in seqlens)
        assert list(seqlens) == sorted(seqlens, reverse=end < start)
        assert seqlens[-1] == end
        if duration > 1:
            assert seqlens[0] == start or unit == "steps"


@given(st.sampled_from(RAMPS), st.integers(1, 64), st.integers(1, 64))
def test_a_fall_is_a_rise_mirrored_in_the_lengths_but_for_exponential(name, low, high):
    if name == "exponential":
        return
    ends = {"duration_steps": 97, "seqlen_multiple": 1}
    rise = lengths_of(PACINGS[name](seqlen_start=low, seqlen_end=high, **ends), 100)
    fall = lengths_of(PACINGS[name](seqlen_start=high, seqlen_end=low, **ends), 100)
    assert [low + high - seqlen for seqlen in rise] == fall


@pytest.mark.parametrize("name", RAMPS)
def test_extreme_durations(name):
    ends = {"seqlen_start": 8, "seqlen_end": 32}
    assert lengths_of(PACINGS[name](**ends, duration_steps=0), 2) == [32, 32]
    assert lengths_of(PACINGS[name](**ends, duration_steps=1), 2) == [32, 32]
    assert lengths_of(PACINGS[name](seqlen_start=16, seqlen_end=16, duration_steps=5), 7) == [16] * 7
    assert PACINGS[name](**ends, duration_tokens=0).points == ((0, 32),)
    assert PACINGS[name](**ends, duration_tokens=1).points[-1] == (1, 32)
    long = PACINGS[name](**ends, duration_tokens=10**18)
    assert long.points[-1] == (10**18, 32)


def test_exact_ties_are_reached_not_missed():
    # sin(pi / 6) = 1 / 2 at a third of the way; a factor of 4 in two halves of a factor of 2.
    halfway = dict(sine(seqlen_start=2, seqlen_end=4, duration_tokens=3 * 10**12, seqlen_multiple=1).points)
    assert halfway[10**12] == 3
    doubled = dict(exponential(seqlen_start=8, seqlen_end=32, duration_tokens=2 * 10**12, seqlen_multiple=8).points)
    assert doubled[10**12] == 16


def test_no_float_decides():
    # Where doubles cannot tell the side of a step, 50 digits do: compare with 80.
    duration = 10**17 + 3
    points = dict(sine(seqlen_start=1, seqlen_end=1000, duration_tokens=duration, seqlen_multiple=1).points)
    with mpmath.workdps(80):
        chosen = list(points.items())[1::97]
        for at, seqlen in chosen:
            assert at == int(mpmath.ceil(mpmath.asin(mpmath.mpf(seqlen - 1) / 999) * 2 / mpmath.pi * duration))
    in_doubles = [math.ceil(math.asin((seqlen - 1) / 999) * 2 / math.pi * duration) for _, seqlen in chosen]
    assert in_doubles != [at for at, _ in chosen]


def test_staged_and_tables_may_fall_and_count_in_tokens():
    assert staged(seqlens=[64, 8], boundaries=[10]).points == ((0, 64), (10, 8))
    assert staged(seqlens=[64, 8], boundaries_tokens=[10]) == table(table=[(0, 64), (10, 8)], table_unit="tokens")


@pytest.mark.parametrize(
    ("pacing", "settings", "message"),
    [
        ("linear", {"seqlen_start": 6, "seqlen_end": 64, "duration_steps": 9}, r"allowed: 8$"),
        ("linear", {"seqlen_start": 8, "seqlen_end": 64, "duration_steps": -1}, "0 or more"),
        ("linear", {"seqlen_start": 8, "seqlen_end": 64}, "neither"),
        ("sine", {"seqlen_start": 8, "seqlen_end": 64, "duration_steps": 1, "duration_tokens": 1}, "both"),
        ("exponential", {"seqlen_start": 0, "seqlen_end": 64, "duration_steps": 1}, "1 or more"),
        ("constant", {"seqlen": 0}, "1 or more"),
        ("staged", {"seqlens": [8, 16], "boundaries": []}, "1 boundaries"),
        ("staged", {"seqlens": [8, 16]}, "exactly one"),
        ("staged", {"seqlens": [8, 16, 8], "boundaries": [5, 5]}, "increasing"),
        ("table", {"table": [[1, 8]]}, "increasing"),
        ("table", {"table": [[0, 8, 8]]}, "two numbers"),
        ("table", {"table": [[0, 8]], "table_unit": "epochs"}, "steps, tokens"),
    ],
)
def test_odd_parameters_are_refused_with_what_is_allowed(pacing, settings, message):
    with pytest.raises(ConfigError, match=message):
        PACINGS[pacing](**settings)
