"""Checkpoints: read back as written, also without our code; whole or not there; damage is found and passed over."""

import json
import os
import pickle
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from runs import config_of, tiny_store
from safetensors.torch import load_file

from pipeline.errors import RunError, StoreError
from train import checkpoint, loop
from train.checkpoint import Kept
from train.config import RunConfig
from train.saver import Saver

DOCUMENT = Path(__file__).parents[1] / "docs/checkpoints.md"
WEIGHTS = {
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "half": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "odd": torch.tensor([True, False, True]),
    "whole": torch.tensor([[1 << 40, -1]]),
}
TWO = Kept(2)


def fail(text):
    raise AssertionError(text)


def write(run, step, weights=WEIGHTS, kept=TWO):
    moments = {"step:scalar": torch.tensor(float(step))}
    return checkpoint.write(run, step, model=weights, optimizer=moments, state={"note": "é"}, kept=kept)


def names(run):
    return [folder.name.removeprefix("step-").lstrip("0") for folder in checkpoint.find(run)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run with three checkpoints."""
    folder = tmp_path_factory.mktemp("home") / "runs/slw"
    store = tiny_store(tmp_path_factory.mktemp("store"))
    loop.run(config_of(store, folder, run__keep_checkpoints=3), warn=fail)
    return folder


def test_tensors_of_any_kind_come_back_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 16)
    folder = write(tmp_path, 7)
    assert checkpoint.damage(folder) is None
    read = load_file(folder / "model.safetensors")
    assert read.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)
    assert checkpoint.read_state(folder) == {"note": "é", "step": 7}
    assert (tmp_path / "checkpoints/LATEST").read_text() == "step-00000007\n"


def test_all_is_flushed_before_it_has_its_name_and_latest_comes_last(tmp_path, monkeypatch):
    """A kill cannot show this, a loss of power would: the order of flushes and renames."""
    fsync, rename, replace, done = os.fsync, os.rename, os.replace, []

    def flushed(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        done.append(
            ("flush", path, path.stat().st_size if path.is_file() else sorted(entry.name for entry in path.iterdir()))
        )
        fsync(handle)

    def renamed(real):
        def call(source, target):
            done.append(("rename", Path(source), Path(target)))
            real(source, target)

        return call

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed(rename))
    monkeypatch.setattr(os, "replace", renamed(replace))
    (tmp_path / "run").mkdir()
    folder = write(tmp_path / "run", 7)
    monkeypatch.undo()
    named = next(i for i, (what, _, target) in enumerate(done) if what == "rename" and target == folder)
    hidden, files = done[named][1], sorted(path.name for path in folder.iterdir())
    assert {("flush", hidden / name, (folder / name).stat().st_size) for name in files} <= {
        *(event for event in done[:named] if event[1].parent == hidden)
    }
    assert ("flush", hidden, files) in done[:named]
    latest = next(i for i, (what, _, target) in enumerate(done) if what == "rename" and target.name == "LATEST")
    places = [path for what, path, _ in done[named:latest] if what == "flush"]
    assert folder.parent in places, "LATEST names what may not be there"
    assert ("flush", done[latest][1], len(folder.name) + 1) in done[:latest]
    assert [path for what, path, _ in done[latest:] if what == "flush"] == [folder.parent]
    assert tmp_path / "run" in [path for what, path, _ in done if what == "flush"], "the folder of checkpoints itself"


def test_the_last_ones_every_nth_and_one_to_go_back_to_are_kept(tmp_path):
    for step in range(1, 24, 2):
        write(tmp_path, step, kept=Kept(2, every_steps=5))
    assert names(tmp_path) == ["5", "15", "21", "23"]
    write(tmp_path, 100_000_025, kept=TWO)  # more digits than the name has room for
    assert names(tmp_path) == ["23", "100000025"]


def test_a_rollback_always_finds_one_far_enough_back_and_not_much_farther(tmp_path):
    for step in range(10, 100, 10):
        write(tmp_path, step, kept=Kept(1, steps_back=15))
        steps = [checkpoint.step_of(folder) for folder in checkpoint.find(tmp_path)]
        assert steps == [s for s in (step - 20, step - 10, step) if s > 0]


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("damaged")
    assert checkpoint.damage(write(tmp_path, 3)) is None
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["LATEST", "step-00000003"]


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.DIGESTS_NAME])
def test_no_flipped_bit_and_no_cut_passes(tmp_path, name):
    before, newest = write(tmp_path, 1), write(tmp_path, 2)
    file = newest / name
    sound = file.read_bytes()
    for bit in range(0, len(sound) * 8, 1 + len(sound) * 8 // 2000):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert name in (checkpoint.damage(newest) or "") or name == checkpoint.DIGESTS_NAME, bit
        assert checkpoint.damage(newest), bit
    heard = []
    for broken in (lambda: file.write_bytes(sound[:-1]), lambda: file.write_bytes(b""), file.unlink):
        broken()
        assert checkpoint.load_latest(tmp_path, heard.append)[0] == before
        assert str(newest) in heard[-1] and name in heard[-1]
    file.write_bytes(sound)
    assert checkpoint.load_latest(tmp_path, fail)[0] == newest
    if name in (checkpoint.MODEL_NAME, checkpoint.OPTIMIZER_NAME):
        file.write_bytes(b"")
        assert checkpoint.load_latest(tmp_path, fail, files=[checkpoint.STATE_NAME])[0] == newest


def test_a_missing_or_stale_latest_changes_nothing(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    latest = tmp_path / "checkpoints/LATEST"
    for text in ("step-00000001\n", "step-99999999\n", "", None):
        latest.unlink() if text is None else latest.write_text(text)
        assert checkpoint.load_latest(tmp_path, fail)[0] == newest


def test_a_run_whose_checkpoints_were_moved_away_does_not_begin_anew(tmp_path):
    shutil.move(write(tmp_path, 1), tmp_path / "elsewhere")
    with pytest.raises(RunError, match="the checkpoints are gone"):
        checkpoint.load_latest(tmp_path, fail)
    (tmp_path / "checkpoints/LATEST").unlink()
    assert checkpoint.load_latest(tmp_path, fail) is None, "none was ever written"


def test_what_a_kill_left_is_swept_and_never_read(tmp_path):
    sound = write(tmp_path, 1)
    shutil.copytree(sound, sound.with_name(".step-00000002.partial"))
    shutil.copytree(sound, sound.with_name(".step-00000000.deleted"))
    (sound.parent / ".LATEST.1f.partial").write_text("step")
    assert checkpoint.load_latest(tmp_path, fail)[0] == sound
    checkpoint.sweep(tmp_path)
    assert sorted(path.name for path in sound.parent.iterdir()) == ["LATEST", "step-00000001"]


def test_training_goes_on_while_a_copy_of_the_moment_is_written(tmp_path, monkeypatch):
    going, may_write = threading.Event(), threading.Event()
    real = checkpoint.write_tensors

    def slow(path, tensors):
        going.set()
        assert may_write.wait(300)
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    weight, state = torch.zeros(5), {"list": [1]}
    with Saver(RunConfig(dir=tmp_path)) as saver:
        saver.save(1, model={"w": weight}, optimizer={}, state=state)
        assert going.wait(300)
        assert checkpoint.find(tmp_path) == []
        weight += 1  # the next update, while it is written
        state["list"].append(2)
        saver.check()
        may_write.set()
        saver.save(2, model={"w": weight}, optimizer={}, state=state)  # waits for the first
    first, second = checkpoint.find(tmp_path)
    assert torch.equal(checkpoint.read_model(first)["w"], torch.zeros(5))
    assert torch.equal(checkpoint.read_model(second)["w"], torch.ones(5))
    assert (checkpoint.read_state(first)["list"], checkpoint.read_state(second)["list"]) == ([1], [1, 2])


def test_a_failure_while_the_newest_is_named_is_one_error_not_two(tmp_path, monkeypatch):
    def full(path, data):
        raise StoreError("cannot write", where=path, found="No space left on device", remedy="make room")

    monkeypatch.setattr(checkpoint, "write_bytes", full)
    saver = Saver(RunConfig(dir=tmp_path))
    saver.save(1, model=WEIGHTS, optimizer={}, state={})
    with pytest.raises(RunError) as failed:
        saver.wait()
    assert str(failed.value).count("to do:") == 1 and failed.value.details["found"] == "No space left on device"


def test_a_failed_write_is_told_to_the_loop_and_keeps_the_one_before(tmp_path, monkeypatch):
    saver = Saver(RunConfig(dir=tmp_path))
    saver.save(1, model=WEIGHTS, optimizer={}, state={})
    saver.wait()

    def full(path, tensors):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    saver.save(2, model=WEIGHTS, optimizer={}, state={})
    with pytest.raises(RunError, match=r"cannot write a checkpoint[\s\S]*No space left"):
        saver.wait()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step-00000001"]
    assert checkpoint.damage(checkpoint.find(tmp_path)[0]) is None


def test_the_document_reads_a_checkpoint_with_safetensors_and_json_alone(run, monkeypatch):
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S).group(1)
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.M))
    assert imported == {"json", "pathlib", "safetensors"}
    monkeypatch.chdir(run.parents[1])
    names = {}
    exec(code, names)
    assert names["state"]["step"] == checkpoint.step_of(checkpoint.find(run)[-1])
    assert names["weights"].keys() == {key.partition(":")[2] for key in names["moments"]}
    assert {key.partition(":")[0] for key in names["moments"]} == {"exp_avg", "exp_avg_sq", "step"}


def test_every_key_of_the_state_is_documented(run):
    state = json.loads((checkpoint.find(run)[-1] / "state.json").read_text())
    documented = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), re.M))
    assert documented == state.keys()


def test_nothing_pickled_is_ever_read(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(checkpoint.find(copy)[-1])

    def refused(read):
        def call(*arguments, **named):
            caller = sys._getframe(1).f_globals["__name__"]
            assert caller.startswith("numba."), f"{caller} unpickles something"  # its cache of kernels, from here
            return read(*arguments, **named)

        return call

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refused(getattr(owner, name)))
    with pytest.raises(AssertionError, match="unpickles something"):
        pickle.loads(b"N.")
    settings = json.loads((copy / "config.json").read_text())
    loop.run(config_of(settings["store"], copy, run__keep_checkpoints=3), warn=lambda text: None)
    assert names(copy) == names(run)
    for package in ("pipeline", "curriculum", "train"):
        for file in (DOCUMENT.parents[1] / package).glob("*.py"):
            assert not re.search(r"import (pickle|shelve|dill)|torch\.load\(|allow_pickle=True", file.read_text()), (
                file
            )
