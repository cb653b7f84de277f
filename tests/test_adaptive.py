"""Adaptive lengths: raised exactly by the rule, recorded, and a stopped run goes on as one that was not."""

import itertools
import json
import math

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from runs import as_toml, config_of, settings_of, tiny_store
from safetensors.torch import load_file

from curriculum.adaptive import Calm, Notches
from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from train import checkpoint, loop, warmup
from train.cli import main
from train.metrics import read_metrics
from train.run import Run

CHANGES = {
    "curriculum__pacing": "adaptive",
    "curriculum__seqlen_end": 24,
    "curriculum__duration_steps": None,
    "curriculum__patience": 2,
    "batch__global_batch_sequences": 6,
    "batch__micro_batch_tokens": 144,
    "run__validate_every_steps": 3,
    "run__validation_tokens": 50,
}
NOTCHES = st.builds(
    lambda low, more, notch, tolerance, patience: Notches(
        low * notch, (low + more) * notch, notch, tolerance, patience
    ),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 8),
    st.floats(1.0, 2.0),
    st.integers(1, 4),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@given(NOTCHES, st.lists(st.floats(0, 10), max_size=60))
def test_the_length_rises_after_so_many_calm_validations_in_a_row(notches, losses):
    state, seqlen, lengths = Calm(), notches.seqlen_start, [notches.seqlen_start]
    for loss in losses:
        seqlen = Calm.observe(state, loss, seqlen, notches)
        lengths.append(seqlen)
        state = Calm(**json.loads(json.dumps(vars(state))))
    since = 0  # validations since the last rise, in the twin
    for i, loss in enumerate(losses):
        since += 1
        recent = range(max(i + 1 - notches.patience, 0), i + 1)
        calm = all(losses[j] <= min(losses[: j + 1]) + math.log(notches.tolerance) for j in recent)
        rises = since >= notches.patience and calm and lengths[i] < notches.seqlen_end
        assert lengths[i + 1] == lengths[i] + notches.seqlen_multiple * rises, loss
        since = 0 if rises else since
    assert max(lengths) <= notches.seqlen_end


def test_lengths_taken_are_recorded_in_metrics_outcome_and_schedule(store, tmp_path):
    config = config_of(store, tmp_path / "run", **CHANGES)
    told = []
    outcome = loop.run(config, warn=told.append)
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    seqlens = [line["seqlen"] for line in lines]
    assert outcome.finished
    assert not any("rose" in text for text in told)
    assert outcome.tokens_seen == Store.open(store).tokens  # still every token once
    assert seqlens[0] == 8
    assert seqlens[-1] == 24
    assert [n for _, n in outcome.lengths] == [8, 16, 24]
    for first, seqlen in outcome.lengths[1:]:
        assert lines[first - 1]["seqlen_next"] == seqlen
        assert (seqlens[first - 1], seqlens[first]) == (seqlen - 8, seqlen)
    # What the rule makes of the very losses in the metrics.
    state, now = Calm(), 8
    for line in lines[:-1]:
        assert line["seqlen"] == now
        if "validation_loss" in line:
            now = state.observe(line["validation_loss"], now, config.schedule().notches)


def test_a_run_that_ends_below_full_length_says_so_and_its_plan_what_that_takes(store, tmp_path):
    told = []
    changes = {**CHANGES, "run__validate_every_steps": 12}
    config = config_of(store, tmp_path / "run", **changes)
    loop.run(config, warn=told.append)
    assert sum("rose to 16 only, not to 24, which takes 4 calm validations" in text for text in told) == 1
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run", **changes)))
    plan = CliRunner().invoke(main, ["plan", str(tmp_path / "run.toml"), "--quick"])
    assert "4 calm validations, 48 steps" in plan.stderr


def test_lengths_still_to_come_are_warmed_up_whatever_the_length_is_now(store, tmp_path, monkeypatch):
    tried = set()
    monkeypatch.setattr(warmup, "try_shape", lambda run, shape: tried.add(shape.rows * shape.seqlen))
    this = Run(config_of(store, tmp_path / "none", **CHANGES, run__compile=True), lambda text: None)
    for raised in (16, 24):
        assert [this.adapt(1.0), this.adapt(1.0)] == [None, raised]
        assert this.schedule.seqlen(0) == raised
        tried.clear()
        warmup.warm_up(this)
        assert tried >= {6 * 8, 6 * 16, 6 * 24}
    this.loader.close()


