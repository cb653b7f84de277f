"""Where a store is: a local folder, or any fsspec URL such as s3://bucket/books (extra `[s3]`).

Both have the methods of `pathlib.Path`; what they do not share is here. A store on a local disk is written by rename
and locked by flock; an object appears whole or not at all, and cannot be locked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ConfigError, SlwError, StoreError
from pipeline.urls import local_path, package_for


def place(path: str | Path) -> Path:
    """A folder or file by its path or URL; a URL gives a `upath.UPath`, which is used as a Path.

    Raises ConfigError where the library for this kind of URL is not installed, and for what is no path.
    """
    if not isinstance(path, str):
        if not hasattr(path, "joinpath"):
            raise ConfigError("not a path", found=repr(path)[:80], allowed="text or a Path: a folder or a URL")
        return path
    path = local_path(path)
    if "://" not in path:
        return Path(path)
    from upath import UPath

    try:
        found = UPath(path, use_listings_cache=False)  # others write there too: a remembered listing would be stale
        found.fs  # noqa: B018  (imports what the protocol needs)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(
            "this URL cannot be opened",
            where=path,
            found=error,
            remedy=f"pip install {package_for(path.partition('://')[0])}"
            if isinstance(error, ImportError)
            else "check the protocol; s3:// and gs:// are tested",
        ) from error
    return cast(Path, found)


def is_local(path: Path) -> bool:
    """Whether `path` is on this machine's file system."""
    return isinstance(path, Path)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below `folder`, by its relative path with forward slashes; {} where there is none."""
    if is_local(folder):
        found = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    remote: Any = folder
    with reaching(folder):
        there = remote.fs.find(remote.path, detail=True)
    root = remote.path.rstrip("/") + "/"
    return {name.removeprefix(root): facts["size"] for name, facts in there.items() if facts["type"] == "file"}


def read_all(folder: Path, pattern: str) -> dict[str, bytes]:
    """Contents by file name of the files of `folder` that match; many small objects are fetched at once."""
    if is_local(folder):
        return {path.name: path.read_bytes() for path in folder.glob(pattern)}
    remote: Any = folder
    with reaching(folder):
        names = remote.fs.glob(f"{remote.path.rstrip('/')}/{pattern}")
        contents = remote.fs.cat(names) if names else {}
    return {name.rsplit("/", 1)[-1]: data for name, data in contents.items()}


def move(file: Path, to: Path) -> None:
    """Put a finished file in the place of another of the same store; who reads sees the one or the other."""
    if is_local(file):
        to.parent.mkdir(parents=True, exist_ok=True)
        file.replace(to)
        sync(to.parent)
    else:
        remote: Any = file
        with reaching(file):
            remote.fs.mv(remote.path, cast(Any, to).path)


def upload(file: Path, to: Path) -> None:
    """Copy a local file to a remote place; who reads there sees all of it or nothing."""
    remote: Any = to
    with reaching(to):
        remote.fs.put_file(str(file), remote.path)


def sync(path: Path) -> None:
    """Flush a local file, or the names in a local folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_tree(folder: Path) -> None:
    """Delete a folder and what is in it; none is fine. One that a link leads to is emptied.

    Raises StoreError where that is not allowed.
    """
    if is_local(folder):
        try:
            if folder.exists():
                shutil.rmtree(folder.resolve())
            if folder.is_symlink():
                folder.resolve().mkdir()
        except OSError as error:
            raise StoreError("cannot be deleted", where=folder, found=error) from error
        return
    remote: Any = folder
    with reaching(folder):
        if remote.fs.exists(remote.path):
            remote.fs.rm(remote.path, recursive=True)


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder. Raises StoreError where object storage cannot be asked."""
    with reaching(path):
        return path.exists()


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turn what object storage may raise, which is no OSError, into a StoreError. FileNotFoundError passes."""
    try:
        yield
    except (SlwError, FileNotFoundError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise StoreError(
            "object storage cannot be reached, or refuses",
            where=path,
            found=f"{type(error).__name__}: {error}",
            remedy="check the URL, the credentials and the endpoint; the same command goes on where it stopped",
        ) from error
