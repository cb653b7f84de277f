"""Student's t and Pearson's r against published quantiles and plain recomputation."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.statistics import correlation, holm, mean_of, p_of, t_quantile, t_two_sided


@pytest.mark.parametrize(
    ("p", "freedom", "t"),
    [(0.975, 1, 12.7062), (0.975, 4, 2.7764), (0.95, 10, 1.8125), (0.995, 3, 5.8409), (0.975, 100_000, 1.95999)],
)
def test_quantiles_are_those_of_the_tables(p, freedom, t):
    assert math.isclose(t_quantile(p, freedom), t, rel_tol=5e-5)
    assert math.isclose(t_two_sided(t, freedom), 2 * (1 - p), rel_tol=1e-3)


@given(st.floats(0, 1e3), st.integers(1, 10_000))
def test_two_sided_probabilities_of_one_and_two_degrees_are_their_closed_forms(t, freedom):
    assert math.isclose(t_two_sided(t, 1), 1 - 2 / math.pi * math.atan(t), rel_tol=1e-7, abs_tol=1e-9)
    assert math.isclose(t_two_sided(t, 2), 1 - t / math.sqrt(2 + t * t), rel_tol=1e-7, abs_tol=1e-9)
    assert 0 <= t_two_sided(t + 0.1, freedom) <= t_two_sided(t, freedom) <= 1


def test_a_mean_and_its_interval():
    values = [1.0, 2.0, 4.0, 8.0, 3.0]
    found = mean_of(values)
    assert (found.n, found.mean) == (5, statistics.fmean(values))
    assert math.isclose(found.half, 2.77645 * statistics.stdev(values) / math.sqrt(5), rel_tol=1e-5)
    assert mean_of([3.0]).half is None


def test_intervals_cover_the_mean_as_often_as_they_say():
    drawn = random.Random(1)
    trials = [mean_of([drawn.gauss(5, 2) for _ in range(4)]) for _ in range(2000)]
    covered = sum(abs(trial.mean - 5) <= trial.half for trial in trials) / 2000
    assert 0.935 < covered < 0.965


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=3, max_size=30))
def test_correlations_are_those_of_the_standard_library(pairs):
    xs, ys = zip(*pairs, strict=True)
    if min(statistics.pstdev(xs), statistics.pstdev(ys)) < 1e-3:
        return
    found = correlation(xs, ys)
    assert math.isclose(found.r, statistics.correlation(xs, ys), abs_tol=1e-9)
    with_hole = correlation([*xs, math.nan, 1.0], [*ys, 1.0, math.inf])
    assert with_hole == found


def test_p_values_of_pure_chance_are_uniform():
    drawn = random.Random(2)
    ps = [correlation([drawn.random() for _ in range(9)], [drawn.random() for _ in range(9)]).p for _ in range(2000)]
    assert 0.03 < sum(p < 0.05 for p in ps) / 2000 < 0.07
    assert correlation([1, 2, 3, 4], [2, 4, 6, 8]).p < 1e-12
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    assert correlation([1, 2], [1, 2]) is None


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=9))
def test_an_interval_leaves_out_zero_where_p_is_below_a_twentieth(values):
    mean = mean_of(values)
    p = p_of(mean)
    if abs(abs(mean.mean) - mean.half) > 1e-6:
        assert (p < 0.05) == (abs(mean.mean) > mean.half)
    assert p_of(mean_of(values[:1])) is None


def test_p_of_a_mean_is_that_of_the_tables():
    assert math.isclose(p_of(mean_of([1.0, 2.0, 3.0])), 0.0741799, rel_tol=1e-5)  # t = 2 sqrt(3), 2 degrees
    assert (p_of(mean_of([2.0, 2.0])), p_of(mean_of([0.0, 0.0]))) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.3))
def test_holm_rejects_what_the_step_down_procedure_rejects(ps, level):
    rejected = set()
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[index] * (len(ps) - rank) > level:
            break
        rejected.add(index)
    assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected


def test_holm_keeps_the_chance_of_any_error_and_p_values_their_place():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
