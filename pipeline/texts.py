"""Documents out of text files: a file each, or many in a file with a separator between them.

A separator is matched as bytes. A file is split at any byte: a document belongs to the unit in which its first byte
lies, and where separators can overlap (an empty line is two newlines; what are three?) a unit begins far enough
before its first byte to see what a reader from the start would have seen.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.documents import Bad, Reading, Record, Unit, not_utf8, too_long
from pipeline.files import STDIN, open_input

_CHUNK_BYTES = 1 << 20


def read_texts(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    """A document a file."""
    for path in unit.paths:
        with open_input(path) as stream:
            data = stream.read(reading.max_record_bytes + 1)
        where = _where(path)
        if len(data) > reading.max_record_bytes:
            bad(too_long(where, reading.max_record_bytes))
        elif (text := _decode(data.removeprefix(BOM_UTF8), where, bad)) is not None:
            yield text, 0, None


def read_separated(unit: Unit, reading: Reading, bad: Bad) -> Iterator[Record]:
    """Documents between separators, none of which is part of a document."""
    assert reading.separator is not None
    path, separator = unit.paths[0], reading.separator.encode()
    with open_input(path) as stream:
        at = _in_step(stream, unit.first, separator) if unit.first else 0
        for row, data in _parts(stream, at, separator, unit, reading.max_record_bytes):
            where = f"{_where(path)}, byte {row}"
            if data is None:
                bad(too_long(where, reading.max_record_bytes))
            elif (text := _decode(data if row else data.removeprefix(BOM_UTF8), where, bad)) is not None:
                yield text, row, None


def _where(path: str) -> str:
    return "standard input" if path == STDIN else path


def _decode(data: bytes, where: str, bad: Bad) -> str | None:
    """The text of `data`; None after a call of `bad`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        bad(not_utf8(where, error))
        return None


def _parts(stream: BinaryIO, at: int, separator: bytes, unit: Unit, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Where each document of the unit begins, and its bytes; None for one of more than `most`.

    Bytes that may be the beginning of a separator stay in `tail`; those that cannot are searched once and kept apart.
    """
    kept: list[bytes] = []
    size, begin, tail = 0, at, b""
    while chunk := stream.read(_CHUNK_BYTES):
        tail += chunk
        found, searched = tail.find(separator), 0
        while found >= 0:
            piece = tail[searched:found]
            if begin >= unit.first:
                yield begin, b"".join([*kept, piece]) if size + len(piece) <= most else None
            begin += size + len(piece) + len(separator)
            if 0 <= unit.end <= begin:
                return
            kept, size, searched = [], 0, found + len(separator)
            found = tail.find(separator, searched)
        certain = max(searched, len(tail) - len(separator) + 1)
        size += certain - searched
        if size <= most and begin >= unit.first:
            kept.append(tail[searched:certain])
        else:
            kept = []
        tail = tail[certain:]
    if size + len(tail) and begin >= unit.first:
        yield begin, b"".join([*kept, tail]) if size + len(tail) <= most else None


def _in_step(stream: BinaryIO, first: int, separator: bytes) -> int:
    """Seek to, and return, a byte before `first` from which the separators to `first` and after can be told.

    It is the last one, a separator's length before `first` or earlier, that no separator can stretch across.
    """
    size = len(separator)
    at = max(first - size, 0)
    data, begin = b"", first
    while at > 0:
        if at - size + 1 < begin > 0:
            begin = max(0, at - size - _CHUNK_BYTES)
            stream.seek(begin)
            data = stream.read(at + size - 1 - begin)
        if separator not in data[max(0, at - size + 1 - begin) : at + size - 1 - begin]:
            break
        at -= 1
    stream.seek(at)
    return at
