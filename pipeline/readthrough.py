"""A file read once in order: its bytes are in the page cache afterwards, and their digest is known.

Pieces of documents are gathered in random order. Where their pages are on disk, each costs a page fault and a seek;
the file in order goes at the full speed of the disk. Price: a block of memory, and nothing for a file in memory
already.
"""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

BLOCK_BYTES = 1 << 18
"""Fits the second-level cache of a core."""
PROBE_BYTES = 1 << 20
"""The first byte of every so many is looked for in memory."""


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
