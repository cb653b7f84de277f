"""Tuning: the search finds the largest calm ramp in few probes, and a killed one goes on without repeating any."""

import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import program
from runs import as_toml, config_of, settings_of, tiny_store

from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from train import probe as probing_module
from train.cli import main
from train.config_file import load_config
from train.optimizer import learning_rate
from train.probe import KEPT_NAME, Probe, probing
from train.signals import StoppedEarly
from train.tune import GRID, Settings, Space, choose, cost, space_of, tune
from train.tuned import CHOSEN_NAME, PICTURE_NAME, Tuned, TuningCost, render

CALM = [(0, 5.0), (5, 4.0), (10, 3.0), (15, 2.5)]
CHEAP = {"run__validation_tokens": 32, "batch__global_batch_sequences": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def quiet(text):
    pass


class Fake:
    """Probes of a run whose least calm start and largest calm ramp are known; counts what it is asked."""

    def __init__(self, calm_start, calm_duration, warmup_steps=10):
        self.calm_start, self.calm_duration, self.warmup_steps, self.asked = (
            calm_start,
            calm_duration,
            warmup_steps,
            [],
        )

    def __call__(self, start, duration):
        self.asked.append((start, duration))
        losses = [(0, 5.0), (1, 4.0)]
        if start < self.calm_start:
            losses.append((self.warmup_steps, 4.0 + math.log(1.5)))
        if duration > self.calm_duration:
            losses.append((self.warmup_steps + 1, 4.0 + math.log(1.31)))
        return Probe(start, duration, [*losses, (30, 4.0 + math.log(1.29))], diverged=False)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True).map(sorted),
    st.integers(0, 7),
    st.data(),
)
def test_the_least_calm_start_and_the_largest_calm_ramp_are_found_in_few_probes(durations, calm_start, data):
    first = data.draw(st.integers(0, len(durations) - 1))
    calm_duration = data.draw(st.integers(0, 10**6 + 1))
    starts = [8 * 2**i for i in range(7)]
    space = Space(starts, durations, first, warmup_steps=10, probe_steps=30, every=1)
    fake = Fake(8 * 2**calm_start, calm_duration)
    found = choose(space, fake, 1.3)
    calm = [duration for duration in durations if duration <= calm_duration]
    assert found == ((8 * 2**calm_start, calm[-1]) if calm and calm_start < 7 else None)
    assert (
        len(fake.asked) == len(set(fake.asked)) <= min(calm_start + 1, 7) + math.ceil(math.log2(len(durations) + 1))
    )


@given(st.lists(st.floats(0.5, 6), min_size=1, max_size=20), st.floats(1.01, 2), st.integers(0, 20))
def test_a_fluctuation_is_a_perplexity_above_its_best_so_far(losses, threshold, until):
    seen = Probe(8, 10, list(enumerate(losses)), diverged=False)
    perplexities = [math.exp(loss) for loss in losses]
    ratios = [b / min(perplexities[: i + 1]) for i, b in enumerate(perplexities[1:])]
    near = any(abs(ratio / threshold - 1) < 1e-9 for ratio in ratios)
    assert near or seen.fluctuates(threshold) == any(ratio > threshold for ratio in ratios)
    assert near or seen.fluctuates(threshold, until) == any(ratio > threshold for ratio in ratios[:until])
    if ratios:
        worst, step = seen.worst()
        assert worst == pytest.approx(max(ratios))
        assert ratios[step - 1] == pytest.approx(worst)


def test_divergence_is_a_fluctuation_after_the_last_loss_known():
    seen = Probe(8, 10, CALM, diverged=True)
    assert seen.fluctuates(1.3)
    assert not seen.fluctuates(1.3, until=10)
    assert seen.fluctuates(1.3, until=20)
    assert seen.worst() == (math.inf, 15)
    assert not Probe(8, 10, CALM, diverged=False).fluctuates(1.3)
    assert Probe(8, 10, [*CALM, (20, math.nan)], diverged=False).fluctuates(1.3)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5))
