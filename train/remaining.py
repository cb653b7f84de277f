"""The text of a run's progress line: step, length, loss, speed, time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

RECENT_S = 120.0


class TimeLeft:
    """Seconds to the end: the schedule's remaining tokens at the rate of the last two minutes, validations included.

    Tokens, not steps: steps grow with the length. Where short lengths are slower a token it is too long at first.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, tokens_seen: int, total_tokens: int) -> float | None:
        """After `tokens_seen` of `total_tokens`; None at the first call, when no rate is known."""
        now = self._clock()
        self._seen.append((now, tokens_seen))
        while len(self._seen) > 2 and self._seen[1][0] < now - RECENT_S:
            self._seen.popleft()
        since, tokens = self._seen[0]
        if tokens_seen <= tokens:
            return None
        return max(total_tokens - tokens_seen, 0) * (now - since) / (tokens_seen - tokens)


def detail(
    line: dict[str, Any], total_steps: int, validation: float | None, left_s: float | None, width: int = 1000
) -> str:
    """Step, length, tokens, loss and its ratio, tokens/s, MFU where known, time left; in `width` columns.

    What is too long for them goes, least important first.
    """
    parts = {
        "step": f"{line['step']:,}/{total_steps:,}",
        "seqlen": f"seqlen {line['seqlen']:,}",
        "tokens": f"{quantity(line['tokens_seen'])} tokens",
        "loss": f"loss {line['loss']:.3f}" if "loss" in line else "not finite",
        "ratio": f"ratio {line['loss_ratio']:.2f}" if "loss_ratio" in line else "",
        "validation": "" if validation is None else f"val {validation:.3f}",
        "rate": f"{quantity(line['tokens_per_s'])}/s" if "tokens_per_s" in line else "",
        "mfu": f"MFU {100 * line['mfu']:.0f} %" if line.get("mfu") is not None else "",
        "left": "" if left_s is None else f"{duration(left_s)} left",
    }
    parts = {name: text for name, text in parts.items() if text}
    for name in ("tokens", "validation", "mfu", "ratio", "rate", "seqlen"):
        if len("  ".join(parts.values())) > width:
            parts.pop(name, None)
    return "  ".join(parts.values())


def quantity(number: float) -> str:
    """950, 12.3k, 4.56M, 157B: three digits."""
    for unit in ("", "k", "M", "B"):
        if number < 999.5 or unit == "B":
            break
        number /= 1000
    return f"{number:.0f}{unit}" if number >= 99.5 or not unit else f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    """45s, 12m30s, 3h05m, 4d07h."""
    whole = round(seconds)
    for size, big, small_size, small in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{big}{whole % size // small_size:02d}{small}"
    return f"{whole}s"
