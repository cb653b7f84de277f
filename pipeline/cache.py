"""A cache of remote shards on the local disk: whole files named by their digest, up to a total size.

    FOLDER/<digest>.arrow            a shard whose digest is right; renamed to this name once it was compared
    FOLDER/.<digest>.arrow.partial   one that a process downloads, and holds locked meanwhile

Processes of one machine share the folder: one downloads, the others wait for it. Over the limit the file that was
used longest ago goes first. A process that has it mapped may go on reading; its space is free once none does.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError, StoreError
from pipeline.format import digest_bytes
from pipeline.place import reaching

CACHE_BYTES = 64 << 30


class Cache:
    """The folder `folder` (else $SLW_CACHE_DIR, else `slw` in the user's cache folder), held at `most_bytes`.

    `most_bytes` is else $SLW_CACHE_BYTES, else 64 GiB.
    """

    def __init__(self, folder: str | Path | None = None, most_bytes: int | None = None) -> None:
        self.folder = Path(folder or os.environ.get("SLW_CACHE_DIR") or _users_folder())
        self.most_bytes = _bytes_from_environment() if most_bytes is None else most_bytes
        self._checked: set[str] = set()  # digests that this process has compared
        self._coming = 0  # bytes that this process downloads now
        self._room = threading.Lock()

    def fetch(self, source: Path, digest: str) -> Path:
        """The local copy of the file `source`, whose digest is right. Raises StoreError where it is wrong or gone."""
        path = self.folder / f"{digest}{source.suffix}"
        try:
            while not self._usable(path, digest):
                self._download(source, digest, path)
            self.touch([path.name])
        except OSError as error:
            raise StoreError(
                "the cache of remote shards cannot be written",
                where=self.folder,
                found=error,
                remedy="make room, or choose a folder and a size: SLW_CACHE_DIR, SLW_CACHE_BYTES",
            ) from error
        self._checked.add(digest)
        return path

    def opened(self, source: Path, digest: str) -> pa.MemoryMappedFile | None:
        """A map of the local copy of `source`; None where this process has not fetched it, or it is gone again."""
        if digest in self._checked:
            with contextlib.suppress(FileNotFoundError):
                return pa.memory_map(str(self.folder / f"{digest}{source.suffix}"))
        return None

    def touch(self, names: Iterable[str]) -> None:
        """Files that were used just now, in this order: those go last."""
        for name in names:
            now = time.time_ns()  # finer than the clock that the file system would take
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                os.utime(self.folder / name, ns=(now, now))

    def _usable(self, path: Path, digest: str) -> bool:
        if not path.exists():
            return False
        if digest in self._checked or digest_of(path) == digest:
            return True
        path.unlink(missing_ok=True)  # damaged here: fetched again
        return False

    def _download(self, source: Path, digest: str, path: Path) -> None:
        with _locked(path.with_name(f".{path.name}.partial")) as partial:
            if partial is None or path.exists():
                return  # somebody else was quicker
            remote: Any = source
            with _reaching_file(source), self._room_for(remote.stat().st_size):
                remote.fs.get_file(remote.path, str(partial))
            if (found := digest_of(partial)) != digest:
                raise StoreError(
                    "a file of the store is damaged: its digest is not the one in the manifest",
                    where=source,
                    found=found,
                    allowed=digest,
                    remedy="the same `slw-prep build` again repairs it",
                )
            self._checked.add(digest)
            partial.replace(path)

    @contextlib.contextmanager
    def _room_for(self, size: int) -> Iterator[None]:
        """Room for `size` bytes more, beside what other threads download."""
        with self._room:
            self._coming += size
            self._make_room(self._coming)
        try:
            yield
        finally:
            with self._room:
                self._coming -= size

    def _make_room(self, needed: int) -> None:
        """Remove the files that were used longest ago until `needed` bytes more are within the limit."""
        files = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile, by another process
                if not file.name.endswith(".partial"):
                    files.append((file.stat(), file))
        used = sum(facts.st_size for facts, _ in files)
        for facts, file in sorted(files, key=lambda item: item[0].st_mtime_ns):
            if used + needed <= self.most_bytes:
                return
            file.unlink(missing_ok=True)
            used -= facts.st_size


def read_head(source: Path, head_bytes: int, whole_bytes: int) -> pa.Buffer:
    """The first `head_bytes` of a remote file of `whole_bytes`, then zeros that take no memory until touched."""
    remote: Any = source
    with _reaching_file(source):
        head = remote.fs.cat_file(remote.path, start=0, end=min(head_bytes, whole_bytes))
    whole = np.zeros(whole_bytes, dtype=np.uint8)
    whole[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    return pa.py_buffer(whole)


def digest_of(path: Path) -> str:
    """The digest of a local file that is in memory: through a map, in two thirds of the time of `read_through`."""
    if path.stat().st_size == 0:
        return digest_bytes(b"")
    with pa.memory_map(str(path)) as source:
        return digest_bytes(source.read_buffer())


@contextlib.contextmanager
def _reaching_file(source: Path) -> Iterator[None]:
    try:
        with reaching(source):
            yield
    except FileNotFoundError as error:
        remedy = "the same `slw-prep build` again repairs it"
        raise StoreError("a file of the store is missing", where=source, remedy=remedy) from error


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[Path | None]:
    """Hold the empty file `partial`; None where its former holder is done. What is left of it is removed."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not _is(handle, partial):
            yield None
            return
        handle.truncate(0)  # a killed process left a part
        try:
            yield partial
        finally:
            if _is(handle, partial):
                partial.unlink()


def _is(handle: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _users_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slw"


def _bytes_from_environment() -> int:
    value = os.environ.get("SLW_CACHE_BYTES", str(CACHE_BYTES))
    if not value.isdecimal():
        raise ConfigError("SLW_CACHE_BYTES is no number of bytes", found=value, allowed="digits, such as 64000000000")
    return int(value)
