"""Run a generator ahead of its consumer in a thread: the stages of a build overlap where they leave the GIL."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def ahead(source: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield what `source` yields, computed in a thread of its own that is at most `depth` + 1 items ahead.

    What `source` raises is raised here, after the items before it. Closing this generator closes `source`, in its
    thread, and waits for that: an unbounded wait only where `source` itself blocks.
    """
    # (item, nothing) or (nothing, error); an error of None ends it
    items: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    free = threading.Semaphore(depth)
    closed = threading.Event()

    def run() -> None:
        try:
            for item in source:
                free.acquire()
                if closed.is_set():
                    break
                items.put(([item], None))
            source.close()
        except BaseException as error:  # handed over, whatever it is
            items.put(([], error))
        else:
            items.put(([], None))

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            found, error = items.get()
            if not found:
                if error is not None:
                    raise error
                return
            free.release()
            yield found[0]
            del found
    finally:
        closed.set()
        free.release()
        thread.join()


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed for the next batch: given back, every page would be cleared anew.

    A sixth of a build's time at batches of 4 MB; it costs some 50 MB at the peak. Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # what is larger is of a huge document, and given back
        libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
