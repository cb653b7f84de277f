"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class ProgressLine:
    """`with ProgressLine("building", total) as progress: progress.update(done, "3.2 MB/s")`."""

    def __init__(self, title: str, total: float) -> None:
        self.title = title
        self.total = total
        self._said = time.monotonic()
        self._bar = _bar() if sys.stderr.isatty() else None
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

    def update(self, done: float, detail: str) -> None:
        """`done` out of `total`; `detail` says how fast."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif time.monotonic() - self._said >= LINE_EVERY_S:
            self._said = time.monotonic()
            print(f"{self.title}: {100 * done / max(self.total, 1):.0f} %  {detail}", file=sys.stderr, flush=True)


def _bar() -> Progress:
    """Narrow enough for 80 columns with a detail of 57."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=6), TextColumn("{task.fields[detail]}"))
    return Progress(*columns, TimeRemainingColumn(compact=True), console=Console(stderr=True))
