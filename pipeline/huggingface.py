"""Hugging Face datasets, in and out: folders of `save_to_disk`, Arrow and Parquet files.

Read with pyarrow alone, memory-mapped or a row group at a time. Written as a folder that `datasets.load_from_disk`
opens without a copy: Arrow streams, dataset_info.json, and state.json, written last.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import CorpusError
from pipeline.tokenised import BATCH_TOKENS, Tokenised
from pipeline.writer import write_atomically

STATE_NAME = "state.json"
DICT_NAME = "dataset_dict.json"
ARROW = (".arrow", ".feather", ".ipc")
PARQUET = (".parquet",)
BATCH_ROWS = 1024


class TokenColumn:
    """The column `column` of a dataset, a list of integers a row.

    `name` is a folder of `save_to_disk`, a folder of .parquet or .arrow files, such a file, or a pattern of them.
    Raises CorpusError where it is none of these.
    """

    def __init__(self, name: str, column: str) -> None:
        self.name = name
        self.files = _files(name)
        self.column = column

    def batches(self, most: int = BATCH_TOKENS) -> Iterator[Tokenised]:
        """All rows in order, each a document, at most `most` tokens or one document at a time.

        Raises CorpusError where a file or the column is missing or damaged, or holds anything but integers.
        """
        first = 0
        for path in self.files:
            for rows in _columns(path, self.column):
                for part in self._split(rows, f"{path}, column {self.column!r}", first, most):
                    yield part
                    first += len(part.lengths)

    def _split(self, rows: pa.Array, where: str, first: int, most: int) -> Iterator[Tokenised]:
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
        lengths = pc.list_value_length(rows).to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        at = 0
        while at < len(rows):
            last = max(int(np.searchsorted(ends, ends[at] + most, side="right")) - 1, at + 1)
            values = rows.slice(at, last - at).flatten()
            if values.null_count:
                position = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
                raise _null(where, first + int(np.searchsorted(ends, ends[at] + position, side="right")) - 1)
            yield Tokenised(values.to_numpy(), lengths[at:last], first + at)
            at = last


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
    write_atomically(folder / STATE_NAME, lambda path: _write_text(path, json.dumps(state, indent=1)))


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


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _files(name: str) -> list[Path]:
    path = Path(name)
    if (path / STATE_NAME).is_file():
        return _saved_files(path)
    if (path / DICT_NAME).is_file():
        raise CorpusError(
            "a dataset of several splits",
            where=path,
            found=", ".join(sorted(p.parent.name for p in path.glob(f"*/{STATE_NAME}"))),
            remedy=f"give one of them: {path}/train",
        )
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in (*ARROW, *PARQUET) and p.is_file())
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
    if not found:
        raise CorpusError(
            "no tokenised data here",
            where=name,
            allowed="PREFIX of PREFIX.bin and PREFIX.idx, a folder of `save_to_disk`, .parquet or .arrow files",
        )
    return found


def _saved_files(folder: Path) -> list[Path]:
    try:
        state = json.loads((folder / STATE_NAME).read_bytes())
        if state.get("_indices_data_files"):
            raise CorpusError(
                "a dataset saved with a selection of rows beside its data",
                where=folder,
                remedy="save it with the selection carried out: dataset.flatten_indices().save_to_disk(...)",
            )
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError("state.json of the dataset cannot be read", where=folder, found=repr(error)) from error
    for path in files:
        if not path.is_file():
            raise CorpusError("a file of the dataset is missing", where=path, remedy="copy the dataset again")
    return files


def _columns(path: Path, column: str) -> Iterator[pa.Array]:
    """The column, a record batch at a time."""
    try:
        if path.suffix in PARQUET:
            with pq.ParquetFile(path) as table:
                _has(table.schema_arrow, column, path)
                for batch in table.iter_batches(BATCH_ROWS, columns=[column]):
                    yield batch.column(0)
            return
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":  # the file format, else the stream
                reader = pa.ipc.open_file(source)
                _has(reader.schema, column, path)
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number).column(column)
                return
            source.seek(0)
            stream = pa.ipc.open_stream(source)
            _has(stream.schema, column, path)
            for batch in stream:
                yield batch.column(column)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            "not a readable Parquet or Arrow file", where=path, found=error, remedy="is it whole? copy it again"
        ) from error


def _has(schema: pa.Schema, column: str, path: Path) -> None:
    if column not in schema.names:
        raise CorpusError(
            f"a dataset without the column {column!r}",
            where=path,
            found=f"columns {', '.join(schema.names)}",
            remedy="name the column with the ids: --token-column NAME",
        )


def _null(where: str, row: int) -> CorpusError:
    return CorpusError("a null among the token ids", where=f"{where}, document {row}", allowed="integers")
