"""A disk that fails or takes the process with it at the n-th thing asked of it; for runs in processes of their own.

`python tests/disk.py CONFIG.toml FAULT EVERY` trains as the config says for n = 1, 1 + EVERY, ... until a run comes
through, each time in a fresh folder and in a forked process, then undisturbed in the same; prints what came of each.
"""

import errno
import faulthandler
import gc
import io
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

LIMIT_S = 300
"""A process that takes longer hangs."""


class Faulty:
    """Counts what changes a folder on the disk: folders made, files opened and written, flushes, renames, deletions.

    At the n-th: "kill" ends the process, of a write only half is done; "full" fails, and all that need room after it;
    "once" fails this once.
    """

    def __init__(self, folder, n, fault):
        self.folder, self.n, self.fault, self.count = str(folder.absolute()), n, fault, 0
        self.lock = threading.Lock()
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
            setattr(os, name, self._counted(getattr(os, name), name not in ("unlink", "rmdir")))
        self.open = io.open
        io.open = self._open

    def operation(self, needs_room=True):
        """Returns whether to end the process."""
        with self.lock:
            self.count += 1
            if self.count == self.n or (self.fault == "full" and self.count > self.n and needs_room):
                if self.fault == "kill":
                    return True
                raise OSError(errno.ENOSPC, "No space left on device (injected)")
        return False

    def _counted(self, real, needs_room):
        def call(what, *more, **named):
            inside = named.get("dir_fd", what if isinstance(what, int) else None)
            path = (
                str(Path(f"/proc/self/fd/{inside}").readlink()) if inside is not None else str(Path(what).absolute())
            )
            if path.startswith(self.folder) and self.operation(needs_room):
                die()
            return real(what, *more, **named)

        return call

    def _open(self, path, mode="r", *more, **named):
        if mode[0] == "r" or not str(Path(path).absolute()).startswith(self.folder):
            return self.open(path, mode, *more, **named)
        if self.operation():
            die()
        raw = Raw(self, path, mode.replace("b", ""))
        stream = io.BufferedWriter(raw, 1 << 20)
        return stream if "b" in mode else io.TextIOWrapper(stream, write_through=False)


class Raw(io.FileIO):
    """A file whose writes are counted."""

    def __init__(self, disk, path, mode):
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data):
        if self.disk.operation():
            super().write(bytes(data)[: len(data) // 2])
            die()
        return super().write(data)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def forked(action):
    """Status of a process that did `action`: 0, -SIGKILL, or 1 with what it raised on standard error."""
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def sweep(config, fault, every):
    import torch._dynamo  # what torch would import in every child  # noqa: F401

    from pipeline.errors import SlwError
    from train import checkpoint, loop
    from train.config_file import load_config

    loop.run(
        load_config(config, ["run.dir=undisturbed"]), warn=lambda text: None
    )  # compiles and imports what the children need
    gc.freeze()  # a collection of it would take most of a child's time, and so would counting it
    gc.get_freeze_count = lambda: 1
    for n in range(1, 100_000, every):
        folder = Path(f"{n:05d}")
        settings = load_config(config, [f"run.dir={folder}"])
        told = []

        def disturbed(folder=folder, n=n, settings=settings):
            disk = Faulty(folder, n, fault)
            try:
                loop.run(settings, warn=lambda text: None)
            except (SlwError, OSError) as error:  # what a command tells without a traceback
                assert "injected" in str(error), error
                os._exit(7)
            os._exit(9 if disk.count < n else 0)

        status = forked(disturbed)
        whole = [checkpoint.damage(found) for found in checkpoint.find(folder)]
        left = len(whole)
        again = forked(lambda: loop.run(settings, warn=told.append))  # noqa: B023
        print(
            json.dumps({"n": n, "status": status, "again": again, "checkpoints": left, "damage": whole}), flush=True
        )
        if status == 9:
            return


if __name__ == "__main__":
    sweep(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
