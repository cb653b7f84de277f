"""Configs: overrides reach their key, and mistakes are named with what is allowed."""

import pytest
from runs import as_toml, settings_of

from pipeline.errors import ConfigError
from train.config import known_keys, load_config


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(as_toml(settings_of("store", "runs/a")))
    return path


def test_overrides_by_full_name_or_by_unique_last_part(toml):
    config = load_config(toml, ["optimizer.lr=2e-3", "seed=7", "run.dir=runs/b", "optimizer.betas=[0.8, 0.9]"])
    assert (config.optimizer.lr, config.run.seed, str(config.run.dir)) == (2e-3, 7, "runs/b")
    assert config.optimizer.betas == (0.8, 0.9)


def test_a_preset_gives_what_is_not_said(toml):
    assert load_config(toml, ["model.preset=gpt2-355m"]).model.layers == 2
    toml.write_text(as_toml({**settings_of("store", "runs/a"), "model": {"preset": "gpt2-355m"}}))
    assert load_config(toml).model.heads == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "did you mean optimizer.lr"),
        ("curriculum.duration=5", "did you mean curriculum.duration_steps"),
        ("zzzzzz=5", "unknown key"),
        ("lr", "key=value"),
        ("optimizer.lr=-1", "optimizer.lr[\\s\\S]*greater than 0"),
        ("optimizer.lr=fast", "optimizer.lr[\\s\\S]*number"),
        ("model.heads=5", "multiple of heads"),
        ("optimizer.betas=[0.9, 1.0]", "below 1"),
        ("optimizer.min_lr=1", "above lr"),
        ("model.preset=gpt5", "gpt2-124m"),
        ("curriculum.pacing=cubic", "linear"),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(toml, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(toml, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.global_batch_tokens=64", "exactly one"),
        ("run.total_tokens=64", "exactly one"),
        ("curriculum.seqlen=64", "seqlen not used"),
        ("curriculum.seqlen_start=9", "multiple"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_the_schedule(toml, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(toml, [override]).schedule()


def test_unknown_keys_and_missing_tables_in_the_file(toml, tmp_path):
    toml.write_text(toml.read_text().replace("warmup_steps", "warmup_step"))
    with pytest.raises(ConfigError, match=r"run\.toml[\s\S]*did you mean optimizer\.warmup_steps"):
        load_config(toml)
    toml.write_text("store = 'x'\n[run]\ndir = 'y'")
    with pytest.raises(ConfigError, match="curriculum is missing"):
        load_config(toml)
    toml.write_text("store = ")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config(toml)
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "none.toml")


def test_every_section_is_known():
    assert {key.split(".")[0] for key in known_keys()} == {
        "store",
        "model",
        "curriculum",
        "batch",
        "mixture",
        "optimizer",
        "run",
    }
