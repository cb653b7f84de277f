"""DeepSpeed configs: the same length at every step as its scheduler gives, and its defects refused."""

import json
import math
import os
import warnings

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import as_toml, tiny_store

from curriculum.deepspeed import METRIC, translate
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.reader import Store
from train.cli import main
from train.config_file import load_config


class Twin:
    """DeepSpeed's scheduler, written from its rule; slow and obvious."""

    def __init__(self, config):
        self.config, self.now = config, config["min_difficulty"]

    def update_difficulty(self, step):
        if self.now < self.config["max_difficulty"]:
            self.now = self.at(step)
        return self.now

    def at(self, step):
        low, high, details = (self.config[k] for k in ("min_difficulty", "max_difficulty", "schedule_config"))
        if self.config["schedule_type"] == "fixed_discrete":
            for seqlen, last in zip(details["difficulty"], details["max_step"], strict=False):
                if step <= last:
                    return seqlen
            return details["difficulty"][-1]
        degree = details.get("root_degree", 1)
        value = math.floor((float(step) / details["total_curriculum_step"]) ** (1.0 / degree) * (high - low) + low)
        return min(value - value % details["difficulty_step"], high)


def schedulers():
    yield Twin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
        except ImportError:
            return
    yield CurriculumScheduler


def ramp(low, high, duration, multiple, degree=None):
    details = {"total_curriculum_step": duration, "difficulty_step": multiple}
    if degree is not None:
        details["root_degree"] = degree
    return {
        "curriculum_type": "seqlen",
        "min_difficulty": low,
        "max_difficulty": high,
        "schedule_type": "fixed_linear" if degree is None else "fixed_root",
        "schedule_config": details,
    }


def discrete(high, seqlens, ends):
    details = {"difficulty": seqlens, "max_step": ends}
    return {
        "min_difficulty": min(seqlens),
        "max_difficulty": high,
        "schedule_type": "fixed_discrete",
        "schedule_config": details,
    }


def legacy(schedule):
    return {"train_batch_size": 4, "curriculum_learning": {"enabled": True, **schedule}}


def assert_equal(schedule, steps):
    ours = Schedule.from_deepspeed(legacy(schedule), total_tokens=10**9)
    for make in schedulers():
        theirs = make({**schedule, "schedule_config": dict(schedule["schedule_config"])})
        wanted = [theirs.update_difficulty(step + 1) for step in range(steps)]
        assert [ours.seqlen(step) for step in range(steps)] == wanted
    assert ours.sequences(0) == 4
    return ours


DEGREE = st.one_of(st.none(), st.integers(1, 5), st.floats(0.3, 4.0))


@settings(max_examples=200)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 9), st.integers(1, 400), st.integers(1, 10), DEGREE)
def test_ramps_equal_deepspeeds_at_every_step(more, low, uneven, duration, multiple, degree):
    least = low * multiple + uneven % multiple  # a minimum that is no multiple is rounded down, as there
    most = (low + 1 + more) * multiple
    assert_equal(ramp(least, most, duration, multiple, degree), duration + 5)


@given(st.lists(st.integers(1, 99), min_size=2, max_size=6, unique=True), st.data())
def test_discrete_schedules_equal_deepspeeds_at_every_step(seqlens, data):
    count = len(seqlens) - 1
    ends = sorted(data.draw(st.lists(st.integers(1, 60), min_size=count, max_size=count, unique=True)))
    assert_equal(discrete(100, seqlens, ends), 70)
    assert_equal(discrete(max(seqlens), sorted(seqlens), ends), 70)


def test_the_real_scheduler_agrees_where_it_is_installed():
    # DS_BUILD_OPS=0 pip install --no-deps deepspeed==0.19.3 einops hjson msgpack py-cpuinfo ninja
    pytest.importorskip("deepspeed", exc_type=ImportError)
    assert len(list(schedulers())) == 2
    for duration in (60_000, 1000, 4800):
        assert_equal(ramp(8, 1024, duration, 8), duration + 5)


def test_the_published_config_becomes_the_published_schedule():
    ours = assert_equal(ramp(8, 1024, 60_000, 8), 61_000)
    assert 'pacing = "linear"' in ours.to_toml()
    assert "global_batch_sequences = 4" in ours.to_toml()


