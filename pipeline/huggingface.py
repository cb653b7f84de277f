"""Hugging Face datasets, in and out: folders of `save_to_disk`, Arrow and Parquet files.

Read with pyarrow alone, memory-mapped or some rows at a time. Written as a folder that `datasets.load_from_disk`
opens without a copy: Arrow streams, dataset_info.json, and state.json, written last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.documents import Reading
from pipeline.errors import CorpusError
from pipeline.inputs import TABLES, InputFile, find_files
from pipeline.tables import check_column, open_arrow, open_parquet
from pipeline.tokenised import BATCH_TOKENS, Tokenised, runs
from pipeline.writer import write_atomically, write_json

STATE_NAME = "state.json"
BATCH_ROWS = 1024
_ALLOWED = (
    "PREFIX of PREFIX.bin and PREFIX.idx, a folder of `save_to_disk`, .parquet or .arrow files, folders of these"
)


class TokenColumn:
    """The column `column` of a dataset, a list of integers a row, and its column `id_column` where one is asked for.

    `name` is a folder of `save_to_disk`, a folder of .parquet or .arrow files, such a file, a pattern of them, or a
    URL of any of these. Raises CorpusError where it is none.
    """

    def __init__(self, name: str, column: str, id_column: str | None = None) -> None:
        self.name = name
        self.files = find_files((name,), Reading(), allowed=_ALLOWED)
        self.column = column
        self.id_column = id_column
        self.done = 0.0
        """Share of the files that `batches` has read."""
        if others := [file for file in self.files if file.format not in TABLES]:
            raise CorpusError(
                "not tokenised data",
                where=others[0].path,
                allowed=_ALLOWED,
                remedy="text is for `slw-prep build`; an index is told from its name: PREFIX or PREFIX.idx",
            )

    def batches(self, most: int = BATCH_TOKENS) -> Iterator[Tokenised]:
        """All rows in order, each a document, at most `most` tokens or one document at a time.

        Raises CorpusError where a file or a column is missing or damaged, or holds what it should not.
        """
        first = 0
        for number, file in enumerate(self.files):
            for batch in self._record_batches(file):
                for part in self._split(batch, file.path, first, most):
                    yield part
                    first += len(part.lengths)
            self.done = (number + 1) / len(self.files)

    def _record_batches(self, file: InputFile) -> Iterator[pa.RecordBatch]:
        """The file's record batches, with the columns that are asked for."""
        names = [self.column] if self.id_column is None else [self.column, self.id_column]
        if file.format == "parquet":
            with open_parquet(file.path) as table:
                _has(table.schema_arrow, names, file.path)
                yield from table.iter_batches(BATCH_ROWS, columns=names)
        else:
            with open_arrow(file.path) as batches:
                for batch in batches:
                    _has(batch.schema, names, file.path)
                    chosen = batch.select(names)
                    chosen.validate(full=True)  # its offsets are trusted below
                    yield chosen

    def _split(self, batch: pa.RecordBatch, path: str, first: int, most: int) -> Iterator[Tokenised]:
        where = f"{path}, column {self.column!r}"
        rows = batch.column(self.column)
        lengths = _lengths(rows, where, first)
        ids = self._ids(batch, path, first) if self.id_column is not None else None
        ends = np.concatenate([[0], np.cumsum(lengths)])
        for at, last in runs(ends, most):
            values = rows.slice(at, last - at).flatten()
            if values.null_count:
                position = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
                raise _null(where, first + int(np.searchsorted(ends, ends[at] + position, side="right")) - 1)
            yield Tokenised(values.to_numpy(), lengths[at:last], first + at, None if ids is None else ids[at:last])

    def _ids(self, batch: pa.RecordBatch, path: str, first: int) -> np.ndarray:
        column = batch.column(self.id_column)
        where = f"{path}, column {self.id_column!r}"
        kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
        if not any(fits(column.type) for fits in kinds):
            raise CorpusError("not a column of ids", where=where, found=column.type, allowed="strings or integers")
        if column.null_count:
            raise _null(where, first + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))))
        return np.array(column.cast(pa.string()).to_pylist(), dtype=object)


def write_dataset(
    folder: Path, schema: pa.Schema, split: str, files: Iterable[Iterable[list[Any]]], count: int
) -> None:
    """Write `files`, `count` of them, each the columns of one record batch after another, as a dataset.

    `schema` gives names and types; they become the dataset's features. Raises StoreError where it cannot be written.
    """
    import datasets

    features = datasets.Features.from_arrow_schema(schema)
    names = []
    for number, batches in enumerate(files):
        names.append(f"data-{number:05d}-of-{count:05d}.arrow")
        _write_stream(folder / names[-1], features.arrow_schema, batches)
    assert len(names) == count, "fewer files than said"
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0" * 16,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": split,
    }
    write_json(folder / STATE_NAME, state)


def int32_lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """An Arrow list<int32> of `lengths`, int64 [rows], out of integers one after another."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def _write_stream(path: Path, schema: pa.Schema, batches: Iterable[list[Any]]) -> None:
    def write(temporary: Path) -> None:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for columns in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

    write_atomically(path, write)


def _lengths(rows: pa.Array, where: str, first: int) -> np.ndarray:
    """int64 [rows]: tokens of each. Raises CorpusError where `rows` are no lists of integers, or null."""
    kind = rows.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise CorpusError(
            "not a column of token ids",
            where=where,
            found=kind,
            allowed="a list of integers a row",
            remedy="name the column with the ids: --token-column NAME",
        )
    if rows.null_count:
        raise _null(where, first + int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False))))
    lengths: np.ndarray = pc.list_value_length(rows).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def _has(schema: pa.Schema, names: list[str], path: str) -> None:
    for name, option in zip(names, ("--token-column", "--id-column"), strict=False):
        check_column(schema, name, path, f"name the column: {option} NAME")


def _null(where: str, row: int) -> CorpusError:
    return CorpusError("a null, where there must be something", where=f"{where}, document {row}")
