"""SkyLadder (arXiv 2503.15450): full rows from the first step, attention within blocks of them that grow.

    row          aaaaaaabbbbbccc      pieces of documents a, b, c
    window 4     aaaa|aaab|bbbb|ccc   blocks from the start of the row, the last one shorter
    spans        aaaa|aaa|b|bbbb|ccc  with the document mask attention ends at both kinds of borders

The authors' released code (sail-sg/SkyLadder, lit_gpt/packed_dataset.py) cuts a row at the multiples of the window,
counted from the row's start; its "dm" arms at these alone (ours: model.mask = "causal"), its "intradm" arms also
where documents end (model.mask = "document", the default here). Positions are those of the uncut row. With rotary
positions it makes no difference whether a block counts from 0; with learned ones it does: `window_positions`.

The window at step t, from 0: w_s + floor((w_e - w_s) * p), p = t / T (linear) or sin(pi / 2 * t / T) (sine), or
floor(w_s * (w_e / w_s)**(t / T)) (exponential), rounded down to `window_multiple` but never below w_s; w_e from T on.
The rate alpha says T: linear grows by alpha a step, T = (w_e - w_s) / alpha.
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
    window_start: int = 32,
    window_end: int | None = None,
    window_shape: str = "linear",
    window_rate: str | float | None = None,
    window_multiple: int = 1,
    duration_steps: int | None = None,
    duration_tokens: int | None = None,
) -> Pacing:
    """Rows of `seqlen`, windows from `window_start` to `window_end` (default: the whole row).

    One of `duration_steps`, `duration_tokens` and `window_rate` (positions a step: 0.125 or "1/8"). "stepwise" is
    linear in stages of `window_multiple`. Raises ConfigError for what does not fit.
    """
    end = seqlen if window_end is None else window_end
    require_positive(seqlen=seqlen, window_start=window_start, window_end=end, window_multiple=window_multiple)
    if not window_start <= end <= seqlen:
        raise ConfigError(
            "windows grow from window_start to window_end, within a row",
            found=f"window_start = {window_start}, window_end = {end}, seqlen = {seqlen}",
            allowed="window_start <= window_end <= seqlen",
        )
    if window_shape not in SHAPES:
        raise ConfigError("unknown window_shape", found=window_shape, allowed=", ".join(SHAPES))
    if window_shape == "stepwise" and window_multiple == 1:
        raise ConfigError("stepwise windows need stages", found="window_multiple = 1", allowed="2 or more")
    if window_rate is not None:
        if (duration_steps, duration_tokens) != (None, None):
            raise ConfigError("give exactly one of window_rate, duration_steps and duration_tokens", found="several")
        rate = _rate(window_rate)
        if window_shape in ("linear", "stepwise"):
            return Pacing(((0, seqlen),), "steps", _windows(window_start, end, window_multiple, _at_rate(rate)))
        duration_steps = -((window_start - end) // rate)
    duration, unit = duration_of(duration_steps, duration_tokens)
    reach = SHAPES[window_shape](window_start, end, duration)
    windows = _windows(window_start, end, window_multiple, lambda window: reach(window_start + window))
    return Pacing(((0, seqlen),), unit, windows)


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
        raise ConfigError("window_rate must be a positive number", found=value, allowed='for example 0.125 or "1/8"')
    return rate
