"""Configs: overrides reach their key, and mistakes are named with what is allowed."""

import os
import re
import subprocess
import sys

import pytest
from runs import as_toml, settings_of, tiny_store

from pipeline.errors import ConfigError
from pipeline.reader import Store
from train.config_file import known_keys, load_config
from train.habits import SAYS_THE_SAME


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(as_toml(settings_of("store", "runs/a")))
    return path


def test_overrides_by_full_name_or_by_unique_last_part(toml):
    config = load_config(toml, ["optimizer.lr=2e-3", "seed=7", "run.dir=runs/b", "optimizer.betas=[0.8, 0.9]"])
    assert (config.optimizer.lr, config.run.seed, str(config.run.dir)) == (2e-3, 7, "runs/b")
    assert config.optimizer.betas == (0.8, 0.9)


def test_a_whole_number_may_be_written_as_in_science(toml):
    assert load_config(toml, ["run.total_tokens=2e6"]).run.total_tokens == 2_000_000
    with pytest.raises(ConfigError, match="fractional"):
        load_config(toml, ["run.total_tokens=2.5"])


def test_a_missing_config_shows_one_that_works_and_json_is_told_of_deepspeed(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match="no config file here") as refused:
        load_config(path)
    path.write_text(str(refused.value).partition("\n\n")[2])
    assert load_config(path).schedule().max_seqlen == 1024
    for name, told in (("ds_config.json", True), ("bad.toml", False)):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ConfigError, match="not TOML") as refused:
            load_config(tmp_path / name)
        assert ("--deepspeed" in str(refused.value)) == told


def test_a_config_is_utf_8_whatever_the_locale(toml):
    toml.write_text(toml.read_text(encoding="utf-8").replace("runs/a", "läufe/ä"), encoding="utf-8")
    code = f"from train.config_file import *; print(ascii(load_config(Path({str(toml)!r})).run.dir))"
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=False)
    assert "l\\xe4ufe/\\xe4" in done.stdout, done.stderr


