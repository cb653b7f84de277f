"""Units of the input into their shards: read, encode, split off held-out documents, write.

Three stages overlap across units: a thread reads and parses; a few threads encode a batch each; the caller's own puts
tokens together, digests, writes and flushes to the disk. Reading begins before the encoder is there. What a shard
holds depends on its unit alone. Memory: `IN_FLIGHT` of text or its tokens, and the tokens of the shard in the making.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.ahead import ahead
from pipeline.corpus import documents
from pipeline.documents import BATCH_BYTES, Documents, Reading, Unit
from pipeline.encoding import Encoder, make_encoder
from pipeline.errors import CorpusError
from pipeline.format import SPLIT_FOLDERS, ShardInfo
from pipeline.freed_memory import keep_freed_memory
from pipeline.held_out import is_held_out
from pipeline.parts import encode_documents, utf8_bytes
from pipeline.proof import Choice, Spot
from pipeline.vocabulary import Vocabulary
from pipeline.writer import Columns, write_json, write_shard

IN_FLIGHT = 64 << 20
"""Characters read and not yet in the buffer of their shard: what is read while the encoder is loaded, and what is
encoded while a shard is flushed to a disk."""
DOCUMENT_WEIGHT = 128
"""Characters that a document counts for besides its own: Python's objects."""
MOST_ENCODERS = 4
"""Threads that encode; a single one that reads, and the GIL, keep no more busy."""
MOST_ROOM = 64 << 20
BAD_KEPT = 5
"""Bad records of a unit that are described; all are counted."""


