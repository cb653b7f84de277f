"""scripts/study.py: every run once whatever is cut off, divergence is a result, and tables of plain arithmetic."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import as_toml, settings_of, tiny_store

from pipeline.errors import ConfigError
from train.config_file import load_config
from train.config_layers import read_layers

ROOT = Path(__file__).parents[1]
ARMS = sorted(path for path in (ROOT / "experiments").rglob("*.toml") if path.stem != "base")


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("study")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny store and arms."""
    place = tmp_path_factory.mktemp("place")
    tiny_store(place / "store")
    text = as_toml(settings_of("none", "none", run__validate_every_steps=100))
    (place / "grow.toml").write_text(text)
    (place / "cut.toml").write_text('base = "grow.toml"\n[curriculum]\ndealing = "truncate"\n')
    (place / "other").mkdir()
    (place / "other/grow.toml").write_text(text.replace("warmup_steps = 5", "warmup_steps = 6"))
    return place


def call(out, *arguments, status=0):
    command = [sys.executable, ROOT / "scripts/study.py", "--out", out, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def results_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def of_arms(place, *arms):
    return ["--store", place / "store", "--arms", ",".join(str(place / f"{arm}.toml") for arm in arms)]


@pytest.fixture(scope="module")
def done(place):
    """The folder of an undisturbed study: two arms at two learning rates."""
    call(place / "done", *of_arms(place, "grow", "cut"), "--lrs", "1e-3,1e30", "--seeds", "1", "--workers", "2")
    return place / "done"


def test_a_study_cut_off_goes_on_and_runs_nothing_twice(place, done, tmp_path):
    first = results_of(done)
    assert sorted((Path(r["arm"]).stem, r["lr"]) for r in first) == [
        ("cut", 1e-3),
        ("cut", 1e30),
        ("grow", 1e-3),
        ("grow", 1e30),
    ]
    assert {(r["lr"], r["status"], r["validation_loss"] is None) for r in first} == {
        (1e-3, "finished", False),
        (1e30, "not finite", True),
    }
    out = shutil.copytree(done, tmp_path / "out")
    kept, cut = first[:3], json.dumps(first[3])
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept) + cut[: len(cut) // 2])
    rest = ["--lrs", "1e-3,1e30", "--seeds", "1"]
    gone_on = call(out, *of_arms(place, "grow", "cut"), *rest, "--workers", "1", "--json")
    assert gone_on.stderr.count("/4 ") == 1
    again = results_of(out)
    assert again[:3] == kept
    apart = ("seconds", "error", "run")
    timeless = [{k: v for k, v in r.items() if k not in apart} for r in (first[3], again[3])]
    assert timeless[0] == timeless[1]
    summary = json.loads(gone_on.stdout)
    assert {name: (arm["best_lr"], arm["largest_lr"]) for name, arm in summary["arms"].items()} == {
        "grow": (1e-3, 1e-3),
        "cut": (1e-3, 1e-3),
    }
    assert json.loads((out / "table.json").read_text()) == summary
    assert "1 of 1 failed" in (out / "table.md").read_text()
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    changed = call(out, *of_arms(place, "other/grow", "cut"), *rest, status=2)
    assert "warmup_steps: 5 there, 6 asked" in changed.stderr


def test_a_killed_study_leaves_no_process_and_its_run_ends_as_if_undisturbed(place, done, tmp_path):
    asked = [*of_arms(place, "grow"), "--lrs", "1e-3", "--seeds", "1"]
    (tmp_path / "waits.py").write_text(WAITS)
    command = [str(part) for part in (sys.executable, tmp_path / "waits.py", "--out", tmp_path / "out", *asked)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{os.environ.get('PYTHONPATH', '')}"}
    study = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: (tmp_path / "midway").exists() or study.poll() is not None)
    assert study.poll() is None
    study.kill()
    study.wait()
    wait_for(lambda: not alive(study.pid))
    assert results_of(tmp_path / "out") == []
    assert "going on after step" in call(tmp_path / "out", *asked).stderr
    (again,) = results_of(tmp_path / "out")
    (whole,) = (r for r in results_of(done) if (r["arm"], r["lr"]) == (again["arm"], again["lr"]))
    apart = ("seconds", "run", "settings")
    assert {k: v for k, v in again.items() if k not in apart} == {k: v for k, v in whole.items() if k not in apart}


WAITS = """
import sys, time
from pathlib import Path
import study

train_one = study.train_one

def waits(job):
    from train import loop
    update = loop.Run.update
    def updated(self, batch):
        if batch.step == 12:
            self.saver.wait()
            Path("midway").touch()
            time.sleep(600)
        return update(self, batch)
    loop.Run.update = updated
    return train_one(job)

study.train_one = waits
if __name__ == "__main__":
    sys.exit(study.main())
"""
"""A study whose run goes no further than its checkpoint of step 7."""


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited for five minutes")


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_of_a_study_is_that_of_the_same_command(study, place):
    job = {"arm": str(place / "grow.toml"), "lr": 2e-3, "seed": 3, "store": str(place / "store"), "set": ["clip=0.5"]}
    config = study.load({**job, "out": str(place)})
    same = ["store=" + job["store"], "optimizer.lr=2e-3", "run.seed=3", "clip=0.5", f"run.dir={config.run.dir}"]
    assert config == load_config(place / "grow.toml", same)
    assert study.load({**job, "out": "x", "lr": 1e-3}).run.dir != study.load({**job, "out": "x"}).run.dir
    changed = {**job, "out": "x", "arm": f"{place / 'grow.toml'}+optimizer.eps=1e+3+model.width=48"}
    assert study.arm_of(changed) == study.arm_of({"arm": "grow+optimizer.eps=1e+3+model.width=48"})
    config = study.load(changed)
    same = ["optimizer.eps=1e+3", "width=48", "store=" + job["store"], "optimizer.lr=2e-3", "run.seed=3", "clip=0.5"]
    assert config == load_config(place / "grow.toml", [*same, f"run.dir={config.run.dir}"])
    assert config.run.dir.parts[2] == study.arm_of(changed)
    assert study.parts_of("c++/a.toml+clip=1e+3+mixture.web-2.weight=1") == [
        "c++/a.toml",
        "clip=1e+3",
        "mixture.web-2.weight=1",
    ]
    with pytest.raises(ConfigError, match=r"no such arm[\s\S]*batch-warmup, constant"):
        study.load({**job, "out": "x", "arm": "slw2"})


def test_mistakes_end_in_a_message(place, tmp_path):
    assert "no result yet" in call(tmp_path, "--report", status=1).stderr
    assert "give --store" in call(tmp_path, status=2).stderr
    assert "no such arm" in call(tmp_path, "--store", place / "store", "--arms", "nothing", status=2).stderr


def result(arm, lr, seed, loss, spikes=0):
    known = {"loss_ratio_max": 1.5, "loss_ratio_overall_max": 1.7, "variance_max": 0.1, "seconds": 2.0, "tokens": 9}
    known |= {"steps": 20, "spikes": {"1.2": spikes}}
    status = "finished" if loss is not None else "not finite"
    return {"arm": arm, "lr": lr, "seed": seed, "validation_loss": loss, "status": status, **known}


def test_the_summary_is_plain_arithmetic(study):
    losses = {("a", 0.1): [2.0, 2.2], ("a", 0.2): [1.9, 2.9], ("b", 0.1): [1.8, 2.1], ("b", 0.2): [2.3, None]}
    results = [result(arm, lr, seed, loss) for (arm, lr), row in losses.items() for seed, loss in enumerate(row)]
    summary = study.study_report.summarise(results, 0.5)
    a, b = summary["arms"]["a"], summary["arms"]["b"]
    assert math.isclose(a["limit"], 2.1 + 0.5)
    assert [row["failed"] for row in a["rates"]] == [0, 1]
    assert [row["failed"] for row in b["rates"]] == [0, 1]
    assert (a["best_lr"], a["largest_lr"], b["best_lr"]) == (0.1, 0.1, 0.1)
    assert summary["references"] == ["a"] and a["less"] == {"a": None}
    assert math.isclose(b["less"]["a"]["mean"], ((1.8 - 2.0) + (2.1 - 2.2)) / 2)
    assert math.isclose(b["less"]["a"]["p"], 1 - 2 / math.pi * math.atan(3), rel_tol=1e-6)  # t = 0.15 / 0.05
    half = 12.7062 * 0.15 * math.sqrt(2) / math.sqrt(2)  # t(0.975, 1) * s / sqrt(2), s = 0.3 / sqrt(2)
    assert math.isclose(b["rates"][0]["validation_loss"]["half"], half, rel_tol=1e-4)
    assert b["rates"][1]["validation_loss"] == {"mean": 2.3, "half": None, "n": 1}
    flat = [result("c", lr, 1, loss) for lr, loss in ((0.1, 9.0), (0.2, 3.0), (0.3, 3.4), (0.4, 3.6))]
    slow = study.study_report.summarise(flat, 0.5)["arms"]["c"]
    assert [row["failed"] for row in slow["rates"]] == [0, 0, 0, 1]  # a rate too small to get far has not failed
    assert (slow["best_lr"], slow["largest_lr"]) == (0.2, 0.3)
    luck = [result("d", lr, 1, loss) for lr, loss in ((0.1, 3.0), (0.2, 4.0), (0.3, 3.1))]
    assert study.study_report.summarise(luck, 0.5)["arms"]["d"]["largest_lr"] == 0.1  # a lucky seed beyond a failure
    wide = study.study_report.summarise(results, 5.0)["arms"]
    assert (wide["a"]["largest_lr"], wide["b"]["largest_lr"]) == (0.2, 0.1)


def test_every_arm_is_compared_seed_by_seed_with_the_first_and_with_slw_and_its_control(study):
    losses = {"constant": [2.0, 3.0, 4.0], "slw": [1.9, 2.91, 3.89], "batch-warmup": [1.8, 3.1, 4.2], "other": [1.0]}
    results = [
        result(arm, 0.1, seed, loss, spikes=seed) for arm, row in losses.items() for seed, loss in enumerate(row)
    ]
    summary = study.study_report.summarise(results, 0.5)
    assert summary["references"] == ["constant", "slw", "batch-warmup"]
    less = {name: arm["less"] for name, arm in summary["arms"].items()}
    assert less["slw"]["constant"]["p"] < 0.01  # the seeds scatter by a nat, the differences by a hundredth
    assert math.isclose(less["slw"]["constant"]["mean"], -0.1) and less["slw"]["slw"] is None
    assert less["batch-warmup"]["constant"]["p"] > 0.05
    assert less["other"]["slw"] == {"mean": pytest.approx(-0.9), "half": None, "n": 1, "p": None, "p_holm": None}
    # three questions: of each two of the three arms with seeds in common
    assert less["slw"]["constant"]["p_holm"] == 3 * less["slw"]["constant"]["p"] == less["constant"]["slw"]["p_holm"]
    assert math.isclose(summary["arms"]["slw"]["rates"][0]["spike_share"]["mean"], 0.05)
    table = study.study_report.as_markdown(summary)
    marked = [cell for line in table.splitlines() for cell in line.split(" | ") if cell.startswith("**")]
    assert [cell[:10] for cell in marked] == ["**+0.100 ±", "**-0.100 ±"]
    assert "1.50, 1.70 (5.0 %)" in table
    wavering = {"constant": [2.0, 2.0, 2.0], "slw": [1.9, 1.93, 1.88], "batch-warmup": [1.9, 1.84, 2.0]}
    results = [result(arm, 0.1, seed, loss) for arm, row in wavering.items() for seed, loss in enumerate(row)]
    results += [result("other", 0.1, seed, loss) for seed, loss in enumerate([1.97, 1.96, 1.975])]
    table = study.study_report.as_markdown(study.study_report.summarise(results, 0.5))
    (row,) = [line for line in table.splitlines() if line.startswith("| other | 0.1")]
    assert row.split(" | ")[3].startswith("*-0.032 ±")  # p = 0.02, of six


@pytest.mark.parametrize("path", ARMS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_arm_has_the_same_tokens_validation_and_warmup_tokens(path):
    arm, (base, _) = load_config(path), read_layers(path.with_name("base.toml"))
    rows = base["batch"]["global_batch_sequences"]
    longest = load_config(path.with_name("constant.toml")).schedule().max_seqlen
    assert arm.run.model_dump(exclude_unset=True, mode="json") == base["run"]
    schedule = arm.schedule()
    assert schedule.max_seqlen == longest
    first = schedule.phases[0] if schedule.phases else None
    tokens = first.seqlen * rows if first else arm.batch.global_batch_tokens  # as many sequences, or tokens
    if path.stem == "constant-long-warmup":
        slw = load_config(path.with_name("slw.toml"))
        warmup = slw.schedule().tokens_before(slw.optimizer.warmup_steps)
        assert abs(arm.optimizer.warmup_steps * tokens - warmup) < 2 * tokens
    elif path.stem == "batch-warmup":
        slw = load_config(path.with_name("slw.toml"))
        assert arm.optimizer == slw.optimizer
        assert arm.schedule().total_steps == slw.schedule().total_steps
    else:
        assert arm.optimizer.warmup_steps * tokens == base["optimizer"]["warmup_steps"] * rows * longest
