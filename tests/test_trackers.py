"""TensorBoard and W&B hear what metrics.jsonl holds, each point once, also of a run that was killed and went on."""

import json
import sys
import textwrap

import pytest
from runs import config_of, tiny_store

from pipeline.errors import ConfigError
from train import loop
from train.metrics import read_metrics
from train.run import Run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


class Killed(Exception):
    """In place of SIGKILL: nothing is saved or closed in an orderly way by the loop."""


def killed_and_resumed(store, folder, trackers, monkeypatch, at=18):
    """A run that ends after step 18, some steps after its checkpoint of step 14, and goes on to its end."""
    config = config_of(store, folder, run__trackers=trackers)
    update = Run.update

    def dying(self, batch):
        if batch.step == at:
            raise Killed
        return update(self, batch)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Run, "update", dying)
        loop.run(config, warn=lambda text: None)
    assert [line["step"] for line in read_metrics(folder)][-1] == at
    loop.run(config, warn=lambda text: None)
    return [line for line in read_metrics(folder) if line["step"]]


def test_tensorboard_holds_every_point_once(store, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = killed_and_resumed(store, tmp_path / "run", ["tensorboard"], monkeypatch)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    for name in ("loss", "loss_ratio", "seqlen", "lr", "grad_norm"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    validated = [line["step"] for line in read_metrics(tmp_path / "run") if "validation_loss" in line]
    assert [event.step for event in events.Scalars("validation_loss")] == validated


FAKE = """
import json, os, pathlib

class Run:
    def __init__(self, path):
        self.path = path
        online = os.environ.get("WANDB_MODE") != "offline" and path.exists()
        steps = [json.loads(text)["step"] for text in path.read_text().splitlines()] if online else []
        self.starting_step = max(steps, default=-1) + 1
    def log(self, values, step):
        with self.path.open("a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\\n")
    def finish(self):
        self.log({"finished": 1}, -1)

def init(*, dir, id, resume, name, project, config):
    path = pathlib.Path(dir) / "wandb"
    path.mkdir(exist_ok=True)
    with (path / "begun.jsonl").open("a") as stream:
        stream.write(json.dumps([id, resume, name, project, config["optimizer"]["lr"]]) + "\\n")
    starts = len((path / "begun.jsonl").read_text().splitlines())
    return Run(path / (f"told-{starts}.jsonl" if os.environ.get("WANDB_MODE") == "offline" else "told-1.jsonl"))
"""


@pytest.mark.parametrize(("mode", "lost"), [("online", 0), ("online", 9), ("offline", 0)])
def test_wandb_has_every_point_once_in_one_run_whatever_a_kill_took_from_it(store, tmp_path, monkeypatch, mode, lost):
    """A module of that name in its place: the real one needs its server to read back."""
    (tmp_path / "wandb.py").write_text(textwrap.dedent(FAKE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "lengths")
    monkeypatch.setenv("WANDB_MODE", mode)
    place = tmp_path / "run" / "wandb"
    going_on = loop.checkpoint.load_latest

    def after_a_loss(*given):
        if (place / "told-1.jsonl").exists():  # of a buffer, together with the process
            kept = [text for text in (place / "told-1.jsonl").read_text().splitlines() if '"finished"' not in text]
            (place / "told-1.jsonl").write_text("".join(text + "\n" for text in kept[: len(kept) - lost]))
        return going_on(*given)

    monkeypatch.setattr(loop.checkpoint, "load_latest", after_a_loss)
    killed_and_resumed(store, tmp_path / "run", ["wandb"], monkeypatch)
    sys.modules.pop("wandb")
    begun = [json.loads(text) for text in (place / "begun.jsonl").read_text().splitlines()]
    assert len(begun) == 2
    assert begun[0] == begun[1]
    assert begun[0][1:] == ["allow", "run", "lengths", 0.01]
    last = place / ("told-2.jsonl" if mode == "offline" else "told-1.jsonl")
    told = [line for line in map(json.loads, last.read_text().splitlines()) if line["step"] >= 0]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in told] == [line["step"] for line in lines]
    assert [line.get("loss") for line in told] == [line.get("loss") for line in lines]


def test_a_missing_package_gives_the_line_that_installs_it_before_anything_is_touched(store, tmp_path, monkeypatch):
    monkeypatch.setattr("train.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "slw\[wandb\]"'):
        loop.run(config_of(store, tmp_path / "run", run__trackers=["wandb"]), warn=lambda text: None)
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_unknown_tracker_is_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="tensorboard"):
        config_of(store, tmp_path / "run", run__trackers=["abacus"])


def test_trackers_may_be_changed_at_a_resume(store, tmp_path):
    loop.run(config_of(store, tmp_path / "run"), warn=lambda text: None)
    loop.run(config_of(store, tmp_path / "run", run__trackers=["tensorboard"]), warn=lambda text: None)
