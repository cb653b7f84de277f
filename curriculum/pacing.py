"""Pacing functions: which sequence length from which step on. Integers only, so that every machine agrees.

A pacing is a tuple of (first_step, seqlen), steps counted from 0. The published rule (arXiv 2108.06084, section 3)
is L(t) = L_s + (L_e - L_s) * min(t / T, 1)**(1/r), rounded down to a multiple, with t counted from 1; solved for t it
gives the first step of each length exactly, without a float: t >= T * (L - L_s)**r / (L_e - L_s)**r.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.errors import ConfigError

Pacing = tuple[tuple[int, int], ...]


def constant(*, seqlen: int) -> Pacing:
    """One length from the first step to the last."""
    _require_positive(seqlen=seqlen)
    return ((0, seqlen),)


def linear(*, seqlen_start: int, seqlen_end: int, duration_steps: int, seqlen_multiple: int = 8) -> Pacing:
    """Grow evenly from `seqlen_start` to `seqlen_end` over `duration_steps`: Sequence Length Warmup."""
    return root(
        seqlen_start=seqlen_start,
        seqlen_end=seqlen_end,
        duration_steps=duration_steps,
        seqlen_multiple=seqlen_multiple,
        degree=1,
    )


def root(
    *, seqlen_start: int, seqlen_end: int, duration_steps: int, seqlen_multiple: int = 8, degree: int = 2
) -> Pacing:
    """Grow as progress**(1/degree): fast at first, then slower. Falls where `seqlen_end` is the smaller one."""
    _require_positive(
        seqlen_start=seqlen_start, seqlen_end=seqlen_end, seqlen_multiple=seqlen_multiple, degree=degree
    )
    if duration_steps < 0:
        raise ConfigError("duration_steps must not be negative", found=duration_steps, allowed="0 or more")
    for name, value in (("seqlen_start", seqlen_start), ("seqlen_end", seqlen_end)):
        if value % seqlen_multiple:
            below = value - value % seqlen_multiple
            nearest = sorted({max(below, seqlen_multiple), below + seqlen_multiple})
            raise ConfigError(
                f"{name} is not a multiple of seqlen_multiple",
                found=f"{name} = {value}, seqlen_multiple = {seqlen_multiple}",
                allowed=" or ".join(str(multiple) for multiple in nearest),
            )
    distance = abs(seqlen_end - seqlen_start)
    first_steps = {0: seqlen_start}
    for gained in range(seqlen_multiple, distance + 1, seqlen_multiple):
        step = -(-duration_steps * gained**degree // distance**degree) - 1  # ceil, then counted from 0
        first_steps[max(step, 0)] = seqlen_start + (gained if seqlen_end > seqlen_start else -gained)
    return tuple(first_steps.items())


def staged(*, seqlens: list[int], boundaries: list[int]) -> Pacing:
    """`seqlens[0]` from step 0, `seqlens[i]` from step `boundaries[i - 1]` on (two-stage training, Shortformer)."""
    if len(boundaries) != len(seqlens) - 1:
        raise ConfigError(
            "staged pacing needs one boundary between each two lengths",
            found=f"{len(seqlens)} seqlens, {len(boundaries)} boundaries",
            allowed=f"{max(len(seqlens) - 1, 0)} boundaries",
        )
    _require_positive(**{f"seqlens[{i}]": seqlen for i, seqlen in enumerate(seqlens)})
    if any(late <= early for early, late in zip([0, *boundaries], boundaries, strict=False)):
        raise ConfigError("boundaries must be increasing steps above 0", found=boundaries)
    return tuple(zip([0, *boundaries], seqlens, strict=True))


PACINGS: dict[str, Callable[..., Pacing]] = {
    "constant": constant,
    "linear": linear,
    "root": root,
    "staged": staged,
}


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ConfigError(f"{name} must be positive", found=value, allowed="1 or more")
