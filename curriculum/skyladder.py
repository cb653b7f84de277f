"""SkyLadder (arXiv 2503.15450): full rows from the first step, attention within blocks of them that grow.

    row          aaaaaaabbbbbccc      pieces of documents a, b, c
    window of 4  aaaa|aaab|bbbb|ccc   blocks from the start of the row, the last one shorter
    spans        aaaa|aaa|b|bbbb|ccc  with the document mask attention ends at both kinds of borders

The authors' released code (sail-sg/SkyLadder, lit_gpt/packed_dataset.py) cuts a row at the multiples of the window,
counted from the row's start; its "dm" arms at these alone (ours: model.mask = "causal"), its "intradm" arms also
where documents end (model.mask = "document", the default here). Positions are those of the uncut row. With rotary
positions it makes no difference whether a block counts from 0; with learned ones it does: see
`attention_window_positions`.

The window at step t, from 0: w_s + floor((w_e - w_s) * p), p = t / T (linear) or sin(pi / 2 * t / T) (sine), or
floor(w_s * (w_e / w_s)**(t / T)) (exponential), rounded down to `attention_window_multiple` but never below w_s; w_e
from T on. The rate alpha says T: linear grows by alpha a step, T = (w_e - w_s) / alpha.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from curriculum.pacing import Pacing, Reach, duration_of, exponential_reach, require_positive, root_reach, sine_reach
from pipeline.errors import ConfigError

SHAPES: dict[str, Callable[[int, int, int], Reach]] = {
    "linear": lambda start, end, duration: root_reach(start, end, duration, 1),
    "stepwise": lambda start, end, duration: root_reach(start, end, duration, 1),
    "sine": sine_reach,
    "exponential": exponential_reach,
}


def skyladder(
    *,
    seqlen: int,
    attention_window_start: int = 32,
    attention_window_end: int | None = None,
    attention_window_shape: str = "linear",
    attention_window_rate: str | float | None = None,
    attention_window_multiple: int = 1,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
) -> Pacing:
    """Rows of `seqlen`, attention windows from `attention_window_start` to `attention_window_end` (default: the row).

    One of `duration_steps`, `duration_tokens` and `attention_window_rate` (positions a step: 0.125 or "1/8").
    "stepwise" is linear in stages of `attention_window_multiple`. Raises ConfigError for what does not fit.
    """
    start, multiple, shape = attention_window_start, attention_window_multiple, attention_window_shape
    end = seqlen if attention_window_end is None else attention_window_end
    require_positive(
        seqlen=seqlen, attention_window_start=start, attention_window_end=end, attention_window_multiple=multiple
    )
    if not start <= end <= seqlen:
        raise ConfigError(
            "attention windows grow, within a row",
            found=f"attention_window_start = {start}, attention_window_end = {end}, seqlen = {seqlen}",
            allowed="attention_window_start <= attention_window_end <= seqlen",
        )
    if shape not in SHAPES:
        raise ConfigError("unknown attention_window_shape", found=shape, allowed=", ".join(SHAPES))
    if shape == "stepwise" and multiple == 1:
        raise ConfigError("stepwise growth needs stages", found="attention_window_multiple = 1", allowed="2 or more")
    if attention_window_rate is not None:
        if (duration_steps, duration_tokens) != (None, None):
            names = "attention_window_rate, duration_steps and duration_tokens"
            raise ConfigError(f"give exactly one of {names}", found="several")
        rate = _rate(attention_window_rate)
        if shape in ("linear", "stepwise"):
            return Pacing(((0, seqlen),), "steps", _windows(start, end, multiple, _at_rate(rate)))
        duration_steps = -((start - end) // rate)
    duration, unit = duration_of(duration_steps, duration_tokens)
    reach = SHAPES[shape](start, end, duration)
    return Pacing(((0, seqlen),), unit, _windows(start, end, multiple, lambda gained: reach(start + gained)))


def _windows(start: int, end: int, multiple: int, reach: Reach) -> tuple[tuple[int, int], ...]:
    """(at, window) of each window; `reach(gained)` says when so much more than `start` is reached."""
    points = {0: start}
    for window in [*range(start - start % multiple + multiple, end, multiple), end]:
        points[reach(window - start)] = window
    return tuple(points.items())


def _at_rate(rate: Fraction) -> Reach:
    return lambda gained: -(-gained * rate.denominator // rate.numerator)


def _rate(value: str | float) -> Fraction:
    try:
        rate = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        allowed = 'for example 0.125 or "1/8"'
        raise ConfigError("attention_window_rate must be a positive number", found=value, allowed=allowed)
    return rate
