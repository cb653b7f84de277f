"""A file read once in order: its bytes are in the page cache afterwards, and their digest is known.

Pieces of documents are gathered in random order. Where their pages are on disk, each costs a page fault and a seek;
the file in order goes at the full speed of the disk. Price: a block of memory, and nothing for a file in memory
already. A map of what is in memory costs a fault every 64 KB still: `enter_pages` takes them while others are read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import xxhash

BLOCK_BYTES = 1 << 18
"""Bytes of one read: fits the second-level cache of a core."""
PROBE_BYTES = 1 << 20
"""Distance between the bytes that `in_memory` probes."""


def in_memory(path: Path) -> bool:
    """Whether the page cache seems to hold the whole file. True where the system cannot tell: Linux alone can.

    Raises OSError where the file cannot be opened.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    byte = bytearray(1)
    with path.open("rb", buffering=0) as source:
        try:
            for at in range(0, os.fstat(source.fileno()).st_size, PROBE_BYTES):
                os.preadv(source.fileno(), [byte], at, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without such reads
    return True


def read_through(path: Path) -> str:
    """Read the file in order; returns its digest, as `digest_bytes` of it. Raises OSError."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as source:
        while count := source.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def enter_pages(address: int, size: int) -> None:
    """Enter the file's pages behind `size` bytes mapped at `address` into this process' page table.

    Where the system cannot (Linux 5.14 and later alone), each costs its fault at its first use, as ever.
    """
    if sys.platform == "linux":
        begin = address & -mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), _MADV_POPULATE_READ
        )


_MADV_POPULATE_READ = 22
