"""The next group's shards are read while those of one are dealt: its first batch does not wait for a disk.

A group is 2^29 tokens, 1 GB: 5 s from a disk of 200 MB/s, minutes from object storage. Price: that much more of the
page cache, or of the cache of a remote store, which must hold SHARE such groups; below that nothing is read ahead.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from queue import Empty, SimpleQueue

from pipeline.reader import Store

SHARE = 4
"""Groups as large as the next one that the cache must have room for, or the next would push out what is being dealt.

Two are in use, the one that is dealt and the next; two more are room for a larger one and for others in the cache,
such as another source's.
"""


class ReadAhead:
    """Reads shards of `store` in the background, until `close`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._stop = threading.Event()
        self._expected = SimpleQueue[list[int]]()

    def expect(self, shards: list[int]) -> None:
        """`shards` come up next: `begin` reads them, in order."""
        self._expected.put(shards)

    def begin(self) -> None:
        """Read what is expected. Returns at once. For when a batch was made: its own shards were read by then."""
        with contextlib.suppress(Empty):
            while True:
                self._start(self._expected.get_nowait())

    def _start(self, shards: list[int]) -> None:
        cache_bytes = self._store.cache_bytes
        if cache_bytes is None or SHARE * sum(self._store.shards[i].bytes for i in shards) <= cache_bytes:
            coming = iter(shards)
            for _ in range(self._store.reads_at_once):
                threading.Thread(target=self._read, args=(coming, self._stop), name="read ahead", daemon=True).start()

    def close(self) -> None:
        """Begin no other shard. Does not wait for the one that is read; goes on with what is expected next."""
        self._stop.set()
        self._stop, self._expected = threading.Event(), SimpleQueue()

    def _read(self, coming: Iterator[int], stop: threading.Event) -> None:
        for index in coming:
            if stop.is_set():
                return
            self._store.read_ahead(index)