def test_the_grid_runs_from_the_warmup_to_the_run_by_equal_factors(warmup, multiples):
    config = load_settings(optimizer__warmup_steps=warmup)
    space = space_of(config, 400, Settings(multiples=multiples))
    assert space.durations[space.first] == space.probe_steps == multiples * warmup
    assert sorted(set(space.durations)) == space.durations
    assert warmup <= space.durations[0] <= warmup * GRID + 1
    assert 400 / GRID - 1 <= space.durations[-1] <= 400
    assert space.starts == [8, 16, 32]
    assert space.probe_steps // space.every >= min(space.probe_steps, 24)


def load_settings(**changes):
    return config_of("store", "runs/a", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__warmup_steps": 0}, "a few LR warmups"),
        ({"optimizer__warmup_steps": 200}, "as long as the run"),
        ({"curriculum": {"pacing": "constant", "seqlen": 32}}, "only a ramp"),
    ],
)
def test_what_cannot_be_tuned_is_refused(changes, message):
    data = settings_of("store", "runs/a", **{k: v for k, v in changes.items() if k != "curriculum"})
    data |= {k: v for k, v in changes.items() if k == "curriculum"}
    with pytest.raises(ConfigError, match=message):
        space_of(type(load_settings()).model_validate(data), 400, Settings())


def test_a_probe_is_the_beginning_of_the_run_it_stands_for(store):
    config = config_of(store, "runs/a")
    whole = config.loader(Store.open(store)).schedule
    shape = probing(config, 16, 25, whole.total_tokens, 12)
    probed = shape.loader(Store.open(store)).schedule
    assert probed.total_steps == 12
    assert probed.max_seqlen == whole.max_seqlen
    ramp = config_of(store, "runs/a", curriculum__seqlen_start=16, curriculum__duration_steps=25).schedule()
    assert [probed.seqlen(i) for i in range(12)] == [ramp.seqlen(i) for i in range(12)]
    for step in range(12):
        seen = probed.tokens_before(step)
        rates = [
            learning_rate(c.optimizer, step, seen, s.total_tokens) for c, s in ((config, whole), (shape, probed))
        ]
        assert rates[0] == rates[1]


def test_a_probe_of_a_run_of_several_epochs_may_be_longer_than_one(store):
    config = config_of(store, "runs/a", run__total_tokens=None, run__epochs=9)
    opened = Store.open(store)
    whole = config.loader(opened).schedule
    steps = next(step for step in range(whole.total_steps) if whole.tokens_before(step) > 2 * opened.tokens)
    duration = config.curriculum.duration_steps
    probed = probing(config, config.curriculum.seqlen_start, duration, whole.total_tokens, steps)
    assert probed.loader(opened).schedule.total_steps == steps


def test_the_cost_told_beforehand_is_what_probes_cost(store, tmp_path):
    config = config_of(store, tmp_path / "run", **CHEAP)
    told = []
    tuned = tune(config, tmp_path / "tune", Settings(validations=5, most_share=100), warn=told.append)
    tokens = config.loader(Store.open(store)).schedule.total_tokens
    space = space_of(config, config.loader(Store.open(store)).schedule.total_steps, Settings(validations=5))
    likely, most = cost(config, space, tokens, Store.open(store, "validation").tokens)
    assert f"likely take {likely}; at most {most}" in told[0]
    assert tuned.cost.probes <= most.probes
    assert tuned.cost.share <= most.share
    assert likely.share <= most.share
    each = {p.duration_steps: p.tokens for p in tuned.probes}
    for probe in tuned.probes:
        shape = probing(config, probe.seqlen_start, probe.duration_steps, tokens, space.probe_steps)
        assert each[probe.duration_steps] == shape.schedule().tokens_before(space.probe_steps)
        assert [step for step, _ in probe.losses] == [*range(0, space.probe_steps, space.every), space.probe_steps]
    with pytest.raises(ConfigError, match=r"cost too much[\s\S]*most-share") as refused:
        tune(config, tmp_path / "dear", Settings(validations=5), warn=quiet)
    assert not (tmp_path / "dear").exists()
    named = float(str(refused.value).partition("--most-share ")[2].split()[0])
    assert likely.share <= named < likely.share + 0.01


