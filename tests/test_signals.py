"""Signals: a checkpoint, status 75, and the same command ends as if there had been none."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from ranks import program
from runs import as_toml, config_of, settings_of, tiny_store
from test_kill import assert_same, ends_in

from train import checkpoint, loop
from train.metrics import read_metrics
from train.signals import Signals

CODE = """
import os, signal, sys
from train.cli import main
from train.loop import Run
from train.parallel import Parallel

begin, update, loss = Run.__init__, Run.update, Parallel.loss
at, where, *numbers = sys.argv[2:]
now = []

def send(place, step):
    if (place, str(step)) == (where, at):
        for number in numbers:
            os.kill(os.getpid(), int(number))

def begun(self, *given):
    send("begin", 0)
    begin(self, *given)

def updated(self, batch):
    now[:] = [batch.step]
    if (where, str(batch.step)) == ("update", at):
        self.saver.wait()  # for the checkpoint before, written in the background: a second signal kills
    send("update", batch.step)
    return update(self, batch)

def lost(self, part):
    send("loss", now[0] if now else -1)
    return loss(self, part)

Run.__init__, Run.update, Parallel.loss = begun, updated, lost
main(["run", sys.argv[1]])
"""
MANY = {"batch__global_batch_sequences": 6, "batch__micro_batch_tokens": 16}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop.run(config_of(store, folder, **MANY), warn=print)
    return ends_in(folder)


@pytest.fixture
def run(store, tmp_path):
    """Train, sending signals at a place; returns what came of it."""
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run", **MANY)))

    def run(at, where, *numbers):
        return program(CODE, "run.toml", at, where, *(int(n) for n in numbers), folder=tmp_path)

    return run


@pytest.mark.parametrize(
    ("number", "where", "kept"),
    [(signal.SIGTERM, "update", 9), (signal.SIGUSR1, "loss", 9), (signal.SIGINT, "update", 9)],
)
def test_the_step_is_given_up_a_checkpoint_written_and_the_same_command_goes_on(
    run, store, whole, tmp_path, number, where, kept
):
    done = run(9, where, number)
    assert done.returncode == 75, done.stderr
    assert f"stopped by {number.name}; the same command goes on" in done.stdout
    assert "Traceback" not in done.stderr
    assert checkpoint.step_of(checkpoint.find(tmp_path / "run")[-1]) == kept  # of step 9, from 0, nothing is there
    assert [line["step"] for line in read_metrics(tmp_path / "run")][-1] == kept
    loop.run(config_of(store, tmp_path / "run", **MANY), warn=lambda text: None)
    assert_same(ends_in(tmp_path / "run"), whole)


def test_a_step_of_one_micro_batch_is_finished(store, tmp_path, monkeypatch):
    update = loop.Run.update

    def signalled(self, batch):
        if batch.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", signalled)
    before = signal.getsignal(signal.SIGTERM)
    outcome = loop.run(config_of(store, tmp_path / "run", batch__micro_batch_tokens=10**6), warn=print)
    assert (outcome.finished, outcome.step, outcome.stopped_by) == (False, 10, "SIGTERM")
    assert (outcome.padding, outcome.lost) == (0, None)
    assert checkpoint.step_of(checkpoint.find(tmp_path / "run")[-1]) == 10
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("tell", [True, False])
def test_of_ranks_that_are_signalled_together_one_speaks(tell, capfd):
    with Signals(tell=tell) as signals:
        signals.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert ("SIGTERM: writing a checkpoint" in capfd.readouterr().err) == tell


def test_a_second_interrupt_ends_it_at_once_and_the_checkpoint_before_serves(run, store, whole, tmp_path):
    done = run(9, "update", signal.SIGINT, signal.SIGINT)
    assert done.returncode == -signal.SIGINT
    assert checkpoint.step_of(checkpoint.find(tmp_path / "run")[-1]) == 7
    loop.run(config_of(store, tmp_path / "run", **MANY), warn=lambda text: None)
    assert_same(ends_in(tmp_path / "run"), whole)


@pytest.mark.parametrize("where", ["begin", "update"])
def test_before_the_first_step_nothing_is_lost(run, store, whole, tmp_path, where):
    done = run(0, where, signal.SIGTERM)
    assert done.returncode == 75, done.stderr
    assert ("before the first step" in done.stderr) == (where == "begin")
    assert checkpoint.find(tmp_path / "run") == []
    loop.run(config_of(store, tmp_path / "run", **MANY), warn=lambda text: None)
    assert_same(ends_in(tmp_path / "run"), whole)


LOADING = """
import os, sys
from train.cli import main

class Signal:
    @staticmethod
    def find_spec(name, *rest):
        if name == "torch":
            os.kill(os.getpid(), int(sys.argv[1]))

sys.meta_path.insert(0, Signal)
main([sys.argv[2], "run.toml"])
"""


@pytest.mark.parametrize(
    ("command", "number"), [("run", signal.SIGTERM), ("tune", signal.SIGUSR1), ("run", signal.SIGINT)]
)
def test_a_signal_while_pytorch_is_loaded_is_answered_as_later(store, tmp_path, command, number):
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run")))
    started = [sys.executable, "-c", LOADING, str(int(number)), command]
    done = subprocess.run(started, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert done.stderr == f"loading PyTorch\n\nstopped by {number.name}; the same command begins again, or goes on\n"
    assert not (tmp_path / "run").exists()


def test_deterministic_kernels_are_asked_for_while_the_run_lasts_only(store, tmp_path, monkeypatch):
    seen, update = [], loop.Run.update

    def updated(self, batch):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", updated)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    runs = {}
    for wanted in (False, True):
        changes = {"run__deterministic": wanted, "run__epochs": None, "run__total_tokens": 200}
        folder = tmp_path / str(wanted)
        loop.run(config_of(store, folder, **changes), warn=print)
        runs[wanted] = ends_in(folder)
    assert seen[0] == (False, None)
    assert seen[-1] == (True, ":4096:8")
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(runs[True], runs[False])