Task = tuple[int, Unit]
"""A unit and its number."""


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What every unit of a build has in common."""

    out: Path
    sidecars: Path
    """Folder for the units' results: a unit is done when its own is there."""
    reading: Reading
    vocabulary: Vocabulary
    encoder: Choice
    validation_fraction: float
    unit_bytes: int
    skip_bad: bool


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What became of a unit."""

    unit: int
    shards: list[ShardInfo]
    text_bytes: int
    empty: int
    bad: int
    bad_examples: list[str] = field(default_factory=list)


def parse_result(sidecar: bytes) -> UnitResult:
    """The result of a unit that is done. Raises ValueError, KeyError or TypeError where it is none."""
    data = json.loads(sidecar)
    return UnitResult(**{**data, "shards": [ShardInfo(**shard) for shard in data["shards"]]})


def build_units(tasks: Iterable[Task], options: UnitOptions) -> Iterator[UnitResult]:
    """Write the shards of each numbered unit, then its sidecar; results in the order of `tasks`.

    Raises CorpusError, TokenizerError, StoreError; the units yielded so far are done. Close the iterator to stop.
    """
    keep_freed_memory()
    work: _Work | None = None
    buffers = {split: _Buffer(options.vocabulary.dtype, options.unit_bytes) for split in SPLIT_FOLDERS}
    encoding = _Encoding(options)
    try:
        with closing(ahead(encoding.begin(_read(tasks, options)), IN_FLIGHT, _weight)) as batches:
            for index, unit, item, _ in batches:
                work = work or _Work(index, unit, options, buffers)
                if isinstance(item, Future):
                    work.add(item.result())
                    del item
                    continue
                result, work = work.finish(item), None
                sidecar = options.sidecars / f"{index:05d}.json"
                write_json(sidecar, dataclasses.asdict(result))
                yield result
    finally:
        encoding.stopped.set()


@dataclass
class _Tally:
    """Records of a unit that make no document."""

    empty: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)

    def on_bad(self, skip: bool, error: CorpusError) -> None:
        if not skip:
            raise error
        self.bad += 1
        if len(self.examples) < BAD_KEPT:
            self.examples.append(str(error))


@dataclass(frozen=True)
class _Encoded:
    """A batch of documents, the first `train` of them to train on, the others held out."""

    tokens: np.ndarray
    """Those of all documents in a row, each with its end-of-document token."""
    lengths: np.ndarray
    rows: np.ndarray
    names: list[str] | None
    train: int
    text_bytes: np.ndarray


def _read(tasks: Iterable[Task], options: UnitOptions) -> Generator[tuple[int, Unit, Documents | _Tally]]:
    """The batches of each unit, without empty texts, then its tally."""
    most = min(BATCH_BYTES, options.unit_bytes)
    for index, unit in tasks:
        tally = _Tally()
        for batch in documents(unit, options.reading, partial(tally.on_bad, options.skip_bad), most):
            if all(batch.texts):
                yield index, unit, batch
                continue
            full = [i for i, text in enumerate(batch.texts) if text]
            tally.empty += len(batch.texts) - len(full)
            if full:
                yield index, unit, _take(batch, full)
        yield index, unit, tally


_Begun = tuple[int, Unit, "Future[_Encoded] | _Tally", int]
"""Number and unit of a batch that is being encoded, and its weight."""


def _weight(begun: _Begun) -> int:
    return begun[3]


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    """One pool a process: fastokens remembers words by thread."""
    return ThreadPoolExecutor(min(MOST_ENCODERS, os.cpu_count() or 1), "encode")


class _Encoding:
    """Encodes batches in several threads, as soon as it is known with what."""

    def __init__(self, options: UnitOptions) -> None:
        self.options = options
        self.stopped = threading.Event()
        """What is not begun by then is left alone."""
        self._ready = _threads().submit(self._prepare)

    def begin(self, batches: Iterable[tuple[int, Unit, Documents | _Tally]]) -> Generator[_Begun]:
        """Have batches encoded; tallies pass through."""
        for index, unit, batch in batches:
            if isinstance(batch, _Tally):
                yield index, unit, batch, 0
                continue
            weight = sum(map(len, batch.texts)) + DOCUMENT_WEIGHT * len(batch.texts)
            encoded = _threads().submit(self._encode, batch, unit)
            del batch
            yield index, unit, encoded, weight
            del encoded

    def _prepare(self) -> tuple[Encoder, Spot | None]:
        name, data = self.options.encoder.name, self.options.vocabulary.data
        encoder = make_encoder(name, data)
        return encoder, Spot(encoder, data) if name == "fastokens" else None

    def _encode(self, batch: Documents, unit: Unit) -> _Encoded:
        encoder, spot = self._ready.result()
        if self.stopped.is_set():
            raise RuntimeError("stopped")  # nobody asks for it
        chosen, train = _held_out_last(batch, self.options.validation_fraction)
        tokens, lengths = encode_documents(encoder, chosen.texts, self.options.vocabulary)
        sizes = [utf8_bytes(text) for text in chosen.texts]  # the encoder has left their UTF-8 with them
        if spot:
            spot.check(chosen.texts, tokens, lengths, unit.name)
        for texts in (batch.texts, chosen.texts):  # whoever still holds the batch holds no huge text
            texts.clear()
        rows, text_bytes = np.array(chosen.rows, dtype=np.int64), np.array(sizes, dtype=np.int64)
        return _Encoded(tokens, lengths, rows, chosen.ids, train, text_bytes)


class _Work:
    """A unit in the making."""

    def __init__(self, index: int, unit: Unit, options: UnitOptions, buffers: dict[str, _Buffer]) -> None:
        self.index = index
        self.unit = unit
        self.options = options
        self.pending = {split: _Pending(buffer) for split, buffer in buffers.items()}
        self.shards: list[ShardInfo] = []
        self.text_bytes = 0

    def add(self, batch: _Encoded) -> None:
        """Take a batch; write a shard once enough is pending: an input that cannot be split makes several."""
        self.text_bytes += int(batch.text_bytes.sum())
        for split, part in (("train", slice(0, batch.train)), ("validation", slice(batch.train, len(batch.rows)))):
            if part.start < part.stop:
                self.pending[split].add(batch, part)
                if self.pending[split].text_bytes >= 2 * self.options.unit_bytes:
                    self._flush(split)

    def finish(self, tally: _Tally) -> UnitResult:
        """Write what is pending."""
        for split in SPLIT_FOLDERS:
            if self.pending[split].rows:
                self._flush(split)
        return UnitResult(
            unit=self.index,
            shards=self.shards,
            text_bytes=self.text_bytes,
            empty=tally.empty,
            bad=tally.bad,
            bad_examples=tally.examples,
        )

    def _flush(self, split: str) -> None:
        earlier = sum(shard.split == split for shard in self.shards)
        part = f".{earlier:03d}" if earlier else ""
        file = f"{SPLIT_FOLDERS[split]}/{self.index:05d}{part}.arrow"
        pending = self.pending[split]
        lengths, rows = np.concatenate(pending.lengths), np.concatenate(pending.rows)
        columns = Columns(pending.buffer.taken(), lengths, rows, pending.names)
        names = {"split": split, "unit": self.unit.name, "source": self.unit.source}
        self.shards.append(write_shard(self.options.out, file, columns, **names))
        self.pending[split] = _Pending(pending.buffer)


class _Buffer:
    """Room for the tokens of one shard after another, so that its pages are faulted in once; it grows where needed.

    Two bytes of text to a token are enough for most; what is not used of it costs nothing.
    """

    def __init__(self, dtype: np.dtype[Any], unit_bytes: int) -> None:
        self._room = np.empty(min(unit_bytes // 2, MOST_ROOM), dtype=dtype)
        self._used = 0

    def more(self, count: int) -> np.ndarray:
        """The next `count` tokens, to be filled."""
        if self._used + count > len(self._room):
            room = np.empty(max(2 * len(self._room), self._used + count), dtype=self._room.dtype)
            room[: self._used] = self._room[: self._used]
            self._room = room
        self._used += count
        return self._room[self._used - count : self._used]

    def taken(self) -> np.ndarray:
        """All that was filled; valid until the next call of `more`, which begins anew."""
        used, self._used = self._used, 0
        return self._room[:used]


class _Pending:
    """Encoded documents of a shard in the making."""

    def __init__(self, buffer: _Buffer) -> None:
        self.buffer = buffer
        self.lengths: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []
        self.names: list[str] | None = None
        self.text_bytes = 0

    def add(self, batch: _Encoded, part: slice) -> None:
        lengths = batch.lengths[part]
        first = int(batch.lengths[: part.start].sum())
        count = int(lengths.sum())
        self.buffer.more(count)[:] = batch.tokens[first : first + count]
        self.lengths.append(lengths)
        self.rows.append(batch.rows[part])
        if batch.names is not None:
            self.names = (self.names or []) + batch.names[part]
        self.text_bytes += int(batch.text_bytes[part].sum())


def _held_out_last(batch: Documents, fraction: float) -> tuple[Documents, int]:
    """The documents to train on, then the others, so that all are encoded at once; and how many the first are."""
    if fraction == 0:
        return batch, len(batch.texts)
    held_out = [is_held_out(text, fraction) for text in batch.texts]
    order = sorted(range(len(held_out)), key=held_out.__getitem__)
    return _take(batch, order), len(held_out) - sum(held_out)


def _take(batch: Documents, order: list[int]) -> Documents:
    return Documents(
        [batch.texts[i] for i in order],
        [batch.rows[i] for i in order],
        None if batch.ids is None else [batch.ids[i] for i in order],
    )
