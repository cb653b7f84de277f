"""What a run tells while it trains: lines of metrics in its folder and to trackers, a progress line on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from curriculum.schedule import Schedule
from pipeline.progress import ProgressLine
from train.config import Config
from train.metrics import MetricsFile
from train.remaining import TimeLeft, detail
from train.trackers import Tracker, trackers_of


class Report:
    """Rank 0 reports; the other ranks have the same figures and are `silent`."""

    def __init__(self, config: Config, step: int, *, silent: bool) -> None:
        self._held = ExitStack()
        self._metrics: MetricsFile | None = None
        self._progress: ProgressLine | None = None
        self._trackers: Sequence[Tracker] = ()
        self._left = TimeLeft()
        if not silent:
            self._metrics = MetricsFile(config.run.dir, keep_until_step=step or -1)
            self._held.callback(self._metrics.close)
            self._trackers = trackers_of(config)
            for tracker in self._trackers:
                self._held.callback(tracker.close)
            self._progress = self._held.enter_context(ProgressLine("training", 1, remaining=False))

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def write(self, lines: list[dict[str, Any]]) -> None:
        """Lines of metrics, of consecutive steps."""
        if self._metrics:
            for line in lines:
                self._metrics.write(line)
                for tracker in self._trackers:
                    tracker.write(line)

    def sync(self) -> None:
        """Return when the lines are on the disk."""
        if self._metrics:
            self._metrics.sync()

    def show(self, line: dict[str, Any], schedule: Schedule, validation: float | None) -> None:
        """How far the run is, after the step of `line`."""
        if self._progress:
            total = schedule.total_tokens or 1
            left_s = self._left.update(line["tokens_seen"], total)
            text = detail(line, schedule.total_steps, validation, left_s, self._progress.width)
            self._progress.update(line["tokens_seen"] / total, text)
