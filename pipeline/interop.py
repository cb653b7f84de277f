"""Stores from data that is tokens already, and stores in other systems' formats.

An import is read once, in order, and written as bounded shards into a folder that becomes the store at the end; an
export likewise. Neither holds more than a shard in memory. A store, exported and imported, has the same tokens.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import megatron
from pipeline.amount import amount
from pipeline.errors import ConfigError, CorpusError
from pipeline.files import STDIN
from pipeline.format import MANIFEST_NAME, SPLIT_FOLDERS, TOKENIZER_NAME, Manifest, ShardInfo
from pipeline.held_out import are_held_out, check_fraction
from pipeline.huggingface import BATCH_ROWS, STATE_NAME, TokenColumn, int32_lists, write_dataset
from pipeline.inputs import in_order, is_new
from pipeline.reader import Store
from pipeline.shell import pasted
from pipeline.staging import new_folder
from pipeline.tokenised import BATCH_TOKENS, Ended, Tokenised, checked, documents_where, ended, runs, without_last
from pipeline.urls import is_remote
from pipeline.vocabulary import Vocabulary, load_vocabulary, manifest_of
from pipeline.writer import Columns, write_bytes, write_json, write_shard

FORMATS = ("megatron", "hf")
TokenReader = megatron.IndexedDataset | TokenColumn
Progress = Callable[[int], None]
"""Called with the tokens done so far."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What an import is asked for."""

    inputs: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    """(name, what to read), in place of `inputs`."""
    tokenizer: Path
    out: Path
    format: str | None = None
    """One of FORMATS; None: megatron where the input is an indexed dataset, else hf."""
    token_column: str = "input_ids"
    id_column: str | None = None
    """Column of a dataset to keep as the store's column `id`."""
    eod: str | None = None
    bos: str | None = None
    validation_fraction: float = 0.0
    unit_bytes: int = 64 << 20
    """Tokens of a shard, in bytes: it is written once it has as many."""
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What `import_tokens` did."""

    manifest: Manifest
    added: int
    """Documents that did not end in the end-of-document token and were given one."""
    empty: int
    """Documents without a token, left out."""


def import_tokens(
    options: ImportOptions, progress: Callable[[float, int], None] = lambda done, tokens: None
) -> Imported:
    """Make the store `options.out` of data that is tokens already.

    `progress` is called with the inputs read so far, a fraction of the one being read included, and the tokens.
    Raises CorpusError for the data, TokenizerError, ConfigError, and StoreError where `out` is in the way.
    """
    check_fraction(options.validation_fraction)
    if options.unit_bytes < 1:
        raise ConfigError("a shard needs room", found=f"--unit-bytes {options.unit_bytes}", allowed="1 or more")
    readers = _readers(options)
    vocabulary = load_vocabulary(options.tokenizer, eod=options.eod, bos=options.bos)
    with new_folder(options.out, marker=MANIFEST_NAME, force=options.force) as folder:
        named = [(source, name) for source, name, _ in readers]
        work = _Import(folder, named, options, vocabulary, progress)
        for number, (source, _, reader) in enumerate(readers):
            work.read(number, source, reader)
        manifest = work.finish()
    return Imported(manifest=manifest, added=work.added, empty=work.empty)


def reader_of(name: str, options: ImportOptions) -> TokenReader:
    """The reader of `name`. Raises CorpusError where there is nothing to read, ConfigError for a wrong option."""
    if options.format is not None and options.format not in FORMATS:
        raise ConfigError("unknown format", found=options.format, allowed=", ".join(FORMATS))
    if name == STDIN:
        raise ConfigError("tokens are not read from standard input", allowed="files, folders, patterns and URLs")
    prefix = megatron.prefix_of(Path(name))
    if prefix is not None and is_remote(name):
        raise CorpusError("an indexed dataset is read from a local disk", where=name, remedy="copy both files first")
    if options.format != "hf" and (indices := _indices(name)):
        prefixes = [pasted(index.with_suffix("")) for index in indices]
        raise CorpusError(
            "several indexed datasets in one input: each is an input of its own",
            where=name,
            found=amount(len(indices), ".idx file"),
            allowed="PREFIX, PREFIX.bin or PREFIX.idx; --format hf for the tables beside them",
            remedy=f"slw-prep import {' '.join(prefixes[:3])}{' ...' * (len(prefixes) > 3)}",
        )
    if options.format == "hf" or (options.format is None and prefix is None):
        return TokenColumn(name, options.token_column, options.id_column)
    if options.id_column is not None:
        raise ConfigError("a Megatron dataset has no ids", where=name, remedy="leave --id-column out")
    return megatron.IndexedDataset(prefix or Path(name))


def _readers(options: ImportOptions) -> list[tuple[str, str, TokenReader]]:
    """(source, input, its reader), each indexed dataset and each table once, whatever names it.

    Raises ConfigError where one is in two sources, and as `reader_of` does.
    """
    readers, sources_of = [], dict[str, str]()
    for source, name in in_order(options.inputs, options.sources):
        reader = reader_of(name, options)
        if isinstance(reader, TokenColumn):
            reader.files = [file for file in reader.files if is_new(file.path, source, sources_of)]
            new = bool(reader.files)
        else:
            new = is_new(reader.name, source, sources_of)
        if new:
            readers.append((source, name, reader))
    return readers


def _indices(name: str) -> list[Path]:
    """The .idx of the indexed datasets in the folder or of the pattern `name`; none where that is one itself."""
    path = Path(name)
    if path.is_dir() and not path.with_name(f"{path.name}.idx").is_file():
        return sorted(path.glob("*.idx"))
    matching = [] if path.exists() else glob.glob(name, recursive=True)  # noqa: PTH207  # may be absolute
    return sorted(Path(one) for one in matching if one.endswith(".idx"))


def export_megatron(
    store: Store, out: Path, *, source: str | None = None, eod: bool = True, force: bool = False, progress: Progress
) -> tuple[int, int]:
    """Write the documents of `store`, or of one source of it, as OUT.bin and OUT.idx; returns (documents, tokens).

    Without `eod` the last token of each document is left out. Raises StoreError where the output is in the way.
    """
    export = _Export(store, eod, progress)
    parts = (part for index in _shards_of(store, source) for part, _ in export.parts(index))
    megatron.write_indexed_dataset(out, parts, store.manifest.vocab_size, force=force)
    return export.documents, export.tokens


def export_huggingface(
    store: Store, out: Path, *, source: str | None = None, eod: bool = True, force: bool = False, progress: Progress
) -> tuple[int, int]:
    """Write the documents of `store`, or of one source of it, as a dataset that `datasets.load_from_disk` opens.

    Columns: `input_ids` (list of int32) and those that the shards have beside their tokens. A file a shard. Returns
    (documents, tokens). Raises StoreError where the output is in the way.
    """
    export = _Export(store, eod, progress)
    chosen = _shards_of(store, source)
    more = [field for field in store.columns(chosen[0]).schema if field.name != "tokens"]
    schema = pa.schema([pa.field("input_ids", pa.list_(pa.int32())), *(pa.field(f.name, f.type) for f in more)])

    def rows(index: int) -> Iterator[list[Any]]:
        for part, columns in export.parts(index):
            yield [int32_lists(part.tokens, part.lengths), *(columns.column(field.name) for field in more)]

    with new_folder(out, marker=STATE_NAME, force=force) as folder:
        write_dataset(folder, schema, store.split, (rows(index) for index in chosen), len(chosen))
    return export.documents, export.tokens


def _shards_of(store: Store, source: str | None) -> list[int]:
    chosen = [index for index, shard in enumerate(store.shards) if source is None or shard.source == source]
    named = [name for name in store.sources if name]
    if not chosen:
        raise ConfigError(
            "nothing to export",
            where=f"{store.path} ({store.split})",
            found=f"source {source!r}" if source is not None else "no document",
            allowed=f"one of the sources {', '.join(map(repr, named))}" if named else None,
            remedy="the store has no named sources: leave --source out" if source and not named else None,
        )
    return chosen


class _Export:
    """An export of `store`, with or without its end-of-document tokens."""

    def __init__(self, store: Store, eod: bool, progress: Progress) -> None:
        self.store = store
        self.eod = eod
        self.progress = progress
        self.documents = self.tokens = 0
        """Those exported so far."""

    def parts(self, index: int) -> Iterator[tuple[Tokenised, pa.RecordBatch]]:
        """Shard `index`, at most BATCH_ROWS documents and about BATCH_TOKENS tokens at a time, with its columns."""
        columns = self.store.columns(index, checked=True)
        offsets = columns.column("tokens").offsets.to_numpy()
        tokens = columns.column("tokens").values.to_numpy()
        for at, last in runs(offsets, BATCH_TOKENS, BATCH_ROWS):
            part = Tokenised(tokens[offsets[at] : offsets[last]], np.diff(offsets[at : last + 1]), at)
            if not self.eod:
                part = Tokenised(*without_last(part.tokens, part.lengths), at)
            yield part, columns.slice(at, last - at)
            self.documents += len(part.lengths)
            self.tokens += len(part.tokens)
            self.progress(self.tokens)


class _Import:
    """A store in the making, in `folder`."""

    def __init__(
        self,
        folder: Path,
        named: list[tuple[str, str]],
        options: ImportOptions,
        vocabulary: Vocabulary,
        progress: Callable[[float, int], None],
    ) -> None:
        self.folder = folder
        self.named = named
        self.options = options
        self.vocabulary = vocabulary
        self.progress = progress
        self.most = min(BATCH_TOKENS, max(options.unit_bytes // vocabulary.dtype.itemsize, 1))
        self.pending: dict[str, list[Ended]] = {split: [] for split in SPLIT_FOLDERS}
        self.shards: list[ShardInfo] = []
        self.added = self.empty = self.tokens = 0

    def read(self, number: int, source: str, reader: TokenReader) -> None:
        """All documents of input `number`, in shards of their own."""
        for batch in reader.batches(self.most):
            checked(batch, self.vocabulary, reader.name)
            whole = ended(batch, self.vocabulary)
            self.added += whole.added
            self.empty += whole.empty
            self.tokens += len(whole.tokens)
            held = are_held_out(whole.tokens, whole.lengths, self.options.validation_fraction)
            for split, chosen in (("train", ~held), ("validation", held)):
                if chosen.any():
                    self.pending[split].append(documents_where(whole, chosen))
                    if sum(part.tokens.nbytes for part in self.pending[split]) >= self.options.unit_bytes:
                        self._flush(split, source, reader.name)
            self.progress(number + reader.done, self.tokens)
        for split in SPLIT_FOLDERS:
            if self.pending[split]:
                self._flush(split, source, reader.name)

    def finish(self) -> Manifest:
        """The tokenizer, then the manifest."""
        if not any(shard.split == "train" for shard in self.shards):
            raise CorpusError(
                "no document to train on",
                where=", ".join(name for _, name in self.named[:3]),
                found=f"{self.empty} empty documents",
                remedy="check the input and --validation-fraction",
            )
        options, vocabulary = self.options, self.vocabulary
        parameters = {
            "imported": [list(item) for item in self.named],
            "token_column": options.token_column,
            "id_column": options.id_column,
            "tokenizer": vocabulary.digest,
            "eod_id": vocabulary.eod_id,
            "bos_id": vocabulary.bos_id,
            "validation_fraction": options.validation_fraction,
            "unit_bytes": options.unit_bytes,
            "end_of_document_added": self.added,
        }
        manifest = replace(manifest_of(vocabulary, parameters), shards=self.shards, skipped=self.empty)
        write_bytes(self.folder / TOKENIZER_NAME, vocabulary.data)
        write_json(self.folder / MANIFEST_NAME, manifest.to_json())
        return manifest

    def _flush(self, split: str, source: str, name: str) -> None:
        parts, self.pending[split] = self.pending[split], []
        number = sum(shard.split == split for shard in self.shards)
        file = f"{SPLIT_FOLDERS[split]}/{number:05d}.arrow"
        tokens, lengths, rows = (
            np.concatenate([getattr(part, column) for part in parts]) for column in ("tokens", "lengths", "rows")
        )
        ids = None if self.options.id_column is None else [name for part in parts for name in part.ids.tolist()]  # type: ignore[union-attr]
        unit = f"{Path(name).name} documents [{rows[0]}:{rows[-1] + 1}]"
        columns = Columns(tokens, lengths, rows, ids)
        self.shards.append(write_shard(self.folder, file, columns, split=split, unit=unit, source=source))
