"""The ranks of a run: processes that torchrun starts, each with its rows of every batch. One alone is rank 0 of 1.

What they exchange here is small and on the CPU (gloo); gradients and weights are in train/parallel.py. Ranks end
together: the first that fails prints its error and sets FAILED in torchrun's store. The others exit silently: when a
connection breaks, or, stuck in a collective, after POLL_S + GRACE_S.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from pipeline.errors import ConfigError, RunError, SlwError
from train.meeting import meet

TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait in a collective: longer than any compilation, or check of a checkpoint, on another rank."""
POLL_S = 1.0
"""How often a rank looks whether another has failed."""
GRACE_S = 20.0
"""How long a rank that is stuck may take to notice the failure by itself before it is ended."""
LINGER_S = 2.5
"""How long a failed rank 0 stays for the others to read that: without torchrun's agent the store ends with it."""
FAILED, HEARD = "failed", "heard"
"""Keys in the store: the first rank that failed, and how many ranks know."""


@dataclass
class Ranks:
    """This rank among all. Its methods that communicate are collectives: all ranks call them, in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """On its machine; which of its GPUs it has."""
    _vote: tuple[Tensor, Any] | None = field(default=None, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that reads checkpoints, writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.world_size > 1

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, plain JSON values, on all ranks; the others do not call it."""
        if not self.several:
            return make()
        data = torch.frombuffer(bytearray(json.dumps(make()).encode()), dtype=torch.uint8) if self.first else None
        size = torch.tensor(0 if data is None else len(data))
        dist.broadcast(size, 0)
        data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        dist.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    def gather(self, tensor: Tensor) -> Tensor:
        """[world_size, ...] on the CPU: a tensor of the same shape and dtype from each rank, in their order."""
        mine = tensor.detach().cpu().contiguous()
        if not self.several:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return torch.stack(parts)

    def agree(self, facts: Mapping[str, int]) -> None:
        """Raise RunError where `facts`, the same names on each rank, are not the same int64 on all."""
        rows = self.gather(torch.tensor(list(facts.values()), dtype=torch.int64)).tolist()
        for rank, row in enumerate(rows):
            if row != rows[0]:
                names = [name for name, a, b in zip(facts, rows[0], row, strict=True) if a != b]
                ours, theirs = (", ".join(f"{n} {r[list(facts).index(n)]}" for n in names) for r in (rows[0], row))
                raise RunError(
                    "the ranks are not at the same place",
                    found=f"rank 0: {ours}; rank {rank}: {theirs}",
                    remedy="start all of them with the same config, the same store and the same code",
                )

    def any(self, mine: bool) -> bool:
        """Whether any rank passed True at the *previous* call: the reduction runs meanwhile, so that nobody waits."""
        if not self.several:
            return mine
        heard = False
        if self._vote is not None:
            votes, work = self._vote
            work.wait()
            heard = bool(votes)
        votes = torch.tensor(int(mine))
        self._vote = votes, dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True)
        return heard

    def exit(self, code: int) -> None:
        """End the process. One of several goes at once: gloo's threads sometimes abort Python's own clean-up."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.several:
            os._exit(code)
        sys.exit(code)

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        if self._vote is not None:
            self._vote[1].wait()
            self._vote = None
        self.gather(torch.zeros(()))


def digest(value: Any) -> int:
    """63 bits of plain JSON values, to `agree` on."""
    return xxhash.xxh3_64_intdigest(json.dumps(value, sort_keys=True).encode()) >> 1


def device_of(name: str, ranks: Ranks) -> torch.device:
    """The device that this rank has for itself, of the kind `name`. Raises ConfigError where there is none."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        # With a number, also alone: `set_device` wants one.
        device = torch.device(f"cuda:{ranks.local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "no such device",
            found=f"run.device = {name}, rank {ranks.local_rank} of this machine: {error}",
            allowed="auto, cpu, cuda; as many ranks a machine as it has GPUs",
        ) from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextmanager
def together() -> Iterator[Ranks]:
    """`with together() as ranks`: the ranks that torchrun started, or one alone; they end together.

    Raises ConfigError where torchrun's variables are incomplete, RunError where the ranks do not find each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    ranks, failures = _join()
    try:
        yield ranks
        failures.stop()
        ranks.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        failures.stop()
        shown = failures.failed(error)
        signal.alarm(math.ceil(GRACE_S))  # what is stuck on a device may keep Python's own clean-up for ever
        if shown is error:
            raise
        raise shown from None


def _join() -> tuple[Ranks, Failures]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            "torchrun's environment variables are incomplete",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but no {', '.join(missing)}",
            remedy="start it with torchrun: docs/distributed.md",
        )
    rank, world_size, local_rank = (int(os.environ[name]) for name in names[:3])
    ranks = Ranks(rank, world_size, local_rank)
    try:
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        store = PrefixStore(f"slw/{meet(store, rank, world_size, TIMEOUT)}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        # A connection of its own: the other one may be waiting for an answer.
        failures = Failures(store.clone(), ranks)  # type: ignore[attr-defined]
    except (RuntimeError, ValueError) as error:
        raise RunError(
            "the ranks do not find each other",
            where=f"rank {rank} of {world_size}, at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            found=error,
            remedy="is that address reachable from every machine, and do all of them run? docs/distributed.md",
        ) from error
    return ranks, failures


class Failures:
    """Tells the other ranks that this one has failed, and ends this one when another has; a thread looks."""

    def __init__(self, store: Store, ranks: Ranks) -> None:
        self._store = store
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._heard = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failures", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank is done, or knows that it has failed."""
        self._stopped.set()
        self._thread.join()

    def failed(self, error: BaseException) -> BaseException:
        """What this rank raises: `error` if it is the first to fail, else a silent SystemExit of the same status."""
        first = not self._heard
        try:
            if first:
                first = self._store.compare_set(FAILED, "", str(self._rank)) == str(self._rank).encode()
            self._hear()
            until = time.monotonic() + LINGER_S
            while self._rank == 0 and self._store.add(HEARD, 0) < self._world_size and time.monotonic() < until:
                time.sleep(0.02)  # without torchrun's agent the store ends with this rank: let the others look first
        except RuntimeError:
            pass  # nobody is there to be asked
        if not first:
            code = error.exit_code if isinstance(error, SlwError) else 1
            return SystemExit(130 if isinstance(error, KeyboardInterrupt) else code)
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error)):
            what = str(error).splitlines()[0]
            return RunError(
                "another rank is gone, without a word",
                found=f"rank {self._rank}: {what}",
                remedy="was it killed, for its memory perhaps? the same command goes on from the last checkpoint",
            )
        return error

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                failed = self._store.check([FAILED])
                if failed:
                    self._hear()
            except RuntimeError:
                failed = True
            if failed and not self._stopped.wait(GRACE_S):
                os._exit(1)

    def _hear(self) -> None:
        """Count this rank among those that know of the failure, once."""
        if not self._heard:
            self._heard = True
            self._store.add(HEARD, 1)
