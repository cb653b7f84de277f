"""Documents out of text files, JSON lines and Parquet, plain or compressed, split into units.

A unit is a deterministic part of the input, the grain of parallelism and of resume. Units depend on the files and on
`unit_bytes` alone: a plain .jsonl file is split into byte ranges (a line belongs to the unit in which its first byte
lies), Parquet into runs of row groups, small text files are put together, a compressed file stays whole.
Nothing is held in memory beyond one document, one line or one row group.
"""

from __future__ import annotations

import glob
import gzip
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pipeline.errors import CorpusError

COMPRESSIONS = (".gz", ".zst")
LINES = (".jsonl", ".json", ".ndjson")
TEXTS = (".txt", ".md")
TABLES = (".parquet",)
CHUNK_BYTES = 1 << 20
BATCH_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of the input. `first` and `end` are bytes of lines, row groups of tables, and 0, -1 for whole files."""

    kind: str
    """A key of `READERS`."""
    paths: tuple[str, ...]
    first: int = 0
    end: int = -1

    @property
    def name(self) -> str:
        """For people: `books.jsonl [0:67108864]`."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        part = f" [{self.first}:{self.end}]" if self.end >= 0 else ""
        return Path(self.paths[0]).name + more + part


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to find the documents in a file."""

    text_field: str = "text"
    separator: str | None = None
    """Text files are split at this string; None: a file is a document."""


@dataclass(frozen=True)
class Documents:
    """Consecutive records of the corpus: at most about `BATCH_BYTES` of text, or one document."""

    texts: list[str]
    rows: list[int]
    """Byte offsets of lines or texts, row numbers of a table."""
    ids: list[str] | None = None
    """What the corpus calls them; None where nobody asked."""


Record = tuple[str, int]
"""Text and row of one document."""

Bad = Callable[[CorpusError], None]
"""Called with every bad record; raises it, or counts it and returns."""


def find_files(inputs: tuple[str, ...], suffixes: tuple[str, ...] = ()) -> list[Path]:
    """The files of `inputs`: files as they are, folders (known suffixes and `suffixes`) and patterns, sorted.

    Raises CorpusError where an input does not exist, matches nothing, or nothing is left.
    """
    known = (*LINES, *TEXTS, *TABLES, *suffixes)
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in known)
        else:
            found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())  # noqa: PTH207
        if not found:
            raise CorpusError(
                "no input file here",
                where=name,
                found="a folder without such files" if path.is_dir() else "nothing of that name",
                allowed=f"a file, a pattern, or a folder with {', '.join(known)} (also .gz, .zst)",
                remedy="check the path; --suffix .py adds a kind of text file" if path.is_dir() else "check the path",
            )
        files += found
    return list(dict.fromkeys(files))


def split_units(files: list[Path], unit_bytes: int, reading: Reading) -> list[Unit]:
    """Units in the order of `files`, of about `unit_bytes` bytes of input each where it can be split."""
    units: list[Unit] = []
    small: list[str] = []
    size = 0
    for path in files:
        if kind := _splittable(path, reading):
            if small:
                units.append(Unit(kind="texts", paths=tuple(small)))
                small, size = [], 0
            units += _SPLITTERS[kind](path, unit_bytes)
            continue
        small.append(str(path))
        size += path.stat().st_size
        if size >= unit_bytes:
            units.append(Unit(kind="texts", paths=tuple(small)))
            small, size = [], 0
    if small:
        units.append(Unit(kind="texts", paths=tuple(small)))
    return units


def documents(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int = BATCH_BYTES) -> Iterator[Documents]:
    """The documents of a unit in order, in batches of about `batch_bytes` of text.

    `bad` is called with a CorpusError for each record that is none.
    """
    return READERS[unit.kind](unit, reading, bad, batch_bytes)


def in_batches(records: Iterator[Record], batch_bytes: int) -> Iterator[Documents]:
    """Put single records together until they have `batch_bytes` characters."""
    texts: list[str] = []
    rows: list[int] = []
    size = 0
    for text, row in records:
        texts.append(text)
        rows.append(row)
        size += len(text)
        if size >= batch_bytes:
            yield Documents(texts, rows)
            texts, rows, size = [], [], 0
    if texts:
        yield Documents(texts, rows)


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def _splittable(path: Path, reading: Reading) -> str | None:
    suffix = _suffix(path)
    if suffix in TABLES:
        return "table"
    if suffix in LINES:
        return "lines"
    return "separated" if reading.separator is not None else None


def _split_lines(path: Path, unit_bytes: int) -> list[Unit]:
    if path.suffix in COMPRESSIONS:
        return [Unit(kind="lines", paths=(str(path),))]
    size = path.stat().st_size
    starts = range(0, max(size, 1), unit_bytes)
    return [Unit(kind="lines", paths=(str(path),), first=at, end=min(at + unit_bytes, size)) for at in starts]


def _split_table(path: Path, unit_bytes: int) -> list[Unit]:
    with _parquet(path) as table:
        sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    units, first, size = [], 0, 0
    for group, group_bytes in enumerate(sizes):
        size += group_bytes
        if size >= unit_bytes or group == len(sizes) - 1:
            units.append(Unit(kind="table", paths=(str(path),), first=first, end=group + 1))
            first, size = group + 1, 0
    return units


def _split_separated(path: Path, unit_bytes: int) -> list[Unit]:
    return [Unit(kind="separated", paths=(str(path),))]


_SPLITTERS = {"lines": _split_lines, "table": _split_table, "separated": _split_separated}


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(Path(path).open("rb"), closefd=True))
    return Path(path).open("rb")


def _read(stream: IO[bytes], path: str, size: int = -1) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError, OSError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> CorpusError:
    return CorpusError(
        "the file cannot be read to its end",
        where=path,
        found=error,
        remedy="is it complete? copy or download it again",
    )


def _texts(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    for path in unit.paths:
        with _open(path) as stream:
            data = _read(stream, path)
        if (text := _decode(data, path, bad)) is not None:
            yield text, 0


def _separated(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    assert reading.separator is not None
    path, separator = unit.paths[0], reading.separator.encode()
    pending, row = b"", 0
    with _open(path) as stream:
        while chunk := _read(stream, path, CHUNK_BYTES):
            *parts, pending = (pending + chunk).split(separator)
            for part in parts:
                if (text := _decode(part, f"{path}, byte {row}", bad)) is not None:
                    yield text, row
                row += len(part) + len(separator)
    if pending and (text := _decode(pending, f"{path}, byte {row}", bad)) is not None:
        yield text, row


def _decode(data: bytes, where: str, bad: Bad) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        bad(CorpusError("not UTF-8 text", where=where, found=error, remedy="convert it, or leave it out: --skip-bad"))
        return None


def _lines(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    path = unit.paths[0]
    with _open(path) as stream:
        at = unit.first
        if at > 0:  # the line that covers our first byte belongs to the unit before, unless it begins there
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while unit.end < 0 or at < unit.end:
            try:
                line = stream.readline()
            except (EOFError, gzip.BadGzipFile, zstandard.ZstdError, OSError) as error:
                raise _unreadable(path, error) from error
            if not line:
                return
            text = _text_of_line(line, reading.text_field, path, at, bad)
            if text is not None:
                yield text, at
            at += len(line)


def _text_of_line(line: bytes, field: str, path: str, at: int, bad: Bad) -> str | None:
    if not line.strip():
        return None
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        bad(
            CorpusError(
                "a line that is not JSON",
                where=f"{path}:{_line_number(path, at)}",
                found=f"{error}: {line[:60]!r}",
                allowed='one JSON object a line, such as {"text": "..."}',
                remedy="mend the line, or leave such lines out: --skip-bad",
            )
        )
        return None
    text = record.get(field) if isinstance(record, dict) else None
    if isinstance(text, str):
        return text
    fields = ", ".join(record) if isinstance(record, dict) else f"no object but a {type(record).__name__}"
    missing = not isinstance(record, dict) or field not in record
    bad(
        CorpusError(
            f"a record without the field {field!r}" if missing else f"the field {field!r} is not a string",
            where=f"{path}:{_line_number(path, at)}",
            found=f"fields {fields}" if missing else type(text).__name__,
            remedy="name the field with the text: --text-field NAME; or leave such records out: --skip-bad",
        )
    )
    return None


def _line_number(path: str, at: int) -> int:
    """1-based; counted only when there is something to report."""
    number = 1
    with _open(path) as stream:
        while at > 0 and (chunk := stream.read(min(at, CHUNK_BYTES))):
            number += chunk.count(b"\n")
            at -= len(chunk)
    return number


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError("not a readable Parquet file", where=path, found=error) from error


def _table(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    path = unit.paths[0]
    with _parquet(Path(path)) as table:
        if reading.text_field not in table.schema_arrow.names:
            raise CorpusError(
                f"a table without the column {reading.text_field!r}",
                where=path,
                found=f"columns {', '.join(table.schema_arrow.names)}",
                remedy="name the column with the text: --text-field NAME",
            )
        row = sum(table.metadata.row_group(i).num_rows for i in range(unit.first))
        for batch in table.iter_batches(row_groups=list(range(unit.first, unit.end)), columns=[reading.text_field]):
            for value in batch.column(0).to_pylist():
                if isinstance(value, str):
                    yield value, row
                else:
                    bad(
                        CorpusError(
                            f"the column {reading.text_field!r} holds no text here",
                            where=f"{path}, row {row}",
                            found=type(value).__name__ if value is not None else "null",
                            remedy="leave such rows out: --skip-bad",
                        )
                    )
                row += 1


def _batched(read: Callable[[Unit, Reading, Bad], Iterator[Record]]) -> Reader:
    return lambda unit, reading, bad, batch_bytes: in_batches(read(unit, reading, bad), batch_bytes)


Reader = Callable[[Unit, Reading, Bad, int], Iterator[Documents]]
READERS: dict[str, Reader] = {
    "lines": _batched(_lines),
    "separated": _batched(_separated),
    "table": _batched(_table),
    "texts": _batched(_texts),
}
