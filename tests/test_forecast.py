"""The forecast: what it says of shapes, rates and FLOPs is what a run of the same config does."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from runs import as_toml, config_of, settings_of, tiny_store

from curriculum.loader import CurriculumLoader
from curriculum.plan import render
from curriculum.resolve import check_first_batch
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.reader import Store
from train.cli import main
from train.config_file import parse_config
from train.data import micro_batches
from train.forecast import forecast, render_forecast
from train.loop import run
from train.metrics import read_metrics
from train.model import GPT2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store") / "store")


def test_landmarks_are_the_rates_of_the_run(store, tmp_path):
    config = config_of(store, tmp_path / "run")
    _, what = forecast(config)
    run(config, warn=lambda text: None)
    lines = {line["step"] - 1: line for line in read_metrics(tmp_path / "run") if "lr" in line}
    names = [mark.name for mark in what.landmarks]
    assert names == ["first step", "end of the LR warmup", "end of the ramp", "half of the tokens", "last step"]
    for mark in what.landmarks:
        line = lines[mark.step]
        assert (line["lr"], line["seqlen"]) == (pytest.approx(mark.lr), mark.seqlen)
        assert mark.step == 0 or lines[mark.step - 1]["tokens_seen"] == mark.tokens_before
    assert len(lines) == what.plan.total_steps
    assert lines[max(lines)]["tokens_seen"] == what.plan.ledger.targets
    _, warmup, ramp, half, _ = (mark.step for mark in what.landmarks)
    assert lines[warmup - 1]["lr"] < lines[warmup]["lr"] >= lines[warmup + 1]["lr"]
    assert lines[ramp - 1]["seqlen"] < lines[ramp]["seqlen"] == 32
    assert lines[half - 2]["tokens_seen"] < what.plan.total_tokens / 2 <= lines[half - 1]["tokens_seen"]
    whole = config_of(store, tmp_path / "run", optimizer__warmup_steps=what.plan.total_steps)
    assert [(m.name, m.step) for m in forecast(whole)[1].landmarks][-2] == ("end of the LR warmup", len(lines) - 1)
    assert "note" not in render_forecast(forecast(whole)[1])


def test_a_run_that_ends_in_its_ramp_or_its_warmup_has_no_end_of_either(store, tmp_path):
    slow = config_of(store, tmp_path / "run", optimizer__warmup_steps=5000, curriculum__duration_steps=1000)
    _, what = forecast(slow, rehearsed=False)
    assert [mark.name for mark in what.landmarks] == ["first step", "half of the tokens", "last step"]
    note = f"the run ends in the warmup: warmup_steps = 5,000, the run has {what.plan.total_steps:,} steps"
    assert note in render_forecast(what)


def test_a_run_of_one_step_has_no_landmark_behind_it(store, tmp_path):
    config = config_of(store, tmp_path / "run", run__total_tokens=1, run__epochs=None)
    _, what = forecast(config)
    assert what.plan.total_steps == 1 and {mark.step for mark in what.landmarks} == {0}
    text = render(what.plan) + render_forecast(what)
    assert "\n1 step, " in text and ", 1 length\n" in text and "\n1 shape of" in text


def test_a_plan_does_not_wait_for_torchs_compiler(store, tmp_path):
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run")))
    code = (
        "import sys; from train.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(tmp_path / "run.toml")], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_shapes_are_those_that_the_trainer_forms(store, tmp_path):
    config = config_of(store, tmp_path / "run", batch__global_batch_sequences=5)
    _, what = forecast(config, rehearsed=False)
    seen = set()
    with CurriculumLoader(Store.open(store), config.schedule(), seed=1) as loader:
        for batch in loader:
            for ids, *_ in micro_batches(batch, config.batch.micro_batch_tokens, torch.device("cpu")):
                seen.add(tuple(ids.shape))
    assert set(what.cost.shapes) == seen
    assert len(what.cost.shapes) == len(seen) > 4


def test_flops_are_those_of_the_formula(store, tmp_path):
    config = config_of(store, tmp_path / "run")
    _, what = forecast(config, tflops=2.0)
    opened = Store.open(store)
    model = GPT2(config.model, opened.manifest.vocab_size, 32)
    count = sum(p.numel() for n, p in model.named_parameters() if "positions" not in n)
    assert what.cost.parameters == count
    flops = attention = apart = 0
    with CurriculumLoader(opened, config.schedule(), seed=1) as loader:
        for batch in loader:
            each = 12 * 2 * 32  # layers, width
            flops += batch.labels.size * (6 * count + each * batch.seqlen)
            attention += each * batch.labels.size * batch.seqlen
            apart += each * sum(n * n for n in batch.pieces.length.tolist())
    assert (what.cost.flops, what.cost.attention_flops) == (flops, attention)
    assert what.cost.attention_flops_documents == apart < attention
    assert what.cost.hours == pytest.approx(flops / 2e12 / 3600)
    settings = settings_of(store, tmp_path / "run")
    settings["curriculum"] = {"pacing": "skyladder", "seqlen": 32, "attention_window_start": 8, "duration_steps": 9}
    ladder = parse_config(settings, where="test")
    schedule, seen = forecast(ladder)
    assert seen.cost.flops == 6 * count * seen.plan.total_tokens + seen.cost.attention_flops
    reach = [schedule.attention_window(step) or 32 for step in range(schedule.total_steps)]
    assert seen.cost.attention_flops == 12 * 2 * 32 * 3 * 32 * sum(reach) < seen.plan.total_tokens * 32 * each
    causal = config_of(store, tmp_path / "run", model__mask="causal")
    assert forecast(causal)[1].cost.attention_flops_documents is None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"curriculum__pacing": "constant", "curriculum__seqlen": 16},
        {"curriculum__control": "batch_warmup"},
        {"curriculum__pacing": "table", "curriculum__table": [[i, 8 + 8 * (i % 3)] for i in range(40)]},
    ],
    ids=["linear", "constant", "batch_warmup", "turns"],
)
def test_every_kind_of_schedule_is_told_and_drawn(store, tmp_path, changes):
    settings = settings_of(store, tmp_path / "run", **changes)
    if "curriculum__pacing" in changes:
        settings["curriculum"] = {key.split("__")[1]: value for key, value in changes.items()}
    (tmp_path / "run.toml").write_text(as_toml(settings))
    command = ["plan", str(tmp_path / "run.toml"), "--plot", str(tmp_path / "plan.png")]
    done = CliRunner().invoke(main, [*command, "--tflops", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "hours at 1 TFLOP/s" in done.output
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    done = CliRunner().invoke(main, [*command[:2], "--json", "--quick"])
    told = json.loads(done.stdout)
    assert told["ledger"] is None
    assert sum(row["steps"] for row in told["rows"]) == told["total_steps"]
    assert told["landmarks"][-1]["step"] == told["total_steps"] - 1


def test_a_picture_that_cannot_be_written_is_an_error(store, tmp_path):
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run")))
    for out, status, what in (
        ("plan.what", 2, "not a kind of picture"),
        ("run.toml/plan.png", 1, "cannot write"),
    ):
        done = CliRunner().invoke(main, ["plan", str(tmp_path / "run.toml"), "--plot", str(tmp_path / out)])
        assert done.exit_code == status
        assert what in done.output


def test_a_run_longer_than_its_data_is_refused(store, tmp_path):
    config = config_of(store, tmp_path / "run", run__epochs=None, run__total_tokens=10**6)
    with pytest.raises(ConfigError, match="longer than the data"):
        forecast(config)


def test_a_batch_that_holds_more_than_the_data_is_refused(store, tmp_path):
    too_many = Store.open(store).tokens // 8 + 1  # sequences of 8, the first length

    def config(sequences, **end):
        return config_of(store, tmp_path / "run", batch__global_batch_sequences=sequences, **end)

    for end in ({}, {"run__epochs": None, "run__total_tokens": 8}):
        with pytest.raises(ConfigError, match="more than all the data"):
            run(config(too_many, **end), warn=print)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*"))
    assert forecast(config(too_many - 2))[1].plan.total_steps > 1
    assert forecast(config(too_many, run__epochs=2))[1].plan.total_steps > 1
    check_first_batch(Schedule.constant(seqlen=99, global_batch_sequences=1, total_tokens=99), 99)  # all of it
