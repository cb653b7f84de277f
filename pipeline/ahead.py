"""Work done in a thread before it is asked for, so that a build loads, reads, encodes and writes at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def ahead(
    source: Generator[T, None, None], most: int, weigh: Callable[[T], int] = lambda item: 1
) -> Generator[T, None, None]:
    """Yield what `source` yields, computed in a thread of its own; what waits weighs at most `most`, or is one item.

    An item counts until the next is asked for. One more may be made already, and wait to be let in.
    What `source` raises is raised here, after the items before it. Closing this generator closes `source`, in its
    thread, and waits for that: an unbounded wait only where `source` itself blocks.
    """
    # (item, weight, nothing) or (nothing, 0, error); an error of None ends it
    items: SimpleQueue[tuple[list[T], int, BaseException | None]] = SimpleQueue()
    changed = threading.Condition()
    held, closed = 0, False

    def run() -> None:
        nonlocal held
        try:
            for item in source:
                weight = weigh(item)
                with changed:
                    changed.wait_for(lambda: closed or held == 0 or held + weight <= most)  # noqa: B023
                    if closed:
                        break
                    held += weight
                items.put(([item], weight, None))
                del item
            source.close()
        except BaseException as error:  # handed over, whatever it is
            items.put(([], 0, error))
        else:
            items.put(([], 0, None))

    thread = threading.Thread(target=run, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            found, weight, error = items.get()
            if not found:
                if error is not None:
                    raise error
                return
            yield found.pop()
            with changed:
                held -= weight
                changed.notify()
    finally:
        with changed:
            closed = True
            changed.notify()
        thread.join()


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run `call` in a thread of its own; the future gets what it returns or raises."""
    pool = ThreadPoolExecutor(1, "in_thread")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future
