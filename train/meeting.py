"""One random name for this start of all ranks: what they write in torchrun's store goes under it.

torchrun keeps its store over restarts, so keys of the ranks before are still there. Its restart count does not tell
starts apart: each machine's agent has its own, and does not count restarts that another machine caused. So:

    rank r   HERE/r     its own random number
    rank 0   ANSWER/r   that number and rank 0's own; written again whenever HERE/r changes
    rank r   HEARD/r    rank 0's number, once ANSWER/r begins with r's own: a leftover answer begins with another
    rank 0              done when every HEARD/r is its own number
"""

from __future__ import annotations

import datetime
import secrets
import time

from torch.distributed import Store  # type: ignore[attr-defined]

POLL_S = 0.02
HERE, ANSWER, HEARD = "slw/here", "slw/answer", "slw/heard"


def meet(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """Rank 0's number, on all `world_size` ranks; each calls this. Raises RuntimeError after `timeout`."""
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
    """The value of `key`, "" where there is none; does not wait."""
    return store.get(key).decode() if store.check([key]) else ""


def _pause(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise RuntimeError(what)
    time.sleep(POLL_S)
