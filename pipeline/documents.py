"""Types that all readers share: a unit of the input, how to read it, the documents that come out, bad records."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from pipeline.errors import CorpusError

BATCH_BYTES = 4 << 20
MAX_RECORD_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A part of the input: `first` and `end` are bytes of lines and text, row groups or record batches of tables.

    0 and -1 mean the whole of its files.
    """

    kind: str
    """A key of `corpus.READERS`."""
    paths: tuple[str, ...]
    """Local paths, URLs, or `-`."""
    first: int = 0
    end: int = -1
    source: str = ""
    """The named source its files belong to."""

    @property
    def name(self) -> str:
        """For people: `books.jsonl [0:67108864]`."""
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        part = f" [{self.first}:{self.end}]" if self.end >= 0 else ""
        return PurePosixPath(self.paths[0]).name + more + part


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to find files and the documents in them."""

    text_field: str = "text"
    text_fields: tuple[tuple[str, str], ...] = ()
    """(source, field) of named sources whose text is in another field."""
    id_field: str | None = None
    """The field of lines, or column of tables, with what the corpus calls a document; None: ids are not kept."""
    separator: str | None = None
    """Text files are split at this string; None: a file is a document."""
    format: str | None = None
    """A key of `inputs.FORMATS` that holds for every file; None: the suffix decides."""
    suffixes: tuple[str, ...] = ()
    """Text files of these suffixes are taken from folders too."""
    max_record_bytes: int = MAX_RECORD_BYTES
    """A line, or a document of a text file, that is longer is bad: memory is bounded by it."""

    def of_source(self, source: str) -> Reading:
        """How to read files of `source`."""
        return replace(self, text_field=dict(self.text_fields).get(source, self.text_field), text_fields=())


@dataclass(frozen=True)
class Documents:
    """Consecutive records of the corpus: at most about `BATCH_BYTES` of text, or one document."""

    texts: list[str]
    rows: list[int]
    """Byte offsets of lines or texts, row numbers of a table."""
    ids: list[str] | None = None
    """What the corpus calls them; None where nobody asked."""


Record = tuple[str, int, str | None]
"""Text, row and id of one document."""

Bad = Callable[[CorpusError], None]
"""Called with every bad record; raises it, or counts it and returns."""

Reader = Callable[[Unit, Reading, Bad, int], Iterator[Documents]]
"""The documents of a unit in batches of about so many bytes of text."""


def batched(read: Callable[[Unit, Reading, Bad], Iterator[Record]]) -> Reader:
    """A reader of batches, of `batch_bytes` characters or a little more, out of a reader of single records."""

    def read_batches(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int) -> Iterator[Documents]:
        batch: list[Record] = []
        size = 0
        for record in read(unit, reading, bad):
            batch.append(record)
            size += len(record[0])
            if size >= batch_bytes:
                yield _together(batch)
                batch, size = [], 0
        if batch:
            yield _together(batch)

    return read_batches


def too_long(where: str, limit: int) -> CorpusError:
    """The bad record that is longer than `limit` bytes."""
    return CorpusError(
        "a record that is too long",
        where=where,
        found=f"more than {limit:,} bytes",
        allowed=f"--max-record-bytes {limit}: a record is held in memory, several times over",
        remedy="is it the right --format? allow longer records: --max-record-bytes 2G, or leave them out: --skip-bad",
    )


def not_utf8(where: str, error: UnicodeDecodeError) -> CorpusError:
    """The bad record that is encoded otherwise."""
    wide = error.object.startswith((b"\xff\xfe", b"\xfe\xff"))
    return CorpusError(
        "not UTF-8 text",
        where=where,
        found=f"byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}",
        allowed="text encoded as UTF-8",
        remedy="convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW, or leave it out: --skip-bad"
        if wide
        else "convert it, such as iconv -f LATIN1 -t UTF-8 FILE > NEW, or leave it out: --skip-bad",
    )


def _together(batch: list[Record]) -> Documents:
    texts, rows, ids = zip(*batch, strict=True)
    return Documents(list(texts), list(rows), None if None in ids else list(ids))
