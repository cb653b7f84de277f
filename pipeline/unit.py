"""One unit of the input into its shards: read, encode, split off held-out documents, write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from pipeline.corpus import documents
from pipeline.documents import BATCH_BYTES, Documents, Reading, Unit
from pipeline.encoding import Encoder, Vocabulary, append_eod, make_encoder
from pipeline.errors import CorpusError
from pipeline.format import SPLIT_FOLDERS, ShardInfo
from pipeline.writer import write_atomically, write_shard

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

    Units run one after another in this process. Raises CorpusError, StoreError; the units yielded so far are done.
    """
    encoder = make_encoder(options.encoder, options.vocabulary.data)
    for index, unit in tasks:
        work = _Work(index, unit, options, encoder)
        for batch in documents(unit, options.reading, work.on_bad, min(BATCH_BYTES, options.unit_bytes)):
            work.add(batch)
        result = work.finish()
        sidecar = options.sidecars / f"{index:05d}.json"
        write_atomically(sidecar, partial(write_json, value=dataclasses.asdict(result)))
        yield result


class _Work:
    """A unit in the making."""

    def __init__(self, index: int, unit: Unit, options: UnitOptions, encoder: Encoder) -> None:
        self.index = index
        self.unit = unit
        self.options = options
        self.encoder = encoder
        self.pending = {split: _Pending() for split in SPLIT_FOLDERS}
        self.shards: list[ShardInfo] = []
        self.text_bytes = self.empty = self.bad = 0
        self.bad_examples: list[str] = []

    def add(self, batch: Documents) -> None:
        """Encode documents; write a shard once enough are pending: an input that cannot be split makes several.

        Empty texts are counted and left out.
        """
        full = _select(batch, [bool(text) for text in batch.texts])
        self.empty += len(batch.texts) - len(full.texts)
        self.text_bytes += sum(len(text.encode()) for text in full.texts)
        for split, chosen in _by_split(full, self.options.validation_fraction):
            self.pending[split].add(self.encoder, chosen, self.options.vocabulary)
            if self.pending[split].text_bytes >= 2 * self.options.unit_bytes:
                self._flush(split)

    def finish(self) -> UnitResult:
        """Write what is pending."""
        for split in SPLIT_FOLDERS:
            if self.pending[split].rows:
                self._flush(split)
        return UnitResult(
            unit=self.index,
            shards=self.shards,
            text_bytes=self.text_bytes,
            empty=self.empty,
            bad=self.bad,
            bad_examples=self.bad_examples,
        )

    def _flush(self, split: str) -> None:
        earlier = sum(shard.split == split for shard in self.shards)
        part = f".{earlier:03d}" if earlier else ""
        file = f"{SPLIT_FOLDERS[split]}/{self.index:05d}{part}.arrow"
        columns = self.pending[split].columns()
        ids, source = self.pending[split].ids, self.unit.source
        info = write_shard(self.options.out, file, split, self.unit.name, *columns, ids=ids, source=source)
        self.shards.append(info)
        self.pending[split] = _Pending()

    def on_bad(self, error: CorpusError) -> None:
        """Raise the error, or count and keep it."""
        if not self.options.skip_bad:
            raise error
        self.bad += 1
        if len(self.bad_examples) < BAD_KEPT:
            self.bad_examples.append(str(error))


class _Pending:
    """Encoded documents of a shard in the making."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.lengths: list[np.ndarray] = []
        self.rows: list[int] = []
        self.ids: list[str] | None = None
        self.text_bytes = 0

    def add(self, encoder: Encoder, chosen: Documents, vocabulary: Vocabulary) -> None:
        ids, offsets = encoder.encode(chosen.texts)
        tokens, lengths = append_eod(ids, offsets, vocabulary.eod_id, vocabulary.dtype)
        self.tokens.append(tokens)
        self.lengths.append(lengths)
        self.rows += chosen.rows
        if chosen.ids is not None:
            self.ids = (self.ids or []) + chosen.ids
        self.text_bytes += sum(len(text) for text in chosen.texts)

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self.tokens), np.concatenate(self.lengths), np.array(self.rows, dtype=np.int64)


def _by_split(batch: Documents, fraction: float) -> Iterator[tuple[str, Documents]]:
    held_out = [in_validation(text, fraction) for text in batch.texts]
    for split, wanted in (("train", False), ("validation", True)):
        chosen = _select(batch, [held is wanted for held in held_out])
        if chosen.texts:
            yield split, chosen


def _select(batch: Documents, wanted: list[bool]) -> Documents:
    return Documents(
        list(compress(batch.texts, wanted)),
        list(compress(batch.rows, wanted)),
        None if batch.ids is None else list(compress(batch.ids, wanted)),
    )


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, for people too."""
    path.write_text(json.dumps(value, indent=1))
