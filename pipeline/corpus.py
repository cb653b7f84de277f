"""A corpus: files split into units, and each unit read into documents by the reader of its kind.

A unit is a deterministic part of the input, the grain of parallelism and of resume. Units depend on the files and on
`unit_bytes` alone: plain lines and separated text are split into byte ranges (a record belongs to the unit in which
its first byte lies), Parquet into runs of row groups, local Arrow files into runs of record batches, small text files
are put together; what is compressed, or comes from standard input, stays whole.
Nothing is held in memory beyond one record, one batch or one row group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from pipeline.documents import BATCH_BYTES, Bad, Documents, Reader, Reading, Unit, batched
from pipeline.errors import ConfigError
from pipeline.inputs import InputFile
from pipeline.lines import read_lines
from pipeline.tables import arrow_sizes, parquet_sizes, read_arrow, read_parquet
from pipeline.texts import read_separated, read_texts
from pipeline.urls import is_remote, suffixes_of


def split_units(files: list[InputFile], unit_bytes: int, reading: Reading) -> list[Unit]:
    """Units in the order of `files`, of about `unit_bytes` bytes of input each where it can be split.

    Raises CorpusError for a table that cannot be opened, ConfigError for ids out of text files, which have none.
    """
    if reading.id_field and (texts := [file.path for file in files if file.format == "text"]):
        raise ConfigError(
            "a text file has no ids",
            where=texts[0],
            found=f"--id-field {reading.id_field}",
            allowed="jsonl, parquet and arrow with --id-field",
            remedy="leave --id-field out, or say what the file is: --format jsonl",
        )
    units: list[Unit] = []
    together: list[InputFile] = []
    size = 0
    for file in files:
        if together and (not _is_one_text(file, reading) or file.source != together[0].source):
            units.append(_text_unit(together))
            together, size = [], 0
        if not _is_one_text(file, reading):
            units += _SPLITTERS[file.format](file, unit_bytes)
            continue
        together.append(file)
        size += max(file.size, 0)
        if size >= unit_bytes:
            units.append(_text_unit(together))
            together, size = [], 0
    if together:
        units.append(_text_unit(together))
    return units


def documents(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int = BATCH_BYTES) -> Iterator[Documents]:
    """The documents of a unit in order, in batches of about `batch_bytes` of text.

    `bad` is called with a CorpusError for each record that is none.
    """
    return READERS[unit.kind](unit, reading.of_source(unit.source), bad, batch_bytes)


def _is_one_text(file: InputFile, reading: Reading) -> bool:
    return file.format == "text" and reading.separator is None


def _text_unit(files: list[InputFile]) -> Unit:
    return Unit(kind="texts", paths=tuple(file.path for file in files), source=files[0].source)


def _split_bytes(kind: str, file: InputFile, unit_bytes: int) -> list[Unit]:
    if file.size < 0 or suffixes_of(file.path)[1]:
        return [Unit(kind=kind, paths=(file.path,), source=file.source)]
    starts = range(0, max(file.size, 1), unit_bytes)
    ends = (min(at + unit_bytes, file.size) for at in starts)
    return [
        Unit(kind=kind, paths=(file.path,), source=file.source, first=at, end=end)
        for at, end in zip(starts, ends, strict=True)
    ]


def _split_parts(kind: str, file: InputFile, sizes: list[int], unit_bytes: int) -> list[Unit]:
    """Runs of row groups or record batches of `sizes` bytes."""
    units, first, size = [], 0, 0
    for part, part_bytes in enumerate(sizes):
        size += part_bytes
        if size >= unit_bytes or part == len(sizes) - 1:
            units.append(Unit(kind=kind, paths=(file.path,), source=file.source, first=first, end=part + 1))
            first, size = part + 1, 0
    return units


def _split_parquet(file: InputFile, unit_bytes: int) -> list[Unit]:
    return _split_parts("parquet", file, parquet_sizes(file.path), unit_bytes)


def _split_arrow(file: InputFile, unit_bytes: int) -> list[Unit]:
    if is_remote(file.path):
        return [Unit(kind="arrow", paths=(file.path,), source=file.source)]
    return _split_parts("arrow", file, arrow_sizes(file.path), unit_bytes)


_SPLITTERS: dict[str, Callable[[InputFile, int], list[Unit]]] = {
    "jsonl": partial(_split_bytes, "lines"),
    "text": partial(_split_bytes, "separated"),
    "parquet": _split_parquet,
    "arrow": _split_arrow,
}


READERS: dict[str, Reader] = {
    "lines": read_lines,
    "separated": batched(read_separated),
    "texts": batched(read_texts),
    "parquet": read_parquet,
    "arrow": read_arrow,
}
"""One for each kind of unit."""
