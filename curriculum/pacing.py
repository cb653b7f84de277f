"""Pacing functions: which sequence length from where on. No float decides, so that every machine agrees.

A pacing lists (at, seqlen): the length holds from `at` on, counted in steps from 0, or in tokens served before the
step. A ramp is solved for its argument, length by length: `reach(L)` is the least t at which it has come to L. Each
function raises ConfigError for what does not fit.

    linear        L_s + (L_e - L_s) * min(t / T, 1)                    arXiv 2108.06084, section 3
    root          L_s + (L_e - L_s) * min(t / T, 1)**(1 / degree)      there too
    sine          L_s + (L_e - L_s) * sin(pi / 2 * min(t / T, 1))      arXiv 2503.15450 has it for attention windows
    exponential   L_s * (L_e / L_s)**min(t / T, 1)                     there too

each rounded down to `seqlen_multiple` (up where it falls), t counted from 1 in steps, from 0 in tokens. Linear and
root are exact in integers. Sine compares 50-digit integers and exponential 50-digit decimals, whose logarithm is
rounded correctly by definition: neither asks the machine's libm, and a tie closer than 1e-30 counts as reached.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Literal

from pipeline.errors import ConfigError

Points = tuple[tuple[int, int], ...]
Reach = Callable[[int], int]

SCALE = 10**50
HALF_PI = 157079632679489661923132169163975144209858469968755
"""pi / 2 * SCALE."""
CONTEXT = decimal.Context(prec=50, rounding=decimal.ROUND_HALF_EVEN)
TIE = 10**30
"""Fractions of a step below 1 / TIE are none: an exact tie must not depend on the last digit."""

MOST_LENGTHS = 1 << 20
"""Lengths that a ramp goes through at most."""


@dataclass(frozen=True)
class Pacing:
    """Lengths, and for SkyLadder attention windows, with where they begin."""

    points: Points
    """(at, seqlen), increasing from at = 0."""
    unit: Literal["steps", "tokens"] = "steps"
    attention_windows: Points = ()
    """(at, positions) in the same unit; empty: whole rows."""


def constant(*, seqlen: int) -> Pacing:
    """One length from the first step to the last."""
    require_positive(seqlen=seqlen)
    return Pacing(((0, seqlen),))


def linear(
    *,
    seqlen_start: int,
    seqlen_end: int,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
    seqlen_multiple: int = 8,
) -> Pacing:
    """Grow evenly from `seqlen_start` to `seqlen_end`: Sequence Length Warmup. Falls where the end is the smaller.

    As in all ramps: one of `duration_steps` and `duration_tokens`; both lengths are multiples of `seqlen_multiple`.
    """
    return root(
        seqlen_start=seqlen_start,
        seqlen_end=seqlen_end,
        duration_steps=duration_steps,
        duration_tokens=duration_tokens,
        seqlen_multiple=seqlen_multiple,
        degree=1,
    )


def root(
    *,
    seqlen_start: int,
    seqlen_end: int,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
    seqlen_multiple: int = 8,
    degree: int = 2,
) -> Pacing:
    """Grow as progress**(1/degree): fast at first, then slower."""
    require_positive(degree=degree)
    duration, unit = duration_of(duration_steps, duration_tokens)
    reach = root_reach(seqlen_start, seqlen_end, duration, degree)
    return _ramp(seqlen_start, seqlen_end, seqlen_multiple, reach, unit)


def sine(
    *,
    seqlen_start: int,
    seqlen_end: int,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
    seqlen_multiple: int = 8,
) -> Pacing:
    """Grow as a quarter of a sine: fast at first, flat at the end."""
    duration, unit = duration_of(duration_steps, duration_tokens)
    return _ramp(seqlen_start, seqlen_end, seqlen_multiple, sine_reach(seqlen_start, seqlen_end, duration), unit)


def exponential(
    *,
    seqlen_start: int,
    seqlen_end: int,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
    seqlen_multiple: int = 8,
) -> Pacing:
    """Grow by equal factors in equal times: slow at first."""
    duration, unit = duration_of(duration_steps, duration_tokens)
    require_positive(seqlen_start=seqlen_start, seqlen_end=seqlen_end)
    reach = exponential_reach(seqlen_start, seqlen_end, duration)
    return _ramp(seqlen_start, seqlen_end, seqlen_multiple, reach, unit)


def staged(
    *, seqlens: Sequence[int], boundaries: Sequence[int] | None = None, boundaries_tokens: Sequence[int] | None = None
) -> Pacing:
    """`seqlens[0]` first, `seqlens[i]` from `boundaries[i - 1]` on: steps, or tokens seen.

    Two lengths are two-stage training (Shortformer, arXiv 2012.15832).
    """
    if (boundaries is None) == (boundaries_tokens is None):
        raise ConfigError("give exactly one of boundaries and boundaries_tokens")
    ends = list(boundaries if boundaries is not None else boundaries_tokens or [])
    if len(ends) != len(seqlens) - 1:
        raise ConfigError(
            "staged pacing needs one boundary between each two lengths",
            found=f"{len(seqlens)} seqlens, {len(ends)} boundaries",
            allowed=f"{max(len(seqlens) - 1, 0)} boundaries",
        )
    rows = list(zip([0, *ends], seqlens, strict=True))
    return table(table=rows, table_unit="steps" if boundaries is not None else "tokens")


def table(*, table: Sequence[Sequence[int]], table_unit: Literal["steps", "tokens"] = "steps") -> Pacing:
    """Rows of (at, seqlen), the first at 0, increasing: any schedule whatever."""
    if table_unit not in ("steps", "tokens"):
        raise ConfigError("unknown unit of a table", found=table_unit, allowed="steps, tokens")
    odd = next((row for row in table if not isinstance(row, Sequence) or len(row) != 2), None)
    if not table or odd is not None:
        raise ConfigError(
            "a table has rows of two numbers", found="none" if odd is None else odd, allowed=f"[{table_unit}, seqlen]"
        )
    if min(seqlen for _, seqlen in table) < 1:
        require_positive(**{f"seqlen of row {i}": seqlen for i, (_, seqlen) in enumerate(table)})
    wrong = next((f"{late} after {early}" for (early, _), (late, _) in pairwise(table) if late <= early), None)
    if table[0][0] != 0 or wrong:
        found = wrong or f"{table[0][0]} in the first row, which begins at 0"
        raise ConfigError(f"boundaries must be increasing {table_unit} above 0", found=found)
    return Pacing(tuple((at, seqlen) for at, seqlen in table), table_unit)


PACINGS: dict[str, Callable[..., Pacing]] = {
    "constant": constant,
    "linear": linear,
    "root": root,
    "sine": sine,
    "exponential": exponential,
    "staged": staged,
    "table": table,
}


def root_reach(start: int, end: int, duration: int, degree: int) -> Reach:
    """The least t with |end - start| * (t / duration)**(1/degree) >= |value - start|, exact."""
    whole = abs(end - start) ** degree or 1
    return lambda value: -(-duration * abs(value - start) ** degree // whole)


def sine_reach(start: int, end: int, duration: int) -> Reach:
    """The least t with |end - start| * sin(pi / 2 * t / duration) >= |value - start|."""
    distance = abs(end - start) or 1

    def reach(value: int) -> int:
        gained = abs(value - start)
        if gained in (0, distance):
            return duration if gained else 0
        wanted = gained * SCALE // distance - SCALE // TIE
        t = int(duration * math.asin(gained / distance) * 2 / math.pi)  # a guess: what follows does not depend on it
        while _sine(t, duration) < wanted:
            t += 1
        while t > 0 and _sine(t - 1, duration) >= wanted:
            t -= 1
        return t

    return reach


def exponential_reach(start: int, end: int, duration: int) -> Reach:
    """The least t with (end / start)**(t / duration) at or beyond value / start."""

    def logarithm(value: int) -> Decimal:
        return CONTEXT.ln(CONTEXT.divide(Decimal(value), Decimal(start)))

    whole = logarithm(end)

    def reach(value: int) -> int:
        if value in (start, end):
            return 0 if value == start else duration
        exact = CONTEXT.divide(CONTEXT.multiply(Decimal(duration), logarithm(value)), whole)
        return int(CONTEXT.subtract(exact, Decimal(1) / TIE).to_integral_value(decimal.ROUND_CEILING))

    return reach


def duration_of(steps: int | None, tokens: int | None) -> tuple[int, Literal["steps", "tokens"]]:
    """The duration that is given, and its unit. Raises ConfigError unless exactly one is."""
    if (steps is None) == (tokens is None):
        found = "neither" if steps is None else "both"
        raise ConfigError("give exactly one of duration_steps and duration_tokens", found=found)
    name, value = ("duration_steps", steps) if steps is not None else ("duration_tokens", tokens)
    assert value is not None
    if value < 0:
        raise ConfigError(f"{name} must not be negative", found=value, allowed="0 or more")
    return value, "steps" if steps is not None else "tokens"


def require_positive(**values: int) -> None:
    """Raise ConfigError where a value is below 1."""
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be positive", found=value, allowed="1 or more")


def require_multiples(start: int, end: int, multiple: int) -> None:
    """Raise ConfigError where `seqlen_start` or `seqlen_end` is no positive multiple of `seqlen_multiple`."""
    require_positive(seqlen_start=start, seqlen_end=end, seqlen_multiple=multiple)
    for name, value in (("seqlen_start", start), ("seqlen_end", end)):
        if value % multiple:
            below = value - value % multiple
            nearest = sorted({max(below, multiple), below + multiple})
            raise ConfigError(
                f"{name} is not a multiple of seqlen_multiple",
                found=f"{name} = {value}, seqlen_multiple = {multiple}",
                allowed=" or ".join(str(near) for near in nearest),
            )


def _ramp(start: int, end: int, multiple: int, reach: Reach, unit: Literal["steps", "tokens"]) -> Pacing:
    require_multiples(start, end, multiple)
    if (lengths := abs(end - start) // multiple) > MOST_LENGTHS:
        raise ConfigError(
            "a ramp of too many lengths",
            found=f"{lengths:,} from seqlen_start = {start:,} to seqlen_end = {end:,}",
            allowed=f"{MOST_LENGTHS:,}",
            remedy="raise seqlen_multiple, or end sooner",
        )
    first = 1 if unit == "steps" else 0  # the step counted 1 is step 0; no token is seen before it
    points = {0: start}
    for value in range(start, end, multiple if end > start else -multiple):
        following = value + (multiple if end > start else -multiple)
        points[max(reach(following) - first, 0)] = following
    return Pacing(tuple(points.items()), unit)


def _sine(t: int, duration: int) -> int:
    """sin(pi / 2 * t / duration) * SCALE by its series in integers; 0 <= t <= duration, else 1."""
    if t >= duration:
        return SCALE
    x = HALF_PI * t // duration
    square, term, total, n = x * x // SCALE, x, x, 1
    while term:
        n += 2
        term = term * square // (SCALE * (n - 1) * n)
        total += term if n % 4 == 1 else -term
    return total
