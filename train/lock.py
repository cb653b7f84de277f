"""One run at a time in a run folder: a lock that the kernel takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import RunError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold RUN/.lock, which names us. Raises RunError where another process does, naming that; or cannot write."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = os.open(run / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError("cannot write here", where=run, found=error, remedy="choose another run.dir") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                "another run is at work in this folder",
                where=run,
                found=_holder(handle),
                remedy="wait, or stop it with SIGTERM: it writes a checkpoint, and this command goes on from there; "
                "or choose another run.dir",
            ) from None
        except OSError as error:
            raise RunError(
                "this file system has no locks, by which a second run is kept out",
                where=run,
                found=error,
                remedy="choose a run.dir on another one; or have it mounted with locks (Lustre: -o flock)",
            ) from error
        _sign(handle)
        yield
    finally:
        os.close(handle)  # the file stays: who waits for it must not lock one that is no longer there


def _sign(handle: int) -> None:
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds, and what is really written will say so
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(facts).encode(), 0)


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 1000, 0))
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not said which it is"
