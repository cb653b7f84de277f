"""An iterator that runs ahead in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """The items of `source`, made in a background thread while at most `ahead` of them wait. `close` it.

    What `source` raises is raised by `next`, after the items before it.
    """

    def __init__(self, source: Iterator[Item], ahead: int) -> None:
        self._source = source
        self._stop = threading.Event()
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # and again for whoever asks again
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it; what it had made is dropped."""
        self._stop.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.01)

    def _run(self) -> None:
        try:
            for item in self._source:
                self._ready.put(item)
                if self._stop.is_set():
                    return
            raise StopIteration
        except BaseException as end:  # handed to whoever waits for the item
            self._ready.put(end)
