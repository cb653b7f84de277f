"""Signals that end a run: SIGTERM and SIGUSR1, as schedulers send them before they kill, and the first SIGINT.

The step at hand is finished, or given up between two of its micro-batches; a checkpoint is written; the process ends
with the status STOPPED. A signal before the first step ends it at once with that status: nothing is lost. A second
SIGINT ends the process like kill -9 would: the last checkpoint stays.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a run that was asked to stop: EX_TEMPFAIL of sysexits.h, "the same command again, later"."""
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def ended_at_once(*, tell: bool) -> Iterator[None]:
    """Where no `Signals` listens, while PyTorch is imported above all: a signal ends the process with STOPPED.

    Of several ranks one is to `tell`.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if tell:
            name = signal.Signals(number).name
            os.write(2, f"\nstopped by {name}; the same command begins again, or goes on\n".encode())
        os._exit(STOPPED)  # an exception might be caught by the module that is being imported

    before = {number: signal.signal(number, end) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StoppedEarly(BaseException):
    """A signal came before the first step; like KeyboardInterrupt nobody should catch it but who ends the process."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Signals:
    """Listens while it is entered; one that is to `tell` says what it does: a terminal signals all ranks."""

    def __init__(self, *, tell: bool) -> None:
        self.received: str | None = None
        """Name of the first signal that came."""
        self._tell = tell
        self.training = False
        """Whether there is a step that can be finished, and something to write."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in ENDING:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            if self._tell:
                os.write(2, f"\n{self.received}: writing a checkpoint; Ctrl-C (again) ends it at once\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self.training:
            raise StoppedEarly(self.received)
