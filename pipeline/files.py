"""Opening what is read: local files, any fsspec URL, standard input; plain, .gz or .zst.

Every stream is a buffered binary one, so that a reader need not know where its bytes come from. Remote files are read
by ranges of `REMOTE_BLOCK_BYTES`. A file that ends too early, is damaged, or cannot be fetched is a CorpusError that
names it: never a shorter corpus.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from pipeline.errors import CorpusError
from pipeline.urls import fetching, filesystem, has_ranges, is_remote, suffixes_of

STDIN = "-"
REMOTE_BLOCK_BYTES = 8 << 20
COUNT_LINES_BYTES = 1 << 30
"""Line numbers are counted for records in the first GiB of a file; beyond, its byte offset is named."""
_CHUNK_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` makes
_counted: dict[tuple[str, int], tuple[int, int]] = {}
"""(path, size) -> (bytes in which newlines were counted, newlines): units with bad lines count a file only once."""


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """A stream of the bytes of `path`, decompressed; one that is plain can be seeked in, but for `-`.

    Raises CorpusError where it cannot be opened; and inside the block where it cannot be read on to its end.
    """
    try:
        with _open(path) as stream:
            yield stream
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> CorpusError:
    """The error of a file whose bytes cannot be had."""
    return CorpusError(
        "the file cannot be read to its end",
        where="standard input" if path == STDIN else path,
        found=error,
        remedy="is it complete? copy or download it again; the same command goes on where it stopped",
    )


def open_raw(path: str) -> BinaryIO:
    """A stream of the bytes of `path` as they are, seekable but for `-`. Raises OSError, ConfigError."""
    if path == STDIN:
        return io.BufferedReader(_StandardInput(), _CHUNK_BYTES)
    if not is_remote(path):
        return Path(path).open("rb")
    return io.BufferedReader(_Remote(path), REMOTE_BLOCK_BYTES)


def lines_before(path: str, at: int) -> int | None:
    """Newlines in the first `at` bytes of a plain file; None where that is beyond `COUNT_LINES_BYTES`."""
    if at > COUNT_LINES_BYTES:
        return None
    with open_input(path) as stream:
        file = (path, stream.seek(0, io.SEEK_END))
        begin, number = _counted.get(file, (0, 0))
        if begin > at:
            begin, number = 0, 0
        left = at - stream.seek(begin)
        while left > 0 and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    _counted[file] = (at, number)
    return number


@contextlib.contextmanager
def looking_ahead() -> Iterator[None]:
    """What is read from standard input in this block is kept, and read again by whoever opens it next."""
    _StandardInput.keep = True
    try:
        yield
    finally:
        _StandardInput.keep = False


def _open(path: str) -> BinaryIO:
    compression = suffixes_of(path)[1] if path != STDIN else ""
    raw = open_raw(path)
    if compression == ".gz":
        return cast(BinaryIO, _Gzip(raw))
    if compression == ".zst":
        return io.BufferedReader(_Zstandard(raw), _CHUNK_BYTES)
    return raw


class _Gzip(gzip.GzipFile):
    """Closes the file it reads from too."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Zstandard(io.RawIOBase):
    """Frame after frame; unlike the library's own stream, an end within a frame is an error."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._output) and self._advance():
            pass
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _advance(self) -> bool:
        """Decompress a little more; False at the end of the file."""
        rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
        data = rest or self._raw.read(1 << 16)
        if not data:
            if self._frame is not None and not self._frame.eof:
                raise EOFError("the compressed data ends within a frame")
            return False
        if self._frame is None or self._frame.eof:
            self._frame = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
        self._output = memoryview(self._frame.decompress(data))
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Remote(io.RawIOBase):
    """An fsspec file; every failure is an OSError."""

    def __init__(self, url: str) -> None:
        self._files, path = filesystem(url)  # kept: an archive is closed with its filesystem
        block_bytes = REMOTE_BLOCK_BYTES if has_ranges(url) else 0
        with fetching():  # without a cache: our buffer does, and reads no more than a block beyond a unit
            self._file = self._files.open(path, "rb", block_size=block_bytes, cache_type="none")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with fetching():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with fetching():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


class _StandardInput(io.RawIOBase):
    """Standard input, begun again with what `looking_ahead` kept of it."""

    keep = False
    kept: list[bytes] = []  # noqa: RUF012  # there is one standard input

    def __init__(self) -> None:
        self._again = [] if _StandardInput.keep else _StandardInput.kept
        if not _StandardInput.keep:
            _StandardInput.kept = []

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._again.pop(0) if self._again else sys.stdin.buffer.read(len(buffer))
        if len(data) > len(buffer):
            self._again.insert(0, data[len(buffer) :])
            data = data[: len(buffer)]
        if _StandardInput.keep:
            _StandardInput.kept.append(data)
        buffer[: len(data)] = data
        return len(data)
