"""Ranks on this machine, as torchrun starts them but without its agent: whatever ends them is of ours."""

import multiprocessing
import os
import random
import socket
import sys

from torch.distributed import TCPStore

from train import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.loop"])
LIMIT_S = 300
"""Ranks that take longer hang."""
LINGER_S = 60
"""Enough for the others to hear of a failure, however busy the machine."""


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
    stream = output.open("w")
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.environ.update(names, RANK=str(rank), LOCAL_RANK=str(rank))
    if lingers:
        distributed.LINGER_S = LINGER_S
    function(*args)
    sys.stdout.flush()
