"""A folder of several files, made beside its place and renamed at the end: whole or not at all.

DATA/.books.partial     in the making, locked; one that a killed command left is emptied and used again
DATA/books              after the rename
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.place import sync


def check_free(out: Path, *, marker: str, force: bool) -> None:
    """Raise StoreError where `out` is in the way: it exists and `force` is not given, or it is something else.

    A folder that may be replaced is empty or has a file named `marker`.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise StoreError("the output exists", where=out, remedy="choose another place, or replace it: --force")
    if not (out / marker).is_file():
        found = "a file" if out.is_file() else f"a folder without {marker}"
        raise StoreError(
            "the output is something else: --force leaves it alone",
            where=out,
            found=found,
            remedy="choose another place",
        )


@contextlib.contextmanager
def new_folder(out: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """An empty folder that becomes `out` when the block ends well, and vanishes when it does not.

    Raises StoreError where `out` is in the way (see `check_free`), being written already, or cannot be written.
    """
    check_free(out, marker=marker, force=force)
    out = out.resolve() if out.is_symlink() else out  # what a link leads to is replaced, not the link
    staging = out.with_name(f".{out.name}.partial")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        handle = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise StoreError("cannot write here", where=out, found=error, remedy="choose another place") from error
    try:
        _lock(handle, out)
        for path in staging.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield staging
            _put(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreError("another command is writing this", where=out, remedy="wait for it") from None


def _put(staging: Path, out: Path) -> None:
    for folder in (*(path for path in staging.rglob("*") if path.is_dir()), staging):
        sync(folder)
    old = out.with_name(f".{out.name}.old")
    if old.exists():  # left by a command killed between the two renames below
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    staging.rename(out)
    sync(out.parent)
    if old.exists():
        shutil.rmtree(old)