def test_a_stopped_run_goes_on_to_the_same_weights_and_lengths(store, tmp_path, monkeypatch):
    whole = loop.run(config_of(store, tmp_path / "whole", **CHANGES), warn=lambda text: None)
    update = loop.Run.update
    for stop in (3, 9, 17, 10**6):

        def killed(self, batch, stop=stop):
            if batch.step == stop:
                raise KeyboardInterrupt
            return update(self, batch)

        monkeypatch.setattr(loop.Run, "update", killed)
        config = config_of(store, tmp_path / "stopped", **CHANGES, run__checkpoint_every_steps=2)
        if stop < 10**6:
            with pytest.raises(KeyboardInterrupt):
                loop.run(config, warn=lambda text: None)
        else:
            again = loop.run(config, warn=lambda text: None)
    assert (again.step, again.tokens_seen, again.lengths) == (whole.step, whole.tokens_seen, whole.lengths)
    left, right = (
        load_file(checkpoint.find(tmp_path / name)[-1] / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_state_stays_small_however_often_the_length_rises(store):
    notches = {"seqlen_start": 1, "seqlen_end": 128, "seqlen_multiple": 1}
    schedule = Schedule.adaptive(**notches, global_batch_sequences=1, epochs=1)
    assert schedule.max_seqlen == 128
    with CurriculumLoader(Store.open(store), schedule, seed=1) as loader:
        batches = []
        for seqlen in range(2, 50):
            batches.append(next(loader))
            loader.change_schedule(loader.order.asked[-1][1].raised_to(seqlen))
        assert [batch.seqlen for batch in batches] == list(range(1, 49))
        state = json.loads(json.dumps(loader.state_dict()))
        assert len(json.dumps(state)) * 127 / 48 < 64_000
        rest = [batch.labels.tolist() for batch in loader]
    with CurriculumLoader(Store.open(store), schedule, seed=1) as again:
        again.load_state_dict(state)
        assert [batch.labels.tolist() for batch in again] == rest


def test_the_command_line_says_what_was_taken(store, tmp_path):
    toml = tmp_path / "run.toml"
    settings = settings_of(store, tmp_path / "run", **CHANGES)
    settings["curriculum"].pop("duration_steps")
    toml.write_text(as_toml(settings))
    planned = CliRunner().invoke(main, ["plan", str(toml)])
    assert "validation decides" in planned.stderr
    assert "lengths taken: 8 from step 0, 16 from step" in CliRunner().invoke(main, ["run", str(toml)]).stdout


@pytest.mark.parametrize(
    ("changes", "seqlen"),
    [
        ({"patience": 5}, 24),
        ({"seqlen_end": 40}, 24),
        ({"seqlen_end": 16}, 16),
        ({"seqlen_multiple": 16, "seqlen_start": 16}, 16),
        ({"seqlen_start": 32}, 32),
    ],
)
def test_another_adaptive_schedule_goes_on_at_the_length_reached(store, changes, seqlen):
    given = {"seqlen_start": 8, "seqlen_end": 32, "global_batch_sequences": 3, "epochs": 1}
    first = Schedule.adaptive(**given)
    with CurriculumLoader(Store.open(store), first, seed=1) as loader:
        served = [next(loader).pieces]
        loader.change_schedule(loader.order.asked[-1][1].raised_to(24))
        served.append(next(loader).pieces)
        state = json.loads(json.dumps(loader.state_dict()))
    again = CurriculumLoader(Store.open(store), Schedule.adaptive(**{**given, **changes}), seed=1)
    again.load_state_dict(state, change_schedule=True)
    state = json.loads(json.dumps(again.state_dict()))
    rest = list(again)
    assert rest[0].seqlen == seqlen
    served += [batch.pieces for batch in rest]
    assert sum(int(pieces.length.sum()) for pieces in served) == Store.open(store).tokens
    with CurriculumLoader(Store.open(store), Schedule.adaptive(**{**given, **changes}), seed=1) as resumed:
        resumed.load_state_dict(state)
        assert [batch.seqlen for batch in resumed] == [batch.seqlen for batch in rest]


def test_an_adaptive_schedule_that_never_rose_is_at_its_own_beginning():
    given = {"seqlen_end": 32, "global_batch_sequences": 3, "epochs": 1}
    before, after = (Schedule.adaptive(seqlen_start=start, **given) for start in (24, 8))
    assert after.carried_on(before).seqlen(0) == 24
    assert before.carried_on(after).seqlen(0) == 24


def test_a_rescheduled_adaptive_run_keeps_its_length_and_follows_the_new_rule(store, tmp_path):
    folder = tmp_path / "run"
    slow = {**CHANGES, "run__checkpoint_every_steps": 2}
    half = Store.open(store).tokens // 2
    stopped = {**slow, "run__epochs": None, "run__total_tokens": half}
    before = loop.run(config_of(store, folder, **stopped), warn=lambda text: None)
    reached = before.lengths[-1][1]
    assert reached > 8
    further = {**slow, "curriculum__seqlen_end": 40, "curriculum__patience": 1}
    with pytest.raises(RunError, match="--reschedule"):
        loop.run(config_of(store, folder, **further), warn=lambda text: None)
    with pytest.raises(RunError, match="longer than the model"):
        loop.run(config_of(store, folder, **further), change_schedule=True, warn=lambda text: None)
    quick = {**slow, "curriculum__patience": 1}
    after = loop.run(config_of(store, folder, **quick), change_schedule=True, warn=lambda text: None)
    assert after.finished
    assert after.lengths[: len(before.lengths)] == before.lengths
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert lines[before.step]["seqlen"] in (reached, reached + 8)
    assert all(a["seqlen"] <= b["seqlen"] for a, b in itertools.pairwise(lines))
    assert after.tokens_seen == Store.open(store).tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen_start": 6}, "allowed: 8"),
        ({"seqlen_start": 32}, "above seqlen_end"),
        ({"patience": 0}, "patience must be positive"),
        ({"tolerance": 0.5}, "1 or more"),
        ({"degree": 2}, "degree not used"),
    ],
)
def test_odd_notches_are_refused_with_what_is_allowed(changes, message):
    given = {"seqlen_start": 8, "seqlen_end": 24, "global_batch_sequences": 1, "epochs": 1, **changes}
    with pytest.raises(ConfigError, match=message):
        Schedule.adaptive(**given)
