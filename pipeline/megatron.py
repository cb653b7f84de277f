"""Megatron-LM's indexed datasets, PREFIX.bin and PREFIX.idx, in and out.

    .idx    "MMIDIDX\\0\\0", version 1 (uint64), dtype code (uint8), sequences (uint64), documents + 1 (uint64),
            tokens of each sequence (int32), its first byte in .bin (int64), first sequence of each document and,
            last, the number of sequences (int64)
    .bin    the tokens, nothing else

A document is one or more sequences (of sentences, say). Both files are memory-mapped to read.
Layout after Megatron Core's `megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CorpusError, StoreError
from pipeline.format import token_dtype
from pipeline.tokenised import BATCH_TOKENS, Tokenised, runs
from pipeline.writer import write_atomically

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in enumerate(
    ("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1
)}  # fmt: skip
"""Megatron's code of a dtype -> the dtype; float64 is 6 and float32 is 7."""
LONGEST = 2**31 - 1
BLOCK = 1 << 18
"""Documents, or sequences, of the index looked at together."""


def prefix_of(path: Path) -> Path | None:
    """PREFIX of an indexed dataset that `path` names: PREFIX itself, its .bin or its .idx; None where it is none."""
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return prefix if _file(prefix, ".idx").is_file() or path.suffix in (".bin", ".idx") else None


class IndexedDataset:
    """An indexed dataset, open to read. Raises CorpusError where a file is missing, or not what the index says."""

    def __init__(self, prefix: Path) -> None:
        self.name = str(prefix)
        self._index_path, self._data_path = _file(prefix, ".idx"), _file(prefix, ".bin")
        for path in (self._index_path, self._data_path):
            if not path.is_file():
                raise CorpusError(
                    "half of an indexed dataset is missing", where=path, allowed="PREFIX.bin and PREFIX.idx"
                )
        index = _mapped(self._index_path)
        if len(index) < HEADER.size or bytes(index[: len(MAGIC)]) != MAGIC:
            raise self._unsound("not a Megatron index", found=bytes(index[:9]), allowed=repr(MAGIC))
        _, version, code, sequences, entries = HEADER.unpack(bytes(index[: HEADER.size]))
        if version != VERSION or code not in DTYPES:
            raise self._unsound(
                "an index of an unknown kind",
                found=f"version {version}, dtype code {code}",
                allowed=f"version {VERSION}, dtype codes {min(DTYPES)} to {max(DTYPES)}",
            )
        size = HEADER.size + sequences * 12 + entries * 8
        if len(index) == size + sequences:
            raise self._unsound(
                "an index with modes: a multimodal dataset is not only tokens",
                remedy="import a dataset of text alone",
            )
        if len(index) != size:
            raise self._unsound("the index is not of the size it names", found=len(index), allowed=f"{size} bytes")
        at = HEADER.size
        self._lengths = np.frombuffer(index, "<i4", sequences, at)
        self._pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self._first_sequence = np.frombuffer(index, "<i8", entries, at + 12 * sequences)
        self._dtype = DTYPES[code]
        self._data = _mapped(self._data_path)
        self.done = 0.0
        """Share of the documents that `batches` has read."""
        self._check_documents()
        self._check_sequences()

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._first_sequence) - 1

    def batches(self, most: int = BATCH_TOKENS) -> Iterator[Tokenised]:
        """All documents in order, at most `most` tokens or one document at a time."""
        for block in range(0, self.documents, BLOCK):
            index = self._first_sequence[block : block + BLOCK + 1]
            lengths, pointers = self._lengths[index[0] : index[-1]], self._pointers[index[0] : index[-1]]
            starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            in_order = bool((pointers == pointers[:1] + starts[:-1] * self._dtype.itemsize).all())
            ends = starts[index - index[0]]
            for first, last in runs(ends, most):
                some = slice(int(index[first] - index[0]), int(index[last] - index[0]))
                tokens = self._tokens(pointers[some], lengths[some], in_order)
                yield Tokenised(tokens, np.diff(ends[first : last + 1]), block + first)
                self.done = (block + last) / self.documents

    def _tokens(self, pointers: np.ndarray, lengths: np.ndarray, in_order: bool) -> np.ndarray:
        """Tokens of some sequences; one slice of the .bin where they stand in it one after another, `in_order`."""
        if not len(lengths):
            return np.empty(0, self._dtype)
        if in_order:
            pointers, lengths = pointers[:1], lengths.sum(keepdims=True, dtype=np.int64)
        pairs = zip(pointers.tolist(), lengths.tolist(), strict=True)
        parts = [np.frombuffer(self._data, self._dtype, n, at) for at, n in pairs if n]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self._dtype), *parts])

    def _check_documents(self) -> None:
        index = self._first_sequence
        sound = len(index) > 0 and index[0] == 0 and index[-1] == len(self._lengths)
        blocks = range(0, len(index), BLOCK)
        if not sound or any((np.diff(index[block : block + BLOCK + 1]) < 0).any() for block in blocks):
            raise self._unsound(
                "the documents of the index do not cover its sequences",
                found=f"{index[:1].tolist()} to {index[-1:].tolist()}",
                allowed=f"0 to {len(self._lengths)}, never falling",
            )

    def _check_sequences(self) -> None:
        for block in range(0, len(self._lengths), BLOCK):
            lengths, pointers = self._lengths[block : block + BLOCK], self._pointers[block : block + BLOCK]
            room = len(self._data) - lengths.astype(np.int64) * self._dtype.itemsize
            beyond = (lengths < 0) | (pointers < 0) | (pointers > room)
            if beyond.any():
                at = int(np.argmax(beyond))
                raise self._unsound(
                    f"sequence {block + at} is outside the .bin",
                    found=f"{lengths[at]} tokens of {self._dtype.itemsize} bytes from byte {pointers[at]} on",
                    allowed=f"the {len(self._data)} bytes of {self._data_path.name}",
                    remedy="are both files whole and of one dataset? copy them again",
                )

    def _unsound(self, what: str, **more: Any) -> CorpusError:
        remedy = "copy both files again, or make them anew with Megatron's tools/preprocess_data.py"
        return CorpusError(what, where=self._index_path, **{"remedy": remedy, **more})


