"""Files written beside their place, flushed to the disk, then renamed: a reader sees a whole file or none."""

from __future__ import annotations

import contextlib
import json
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.direct import DirectFile
from pipeline.errors import StoreError
from pipeline.format import ShardInfo, length_histogram, shard_schema
from pipeline.place import is_local, sync, upload


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary file in the folder of `path`, fsync it, rename it to `path`, fsync the folder.

    For a remote `path` the temporary file is in $TMPDIR and is uploaded: an object appears whole or not at all.
    Raises StoreError where the disk is full or cannot be written; then nothing is left behind.
    """
    if not is_local(path):
        _upload(path, write)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # machines may share a process id
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, pa.ArrowException) as error:
        raise StoreError(
            "cannot write",
            where=path,
            found=error,
            remedy="make room or choose another place, then the same command again",
        ) from error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk: the error is raised already
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """`data` as the file `path`, written atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON in the file `path`, written atomically."""
    write_bytes(path, json.dumps(value, indent=1).encode())


def _upload(path: Path, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory(prefix="slw-") as folder:
        temporary = Path(folder) / path.name
        try:
            write(temporary)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(
                "cannot write", where=temporary, found=error, remedy="make room, or choose another place: TMPDIR"
            ) from error
        upload(temporary, path)


class Columns(NamedTuple):
    """Documents as a shard has them."""

    tokens: np.ndarray
    """uint16 or uint32 [tokens]: of all documents in a row."""
    lengths: np.ndarray
    """int64 [documents]"""
    rows: np.ndarray
    """int64 [documents]: see `format`."""
    ids: list[str] | None = None


def write_shard(store: Path, file: str, documents: Columns, *, split: str, unit: str, source: str = "") -> ShardInfo:
    """Write `documents` as STORE/`file`; `split`, `unit` and `source` as in `ShardInfo`."""
    tokens, lengths, rows, ids = documents
    schema = shard_schema(tokens.dtype, ids=ids is not None, source=bool(source))
    offsets = _numbers(_starts(lengths, np.int64))
    column = pa.LargeListArray.from_arrays(offsets, _numbers(tokens), type=schema.field("tokens").type)
    columns = [column, _numbers(np.asarray(rows, dtype=np.int64))]
    if ids is not None:
        columns.append(_strings(ids))
    if source:
        columns.append(pa.repeat(pa.scalar(source), len(lengths)))
    batch = pa.RecordBatch.from_arrays(columns, schema=schema)
    written: list[DirectFile] = []

    def write(path: Path) -> None:
        with DirectFile(path) as sink:
            with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), schema) as writer:
                writer.write_batch(batch)
            written.append(sink)

    write_atomically(store / file, write)
    return ShardInfo(
        file=file,
        split=split,
        digest=written[0].digest.hexdigest(),
        bytes=written[0].size,
        documents=len(lengths),
        tokens=len(tokens),
        length_histogram=length_histogram(lengths),
        unit=unit,
        source=source,
    )


def _numbers(values: np.ndarray) -> pa.Array:
    """Without a copy, and without `pa.array`, which imports pandas where it is installed: a quarter of a second."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _strings(values: list[str]) -> pa.Array:
    data = [value.encode() for value in values]
    starts = _starts(np.array([len(one) for one in data], dtype=np.int64), np.int32)
    return pa.Array.from_buffers(pa.string(), len(data), [None, pa.py_buffer(starts), pa.py_buffer(b"".join(data))])


def _starts(lengths: np.ndarray, dtype: type[np.integer[Any]]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