def test_the_command_chooses_a_config_that_runs(store, tmp_path):
    toml, out = tmp_path / "run.toml", tmp_path / "tuned well"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run", **CHEAP)))
    command = ["tune", str(toml), "optimizer.lr=2e-3", "--out", str(out), "--most-share", "100", "--validations", "4"]
    done = CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (out / PICTURE_NAME).read_bytes()[:4] == b"\x89PNG"
    assert {probe["seqlen_start"] for probe in told["probes"]} == {8}
    assert told["seqlen_start"] == 8
    calm = [p["duration_steps"] for p in told["probes"] if not p["fluctuates"]]
    assert told["duration_steps"] == max(calm)
    chosen = load_config(out / CHOSEN_NAME)
    expected = load_config(
        toml, ["optimizer.lr=2e-3", "seqlen_start=8", f"curriculum.duration_steps={told['duration_steps']}"]
    )
    assert chosen == expected
    assert told["run_steps"] == chosen.loader(Store.open(store)).schedule.total_steps
    again = CliRunner().invoke(main, command, catch_exceptions=False)
    assert again.exit_code == 0
    assert f"ready to run: slw-train run '{out}/chosen.toml'" in again.stdout
    assert "probe:" not in again.stderr  # all are known
    other = CliRunner().invoke(main, [*command, "optimizer.lr=3e-3"])
    assert other.exit_code == 1
    assert "optimizer.lr: 0.002 there, 0.003 asked" in other.stderr


@pytest.mark.parametrize(("wild", "noted"), [([], True), ([(8, 10)], True), ([(16, 40)], False)])
def test_where_no_ramp_fluctuated_t_is_said_to_be_the_longest_that_was_tried(wild, noted):
    tried = [(8, 10), (16, 10), (16, 20), (16, 40)]
    probes = [Probe(*one, [*CALM, (20, 4.0)] if one in wild else CALM, diverged=False) for one in tried]
    chosen = max(duration for start, duration in tried if start == 16 and (start, duration) not in wild)
    tuned = Tuned("t", 16, chosen, 50, 1.3, 5, probes, TuningCost(4, 1, 1, 100), "")
    assert bool(tuned.note) == bool(tuned.to_json()["note"]) == noted
    told = render(dataclasses.replace(tuned, toml="[run]")).splitlines()
    assert [line for line in told if "longest that is tried" in line] == ([f"note: {tuned.note}"] if noted else [])
    assert ("T 40 " in str(tuned.note)) == noted
    assert all(f"{word}: " in told[0] for word in ("L_s", "T", "ratio"))
    assert "above 1.3" in told[0]


def test_diverging_probes_choose_nothing_and_say_what_to_do(store, tmp_path):
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run", **CHEAP, optimizer__lr=1e30, optimizer__clip=0.0)))
    done = CliRunner().invoke(main, ["tune", str(toml), "--most-share", "100", "--validations", "4"])
    assert done.exit_code == 1
    assert "every probe fluctuates" in done.stderr
    assert "a lower optimizer.lr" in done.stderr
    assert not (tmp_path / "run-tune" / CHOSEN_NAME).exists()
    assert (tmp_path / "run-tune" / PICTURE_NAME).exists()


