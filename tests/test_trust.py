"""Whatever goes wrong while a store is written or kept: it is the same store after a rerun, or an error says why."""

import errno
import gzip
import io
import os
import runpy
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from corpora import bytes_of, options, tokenizer_of, write_jsonl

from pipeline import build as b
from pipeline import job
from pipeline.cli import main
from pipeline.documents import Reading
from pipeline.errors import SlwError, StoreError
from pipeline.format import BUILD_FOLDER, Manifest
from pipeline.reader import Store
from pipeline.train_tokenizer import train_tokenizer
from pipeline.verify import verify

TEXTS = [f"tale {i}: " + "of ships, naïve cafés and 😀 " * (i % 11) for i in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder / "c.jsonl", tokenizer_of(folder)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    b.build(asked(corpus, out))
    return out


def asked(corpus, out, **more):
    return options(corpus[1], out, corpus[0], **{"unit_bytes": 2000, "encoder": "tokenizers", **more})


class Disk:
    """Makes the n-th of all writes, flushes, renames and new folders below a folder fail; counts them."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.fails, self.count, self.lasting = str(folder), None, 0, False
        self.lock = threading.Lock()
        for owner, name in ((os, "fsync"), (os, "write"), (os, "open"), (Path, "replace"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name), path_of=name))
        self.open = io.open
        monkeypatch.setattr(io, "open", self.opened)

    def begin(self, fails, lasting):
        self.count, self.fails, self.lasting = 0, fails, lasting

    def operation(self):
        with self.lock:
            self.count += 1
            if self.fails and (self.count == self.fails or (self.lasting and self.count > self.fails)):
                raise OSError(errno.ENOSPC, "No space left on device (injected)")

    def counted(self, real, path_of):
        def call(first, *more, **named):
            path = str(Path(f"/proc/self/fd/{first}").readlink()) if path_of in ("fsync", "write") else str(first)
            if path.startswith(self.folder) and not (path_of == "open" and more[0] == os.O_RDONLY):
                self.operation()
            return real(first, *more, **named)

        return call

    def opened(self, path, mode="r", *more, **named):
        if not str(path).startswith(self.folder) or mode[0] == "r":
            return self.open(path, mode, *more, **named)
        self.operation()
        stream = self.open(path, mode, *more, **named)
        real = stream.write

        def write(data):
            self.operation()
            return real(data)

        stream.write = write
        return stream


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_any_write_flush_or_rename_may_fail(corpus, tmp_path, monkeypatch, lasting):
    few, out = tmp_path / "few.jsonl", tmp_path / "s"
    write_jsonl(few, TEXTS[5:14])
    b.build(asked((few, corpus[1]), tmp_path / "few"))
    expected = bytes_of(tmp_path / "few")
    disk = Disk(monkeypatch, out)
    for n in range(1, 1000):
        disk.begin(n, lasting)
        try:
            b.build(asked((few, corpus[1]), out))
        except StoreError as error:
            assert "injected" in str(error), n
        reached = disk.count >= n
        if (out / "manifest.json").exists():
            assert verify(out) == [], n
        disk.begin(None, False)
        b.build(asked((few, corpus[1]), out))
        assert bytes_of(out) == expected, n
        shutil.rmtree(out)
        if not reached:
            break
    assert 30 < n < 999


def test_a_damaged_or_lost_shard_is_named_and_just_that_is_repaired(corpus, whole, tmp_path):
    out = tmp_path / "s"
    shutil.copytree(whole, out)
    shards = [out / shard.file for shard in Manifest.load(out).shards]
    assert len(shards) >= 4
    data = bytearray(shards[1].read_bytes())
    data[-50] ^= 1
    shards[1].write_bytes(data)
    shards[2].unlink()
    (out / "tokenizer.json").write_text("{}")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert [damage.file for damage in verify(out)] == ["tokenizer.json", "shards/00001.arrow", "shards/00002.arrow"]
    assert CliRunner().invoke(main, ["verify", str(out)]).exit_code == 1
    result = b.build(asked(corpus, out))
    assert (result.already_built, result.repaired) == (True, 3)
    assert bytes_of(out) == bytes_of(whole)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == {"tokenizer.json", "00001.arrow"}
    assert b.build(asked(corpus, out)).repaired == 0


def test_a_repair_from_a_changed_input_is_refused_and_touches_nothing(corpus, tmp_path, monkeypatch):
    source = tmp_path / "c.jsonl"
    write_jsonl(source, TEXTS)
    b.build(asked((source, corpus[1]), tmp_path / "s"))
    parameters = Manifest.load(tmp_path / "s").parameters
    (tmp_path / "s/shards/00001.arrow").unlink()
    before = bytes_of(tmp_path / "s")
    source.write_bytes(source.read_bytes().replace(b"ships", b"boats"))
    with pytest.raises(StoreError, match=r"1 rewritten since, in the same size[\s\S]*c\.jsonl[\s\S]*--force"):
        b.build(asked((source, corpus[1]), tmp_path / "s"))
    monkeypatch.setattr(job, "fingerprints", lambda files: [look for _, _, look in parameters["files"]])
    with pytest.raises(StoreError, match=r"input has changed[\s\S]*shards/00001\.arrow[\s\S]*--force"):
        b.build(asked((source, corpus[1]), tmp_path / "s"))
    assert {name: digest for name, digest in bytes_of(tmp_path / "s").items() if ".slw-build" not in name} == before
    write_jsonl(source, TEXTS)
    assert b.build(asked((source, corpus[1]), tmp_path / "s")).repaired == 1
    assert len(bytes_of(tmp_path / "s")) == len(before) + 1


def test_a_repair_rewrites_one_of_several_shards_of_a_unit(corpus, tmp_path):
    source = tmp_path / "c.jsonl.gz"
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    source.write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    b.build(asked((source, corpus[1]), tmp_path / "s", unit_bytes=700))
    shards = sorted((tmp_path / "s/shards").iterdir())
    assert len(shards) > 2
    before, time = bytes_of(tmp_path / "s"), shards[0].stat().st_mtime_ns
    shards[1].write_bytes(b"")
    assert b.build(asked((source, corpus[1]), tmp_path / "s", unit_bytes=700)).repaired == 1
    assert bytes_of(tmp_path / "s") == before
    assert shards[0].stat().st_mtime_ns == time


def test_a_manifest_changed_by_hand_is_named_by_whoever_reads_it(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "s")
    manifest = tmp_path / "s/manifest.json"
    manifest.write_text(manifest.read_text().replace('"eod_id": 0', '"eod_id": 1'))
    for read in (Store.open, verify, Manifest.load):
        with pytest.raises(StoreError, match=r"changed after it was written[\s\S]*manifest\.json"):
            read(tmp_path / "s")


def test_two_builds_at_once_never_break_the_store(corpus, whole, tmp_path):
    errors = []

    def work():
        try:
            b.build(asked(corpus, tmp_path / "s"))
        except SlwError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("another build of this store is running" in error for error in errors)
    assert len(errors) < 4
    assert bytes_of(tmp_path / "s") == bytes_of(whole)


def test_a_build_that_another_one_overtakes_while_it_looks_at_the_output_is_not_refused(
    corpus, whole, tmp_path, monkeypatch
):
    exists, begun = Path.exists, []

    def looked_at(path, **more):
        answer = exists(path, **more)
        if path.parent == tmp_path / "s" and not begun:  # after the first look, whatever it was for
            begun.append(path)
            (tmp_path / "s" / BUILD_FOLDER).mkdir(parents=True)
        return answer

    monkeypatch.setattr(Path, "exists", looked_at)
    b.build(asked(corpus, tmp_path / "s"))
    assert begun and bytes_of(tmp_path / "s") == bytes_of(whole)


def small_disk(path, size):
    """A tmpfs of `size` bytes; skips where we may not mount."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs here")


