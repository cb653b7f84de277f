"""A finished store, memory-mapped piece by piece: opening reads the manifest, a shard is touched at its first use.

At its first use a shard is mapped and its list offsets are checked; before a token of it is served its digest is
compared with the manifest too, which is remembered (`Verified`). Price: 100 bytes a shard, nothing a document, until
`lengths` is asked for (8 bytes a document).

A remote store (`s3://...`) is read through a `Cache` of whole shards; only the lengths are read without it, from the
head of each shard. Its maps are held within the size of the cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from pipeline.cache import Cache, digest_of, read_head
from pipeline.errors import ConfigError, SlwError, StoreError
from pipeline.format import SPLIT_FOLDERS, TOKENIZER_NAME, Manifest, ShardInfo
from pipeline.place import is_local, place
from pipeline.shell import pasted
from pipeline.verified import Verified

HEAD_BYTES = 16 << 10
"""Bytes fetched besides the list offsets: more than the Arrow messages before them take."""
REQUESTS_AT_ONCE = 16
"""Heads of shards of a remote store, read at once."""
FETCHES_AT_ONCE = 8
"""Whole shards of a remote store, fetched at once: one stream is far below what object storage gives."""


@dataclass(frozen=True)
class _Held:
    """Shards in use: as long as this lives, those that are ready are mapped."""

    shards: tuple[np.ndarray, np.ndarray, np.ndarray]
    """The addresses of their offsets and of their tokens, and whether they are ready."""
    maps: Sequence[np.ndarray]


class Store:
    """One split of a store. Documents are numbered 0..documents-1 in shard order; use `Store.open`."""

    def __init__(
        self, path: Path, manifest: Manifest, split: str, *, verify: bool, cache: Cache | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.split = split
        self.shards: list[ShardInfo] = manifest.of_split(split)
        self.tokens = manifest.tokens(split)
        """Number of stored tokens of this split: the targets of one epoch."""
        self._verified = Verified(path, compare=verify)
        self._cache = cache
        self._dtype = np.dtype(manifest.token_dtype)
        self._starts = np.cumsum([0] + [shard.documents for shard in self.shards], dtype=np.int64)
        self._maps: dict[int, pa.MemoryMappedFile] = {}
        self._offsets: dict[int, np.ndarray] = {}
        self._offsets_at, self._tokens_at = np.zeros((2, len(self.shards)), dtype=np.int64)  # addresses, once mapped
        self._ready = np.zeros(len(self.shards), dtype=np.bool_)  # mapped, and its digest is right
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        split: str = "train",
        *,
        verify: bool = True,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> Store:
        """Open STORE's `split`, "train" or "validation". `cache_dir` and `cache_bytes` of a remote one: see `Cache`.

        Raises StoreError where the store is missing or unfinished, ConfigError for an unknown split. A shard that is
        missing or damaged is a StoreError when it is first used; `slw-prep verify` looks at all of them.
        `verify=False` skips the digests, never the check of the offsets.
        """
        if split not in SPLIT_FOLDERS:
            raise ConfigError("unknown split", found=split, allowed=" or ".join(SPLIT_FOLDERS))
        path = place(path)
        cache = None if is_local(path) else Cache(cache_dir, cache_bytes)
        return cls(path, Manifest.load(path), split, verify=verify, cache=cache)

    @property
    def cache_bytes(self) -> int | None:
        """Most bytes of a remote store's shards that this machine holds; None of a local store."""
        return self._cache.most_bytes if self._cache else None

    @property
    def reads_at_once(self) -> int:
        """How many shards are best read ahead at the same time: a disk is fastest in order."""
        return FETCHES_AT_ONCE if self._cache else 1

    @property
    def documents(self) -> int:
        """Number of documents of this split."""
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: stored tokens, the end-of-document token included. Maps every shard, reads no token."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self.shard_lengths(range(len(self.shards)))])

    def shard_lengths(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Of each of these shards int64 [its documents], as in `lengths`. Raises StoreError at a damaged one.

        Those of a remote store are asked for several at once.
        """
        if self._cache is None:
            yield from map(self._lengths_of, indices)
        else:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                yield from pool.map(self._lengths_of, indices)

    def _lengths_of(self, index: int) -> np.ndarray:
        """int64 [documents of shard `index`]."""
        if self._cache is not None and index not in self._offsets:
            shard = self.shards[index]
            path = self.path / shard.file
            head = self._cache.opened(path, shard.digest)
            if head is None:
                head = read_head(path, shard.documents * 8 + HEAD_BYTES, shard.bytes)
            return np.diff(self._columns(head, shard, path)[0])
        with self._lock:
            return np.diff(self._map(index))

    @property
    def sources(self) -> dict[str, range]:
        """The document numbers of each named source, in store order; one source named "" where none was named."""
        ranges: dict[str, range] = {}
        for shard, first in zip(self.shards, self._starts.tolist(), strict=False):
            start = ranges[shard.source].start if shard.source in ranges else first
            ranges[shard.source] = range(start, first + shard.documents)
        return ranges

    @property
    def fingerprint(self) -> str:
        """Digest of what is served: split, tokenizer and every shard. Equal fingerprints serve equal batches."""
        parts = [
            self.split,
            self.manifest.tokenizer_digest,
            *(f"{shard.source} {shard.digest}" for shard in self.shards),
        ]
        return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json the store was built with, on this machine. Raises StoreError where it is another."""
        path = self.path / TOKENIZER_NAME
        if self._cache:
            return self._cache.fetch(path, self.manifest.tokenizer_digest)
        if not path.is_file():
            raise StoreError("the store's tokenizer is missing", where=path, remedy=_remedy(self.path))
        if (found := digest_of(path)) != self.manifest.tokenizer_digest:
            raise StoreError(
                "the tokenizer is not the one that the store was built with",
                where=path,
                found=f"digest {found}",
                allowed=self.manifest.tokenizer_digest,
                remedy=_remedy(self.path),
            )
        return path

    def place(self, index: int) -> tuple[int, int]:
        """(shard, document of it) of a document, both from 0. Raises ConfigError out of range."""
        if not 0 <= index < self.documents:
            raise ConfigError(
                "no such document",
                where=f"{self.path} ({self.split})",
                found=index,
                allowed=f"0 to {self.documents - 1}" if self.documents else "none: the split is empty",
            )
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, index - int(self._starts[shard])

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, uint16 or uint32, end-of-document token last. Raises ConfigError out of range."""
        shard, item = self.place(index)
        if self._cache is not None:
            self._use_shards([shard])
        with self._lock:
            offsets = self._map(shard)
        length = offsets[item + 1 : item + 2] - offsets[item : item + 1]
        inputs, labels = np.empty((2, int(length[0])), dtype=np.int64)
        self.gather(np.array([index]), np.zeros(1, dtype=np.int64), length, inputs, labels)
        return labels.astype(self._dtype)

    def columns(self, shard: int, *, checked: bool = False) -> pa.RecordBatch:
        """All columns of a shard, memory-mapped: `tokens`, `row`, and `id` and `source` where it has them.

        Raises StoreError where its offsets are not sound or, `checked`, its digest is not the manifest's.
        """
        if checked or self._cache is not None:
            self._use_shards([shard])
        with self._lock:
            self._map(shard)
            self._maps[shard].seek(0)
            return pa.ipc.open_stream(self._maps[shard]).read_next_batch()

    def gather(
        self,
        document: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        inputs: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray | None = None,
    ) -> None:
        """Copy pieces, one after another, into `labels`, shifted by one into `inputs`; count them in `positions`.

        A piece serves `tokens[start : start + length]` as labels; its inputs are the token before each, and the
        beginning-of-document token before a document's first; its positions are 0..length-1. `document`, `start`,
        `length` are int64 [pieces], the others int32 or int64 [sum of lengths]. Raises StoreError at the first use of
        a damaged shard.
        """
        from pipeline.gather import NOT_READY, gather_uint16, gather_uint32  # numba: 0.3 s that `info` need not pay

        positions = np.empty_like(labels) if positions is None else positions
        sizes = {len(inputs), len(labels), len(positions), int(length.sum())}
        assert len(sizes) == 1, f"buffers and pieces differ in size: {sizes}"
        kernel = gather_uint16 if self._dtype.itemsize == 2 else gather_uint32
        pieces = (document, start, length, self.manifest.bos_id, inputs, labels, positions)
        copied = NOT_READY
        if self._cache is None:  # what is mapped stays so
            copied = kernel(self._starts, *self._held().shards, *pieces)
        if copied == NOT_READY:
            held = self._use_shards_of(document)
            copied = kernel(self._starts, *held.shards, *pieces)
        assert copied == len(document), f"piece {copied} is outside its document"

    def read_ahead(self, index: int) -> None:
        """Have a shard in memory, or in the cache of a remote store; what is wrong with it is said at its use."""
        with contextlib.suppress(OSError, SlwError):
            path = self._local(self.shards[index])
            if self._cache is None:
                self._verified.read_ahead(self.shards[index], path)

    def _local(self, shard: ShardInfo) -> Path:
        """Where the file of `shard` is on this machine."""
        path = self.path / shard.file
        return self._cache.fetch(path, shard.digest) if self._cache else path

    def _use_shards_of(self, document: np.ndarray) -> _Held:
        """Make ready the shards of documents `document`, int64 [pieces]; they are mapped while the result is held."""
        assert document.min(initial=0) >= 0 and document.max(initial=0) < self.documents, "no such document"
        return self._use_shards(np.unique(np.searchsorted(self._starts, document, side="right") - 1).tolist())

    def _use_shards(self, indices: list[int]) -> _Held:
        with self._lock:
            self._make_room(indices)
            fresh = [index for index in indices if not self._ready[index]]
            if self._cache is not None:
                with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
                    list(pool.map(self._local, [self.shards[index] for index in fresh]))
            for index in fresh:
                self._map(index)
            if self._cache is None:
                mapped = [(self.shards[i], self._local(self.shards[i]), self._tokens_of(i)) for i in fresh]
                self._verified.read(mapped, _remedy(self.path))  # what the cache fetched is, and in memory
            self._ready[fresh] = True
            return self._held([self._offsets[index] for index in indices])

    def _held(self, maps: Sequence[np.ndarray] = ()) -> _Held:
        """What is ready now. Copies, as other threads map and unmap."""
        return _Held((self._offsets_at.copy(), self._tokens_at.copy(), self._ready.copy()), maps)

    def _tokens_of(self, index: int) -> tuple[int, int]:
        """Address and bytes of the tokens of a shard that is mapped."""
        return int(self._tokens_at[index]), self.shards[index].tokens * self._dtype.itemsize

    def _make_room(self, indices: list[int]) -> None:
        """Unmap the shards of a remote store that were used longest ago, until those of `indices` fit the cache."""
        if self._cache is None:
            return
        for index in indices:
            if index in self._maps:
                self._maps[index] = self._maps.pop(index)  # used last
        if all(index in self._maps for index in indices):
            return
        self._cache.touch(f"{self.shards[index].digest}.arrow" for index in self._maps)
        needed = {*indices, *self._maps}
        size = sum(self.shards[index].bytes for index in needed)
        for index in [index for index in self._maps if index not in set(indices)]:
            if size <= self._cache.most_bytes:
                break
            size -= self.shards[index].bytes
            del self._maps[index], self._offsets[index]
            self._ready[index] = False
        if size > self._cache.most_bytes:
            raise StoreError(
                "the cache is smaller than the shards that one batch is made from",
                where=self._cache.folder,
                found=f"{size:,} bytes in {len(indices):,} shards",
                allowed=f"{self._cache.most_bytes:,} bytes",
                remedy="raise SLW_CACHE_BYTES, or deal from fewer shards at a time",
            )

    def _map(self, index: int) -> np.ndarray:
        """Map one shard if it is not; returns its list offsets, int64 [documents + 1]."""
        if index in self._offsets:
            return self._offsets[index]
        shard = self.shards[index]
        path = self._local(shard)
        remedy = _remedy(self.path)
        if not path.is_file():
            raise StoreError("a shard is missing", where=path, remedy=remedy)
        if path.stat().st_size != shard.bytes:
            raise StoreError(
                "a shard is not of the size in the manifest",
                where=path,
                found=f"{path.stat().st_size} bytes",
                allowed=f"{shard.bytes} bytes",
                remedy=remedy,
            )
        source = pa.memory_map(str(path))
        offsets, tokens_at = self._columns(source, shard, path)
        self._maps[index], self._offsets[index] = source, offsets
        self._offsets_at[index], self._tokens_at[index] = offsets.ctypes.data, tokens_at
        return offsets

    def _columns(self, source: Any, shard: ShardInfo, where: Path) -> tuple[np.ndarray, int]:
        """The list offsets of a shard, int64 [documents + 1], and the address of its tokens. Raises StoreError."""
        remedy = _remedy(self.path)
        try:
            column = pa.ipc.open_stream(source).read_next_batch().column("tokens")
            _, offset_buffer, _, token_buffer = column.buffers()
            offsets = np.frombuffer(offset_buffer, dtype=np.int64, count=len(column) + 1, offset=column.offset * 8)
            stored = token_buffer.size // self._dtype.itemsize
            sound = column.type.value_type == pa.from_numpy_dtype(self._dtype) and len(column) == shard.documents
        except (pa.ArrowException, KeyError, ValueError, StopIteration, OSError) as error:
            raise StoreError("a shard is damaged", where=where, found=error, remedy=remedy) from error
        if not (
            sound and offsets[0] == 0 and offsets[-1] == shard.tokens <= stored and bool((np.diff(offsets) > 0).all())
        ):
            raise StoreError("a shard is damaged: its list offsets are not sound", where=where, remedy=remedy)
        return offsets, token_buffer.address


def _remedy(store: Path) -> str:
    return f"see what is damaged: slw-prep verify {pasted(store)}; the same `slw-prep build` again repairs just that"
