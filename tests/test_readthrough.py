import ctypes
import mmap
import os
import platform
import resource

import numpy as np
import pytest
from stores import documents_of, write_store

from pipeline import verified
from pipeline.errors import StoreError
from pipeline.format import digest_bytes
from pipeline.reader import Store
from pipeline.readthrough import BLOCK_BYTES, PROBE_BYTES, enter_pages, in_memory, read_through


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 7])
def test_the_digest_is_that_of_all_bytes(tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(data)
    assert read_through(tmp_path / "file") == digest_bytes(data)
    assert in_memory(tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux alone can tell")
def test_one_part_that_would_have_to_be_waited_for_is_not_in_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(3 * PROBE_BYTES))

    def preadv(descriptor, buffers, at, flags, error):
        assert flags == os.RWF_NOWAIT
        if at == 2 * PROBE_BYTES:
            raise error
        return 1

    for error, found in [(BlockingIOError(), False), (OSError(95, "not supported"), True)]:
        monkeypatch.setattr(os, "preadv", lambda *arguments, error=error: preadv(*arguments, error))
        assert in_memory(tmp_path / "file") == found


LINUX = tuple(int(part) for part in platform.release().split(".")[:2]) if platform.system() == "Linux" else (0, 0)


@pytest.mark.skipif(LINUX < (5, 14), reason="the system cannot")
def test_pages_that_were_entered_are_read_without_a_fault(tmp_path):
    size = 1024 * mmap.PAGESIZE
    (tmp_path / "file").write_bytes(bytes(size))
    with (tmp_path / "file").open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        enter_pages(view.ctypes.data + 1, size - 2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        assert not view[:: mmap.PAGESIZE].any()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16  # at most 1024, mostly 64 without
        del view


def test_a_shards_tokens_are_entered_at_its_first_use(tmp_path, monkeypatch):
    documents = documents_of([30, 40, 50, 60])
    write_store(tmp_path, documents, shards=2)
    entered = []
    monkeypatch.setattr(verified, "enter_pages", lambda *mapped: entered.append(ctypes.string_at(*mapped)))
    store = Store.open(tmp_path)
    for index in (0, 1, 3):
        store.document(index)
    assert entered == [np.concatenate(documents[:2]).tobytes(), np.concatenate(documents[2:]).tobytes()]


def test_a_shard_on_disk_is_read_once_before_its_documents_and_one_in_memory_is_not(tmp_path, monkeypatch):
    documents = documents_of([30, 40, 50, 60])
    manifest = write_store(tmp_path, documents, shards=2)
    Store.open(tmp_path).document(0)
    read, on_disk = [], {manifest.shards[0].file}
    monkeypatch.setattr(verified, "read_through", lambda path: read.append(path.name) or read_through(path))
    monkeypatch.setattr(verified, "in_memory", lambda path: str(path.relative_to(tmp_path)) not in on_disk)
    for verify in (True, False):
        store = Store.open(tmp_path, verify=verify)
        for index in (1, 0, 3, 2):
            assert store.document(index).tolist() == documents[index].tolist()
    # The first was verified and is on disk; the second was not verified, then is known to be right.
    assert read == ["00000.arrow", "00001.arrow", "00000.arrow"]


def test_a_damaged_shard_among_sound_ones_is_refused_every_time(tmp_path):
    documents = documents_of([30] * 12)
    manifest = write_store(tmp_path, documents, shards=6)
    path = tmp_path / manifest.shards[4].file
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    store, every = Store.open(tmp_path), np.arange(12)
    inputs, labels = np.full((2, 360), -1, dtype=np.int64)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"digest[\s\S]*00004"):
            store.gather(every, np.zeros(12, dtype=np.int64), np.full(12, 30), inputs, labels)
        assert (labels == -1).all()
    assert store.document(0).tolist() == documents[0].tolist()