def test_a_preset_gives_what_is_not_said(toml):
    assert load_config(toml, ["model.preset=gpt2-350m"]).model.layers == 2
    toml.write_text(as_toml({**settings_of("store", "runs/a"), "model": {"preset": "gpt2-350m"}}))
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
        ("optimizer.lr=inf", "optimizer.lr[\\s\\S]*finite"),
        ("optimizer.clip=nan", "optimizer.clip"),
        ("model.heads=5", "^bad value of model: width .* multiple of heads"),
        ("model=gpt2", "a table[\\s\\S]*model.preset"),
        ("mixture.books=0.7", "allowed: mixture.NAME.weight"),
        ("optimizer.betas=[0.9, 1.0]", "below 1"),
        ("optimizer.min_lr=1", "above lr"),
        ("run.keep_every_steps=1500", "keep_every_steps 1500 is no multiple of checkpoint_every_steps 7"),
        ("model.preset=gpt5", "gpt2-124m"),
        ("curriculum.pacing=cubic", "linear"),
        ("run.seed=true", "run.seed: neither true nor false"),
        ("optimizer.betas=[true, 0.9]", "optimizer.betas: neither true nor false"),
        ("curriculum.table=[[0, true]]", "curriculum.table: neither true nor false"),
        ("run.seed=9223372036854775808", "less than 9223372036854775808"),
        ("run.compile=3", "^bad value of run.compile\n[\\s\\S]* or 'auto'$"),
        ("run.dir=5", "a path$"),
        ('optimizer.lr="3e-3"', '^bad value of optimizer.lr: found "3e-3"; allowed: a number, without quotes\n'),
        ("mixture.books=", "allowed: mixture.NAME.weight"),
        ("model.hidden_size=8", "allowed: model.preset, [^\n]*, model.init\n[^\n]*did you mean model.width"),
        ("learning_rate=1", "did you mean optimizer.lr"),
        ("train.zzzzzz=1", "(?s)^unknown key((?!did you mean).)*$"),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(toml, override, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(toml, [override])
    assert override == "lr" or "the command line" in str(refused.value)


def test_true_is_for_what_is_true_or_false(toml):
    run = load_config(toml, ["run.compile=true", "run.deterministic=true"]).run
    assert (run.compile, run.deterministic) == (True, True)


@pytest.mark.parametrize(
    ("line", "found", "number"),
    [
        ('lr = "fast"', "optimizer.lr", 17),
        ("lrr = 1", "optimizer.lrr", 17),
        ("betas = [\n  0.9,\n  2.0,\n]  # two", "optimizer: betas must be", 16),
        ("betas = [\n  0.9,\n]", "optimizer.betas.1 is missing", 17),
        ("[optimizer.more]\nlr = 1", "optimizer.more", 17),
        ("[run]\nseed = -1\ndir = 'x'", "run.seed", 18),
        ('["run"]\n"seed" = -1\ndir = "x"', "run.seed", 18),
        ("[run]\nepochs = 1", "run.dir is missing", 17),
        ("[model]\nheads=5 # of 768", "model: width", 17),
        ("[mixture.a]\nweight = -1", "mixture.a.weight", 18),
        ("", "run is missing", None),
        (
            "[run]\ndir = 'x'\nepochs = 1\n[mixture]\na = 3",
            "found:   mixture.a = 3\n  allowed: mixture.a.weight,",
            21,
        ),
        ("[model]\npreset = ['gpt2']", "unknown preset ['gpt2']", 17),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(tmp_path, line, found, number):
    above = ["store = 's'", "[curriculum]", "pacing = 'constant'", "seqlen = 8", "[batch]", "", "# lr = 3"]
    above += ["global_batch_sequences = 1", *[""] * 7, "[optimizer]"]
    below = [] if "run]" in line or '"run"' in line or not line else ["[run]", "dir = 'x'", "epochs = 1"]
    (tmp_path / "run.toml").write_text("\n".join([*above, line, *below]))
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "run.toml")
    text = str(refused.value)
    assert found in text, text
    assert re.search(r"run\.toml(?:, line (\d+))?\n", f"{text}\n").group(1) == (str(number) if number else None)


@pytest.mark.parametrize("section", ["model", "curriculum", "batch", "optimizer", "run", "mixture"])
@pytest.mark.parametrize("value", ['"gpt2-124m"', "3", "[1]"])
def test_a_value_where_a_table_is_wanted_is_told_what_may_be_in_it(tmp_path, section, value):
    lines = {
        "store": "'s'",
        "curriculum": "{pacing = 'constant', seqlen = 8}",
        "batch": "{global_batch_sequences = 1}",
        "run": "{dir = 'x', epochs = 1}",
    }
    lines.pop(section, None)
    text = [f"{key} = {there}" for key, there in lines.items()] + [f"{section} = {value}"]
    (tmp_path / "run.toml").write_text("\n".join(text))
    with pytest.raises(ConfigError, match="a table, not a value") as refused:
        load_config(tmp_path / "run.toml")
    assert f"line {len(text)}\n  found:   {section} = " in str(refused.value)
    assert f"allowed: {section}." in str(refused.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("global_batch_sequences=", "exactly one"),
        ("run.epochs=", "exactly one"),
        ("curriculum.seqlen=64", r"seqlen not used[\s\S]*take away what is not used: curriculum.seqlen=$"),
        ("curriculum.seqlen_start=9", "multiple"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_by_the_schedule(toml, override, message):
    with pytest.raises(ConfigError, match=message) as refused:
        load_config(toml, [override])
    assert f"{toml} and the command line" in str(refused.value)


def test_an_override_takes_the_place_of_the_other_key_of_which_one_is_given(toml):
    config = load_config(toml, ["total_tokens=640", "global_batch_tokens=64", "duration_tokens=100"])
    assert (config.run.total_tokens, config.run.epochs) == (640, None)
    assert (config.batch.global_batch_tokens, config.batch.global_batch_sequences) == (64, None)
    assert (config.curriculum.duration_tokens, config.curriculum.duration_steps) == (100, None)
    with pytest.raises(ConfigError, match="total_tokens, epochs"):
        load_config(toml, ["total_tokens=640", "epochs=2"])


def test_an_override_without_a_value_takes_the_key_away(toml):
    gone = ["seqlen_start=", "seqlen_end=", "duration_steps="]
    assert load_config(toml, ["pacing=constant", "curriculum.seqlen=16", *gone]).schedule().max_seqlen == 16
    with pytest.raises(ConfigError, match="store is missing"):
        load_config(toml, ["store="])


def test_an_override_without_a_value_takes_a_table_away(toml):
    toml.write_text(toml.read_text() + '\n[mixture.books]\nweight = 3\n[mixture."v1.5"]\nweight = 1\n')
    assert set(load_config(toml, ["mixture.books="]).mixture) == {"v1.5"}
    assert set(load_config(toml, ["mixture.v1.5="]).mixture) == {"books"}
    assert load_config(toml, ["mixture="]).mixture is None
    assert load_config(toml, ["optimizer="]).optimizer.lr == 6e-4
    assert load_config(toml, ["curriculum=", "pacing=constant", "curriculum.seqlen=16"]).schedule().max_seqlen == 16
    with pytest.raises(ConfigError, match="curriculum is missing"):
        load_config(toml, ["curriculum="])


def test_without_quotes_the_command_line_takes_what_no_toml_is(toml):
    config = load_config(toml, ["optimizer.lr=.5", "run.seed=007", "run.compile=no", "run.dir=runs/7"])
    assert (config.optimizer.lr, config.run.seed, config.run.compile) == (0.5, 7, False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('lr = "3e-3"', 'optimizer.lr: found "3e-3"; allowed: a number, without quotes'),
        ('betas = [0.9, "0.95"]', 'optimizer.betas: found "0.95"; allowed: a number'),
        ('warmup_steps = "5"', 'optimizer.warmup_steps: found "5"; allowed: a number'),
        ('decay_tokens = "5"', 'optimizer.decay_tokens: found "5"; allowed: a number'),
        ('[run]\ndeterministic = "true"', 'run.deterministic: found "true"; allowed: true or false, without quotes'),
        ('[run]\ncompile = "true"', 'run.compile: found "true"; allowed: true or false, without quotes or "auto"'),
        ('[run]\nspike_ratios = ["1.2"]', "run.spike_ratios: found"),
        ('[batch]\nmicro_batch_tokens = "64"', 'found "64"; allowed: a number, without quotes or "auto"'),
        ('[curriculum]\ntable = [[0, 8], [5, "16"]]', 'curriculum.table: found "16"'),
        ('[curriculum]\nodds = [1, "2"]', 'curriculum.odds: found "2"'),
        ('[mixture.a]\nweight = "1"', 'mixture.a.weight: found "1"'),
    ],
)
def test_what_is_in_quotes_is_no_number_and_not_true(tmp_path, line, message):
    header = "" if line.startswith("[") else "[optimizer]\n"
    (tmp_path / "base.toml").write_text(as_toml(settings_of("store", "runs/a")))
    (tmp_path / "run.toml").write_text(f'base = "base.toml"\n{header}{line}\n')
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "run.toml")
    assert message in str(refused.value)
    assert "run.toml, line 3" in str(refused.value)


def test_what_has_quotes_in_its_own_right_keeps_them(toml):
    names = ['run.trackers=["wandb"]', 'micro_batch_tokens="auto"', 'run.compile="auto"', 'run.dtype="bfloat16"']
    assert load_config(toml, names).run.trackers == ["wandb"]


def test_window_tokens_reach_the_loader(toml, tmp_path):
    store = Store.open(tiny_store(tmp_path / "tiny"))
    assert load_config(toml, ["window_tokens=500"]).loader(store).order.window_tokens == 500


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


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [("[run]", "[rnu]", r"rnu[\s\S]*did you mean run\?"), ("dir =", "dri =", r"run.dri")],
)
def test_a_typo_is_told_before_the_key_that_it_leaves_missing(toml, right, wrong, found):
    toml.write_text(toml.read_text().replace(right, wrong))
    with pytest.raises(ConfigError, match=rf"unknown key\n[\s\S]*found:   {found}"):
        load_config(toml)


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


def test_a_file_is_laid_over_its_base_key_by_key(toml, tmp_path):
    (tmp_path / "arms").mkdir()
    hot = tmp_path / "arms" / "hot.toml"
    hot.write_text('base = "../run.toml"\n[optimizer]\nlr = 0.5\n[run]\ntotal_tokens = 640\n')
    hotter = tmp_path / "hotter.toml"
    hotter.write_text('base = "arms/hot.toml"\n[optimizer]\nlr = 0.7\n')
    below, laid = load_config(toml), load_config(hotter, ["seed=5"])
    assert (laid.optimizer.lr, laid.optimizer.warmup_steps) == (0.7, below.optimizer.warmup_steps)
    assert (laid.run.total_tokens, laid.run.epochs, laid.run.seed) == (640, None, 5)
    assert load_config(hot).optimizer.lr == 0.5
    assert (laid.model, laid.curriculum, laid.batch) == (below.model, below.curriculum, below.batch)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ('"none.toml"', r"no config file[\s\S]*none.toml[\s\S]*relative to the folder of .*arm.toml"),
        ('"arm.toml"', "its own base"),
        ('"loop.toml"', r"its own base[\s\S]*arm.toml -> .*loop.toml -> .*arm.toml"),
        ("3", "names a TOML file"),
        ('"broken.toml"', r"not TOML[\s\S]*broken.toml"),
        ('"run.toml"\n[optimizer]\nlrr = 1', r"unknown key[\s\S]*arm.toml, line 3\n[\s\S]*optimizer.lr\b"),
    ],
)
def test_a_bad_base_is_named(toml, tmp_path, base, message):
    (tmp_path / "loop.toml").write_text('base = "arm.toml"')
    (tmp_path / "broken.toml").write_text("base = ")
    arm = tmp_path / "arm.toml"
    arm.write_text(f"base = {base}")
    with pytest.raises(ConfigError, match=message):
        load_config(arm)


def test_what_other_trainers_call_it_is_no_key_here_and_leads_to_one_that_is():
    keys = known_keys()
    assert set(SAYS_THE_SAME.values()) <= set(keys)
    assert not set(SAYS_THE_SAME) & {key.rsplit(".", maxsplit=1)[-1] for key in keys}
