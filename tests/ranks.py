"""Ranks on this machine, as torchrun starts them but without its agent: whatever ends them is of ours."""

import multiprocessing
import os
import socket
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop"])
LIMIT_S = 120


def launch(world_size, function, *args, folder):
    """Run `function(*args)` on so many ranks; returns their exit codes and what each printed (in `folder`)."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_work, args=(rank, world_size, port, folder / f"{rank}.txt", function, args))
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
    return [process.exitcode for process in processes], [
        (folder / f"{rank}.txt").read_text() for rank in range(world_size)
    ]


def _work(rank, world_size, port, output, function, args):
    stream = output.open("w")
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
    function(*args)
    sys.stdout.flush()