def test_a_tie_that_doubles_miss_becomes_a_table():
    late = [d for d in range(1, 200) if any(math.floor(s / d * d + 1) < s + 1 for s in range(1, d))]
    assert late
    for duration in late[:5]:
        ours = assert_equal(ramp(1, 1 + duration, duration, 1), duration + 5)
        assert ours.settings["curriculum"]["pacing"] == "table"


def test_both_places_and_files_are_read(tmp_path):
    schedule = ramp(8, 64, 50, 8)
    nested = {
        "data_efficiency": {
            "enabled": True,
            "data_sampling": {
                "enabled": True,
                "curriculum_learning": {
                    "enabled": True,
                    "curriculum_metrics": {"seqlen": {"difficulty_type": "value", **schedule}},
                },
            },
        },
    }
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(nested))
    batch = {"global_batch_tokens": 128, "total_tokens": 9}
    assert Schedule.from_deepspeed(path, **batch) == Schedule.from_deepspeed(legacy(schedule), **batch)
    sampling = nested["data_efficiency"]["data_sampling"]
    sampling["curriculum_learning"]["curriculum_metrics"]["vocabularyrarity"] = {"min_difficulty": 1}
    nested["data_efficiency"]["data_routing"] = {"enabled": True, "random_ltd": {"enabled": True}}
    nested["fp16"] = {"enabled": True}
    assert translate(nested)[2] == ["fp16", "data_efficiency.data_routing", f"{METRIC}.vocabularyrarity"]
    for switched in (sampling["curriculum_learning"], sampling):
        del switched["enabled"]  # off is DeepSpeed's default
        with pytest.raises(ConfigError, match="switched off"):
            Schedule.from_deepspeed(nested, **batch)
        switched["enabled"] = True
    nested["data_efficiency"]["enabled"] = False
    with pytest.raises(ConfigError, match="switched off"):
        Schedule.from_deepspeed(nested, **batch)
    automatic = {**legacy(ramp(8, 64, 50, 8)), "train_batch_size": "auto"}
    with pytest.raises(ConfigError, match="exactly one of global_batch"):
        Schedule.from_deepspeed(automatic, total_tokens=9)
    with pytest.raises(ConfigError, match="exactly one of global_batch"):
        Schedule.from_deepspeed(path, total_tokens=9)
    with pytest.raises(ConfigError, match="train_batch_size must be a positive integer"):
        Schedule.from_deepspeed({**legacy(ramp(8, 64, 50, 8)), "train_batch_size": 4.0}, total_tokens=9)
    sampling["curriculum_learning"]["curriculum_metrics"]["seqlen"] = 64
    nested["data_efficiency"]["enabled"] = True
    with pytest.raises(ConfigError, match="an object is wanted here"):
        Schedule.from_deepspeed(nested, **batch)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"is not JSON\n.*ds_config\.json"):
        Schedule.from_deepspeed(path, **batch)
    with pytest.raises(ConfigError, match=r"cannot read .*\n.*gone\.json\n  found:   No such file or directory$"):
        Schedule.from_deepspeed(tmp_path / "gone.json", **batch)


def test_stages_of_one_length_that_is_least_and_most_are_that_length():
    schedule = Schedule.from_deepspeed(legacy(discrete(8, [8, 8], [5])), total_tokens=9)
    assert [schedule.seqlen(step) for step in (0, 5, 9)] == [8] * 3


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ramp(4, 64, 50, 8), "length of 0"),
        (ramp(16, 1000, 50, 16), "992 or 1008"),
        (ramp(64, 8, 50, 8), "for ever"),
        (ramp(8, 64, 0, 8), "total_curriculum_step must be a positive"),
        (ramp("8", 64, 50, 8), "min_difficulty must be a positive integer\n.*\n  found:   '8'"),
        (ramp(8, 64, 50, 8, 0), "root_degree must be a positive number"),
        (discrete(32, [8, 32, 16], [5, 9]), r"never used[\s\S]*staged"),
        (discrete(8, [8, 16], [5]), "never leaves"),
        (discrete(64, [8, 16, 32], [5]), "one entry shorter"),
        (discrete(64, [8, 16, 32], [5, 5]), "must increase"),
        ({**ramp(8, 64, 50, 8), "schedule_type": "custom"}, "from_function"),
        ({**ramp(8, 64, 50, 8), "schedule_type": "cubic"}, "fixed_root"),
        ({**ramp(8, 64, 50, 8), "curriculum_type": "vocab"}, r"found:   'vocab'\n  allowed: \"seqlen\""),
        ({"curriculum_type": "seqlen"}, "schedule_type is missing"),
        ({**ramp(8, 64, 50, 8), "schedule_type": ["fixed_linear"]}, "unknown schedule_type"),
        (
            {**ramp(8, 64, 50, 8), "schedule_config": 50},
            r"an object is wanted here\n.*schedule_config\n  found:   50",
        ),
        (ramp(8, 64, 50, 8, math.nan), "root_degree must be a positive number"),
    ],
)
def test_what_deepspeed_gets_wrong_is_refused_with_the_reason(schedule, message):
    with pytest.raises(ConfigError, match=message):
        Schedule.from_deepspeed(legacy(schedule), total_tokens=9)


