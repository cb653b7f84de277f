"""A finished store, memory-mapped: document lengths at once, tokens when they are asked for.

Nothing is copied at opening but the list offsets. Before a shard's tokens are served for the first time its
digest is compared with the manifest; the result is remembered by size and modification time in STORE/.verified,
so that the next opening costs nothing. `gather` is the only way training reads tokens: one nogil kernel call a batch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numba import carray, njit, types
from numba.extending import intrinsic

from pipeline.errors import ConfigError, StoreError
from pipeline.format import SPLIT_FOLDERS, TOKENIZER_NAME, Manifest, ShardInfo

VERIFIED_NAME = ".verified"


class Store:
    """One split of a store. Documents are numbered 0..documents-1 in shard order; use `Store.open`."""

    def __init__(self, path: Path, manifest: Manifest, split: str, *, verify: bool) -> None:
        self.path = path
        self.manifest = manifest
        self.split = split
        self.shards: list[ShardInfo] = manifest.of_split(split)
        self._maps: list[pa.MemoryMappedFile] = []
        self._dtype = np.dtype(manifest.token_dtype)
        columns = [self._map(shard) for shard in self.shards]
        self.lengths: np.ndarray = _concatenate([np.diff(offsets) for _, offsets in columns])
        """int64 [documents]: stored tokens, the end-of-document token included."""
        self._address: np.ndarray = _concatenate(
            [address + offsets[:-1] * self._dtype.itemsize for address, offsets in columns]
        )
        self._shard_starts = np.cumsum([0] + [shard.documents for shard in self.shards])
        self._trusted = np.full(len(self.shards), not verify)
        if verify:
            self._recall_verified()

    @classmethod
    def open(cls, path: str | Path, split: str = "train", *, verify: bool = True) -> Store:
        """Open STORE's `split`, "train" or "validation".

        Raises StoreError where the store is missing, unfinished, or a shard is missing or damaged; ConfigError for
        an unknown split. `verify=False` skips the digests, never the check of the offsets.
        """
        if split not in SPLIT_FOLDERS:
            raise ConfigError("unknown split", found=split, allowed=" or ".join(SPLIT_FOLDERS))
        return cls(Path(path), Manifest.load(Path(path)), split, verify=verify)

    @property
    def documents(self) -> int:
        """Number of documents of this split."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of stored tokens of this split: the targets of one epoch."""
        return int(self.lengths.sum())

    @property
    def sources(self) -> dict[str, range]:
        """The document numbers of each named source, in store order; one source named "" where none was named."""
        ranges: dict[str, range] = {}
        for shard, first in zip(self.shards, self._shard_starts.tolist(), strict=False):
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
        """The tokenizer.json the store was built with."""
        return self.path / TOKENIZER_NAME

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, uint16 or uint32, end-of-document token last. Raises ConfigError out of range."""
        if not 0 <= index < self.documents:
            raise ConfigError(
                "no such document",
                where=f"{self.path} ({self.split})",
                found=index,
                allowed=f"0 to {self.documents - 1}",
            )
        length = self.lengths[index : index + 1]
        labels = np.empty(int(length[0]), dtype=np.int64)
        self.gather(np.array([index]), np.zeros(1, dtype=np.int64), length, np.empty_like(labels), labels)
        return labels.astype(self._dtype)

    def gather(
        self, document: np.ndarray, start: np.ndarray, length: np.ndarray, inputs: np.ndarray, labels: np.ndarray
    ) -> None:
        """Copy pieces, one after another, into `labels` and, shifted by one, into `inputs` (int64 [sum of lengths]).

        A piece serves `tokens[start : start + length]` as labels; its inputs are the token before each, and the
        beginning-of-document token before a document's first. `document`, `start`, `length` are int64 [pieces].
        Raises StoreError at the first use of a damaged shard.
        """
        self._verify_shards_of(document)
        end = start + length
        assert len(inputs) == len(labels) == int(length.sum()), "buffers and pieces differ in size"
        assert ((start >= 0) & (length > 0) & (end <= self.lengths[document])).all(), "a piece outside its document"
        kernel = _gather_uint16 if self._dtype.itemsize == 2 else _gather_uint32
        kernel(self._address, document, start, length, self.manifest.bos_id, inputs, labels)

    def _map(self, shard: ShardInfo) -> tuple[int, np.ndarray]:
        """Map one shard; returns the address of its first token and the list offsets, int64 [documents + 1]."""
        path = self.path / shard.file
        remedy = f"see what is damaged: slw-prep verify {self.path}; then build the store again"
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
        self._maps.append(source)
        try:
            column = pa.ipc.open_stream(source).read_next_batch().column("tokens")
            _, offset_buffer, _, token_buffer = column.buffers()
            offsets = np.frombuffer(offset_buffer, dtype=np.int64, count=len(column) + 1, offset=column.offset * 8)
            stored = token_buffer.size // self._dtype.itemsize
            sound = column.type.value_type == pa.from_numpy_dtype(self._dtype) and len(column) == shard.documents
        except (pa.ArrowException, KeyError, ValueError, StopIteration, OSError) as error:
            raise StoreError("a shard is damaged", where=path, found=error, remedy=remedy) from error
        if not (
            sound and offsets[0] == 0 and offsets[-1] == shard.tokens <= stored and bool((np.diff(offsets) > 0).all())
        ):
            raise StoreError("a shard is damaged: its list offsets are not sound", where=path, remedy=remedy)
        return token_buffer.address, offsets

    def _verify_shards_of(self, document: np.ndarray) -> None:
        if self._trusted.all():
            return
        for index in np.unique(np.searchsorted(self._shard_starts, document, side="right") - 1):
            if not self._trusted[index]:
                self._verify_shard(int(index))

    def _verify_shard(self, index: int) -> None:
        shard = self.shards[index]
        found = xxhash.xxh3_128_hexdigest(self._maps[index].read_at(shard.bytes, 0))
        if found != shard.digest:
            raise StoreError(
                "a shard is damaged: its digest is not the one in the manifest",
                where=self.path / shard.file,
                found=found,
                allowed=shard.digest,
                remedy=f"see what is damaged: slw-prep verify {self.path}; then build the store again",
            )
        self._trusted[index] = True
        self._remember_verified()

    def _stamp(self, index: int) -> list[Any]:
        shard = self.shards[index]
        return [shard.digest, shard.bytes, (self.path / shard.file).stat().st_mtime_ns]

    def _recall_verified(self) -> None:
        try:
            known = json.loads((self.path / VERIFIED_NAME).read_bytes())
            self._trusted = np.array(
                [known.get(shard.file) == self._stamp(index) for index, shard in enumerate(self.shards)], dtype=bool
            )
        except (OSError, ValueError, AttributeError):
            return  # never verified, or the note is unreadable: verify again

    def _remember_verified(self) -> None:
        path = self.path / VERIFIED_NAME
        temporary = path.with_name(f"{VERIFIED_NAME}.{os.getpid()}")
        try:
            known = json.loads(path.read_bytes()) if path.exists() else {}
            known |= {self.shards[i].file: self._stamp(i) for i in np.flatnonzero(self._trusted).tolist()}
            temporary.write_text(json.dumps(known))
            temporary.replace(path)
        except (OSError, ValueError):
            temporary.unlink(missing_ok=True)  # a read-only or full disk: remembered in this process only


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """int64 address -> pointer to items of the type of `like`."""
    signature = types.CPointer(like)(types.int64, like)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, codegen


def _gather_kernel(token: Any) -> Any:
    # One address a document, whatever shard it is in: a batch over a thousand shards is still one call.
    @njit(nogil=True, cache=True)
    def gather(
        address: np.ndarray,
        document: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        bos_id: int,
        inputs: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        position = 0
        for piece in range(len(document)):
            first, count = start[piece], length[piece]
            tokens = carray(_pointer(address[document[piece]], token(0)), (first + count,))
            inputs[position] = tokens[first - 1] if first > 0 else bos_id
            for i in range(count):
                labels[position + i] = tokens[first + i]
            for i in range(count - 1):
                inputs[position + 1 + i] = tokens[first + i]
            position += count

    return gather


_gather_uint16 = _gather_kernel(np.uint16)
_gather_uint32 = _gather_kernel(np.uint32)