def test_a_wild_start_length_is_raised(store, tmp_path, monkeypatch):
    ran = []

    def faked(config, warn):
        ran.append((config.curriculum.seqlen_start, config.curriculum.duration_steps))
        config.run.dir.mkdir(parents=True)
        rise = 2.0 if config.curriculum.seqlen_start < 32 else 0.0
        lines = [{"step": 0, "validation_loss": 4.0}, {"step": 3, "validation_loss": 4.0 + rise}]
        (config.run.dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return type("Outcome", (), {"finished": True})

    monkeypatch.setattr(probing_module, "run", faked)
    tuned = tune(config_of(store, tmp_path / "run"), tmp_path / "t", Settings(most_share=100), warn=quiet)
    assert (tuned.seqlen_start, ran[:3]) == (32, [(8, 15), (16, 15), (32, 15)])
    assert tuned.duration_steps == max(duration for start, duration in ran if start == 32)


def test_killed_and_run_again_goes_on_and_repeats_no_finished_probe(store, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    config = tmp_path / "run.toml"
    config.write_text(as_toml(settings_of(store, tmp_path / "run", **CHEAP)))
    chosen = Settings(validations=4, most_share=100)
    expected = tune(load_config(config), whole, chosen, warn=quiet)
    code = f"""
import os, signal
from pathlib import Path
from train import loop, tune
from train.config_file import load_config
update, left = loop.Run.update, int(os.environ["LEFT"])
def updated(self, batch):
    global left
    left -= 1
    if left < 0:
        self.saver.wait()
        os.kill(os.getpid(), signal.SIGKILL)
    print(self.config.run.dir.name, batch.step, flush=True)
    return update(self, batch)
loop.Run.update = updated
settings = tune.Settings(validations=4, most_share=100)
tune.tune(load_config(Path({str(config)!r})), Path({str(killed)!r}), settings, warn=lambda text: None)
"""
    steps = []
    for left in (20, 11, 10**6):  # in the second probe; in what is left of it or in the third; never
        done = program(code, folder=tmp_path, environment={"LEFT": str(left)})
        assert done.returncode == (0 if left == 10**6 else -signal.SIGKILL), done.stderr
        steps += done.stdout.splitlines()
    kept, undisturbed = (json.loads((folder / KEPT_NAME).read_bytes()) for folder in (killed, whole))
    assert kept == undisturbed
    assert len(expected.probes) > 2
    first = [line for line in steps if line.split()[0] == steps[0].split()[0]]
    assert first == list(dict.fromkeys(first))  # finished before the first kill: no step of it again
    assert len(steps) - len(set(steps)) <= 2 * 4  # a kill costs what came after the last checkpoint
    assert sorted(path.name for path in killed.iterdir()) == [KEPT_NAME]


def test_a_failure_that_is_no_divergence_is_not_a_verdict(store, tmp_path, monkeypatch):
    def fails(config, warn):
        raise RunError("cannot write a checkpoint")

    monkeypatch.setattr(probing_module, "run", fails)
    with pytest.raises(RunError, match="cannot write"):
        tune(config_of(store, tmp_path / "run"), tmp_path / "t", Settings(most_share=100), warn=quiet)
    assert not (tmp_path / "t" / KEPT_NAME).exists()


def test_a_folder_that_cannot_be_made_is_an_error(store, tmp_path):
    (tmp_path / "t").write_text("a file")
    with pytest.raises(RunError, match="cannot write here"):
        tune(config_of(store, tmp_path / "run"), tmp_path / "t", Settings(most_share=100), warn=quiet)


@pytest.mark.parametrize("early", [False, True])
def test_a_tuning_stopped_by_a_signal_says_so(store, tmp_path, monkeypatch, early):
    def stopped(config, warn):
        if early:  # before the first step of a probe
            raise StoppedEarly("SIGINT")
        return SimpleNamespace(finished=False)

    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, tmp_path / "run")))
    monkeypatch.setattr(probing_module, "run", stopped)
    done = CliRunner().invoke(main, ["tune", str(toml), "--most-share", "100"])
    assert done.exit_code == 75
    assert "the same command goes on" in done.stderr