def test_a_full_disk_is_named_and_the_rerun_goes_on_after_making_room(corpus, whole, tmp_path):
    small_disk(tmp_path / "disk", 48 << 10)
    try:
        ballast = tmp_path / "disk/ballast"
        ballast.write_bytes(bytes(28 << 10))
        with pytest.raises(StoreError, match=r"cannot write[\s\S]*No space left[\s\S]*make room"):
            b.build(asked(corpus, tmp_path / "disk/s"))
        with pytest.raises(StoreError, match=r"not a finished store[\s\S]*again goes on"):
            Store.open(tmp_path / "disk/s")
        ballast.unlink()
        b.build(asked(corpus, tmp_path / "disk/s"))
        assert bytes_of(tmp_path / "disk/s") == bytes_of(whole)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_read_only_target_is_named_and_a_finished_store_there_can_be_read_and_verified(corpus, whole, tmp_path):
    small_disk(tmp_path / "disk", 1 << 20)
    try:
        shutil.copytree(whole, tmp_path / "disk/s")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        with pytest.raises(StoreError, match=r"cannot write here[\s\S]*Read-only[\s\S]*--out"):
            b.build(asked(corpus, tmp_path / "disk/other"))
        with pytest.raises(StoreError, match=r"cannot write[\s\S]*where: .*disk/t\.json"):
            train_tokenizer((str(corpus[0]),), tmp_path / "disk/t.json", vocab_size=300, reading=Reading())
        assert b.build(asked(corpus, tmp_path / "disk/s")).already_built
        assert verify(tmp_path / "disk/s") == []
        assert len(Store.open(tmp_path / "disk/s").document(0)) > 1
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_killed_at_random_moments_with_two_workers(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts/kill_build.py"))
    command = script["make_corpus"](tmp_path, documents=400)
    outcome = script["kill_and_rerun"](command, tmp_path, workers=2, kills=2, seed=3)
    assert (outcome["kills_before_commit"], outcome["different"]) == (2, 0)
