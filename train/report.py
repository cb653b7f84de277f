"""What a run tells while it trains: lines of metrics in its folder and to trackers, a progress line on stderr."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from curriculum.schedule import Schedule
from pipeline.progress import ProgressLine
from train.config import Config
from train.metrics import MetricsFile
from train.trackers import Tracker, trackers_of

RECENT_S = 120.0
"""The time left is told by the rate of so long."""


class Report:
    """Rank 0 reports; the other ranks have the same figures and are `silent`."""

    def __init__(self, config: Config, step: int, *, silent: bool) -> None:
        self._held = ExitStack()
        self._metrics: MetricsFile | None = None
        self._progress: ProgressLine | None = None
        self._takers: list[MetricsFile | Tracker] = []
        self._left = TimeLeft()
        if not silent:
            self._metrics = MetricsFile(config.run.dir, keep_until_step=step or -1)
            self._takers = [self._metrics, *trackers_of(config)]
            for taker in self._takers:
                self._held.callback(taker.close)
            self._progress = self._held.enter_context(ProgressLine("training", 1, remaining=False))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics, of consecutive steps."""
        for line in lines:
            for taker in self._takers:
                taker.write(line)

    def sync(self) -> None:
        """Return when the lines are on the disk."""
        if self._metrics:
            self._metrics.sync()

    def show(self, line: dict[str, Any], schedule: Schedule, validation: float | None) -> None:
        """How far the run is, after the step of `line`."""
        if self._progress:
            total = schedule.tokens_before(schedule.total_steps)  # the last step may go beyond total_tokens
            left_s = self._left.update(line["tokens_seen"], total)
            text = detail(line, schedule.total_steps, validation, left_s, self._progress.width)
            self._progress.update(line["tokens_seen"] / total, text)


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
