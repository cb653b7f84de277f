"""Items made ahead by threads of their own, handed out in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """The results of `jobs`, in order, made in background threads; at most `ahead` wait finished. `close` it.

    `threads` take turns at asking for the next job and run jobs at the same time. At most `ahead` + 1 jobs are begun
    whose results were not yet asked for. What `jobs` or a job raises is raised by `next`, after the items before it.
    """

    def __init__(self, jobs: Iterator[Callable[[], Item]], ahead: int, threads: int = 1) -> None:
        self._jobs = jobs
        self._stop = threading.Event()
        self._turn = threading.Lock()
        self._room = threading.Semaphore(ahead + 1)
        self._items: queue.SimpleQueue[Future[Item]] = queue.SimpleQueue()
        self._failed: Future[Item] | None = None
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        future = self._failed or self._items.get()
        try:
            item = future.result()
        except BaseException:
            self._failed = future  # and again for whoever asks again
            raise
        self._room.release()
        return item

    def close(self) -> None:
        """Stop the threads and wait for them; what they had made is dropped."""
        self._stop.set()
        self._room.release(len(self._threads))
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            future = Future[Item]()
            try:
                with self._turn:
                    self._room.acquire()
                    if self._stop.is_set():
                        return
                    self._items.put(future)
                    job = next(self._jobs)
                future.set_result(job())
                del job
            except BaseException as end:  # handed to whoever waits for the item
                self._stop.set()
                future.set_exception(end)