def check_free(prefix: Path, *, force: bool) -> None:
    """Raise StoreError where PREFIX.bin or PREFIX.idx exists, unless `force` is given."""
    for path in (_file(prefix, ".idx"), _file(prefix, ".bin")):
        if path.exists() and not force:
            raise StoreError("the output exists", where=path, remedy="choose another --out, or replace it: --force")


def write_indexed_dataset(
    prefix: Path, batches: Iterable[Tokenised], vocab_size: int, *, force: bool = False
) -> None:
    """Write PREFIX.bin and, when that is whole, PREFIX.idx: a document is one sequence.

    The ids are uint16 where they fit, int32 otherwise, the two types that Megatron itself writes. Price: 4 bytes of
    memory a document. Raises StoreError where the output exists or cannot be written, or a document is too long.
    """
    check_free(prefix, force=force)
    dtype = np.dtype("<u2") if token_dtype(vocab_size).itemsize == 2 else np.dtype("<i4")
    lengths: list[np.ndarray] = []

    def write_data(path: Path) -> None:
        with path.open("wb") as stream:
            for batch in batches:
                if batch.lengths.max(initial=0) > LONGEST:
                    raise StoreError(
                        "a document is too long for an indexed dataset",
                        where=prefix,
                        found=f"{batch.lengths.max()} tokens",
                        allowed=f"{LONGEST} or fewer",
                    )
                lengths.append(batch.lengths.astype("<i4"))
                stream.write(np.ascontiguousarray(batch.tokens, dtype=dtype).data.cast("B"))
        # An old index beside new data would be wrong: from here until the new one is written there is none.
        _file(prefix, ".idx").unlink(missing_ok=True)

    write_atomically(_file(prefix, ".bin"), write_data)
    write_atomically(_file(prefix, ".idx"), lambda path: _write_index(path, lengths, dtype))


def _write_index(path: Path, lengths: list[np.ndarray], dtype: np.dtype[Any]) -> None:
    """The index of documents of `lengths`, int32 [documents of a part] each, of one sequence each."""
    documents = sum(len(part) for part in lengths)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        for part in lengths:
            stream.write(part.tobytes())
        at = 0
        for part in lengths:
            ends = at + np.cumsum(part, dtype="<i8") * dtype.itemsize
            stream.write((ends - part * np.int64(dtype.itemsize)).astype("<i8").tobytes())
            at = int(ends[-1]) if len(ends) else at
        for first in range(0, documents + 1, BATCH_TOKENS):
            stream.write(np.arange(first, min(first + BATCH_TOKENS, documents + 1), dtype="<i8").tobytes())


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)
