"""A pool of memory for batches: an array's memory is reused once nobody refers to the array any more."""

from __future__ import annotations

import ctypes
import math
import weakref

import numpy as np

MOST_FREE = 8
"""Most free arrays kept; a loader has no more in use at once."""


class Pool:
    """Called with a shape, gives an int64 array; its memory comes back when it and all views of it are gone.

    Where the allocator gives freed memory back to the system, fresh memory costs a page fault every 4 KB: as long as
    filling it with tokens. Blocks have `least` items or more. For one caller at a time; arrays may be dropped in any
    thread.
    """

    def __init__(self, least: int) -> None:
        self.least = least
        self._free: list[np.ndarray] = []

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array of `shape`, its values left over from earlier ones."""
        size = math.prod(shape)
        memory = self._free.pop() if self._free else np.empty(0, dtype=np.int64)
        if len(memory) < size:
            memory = np.empty(max(size, self.least), dtype=np.int64)
        # What all views refer to, and can be watched: numpy's own views refer to one another's owner.
        lease = (ctypes.c_int64 * len(memory)).from_buffer(memory.data)
        weakref.finalize(lease, self._give_back, memory)
        return np.frombuffer(memoryview(lease), dtype=np.int64, count=size).reshape(shape)

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self._free) < MOST_FREE:
            self._free.append(memory)
