"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
SLOWEST_LINE_EVERY_S = 60.0
"""A plain line comes every 10 seconds at first, and more seldom the longer it takes: a tenth of the time so far."""


class ProgressLine:
    """`with ProgressLine("building", total) as progress: progress.update(done, "3.2 MB/s")`."""

    def __init__(self, title: str, total: float, *, remaining: bool = True) -> None:
        self.title = title
        self.total = total
        self._began = self._said = time.monotonic()
        self._bar = _bar(remaining) if sys.stderr.isatty() else None
        self._task = self._bar.add_task(title, total=total, detail="") if self._bar else None

    def __enter__(self) -> ProgressLine:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def width(self) -> int:
        """Columns for a detail: what a terminal leaves beside title and bar, without end elsewhere."""
        return self._bar.console.width - len(self.title) - 9 if self._bar else sys.maxsize

    def update(self, done: float, detail: str) -> None:
        """`done` out of `total`; `detail` says how fast."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        now = time.monotonic()
        if now - self._said >= min(max(LINE_EVERY_S, (now - self._began) / 10), SLOWEST_LINE_EVERY_S):
            self._said = now
            print(f"{self.title}: {100 * done / max(self.total, 1):.0f} %  {detail}", file=sys.stderr, flush=True)


def _bar(remaining: bool) -> Progress:
    """Narrow enough for 80 columns with a detail of 57."""
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(bar_width=6)]
    columns.append(TextColumn("{task.fields[detail]}"))
    if remaining:
        columns.append(TimeRemainingColumn(compact=True))
    return Progress(*columns, console=Console(stderr=True))
