"""Means with their intervals, correlations with their p-values: what a table of several seeds needs.

Student's t from the regularised incomplete beta function, by its continued fraction (Numerical Recipes, 6.4), so that
no further package is needed.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of n numbers and half the width of its interval."""

    mean: float
    half: float | None
    """None of one number: nothing is known of its scatter."""
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class Correlation:
    """Pearson's r of n pairs; p, two-sided, as if the pairs were independent (steps of a run are not: a hint)."""

    r: float
    n: int
    p: float


def mean_of(values: Sequence[float], confidence: float = CONFIDENCE) -> Mean:
    """The mean of finite numbers, one or more, and their t-interval: mean +- t(n - 1) * s / sqrt(n)."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Mean(mean, None, 1)
    return Mean(mean, t_quantile(0.5 + confidence / 2, n - 1) * statistics.stdev(values) / math.sqrt(n), n)


def p_of(mean: Mean) -> float | None:
    """Two-sided p that the mean behind a `mean_of` is 0, by Student's t; None of one number."""
    if mean.half is None:
        return None
    if mean.half == 0:
        return float(mean.mean == 0)
    return t_two_sided(mean.mean / mean.half * t_quantile(0.5 + CONFIDENCE / 2, mean.n - 1), mean.n - 1)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values of questions asked together, adjusted: below a when the chance of any error is to be a (Holm 1979)."""
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """Pearson's correlation of pairs, those that are not finite left out.

    None where fewer than three are left, or one side is constant.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    n = len(pairs)
    if n < 3:
        return None
    try:
        r = max(-1.0, min(1.0, statistics.correlation(*zip(*pairs, strict=True))))
    except statistics.StatisticsError:  # a side is constant
        return None
    if abs(r) == 1:
        return Correlation(r, n, 0.0)
    return Correlation(r, n, t_two_sided(r * math.sqrt((n - 2) / (1 - r * r)), n - 2))


def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| > |t|) of Student's T with `freedom` degrees of freedom: I_x(f / 2, 1 / 2) at x = f / (f + t**2)."""
    return _beta(freedom / (freedom + t * t), freedom / 2, 0.5)


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, for p of 0.5 to below 1; by bisection."""
    low, high = 0.0, 1.0
    while t_two_sided(high, freedom) > 2 * (1 - p):
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > 2 * (1 - p) else (low, middle)
    return high


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction of the other side converges sooner
        return 1 - _beta(1 - x, b, a)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), evaluated from the back: 300 terms are plenty for x on this side."""
    value = 1.0
    for term in range(300, 0, -1):
        m = term // 2
        if term % 2 == 0:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        value = 1 + d / value
    return value
