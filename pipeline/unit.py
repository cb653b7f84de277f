"""Units of the input into their shards: read, encode, split off held-out documents, write.

Three stages, each in a thread of its own, overlap across units: reading and parsing; encoding, which has more threads
below Python; putting tokens together, digesting, writing and flushing to the disk. What a shard holds depends on its
unit alone. Memory: a few batches of 4 MB, and the tokens of the shard in the making.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.ahead import ahead, keep_freed_memory
from pipeline.corpus import documents
from pipeline.documents import BATCH_BYTES, Documents, Reading, Unit
from pipeline.encoding import Spot, Vocabulary, make_encoder, put_documents
from pipeline.errors import CorpusError
from pipeline.format import SPLIT_FOLDERS, ShardInfo
from pipeline.writer import write_atomically, write_shard

READ_AHEAD = 4
ENCODED_AHEAD = 10
"""Batches that wait between the stages: the encoder goes on while a shard is flushed to a disk."""
CHUNK_CHARACTERS = 1 << 20
BAD_KEPT = 5
"""Bad records of a unit that are described; all are counted."""


@dataclass(frozen=True, kw_only=True)
class UnitOptions:
    """What every unit of a build has in common."""

    out: Path
    sidecars: Path
    """Folder for the units' results: a unit is done when its own is there."""
    reading: Reading
    vocabulary: Vocabulary
    encoder: str
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


def in_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out: XXH3-64 of its UTF-8 bytes is below fraction * 2**64. Copies go together."""
    return fraction > 0 and xxhash.xxh3_64_intdigest(text.encode()) < int(fraction * 2**64)


def parse_result(sidecar: bytes) -> UnitResult:
    """The result of a unit that is done. Raises ValueError, KeyError or TypeError where it is none."""
    data = json.loads(sidecar)
    return UnitResult(**{**data, "shards": [ShardInfo(**shard) for shard in data["shards"]]})


def build_units(tasks: Iterable[tuple[int, Unit]], options: UnitOptions) -> Iterator[UnitResult]:
    """Write the shards of each numbered unit, then its sidecar; results in the order of `tasks`.

    Raises CorpusError, TokenizerError, StoreError; the units yielded so far are done. Close the iterator to stop.
    """
    keep_freed_memory()
    work: _Work | None = None
    buffers = {split: _Buffer(options.vocabulary.dtype) for split in SPLIT_FOLDERS}
    with closing(ahead(_encode(tasks, options), ENCODED_AHEAD)) as batches:
        for index, unit, batch in batches:
            work = work or _Work(index, unit, options, buffers)
            if isinstance(batch, _Encoded):
                work.add(batch)
                continue
            result, work = work.finish(batch), None
            sidecar = options.sidecars / f"{index:05d}.json"
            write_atomically(sidecar, partial(write_json, value=dataclasses.asdict(result)))
            yield result


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

    ids: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    names: list[str] | None
    train: int
    text_bytes: np.ndarray


_Numbered = tuple[int, Unit]


def _read(tasks: Iterable[_Numbered], options: UnitOptions) -> Generator[tuple[int, Unit, Documents | _Tally]]:
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


def _encode(tasks: Iterable[_Numbered], options: UnitOptions) -> Generator[tuple[int, Unit, _Encoded | _Tally]]:
    encoder = make_encoder(options.encoder, options.vocabulary.data)
    spot = Spot(encoder, options.vocabulary.data) if options.encoder == "fastokens" else None
    with closing(ahead(_read(tasks, options), READ_AHEAD)) as batches:
        for index, unit, batch in batches:
            if isinstance(batch, _Tally):
                yield index, unit, batch
                continue
            chosen, train = _held_out_last(batch, options.validation_fraction)
            ids, offsets = encoder.encode(chosen.texts)
            if spot:
                spot.check(chosen.texts, ids, offsets, unit.name)
            sizes = [_utf8_bytes(text) for text in chosen.texts]
            rows, text_bytes = np.array(chosen.rows, dtype=np.int64), np.array(sizes, dtype=np.int64)
            encoded = _Encoded(ids, offsets, rows, chosen.ids, train, text_bytes)
            del batch, chosen, ids, offsets  # they may be of a huge document
            yield index, unit, encoded
            del encoded


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
                self.pending[split].add(batch, part, self.options.vocabulary.eod_id)
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
        columns = pending.buffer.taken(), np.concatenate(pending.lengths), np.concatenate(pending.rows)
        info = write_shard(
            self.options.out, file, split, self.unit.name, *columns, ids=pending.names, source=self.unit.source
        )
        self.shards.append(info)
        self.pending[split] = _Pending(pending.buffer)


class _Buffer:
    """Room for the tokens of one shard after another: grown as needed, so its pages are faulted in once."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._room = np.empty(1 << 16, dtype=dtype)
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

    def add(self, batch: _Encoded, part: slice, eod_id: int) -> None:
        offsets = batch.offsets[part.start : part.stop + 1]
        ids = batch.ids[offsets[0] : offsets[-1]]
        documents = part.stop - part.start
        put_documents(self.buffer.more(len(ids) + documents), ids, offsets - offsets[0], eod_id)
        self.lengths.append(np.diff(offsets) + 1)
        self.rows.append(batch.rows[part])
        if batch.names is not None:
            self.names = (self.names or []) + batch.names[part]
        self.text_bytes += int(batch.text_bytes[part].sum())


def _utf8_bytes(text: str) -> int:
    """Length in UTF-8, without a copy of a long text."""
    if text.isascii():
        return len(text)
    return sum(len(text[at : at + CHUNK_CHARACTERS].encode()) for at in range(0, len(text), CHUNK_CHARACTERS))


def _held_out_last(batch: Documents, fraction: float) -> tuple[Documents, int]:
    """The documents to train on, then the others, so that all are encoded at once; and how many the first are."""
    if fraction == 0:
        return batch, len(batch.texts)
    held_out = [in_validation(text, fraction) for text in batch.texts]
    order = sorted(range(len(held_out)), key=held_out.__getitem__)
    return _take(batch, order), len(held_out) - sum(held_out)


def _take(batch: Documents, order: list[int]) -> Documents:
    return Documents(
        [batch.texts[i] for i in order],
        [batch.rows[i] for i in order],
        None if batch.ids is None else [batch.ids[i] for i in order],
    )


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, for people too."""
    path.write_text(json.dumps(value, indent=1))
