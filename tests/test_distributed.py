"""Several ranks start, agree, stop and fail together."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from click.testing import CliRunner
from rank_runs import UNEVEN, assert_same, run_alone, steps_of, train_until, written
from ranks import launch
from runs import settings_of, tiny_store

from pipeline.errors import RunError, StoreError
from train import checkpoint, distributed
from train.cli import main
from train.distributed import together


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The same run on one rank."""
    return run_alone(store, tmp_path_factory.mktemp("whole") / "run")


def test_an_error_of_one_rank_ends_all_and_is_told_once(store, whole, tmp_path):
    folder = tmp_path / "run"
    toml = written(settings_of(store, folder, **UNEVEN), tmp_path / "run.toml")
    error = StoreError("a shard is damaged", found="three flipped bits")
    codes, output = launch(2, train_until, toml, 1, 12, error, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "three flipped bits" in output[1]
    assert not output[0].strip()
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [0, 0], output
    assert "22 steps" in output[0]
    assert not output[1].strip()
    assert_same(folder, whole)


def train_as_rank(settings):
    """A learning rate of its own on each rank."""
    main(["run", str(settings), f"lr=1e-{os.environ['RANK']}"], standalone_mode=False)


def test_ranks_of_different_configs_are_refused_once(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    codes, output = launch(2, train_as_rank, toml, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "".join(output).count("the ranks are not at the same place") == 1
    assert not (tmp_path / "run").exists()


def test_what_only_rank_0_finds_wrong_ends_all(store, whole, tmp_path):
    toml = written(settings_of(store, whole, **UNEVEN, optimizer__lr=2e-2), tmp_path / "run.toml")
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "0.01 there, 0.02 asked" in output[0]
    assert not output[1].strip()


def test_a_bad_config_is_told_once(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run", run__device="abacus"), tmp_path / "run.toml")
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [2, 2], output
    assert "".join(output).count("no such device") == 1


def never_cleaned_up():
    """A rank fails; what both do afterwards takes for ever, as a context of CUDA can with a kernel that waits."""
    distributed.GRACE_S = 1.0
    try:
        with together() as ranks:
            if ranks.rank == 1:
                raise StoreError("a shard is damaged")
            ranks.barrier()
    finally:
        threading.Event().wait()


def test_a_rank_that_is_stuck_in_its_clean_up_ends_all_the_same(tmp_path):
    codes, output = launch(2, never_cleaned_up, folder=tmp_path)
    assert codes == [-signal.SIGALRM] * 2, output


def test_without_an_agent_too_rank_0_is_heard_before_its_store_goes_with_it(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    error = StoreError("a shard is damaged", found="three flipped bits")
    codes, output = launch(2, train_until, toml, 0, 3, error, folder=tmp_path / "output", rank_0_stores=True)
    assert codes == [1, 1], output
    assert "three flipped bits" in output[0]
    assert not output[1].strip()


def test_torchrun_starts_ranks_and_a_signal_to_one_of_them_stops_all_at_one_step(store, whole, tmp_path):
    folder = tmp_path / "run"
    toml = written(settings_of(store, folder, **UNEVEN, run__parallel="ddp"), tmp_path / "run.toml")
    code = f"""
import os, time
from pathlib import Path
from train import loop
from train.cli import main
update, place = loop.Run.update, Path({str(tmp_path)!r})
def waits(self, batch):
    if self.ranks.rank == 1 and batch.step == 6:
        (place / "writing").write_text(str(os.getpid()))
        (place / "writing").rename(place / "pid")
        while not (place / "sent").exists():
            time.sleep(0.02)
    return update(self, batch)
loop.Run.update = waits
main()
"""
    (tmp_path / "waits.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, str(tmp_path / "waits.py"), "run", str(toml)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    (tmp_path / "sent").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("the same command goes on") == 1, output
    assert "writing a checkpoint" not in output, "rank 0 alone speaks, and was not signalled"
    step = steps_of(folder)[-1]["step"]
    assert step < steps_of(whole)[-1]["step"]
    assert checkpoint.find(folder)[-1].name == f"step-{step:08d}"
    assert output.count(f"{step:,} steps") == 1
    done = CliRunner().invoke(main, ["run", str(toml)])
    assert done.exit_code == 0, done.output
    assert_same(folder, whole)


def talk():
    """What ranks say to each other, on every one of two."""
    with together() as ranks:
        told = ranks.from_first(lambda: {"rank": ranks.rank, "text": "ä" * 10_000, "none": None})
        assert told == {"rank": 0, "text": "ä" * 10_000, "none": None}
        assert ranks.gather(torch.tensor([ranks.rank + 0.5])).tolist() == [[0.5], [1.5]]
        heard = [ranks.any(ranks.rank == 1 and turn == 2) for turn in range(5)]
        assert heard == [False, False, False, True, False]
        ranks.agree({"step": 3, "loader": 2**62})
        with pytest.raises(RunError, match="rank 0: loader 4611686018427387904; rank 1: loader 4611686018427387905"):
            ranks.agree({"step": 3, "loader": 2**62 + ranks.rank})
        print("done")


def test_ranks_tell_each_other_what_they_need(tmp_path):
    codes, output = launch(2, talk, folder=tmp_path)
    assert codes == [0, 0], output
    assert [text.strip() for text in output] == ["done", "done"]


def test_half_an_environment_is_refused(store, tmp_path, monkeypatch):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(main, ["run", str(toml)])
    assert done.exit_code == 2
    assert "start it with torchrun" in done.output
