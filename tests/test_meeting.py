"""Ranks that start together agree on a name, whatever those before them have left in the store."""

import datetime
import random
import threading
import time

import pytest
from torch.distributed import HashStore

from train.meeting import meet

TIMEOUT = datetime.timedelta(minutes=1)


def names_of(store, world_size, late=()):
    """What each rank of one start hears; ranks in `late` come last, after the others have seen what is there."""
    names = [None] * world_size

    def start(rank):
        time.sleep(0.2 if rank in late else random.random() / 50)
        names[rank] = meet(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return names


def test_each_start_has_a_name_of_its_own_on_all_ranks():
    store, seen = HashStore(), []
    for world_size, late in ((2, ()), (4, ()), (4, {0}), (4, {1, 3}), (3, {2}), (2, {1}), (2, {0}), (5, {0, 1})):
        names = names_of(store, world_size, late)
        assert names[0] and names == [names[0]] * world_size
        seen.append(names[0])
    assert len(set(seen)) == len(seen)


def test_a_start_that_some_did_not_live_to_see_does_not_disturb_the_next():
    store, short = HashStore(), datetime.timedelta(seconds=0.1)
    assert len(set(names_of(store, 3))) == 1
    for rank, missing in ((1, "rank 0"), (0, "2 of 3 ranks")):
        with pytest.raises(RuntimeError, match=f"no word from {missing}"):
            meet(store, rank, 3, short)
    assert len(set(names_of(store, 3, {0}))) == 1
