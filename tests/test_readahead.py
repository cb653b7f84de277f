"""The next group's shards are read while one is dealt: by loaders alone, in the background, and in time."""

import os
import threading

import pytest
from stores import documents_of, write_store

from curriculum.loader import CurriculumLoader
from curriculum.mixture import Mixture
from curriculum.order import Order
from curriculum.planner import plan_steps
from curriculum.readahead import ReadAhead
from curriculum.schedule import Schedule
from curriculum.window import GROUP_WINDOWS
from pipeline.errors import StoreError
from pipeline.reader import Store

SHARDS, WINDOW = 12, 20
SCHEDULE = Schedule.constant(seqlen=8, global_batch_sequences=4, epochs=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Twelve shards of 160 tokens: six groups of two in an epoch at WINDOW tokens a window."""
    assert GROUP_WINDOWS * WINDOW == 320
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of([10] * 16 * SHARDS), shards=SHARDS)
    return Store.open(path)


def shards_of(documents):
    return set((documents // 16).tolist())


def test_a_group_is_told_before_it_comes_up_and_once_an_epoch(store):
    told = []
    for step, batch in plan_steps(Order.begin(store, SCHEDULE, seed=1, window_tokens=WINDOW), 0, told.append):
        epoch, group = divmod(step // 10, 6)  # a group is dealt in ten steps; an epoch's first is told to nobody
        assert not group or shards_of(batch.document) <= set(told[5 * epoch + group - 1])
    assert step == 2 * 60 - 1
    for epoch in (told[:5], told[5:]):
        assert len({shard for group in epoch for shard in group}) == 10, "all but the first group's, each once"


def test_sources_of_a_mixture_have_groups_of_their_own(tmp_path):
    for number, source in enumerate("ab"):
        write_store(tmp_path, documents_of([10] * 64, seed=number), shards=4, source=source)
    told, mixture = [], Mixture(("a", "b"), (1, 1), (1, 1))
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=4, total_tokens=640)
    order = Order.begin(Store.open(tmp_path), schedule, seed=1, mixture=mixture, window_tokens=WINDOW)
    next(plan_steps(order, 0, told.append))
    assert sorted(shard // 4 for group in told for shard in group) == [0, 0, 1, 1]


def test_a_loader_reads_ahead_and_waits_for_none_of_it(store, monkeypatch):
    begun, done, go_on, made = [], [], threading.Event(), threading.Event()

    def gather(self, *arguments):
        whole(self, *arguments)
        made.set()

    def read_ahead(self, index):
        assert made.is_set(), "the shards of the first batch come first"
        begun.append(index)
        go_on.wait(60)
        done.append(index)

    whole = Store.gather
    monkeypatch.setattr(Store, "gather", gather)
    monkeypatch.setattr(Store, "read_ahead", read_ahead)
    with CurriculumLoader(store, SCHEDULE, seed=1, window_tokens=WINDOW) as loader:
        assert len(list(loader.planned())) == loader.schedule.total_steps
        assert not begun, "planning reads no token"
        served = sum(int((batch.labels >= 0).sum()) for batch in loader)
    assert served == 2 * store.tokens
    assert len(begun) == 10
    assert not done
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "read ahead":
            thread.join()
    assert len(begun) == len(done) == 10, "closed: the second shard of a group is not begun"


def test_what_cannot_be_read_ahead_is_an_error_at_its_use_only(tmp_path):
    write_store(tmp_path, documents_of([10] * 4), shards=2)
    store = Store.open(tmp_path)
    store.read_ahead(1)
    (tmp_path / store.shards[1].file).unlink()
    store.read_ahead(1)
    with pytest.raises(StoreError, match="a shard is missing"):
        store.document(2)


def test_the_digest_of_what_was_read_ahead_is_compared_at_its_use(tmp_path, monkeypatch):
    documents = documents_of([10] * 4)
    write_store(tmp_path, documents, shards=2)
    assert Store.open(tmp_path).document(2).tolist() == documents[2].tolist()  # known to be right from now on
    file = tmp_path / Store.open(tmp_path).shards[1].file
    stamp, whole = file.stat(), file.read_bytes()
    at = whole.index(documents[2].tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    store = Store.open(tmp_path)
    store.read_ahead(1)  # in memory already: nothing to do
    assert store.document(3).tolist() == documents[3].tolist()
    monkeypatch.setattr("pipeline.verified.in_memory", lambda path: False)
    store = Store.open(tmp_path)
    store.read_ahead(1)
    monkeypatch.setattr("pipeline.verified.in_memory", lambda path: True)
    with pytest.raises(StoreError, match="a shard is damaged"):
        store.document(3)


def test_a_small_cache_is_not_filled_ahead(store, monkeypatch):
    read = threading.Semaphore(0)
    monkeypatch.setattr(Store, "read_ahead", lambda self, index: read.release())
    size = sum(store.shards[index].bytes for index in (0, 1))
    for cache_bytes, reads in [(None, True), (4 * size, True), (4 * size - 1, False)]:
        monkeypatch.setattr(Store, "cache_bytes", cache_bytes)
        ahead = ReadAhead(store)
        ahead.expect([0, 1])
        ahead.begin()
        assert read.acquire(timeout=30 if reads else 0.2) == reads
        assert not reads or read.acquire(timeout=30)
