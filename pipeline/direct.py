"""A file written with O_DIRECT, past the page cache, with its digest; for files that nobody reads soon after.

The page cache would copy the bytes into new pages: three times the processor time, thirty times where a virtual
machine was never given those pages before, and what others read would be pushed out. Price: one block of memory, and
the writer waits for the disk. Where the system or file system has no O_DIRECT, all of it goes through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash

BLOCK_BYTES = 4 << 20
ALIGNED_BYTES = 4096
"""O_DIRECT wants lengths and offsets that are multiples of this; the rest of a file goes through the cache."""
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new binary file to be written from beginning to end; a file object for pyarrow. Raises OSError."""

    closed = False

    def __init__(self, path: Path) -> None:
        self.digest = xxhash.xxh3_128()
        self.size = 0
        self._block = np.frombuffer(mmap.mmap(-1, BLOCK_BYTES), dtype=np.uint8)  # begins a page
        self._used = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._set(_O_DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                end = self._used % ALIGNED_BYTES
                self._put(self._block[: self._used - end])
                self._set(0)
                self._put(self._block[self._used - end : self._used])
        finally:
            os.close(self._file)

    def write(self, data: Any) -> int:
        """Take any bytes-like object."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        at = 0
        while at < len(view):
            part = view[at : at + BLOCK_BYTES - self._used]
            self._block[self._used : self._used + len(part)] = part
            self._used += len(part)
            at += len(part)
            if self._used == BLOCK_BYTES:
                self._put(self._block)
                self._used = 0
        return len(view)

    def flush(self) -> None:
        """Nothing: what is not yet written is when the block ends."""

    def close(self) -> None:
        """Nothing: pyarrow closes what it is given."""

    def _put(self, values: np.ndarray) -> None:
        while len(values):
            try:
                values = values[os.write(self._file, values.data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not fcntl.fcntl(self._file, fcntl.F_GETFL) & _O_DIRECT:
                    raise
                self._set(0)

    def _set(self, direct: int) -> None:
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # a file system without it
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~_O_DIRECT | direct)
