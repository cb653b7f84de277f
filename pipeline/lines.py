"""Documents out of JSON lines, cut in place: no object is made for a line but its parsed record.

One buffer is filled again and again; it grows only for a line that does not fit. A record is parsed by orjson from a
view of the buffer, so a document's text is copied once, into its string.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from pipeline.documents import Bad, Documents, Reading, Unit, not_utf8, too_long
from pipeline.errors import CorpusError
from pipeline.files import STDIN, lines_before, open_input

SKIP_BYTES = 1 << 20
GROW_BYTES = 16 << 20
"""A buffer for a huge line is grown by no more at a time."""


def read_lines(unit: Unit, reading: Reading, bad: Bad, batch_bytes: int) -> Iterator[Documents]:
    """The documents in the lines whose first byte lies in [first, end) of a file (end -1: all).

    Blank lines are passed over, and the byte order mark at the start of a file.
    """
    path = unit.paths[0]
    with open_input(path) as stream:
        lines = _Lines(path, _seek_line(stream, unit.first), unit.end, reading, bad)
        buffer = bytearray(batch_bytes)
        kept = 0  # bytes of an unfinished line at the head of the buffer
        while unit.end < 0 or lines.at < unit.end:
            if kept > reading.max_record_bytes:
                bad(too_long(lines.where(0, lines.at), reading.max_record_bytes))
                lines.pass_over(kept + _rest_of_line(stream))
                kept = 0
                continue
            if kept == len(buffer):
                buffer += bytes(min(kept, GROW_BYTES, max(reading.max_record_bytes + 1 - kept, 1)))
            with memoryview(buffer)[kept:] as room:
                got = stream.readinto(room)  # type: ignore[attr-defined]
            stop = buffer.rfind(b"\n", kept, kept + got) + 1 if got else kept
            if stop:
                batch = lines.parse(buffer, stop)
                if batch.texts:
                    yield batch
                del batch
            kept += got - stop
            if len(buffer) > 4 * batch_bytes >= 4 * kept:
                buffer = buffer[stop : stop + kept] + bytes(batch_bytes - kept)
            else:
                buffer[:kept] = buffer[stop : stop + kept]
            if not got:
                return


def _seek_line(stream: BinaryIO, first: int) -> int:
    """Go to the first line that begins at or after `first`: one that covers it belongs to the part before."""
    if first == 0:
        return 0
    return stream.seek(first - 1) + _rest_of_line(stream)


def _rest_of_line(stream: BinaryIO) -> int:
    """Read on to the next line without keeping anything; returns the bytes passed over."""
    size = 0
    while part := stream.readline(SKIP_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


class _Lines:
    """Where a unit's reader stands in the file, and what it makes of lines."""

    def __init__(self, path: str, at: int, end: int, reading: Reading, bad: Bad) -> None:
        self.path = path
        self.begin = self.at = at
        """Bytes of the file at which the unit's first line begins, and the next line to be parsed."""
        self.end = end
        self.reading = reading
        self.bad = bad
        self._line = 0
        self._before: int | None = None

    def pass_over(self, size: int) -> None:
        """Count a line of `size` bytes, newline included, that is not parsed."""
        self.at += size
        self._line += 1

    def parse(self, buffer: bytearray, stop: int) -> Documents:
        """The documents in the lines of buffer[:stop], which begins at byte `at`."""
        texts: list[str] = []
        rows: list[int] = []
        ids: list[str] | None = [] if self.reading.id_field else None
        field, id_field, longest = self.reading.text_field, self.reading.id_field, self.reading.max_record_bytes
        at, line = self.at, self._line
        mark = len(BOM_UTF8) if at == 0 and buffer.startswith(BOM_UTF8) else 0
        begin, last = 0, stop if self.end < 0 else min(stop, self.end - at)
        find, loads = buffer.find, orjson.loads
        with memoryview(buffer) as view:
            while begin < last:
                newline = find(b"\n", begin, stop)
                if newline < 0:
                    newline = stop
                text, name = None, ""
                if newline - begin <= longest:
                    try:
                        record = loads(view[begin + mark : newline])
                        text = record[field]
                        if ids is not None:
                            name = _id(record[id_field])
                    except (ValueError, KeyError, TypeError, IndexError):
                        text = None
                if type(text) is str:
                    texts.append(text)
                    rows.append(at + begin)
                    if ids is not None:
                        ids.append(name)
                elif data := bytes(view[begin + mark : newline]).strip():
                    self.bad(_error(data, self.reading, self.where(line - self._line, at + begin)))
                begin, mark = newline + 1, 0
                line += 1
        self.at, self._line = at + stop, line
        return Documents(texts, rows, ids)

    def where(self, ahead: int, at: int) -> str:
        """Names the line `ahead` lines after the next one, at byte `at`; counted when there is something to say."""
        if self.path == STDIN:
            return f"standard input:{self._line + ahead + 1}"
        if self._before is None:
            before = lines_before(self.path, self.begin) if self.begin else 0
            self._before = -1 if before is None else before
        if self._before < 0:
            return f"{self.path}, byte {at}"
        return f"{self.path}:{self._before + self._line + ahead + 1}"


def _id(value: Any) -> str:
    """Raises TypeError for what is neither a string nor an integer."""
    if type(value) is str:
        return value
    if type(value) is int:
        return str(value)
    raise TypeError


def _error(line: bytes, reading: Reading, where: str) -> CorpusError:
    """What is wrong with a line."""
    if len(line) > reading.max_record_bytes:
        return too_long(where, reading.max_record_bytes)
    try:
        record: Any = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as fault:
            return not_utf8(where, fault)
        return CorpusError(
            "a line that is not JSON",
            where=where,
            found=f"{error}: {line[:60]!r}",
            allowed='one JSON object a line, such as {"text": "..."}',
            remedy=_unwrap(line) or "mend the line, or leave such lines out: --skip-bad",
        )
    field, option, what = reading.text_field, "--text-field", "text"
    if isinstance(record, dict) and isinstance(record.get(field), str) and reading.id_field:
        field, option, what = reading.id_field, "--id-field", "id"
    missing = not isinstance(record, dict) or field not in record
    kind = "string" if what == "text" else "string or an integer"
    fields = f"fields {', '.join(record)}" if isinstance(record, dict) else f"no object but a {type(record).__name__}"
    return CorpusError(
        f"a record without the field {field!r}" if missing else f"the field {field!r} is not a {kind}",
        where=where,
        found=fields if missing else type(record[field]).__name__,
        allowed=f"one JSON object a line with a {kind} in it",
        remedy=_unwrap(line)
        or f"name the field with the {what}: {option} NAME; or leave such records out: --skip-bad",
    )


def _unwrap(line: bytes) -> str | None:
    """The remedy for a file that is one JSON array."""
    array = "one record a line: jq -c '.[]' FILE > FILE.jsonl; or leave such lines out: --skip-bad"
    return array if line.startswith(b"[") else None
