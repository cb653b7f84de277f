"""Processes forked from one that has imported torch already: a program, and ranks as torchrun starts them.

Ranks have none of torchrun's agent: whatever ends them is of ours.
"""

import gc
import multiprocessing
import os
import random
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import TCPStore

from train import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop", "train.tune", "transformers.trainer", "accelerate"])
LIMIT_S = 300
"""What takes longer hangs."""
LINGER_S = 60
"""Enough for the others to hear of a failure, however busy the machine."""


@dataclass(frozen=True)
class Done:
    """How a program ended."""

    returncode: int
    """Less than 0: by that signal."""
    stdout: str
    stderr: str


def program(code, *arguments, folder, environment=()):
    """Run Python `code` in `folder` in a process of its own, as `python -c` does, but for the time that takes."""
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / "stdout", Path(name) / "stderr"]
        given = (code, arguments, str(folder), dict(environment), torch.get_num_threads(), outputs)
        process = CONTEXT.Process(target=_run, args=given)
        process.start()
        try:
            process.join(LIMIT_S)
            assert process.exitcode is not None, "it hangs"
        finally:
            process.kill()
        return Done(process.exitcode, *(path.read_text() for path in outputs))


def _run(code, arguments, folder, environment, threads, outputs):
    _freeze()
    _write_to(*outputs)
    torch.set_num_threads(threads)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["-c", *(str(argument) for argument in arguments)]
    try:
        exec(compile(code, "program", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _freeze():
    """What is imported already is not looked at again: as in conftest.py."""
    gc.freeze()
    gc.get_freeze_count = lambda: 1


def _write_to(stdout, stderr):
    """From here on, and nothing else: both may be one file."""
    stdout.write_text("")
    stderr.write_text("")
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("a") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)


def launch(world_size, function, *args, folder, rank_0_stores=False):
    """Run `function(*args)` on so many ranks; returns their exit codes and what each printed (in `folder`).

    They find each other by a store of this process, as that of torchrun's agent, or by one that ends with rank 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store, names = store_of_rank_0_at(world_size) if rank_0_stores else agent_store(world_size)
    processes = [
        CONTEXT.Process(target=_work, args=(rank, names, store is None, folder / f"{rank}.txt", function, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(LIMIT_S)
        assert all(process.exitcode is not None for process in processes), "ranks hang"
    finally:
        for process in processes:
            process.kill()
    del store
    return [process.exitcode for process in processes], [
        (folder / f"{rank}.txt").read_text() for rank in range(world_size)
    ]


def agent_store(world_size):
    """(store, environment of ranks to meet there): it lives while it is held, its port is nobody else's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def store_of_rank_0_at(world_size):
    """The same where rank 0 makes the store, at a port that no one is given by chance."""
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(10_000, 30_000)))
            except OSError:
                continue
            port = probe.getsockname()[1]
        return None, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}


def _work(rank, names, lingers, output, function, args):
    _freeze()
    _write_to(output, output)
    os.environ.update(names, RANK=str(rank), LOCAL_RANK=str(rank))
    if lingers:
        distributed.LINGER_S = LINGER_S
    function(*args)
    sys.stdout.flush()
