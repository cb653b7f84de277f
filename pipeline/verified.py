"""STORE/.verified: which shards of a local store were compared with their digests, by size and modification time.

A later process then reads only what the page cache does not hold, in order, before documents are read in random
order. Deleting the file costs only time; on a read-only disk it is kept in memory, for this process.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.format import ShardInfo
from pipeline.readthrough import enter_pages, in_memory, read_through

VERIFIED_NAME = ".verified"
SHARDS_AT_ONCE = 4


class Verified:
    """The verified shards of the store in folder `store`; without `compare`, shards are read but not compared."""

    def __init__(self, store: Path, *, compare: bool) -> None:
        self.path = store / VERIFIED_NAME
        self.compare = compare
        self._ahead: dict[str, str] = {}  # file -> digest of what was read ahead

    def read_ahead(self, shard: ShardInfo, path: Path) -> None:
        """Have a shard in memory before it is asked for; its digest is compared then. Raises OSError."""
        if not in_memory(path):
            self._ahead[shard.file] = read_through(path)

    def read(self, shards: Sequence[tuple[ShardInfo, Path, tuple[int, int]]], remedy: str) -> None:
        """Have shards in memory, digests equal to the manifest's; several are read at once.

        Each is given with its file, and with address and bytes of what is mapped of it, to be used without a fault.
        One whose digest was compared before is read where it is not in memory, so that its documents, which come in
        random order, need not be. Raises StoreError with `remedy` for one that differs.
        """
        remembered, stamps = self._known, dict[str, list[Any]]()

        def read(given: tuple[ShardInfo, Path, tuple[int, int]]) -> str:
            shard, path, mapped = given
            stamp = [shard.digest, shard.bytes, path.stat().st_mtime_ns]
            known = not self.compare or remembered.get(shard.file) == stamp
            found = self._ahead.pop(shard.file, None)
            if found is None:
                found = shard.digest if known and in_memory(path) else read_through(path)
            if not known and found == shard.digest:
                stamps[shard.file] = stamp
            enter_pages(*mapped)
            return found if self.compare else shard.digest

        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            for (shard, path, _), found in zip(shards, pool.map(read, shards), strict=True):
                if found != shard.digest:
                    raise StoreError(
                        "a shard is damaged: its digest is not the one in the manifest",
                        where=path,
                        found=found,
                        allowed=shard.digest,
                        remedy=remedy,
                    )
        if stamps:
            remembered.update(stamps)
            self._write()

    @cached_property
    def _known(self) -> dict[str, list[Any]]:
        """Shards whose digest was right: file -> [digest, bytes, modification time in ns]."""
        try:
            return dict(json.loads(self.path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return {}  # never verified, or the note is unreadable: verify again

    def _write(self) -> None:
        temporary = self.path.with_name(f"{VERIFIED_NAME}.{os.getpid()}")
        try:
            there = json.loads(self.path.read_bytes()) if self.path.exists() else {}
            temporary.write_text(json.dumps(there | self._known))
            temporary.replace(self.path)
        except (OSError, ValueError, TypeError):
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)  # a read-only or full disk: remembered in this process only
