"""A name for this start of all ranks that they agree on, through the store where torchrun has them meet.

torchrun keeps that store when it starts ranks again, with all that those before have written, and each machine's
agent counts restarts for itself: one that only sees another's ranks begin anew does not count it. So each rank draws
a number. Rank 0 answers each rank with that rank's number and its own, until the rank has repeated rank 0's: an
answer to one that is gone has another number.
"""

from __future__ import annotations

import datetime
import secrets
import time

from torch.distributed import Store  # type: ignore[attr-defined]

POLL_S = 0.02
HERE, ANSWER, HEARD = "slw/here", "slw/answer", "slw/heard"


def meet(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """Called by each of `world_size` ranks; returns rank 0's number. Raises RuntimeError after `timeout`."""
    until = time.monotonic() + timeout.total_seconds()
    mine = secrets.token_hex(8)
    store.set(f"{HERE}/{rank}", mine)
    if rank == 0:
        waiting = set(range(1, world_size))
        answered: dict[int, str] = {}
        while waiting:
            for other in waiting:
                theirs = _read(store, f"{HERE}/{other}")
                if theirs and theirs != answered.get(other):
                    store.set(f"{ANSWER}/{other}", f"{theirs} {mine}")
                    answered[other] = theirs
            waiting = {other for other in waiting if _read(store, f"{HEARD}/{other}") != mine}
            _pause(until, f"no word from {len(waiting)} of {world_size} ranks")
        return mine
    while True:
        asked, _, name = _read(store, f"{ANSWER}/{rank}").partition(" ")
        if asked == mine:
            store.set(f"{HEARD}/{rank}", name)
            return name
        _pause(until, "no word from rank 0")


def _read(store: Store, key: str) -> str:
    """An empty text where nothing is there; does not wait."""
    return store.get(key).decode() if store.check([key]) else ""


def _pause(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(what)
    time.sleep(POLL_S)
