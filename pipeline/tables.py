"""Documents out of Parquet and Arrow files (IPC file and stream; what Hugging Face `save_to_disk` writes too).

The text may be string, large_string, string_view or a dictionary of one. Parquet is split by row groups, a local
Arrow file by record batches; a remote Arrow file is read in one go. Offsets are checked before they are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.documents import Bad, Documents, Reading, Unit
from pipeline.errors import CorpusError
from pipeline.files import open_raw, unreadable
from pipeline.urls import is_remote

_ARROW_FILE_MAGIC = b"ARROW1"
_READ_BYTES = 1 << 20
_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def parquet_sizes(path: str) -> list[int]:
    """Uncompressed bytes of each row group."""
    with open_parquet(path) as table:
        return [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]


def arrow_sizes(path: str) -> list[int]:
    """Bytes of each record batch of a local Arrow file; it is memory-mapped, so that no text is read."""
    with open_arrow(path) as batches:
        return [batch.nbytes for batch in batches]


def read_parquet(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int) -> Iterator[Documents]:
    """Row groups `first` to `end` of a Parquet file."""
    path = unit.paths[0]
    with open_parquet(path) as table:
        names = _columns(table.schema_arrow, reading, path)
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        row = sum(group.num_rows for group in groups[: unit.first])
        for number in range(unit.first, unit.end):
            group = groups[number]
            rows = max(1, group.num_rows * batch_bytes // max(1, group.total_byte_size))
            for batch in table.iter_batches(min(rows, 1 << 16), row_groups=[number], columns=names):
                yield from _documents(batch, row, reading, path, bad, batch_bytes)
                row += batch.num_rows


def read_arrow(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int) -> Iterator[Documents]:
    """Record batches `first` to `end` of an Arrow file, all of them where `end` is -1."""
    path, row = unit.paths[0], 0
    with open_arrow(path) as batches:
        for number, batch in enumerate(batches):
            if 0 <= unit.end <= number:
                return
            if number >= unit.first:
                chosen = batch.select(_columns(batch.schema, reading, path))
                yield from _documents(chosen, row, reading, path, bad, batch_bytes)
            row += batch.num_rows


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file, local or remote. Raises CorpusError for a damaged one, also where it is read."""
    with (
        _reading(path, "Parquet"),
        open_raw(path) as stream,
        # with a buffer, else a column of a row group is read at once
        pq.ParquetFile(stream if is_remote(path) else path, buffer_size=_READ_BYTES) as table,
    ):
        yield table


@contextlib.contextmanager
def open_arrow(path: str) -> Iterator[Iterator[pa.RecordBatch]]:
    """The record batches of an Arrow file or stream. Raises CorpusError for a damaged one, also where it is read."""
    with _reading(path, "Arrow"), open_raw(path) as stream:
        is_file = stream.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
        stream.seek(0)
        with contextlib.ExitStack() as stack:
            source = stream if is_remote(path) else stack.enter_context(pa.memory_map(path))
            if is_file:
                table = stack.enter_context(pa.ipc.open_file(source))
                yield (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                yield iter(stack.enter_context(pa.ipc.open_stream(source)))


def check_column(schema: pa.Schema, name: str, path: str, remedy: str) -> None:
    """Raise CorpusError where the file `path` has no column `name`."""
    if name not in schema.names:
        found = f"columns {', '.join(schema.names)}"
        raise CorpusError(f"a table without the column {name!r}", where=path, found=found, remedy=remedy)


@contextlib.contextmanager
def _reading(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise CorpusError(
            f"not a readable {kind} file",
            where=path,
            found=error,
            remedy="is it complete, and of that kind? copy or make it again; --format says what it is",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


def _columns(schema: pa.Schema, reading: Reading, path: str) -> list[str]:
    """The columns to read: text, and id where one is asked for. Raises CorpusError for one that will not do."""
    wanted = [(reading.text_field, "--text-field", "text", _is_text)]
    if reading.id_field:
        wanted.append((reading.id_field, "--id-field", "id", _is_id))
    for name, option, what, fits in wanted:
        check_column(schema, name, path, f"name the column with the {what}: {option} NAME")
        kind = schema.field(name).type
        if not fits(kind):
            others = [field.name for field in schema if fits(field.type)]
            raise CorpusError(
                f"the column {name!r} holds no {what}",
                where=path,
                found=kind,
                allowed="string, large_string, string_view, a dictionary of one" + (", integers" * (what == "id")),
                remedy=f"name another column: {option} NAME; such are {', '.join(others) or 'none'}",
            )
    return list(dict.fromkeys(name for name, *_ in wanted))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _documents(
    batch: pa.RecordBatch, row: int, reading: Reading, path: str, bad: Bad, batch_bytes: int
) -> Iterator[Documents]:
    """The documents of a record batch whose first row is number `row`, in pieces of about `batch_bytes`."""
    pieces = max(1, -(-batch.nbytes // batch_bytes))
    size = max(1, -(-batch.num_rows // pieces))
    for at in range(0, batch.num_rows, size):
        piece = batch.slice(at, size)
        yield _piece(piece, range(row + at, row + at + piece.num_rows), reading, path, bad)


def _piece(batch: pa.RecordBatch, rows: range, reading: Reading, path: str, bad: Bad) -> Documents:
    texts = _strings(batch.column(reading.text_field))
    ids = _strings(batch.column(reading.id_field)) if reading.id_field else None
    sound = [isinstance(text, str) for text in texts]
    if ids is not None:
        sound = [one and isinstance(name, str) for one, name in zip(sound, ids, strict=True)]
    if all(sound):
        return Documents(texts, list(rows), ids)
    for at in (at for at, one in enumerate(sound) if not one):
        name, value = reading.text_field, texts[at]
        if isinstance(value, str) and ids is not None:
            name, value = str(reading.id_field), ids[at]
        bad(
            CorpusError(
                f"the column {name!r} holds no text here",
                where=f"{path}, row {rows[at]}",
                found="null" if value is None else f"not UTF-8: {value[:40]!r}",
                allowed="text encoded as UTF-8",
                remedy="leave such rows out: --skip-bad",
            )
        )
    kept = [at for at, one in enumerate(sound) if one]
    return Documents(
        [texts[i] for i in kept], [rows[i] for i in kept], None if ids is None else [ids[i] for i in kept]
    )


def _strings(column: pa.Array) -> list[Any]:
    """Each value as str, None for null, and bytes where it is not UTF-8. Raises ArrowInvalid for wrong offsets."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.string())
    elif column.type in (pa.string(), pa.large_string()):  # whether it is UTF-8 shows when it becomes text
        column.view(_BYTES[column.type]).validate(full=True)
    else:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            return _strings_one_by_one(column)
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        return _strings_one_by_one(column)
    return values


def _strings_one_by_one(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        values = _strings_one_by_one(column.dictionary)
        return [None if at is None else values[at] for at in column.indices.to_pylist()]
    found: list[Any] = column.view(_BYTES[column.type]).to_pylist()
    for at, value in enumerate(found):
        with contextlib.suppress(UnicodeDecodeError, AttributeError):
            found[at] = value.decode()
    return found