def test_a_config_without_a_curriculum_says_where_it_would_be():
    with pytest.raises(ConfigError, match=r"curriculum_metrics\.seqlen"):
        Schedule.from_deepspeed({"train_batch_size": 8}, total_tokens=9)
    percentile = {"seqlen": {"difficulty_type": "percentile", **ramp(1, 100, 50, 1)}}
    on = {"enabled": True}
    nested = {**on, "data_sampling": {**on, "curriculum_learning": {**on, "curriculum_metrics": percentile}}}
    with pytest.raises(ConfigError, match="percentiles"):
        Schedule.from_deepspeed({"data_efficiency": nested}, global_batch_sequences=1, total_tokens=9)


def test_the_printed_toml_is_a_run_of_the_same_schedule(tmp_path):
    store = tiny_store(tmp_path / "store")
    config, toml = tmp_path / "ds_config.json", tmp_path / "run.toml"
    config.write_text(json.dumps(legacy(ramp(8, 32, 20, 8))))
    text = CliRunner().invoke(main, ["plan", "--deepspeed", str(config)]).stdout
    run = {"run": {"dir": str(tmp_path / "run"), "epochs": 1}}
    toml.write_text(f"{as_toml({'store': str(store), **run})}\n{text}")
    wanted = Schedule.from_deepspeed(config, epochs=1)
    assert load_config(toml).schedule() == wanted
    planned = CliRunner().invoke(main, ["plan", str(toml), "--deepspeed", str(config), "--json"])
    assert json.loads(planned.stdout)["total_steps"] == wanted.resolve(Store.open(store).tokens).total_steps
    toml.write_text(as_toml({"store": str(store), "batch": {"global_batch_tokens": 4096}, **run}))
    theirs, ours = (
        CliRunner().invoke(main, ["plan", str(toml), "--deepspeed", str(config), "--json", *override])
        for override in ([], ["batch.global_batch_sequences=2"])
    )
    assert [json.loads(told.stdout)["rows"][0]["sequences_first"] for told in (theirs, ours)] == [4, 2]
    alone = CliRunner().invoke(main, ["plan", "--deepspeed", str(config), "--json"])
    assert json.loads(alone.stdout)["batch"] == {"global_batch_sequences": 4}
    assert CliRunner().invoke(main, ["plan"]).exit_code == 2


def test_the_command_names_what_it_does_not_take_over(tmp_path):
    config = tmp_path / "ds_config.json"
    config.write_text(json.dumps({**legacy(ramp(8, 32, 20, 8)), "optimizer": {}, "train_batch_size": "auto"}))
    told = CliRunner().invoke(main, ["plan", "--deepspeed", str(config)])
    assert told.stderr.splitlines()[0].endswith("ds_config.json: optimizer")
    assert "set batch.global_batch_sequences" in told.stderr
    misspelt = {**ramp(8, 32, 20, 8, 2), "schedule_type": "fixed_linear", "max_dificulty": 64}
    assert translate(legacy(misspelt))[2] == ["max_dificulty", "schedule_config.root_degree"]
    config.write_text(json.dumps(legacy(ramp(8, 32, 20, 8))))
    assert CliRunner().invoke(main, ["plan", "--deepspeed", str(config)]).stderr == ""


def test_the_config_may_be_a_pipe_which_is_read_once():
    reader, writer = os.pipe()
    os.write(writer, json.dumps({**legacy(ramp(8, 32, 20, 8)), "optimizer": {}}).encode())
    os.close(writer)
    told = CliRunner().invoke(main, ["plan", "--deepspeed", f"/dev/fd/{reader}", "--json"])
    os.close(reader)
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["curriculum"]["pacing"] == "linear"
    assert "optimizer" in told.stderr
