"""The loop: metrics true to the schedule, and a killed run ends with the very weights of one that was not."""

import gc
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from ranks import program
from runs import as_toml, config_of, settings_of, tiny_store
from stores import documents_of, write_store

from curriculum.ledger import rehearse
from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from train import checkpoint, loop
from train import run as train_run
from train.config_file import parse_config
from train.data import micro_batches
from train.metrics import read_metrics
from train.trained import load_run

TIMES = ("elapsed_s", "tokens_per_s")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop.run(config_of(store, folder), warn=fail)
    return folder


def fail(text):
    raise AssertionError(text)


def quiet(text):
    pass


def timeless(folder):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def assert_equal_runs(a, b):
    for name in (checkpoint.MODEL_NAME, checkpoint.OPTIMIZER_NAME):
        left, right = ((checkpoint.find(run)[-1] / name).read_bytes() for run in (a, b))
        assert left == right, name
    assert timeless(a) == timeless(b)


def test_metrics_follow_the_schedule_and_count_every_token(store, whole):
    lines = read_metrics(whole)
    steps = [line for line in lines if "loss" in line]
    schedule = config_of(store, whole).schedule().resolve(Store.open(store).tokens)
    assert [line["step"] for line in steps] == list(range(1, schedule.total_steps + 1))
    assert [line["seqlen"] for line in steps] == [schedule.seqlen(i) for i in range(schedule.total_steps)]
    assert steps[-1]["tokens_seen"] == Store.open(store).tokens
    last = steps[-1]["step"]
    validated = [line["step"] for line in lines if "validation_loss" in line]
    assert validated == sorted({*range(0, last, 10), last})
    assert all(
        np.isfinite(line[key]) for line in steps for key in ("loss", "grad_norm", "variance_l1", "variance_max")
    )
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert validations[-1] < validations[0]


def test_killed_anywhere_and_resumed_ends_with_the_same_weights_to_the_last_bit(store, whole, tmp_path):
    folder = tmp_path / "killed"
    toml = tmp_path / "run.toml"
    toml.write_text(as_toml(settings_of(store, folder)))
    code = f"""
import os, signal
from train import loop
from train.config_file import load_config
from pathlib import Path
update, stop = loop.Run.update, int(os.environ["STOP"])
def updated(self, batch):
    if batch.step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)
loop.Run.update = updated
loop.run(load_config(Path({str(toml)!r})), warn=print)
"""
    for stop in (3, 17, 25, 10**6):
        done = program(code, folder=tmp_path, environment={"STOP": str(stop)})
        assert done.returncode == (0 if stop == 10**6 else -signal.SIGKILL), done.stderr
    assert_equal_runs(folder, whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store, whole, tmp_path):
    folder = tmp_path / "damaged"
    loop.run(config_of(store, folder, run__keep_checkpoints=3), warn=fail)
    last = checkpoint.find(folder)[-1]
    data = bytearray((last / "optimizer.safetensors").read_bytes())
    data[-3] ^= 1
    (last / "optimizer.safetensors").write_bytes(data)
    heard = []
    loop.run(config_of(store, folder, run__keep_checkpoints=3), warn=heard.append)
    assert "damaged" in heard[0]
    assert_equal_runs(folder, whole)
    for broken in checkpoint.find(folder):
        (broken / "state.json").write_text("{")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        loop.run(config_of(store, folder), warn=quiet)


def test_a_run_killed_before_its_first_checkpoint_says_that_it_begins_again(store, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    heard = []
    loop.run(config_of(store, tmp_path / "run"), warn=heard.append)
    assert "it begins again" in heard[0]
    assert_equal_runs(tmp_path / "run", whole)


def test_figures_fetched_seldom_are_the_same_lines(store, whole, tmp_path):
    for every in (3, 1000):
        folder = tmp_path / str(every)
        loop.run(config_of(store, folder, run__log_every_steps=every), warn=fail)
        assert_equal_runs(folder, whole)


def test_a_kill_between_fetches_loses_no_line(store, whole, tmp_path, monkeypatch):
    folder = tmp_path / "killed"
    update = loop.Run.update

    def killed(self, batch):
        if batch.step == 19:  # after the checkpoint of step 14 and the validation of step 10
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config_of(store, folder, run__log_every_steps=1000), warn=fail)
    assert [line["step"] for line in read_metrics(folder)] == list(range(15))
    monkeypatch.undo()
    loop.run(config_of(store, folder, run__log_every_steps=4), warn=quiet)
    assert_equal_runs(folder, whole)


def test_times_of_an_interval_are_spread_over_its_steps_by_tokens(store, tmp_path):
    folder = tmp_path / "timed"
    loop.run(config_of(store, folder, run__log_every_steps=5, run__checkpoint_every_steps=5), warn=fail)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert len({line["tokens_per_s"] for line in lines[:5]}) == 1
    took = np.diff([0.0] + [line["elapsed_s"] for line in lines[:5]])
    tokens = np.diff([0] + [line["tokens_seen"] for line in lines[:5]])
    assert took == pytest.approx(tokens / lines[0]["tokens_per_s"], abs=2e-4)


def test_a_step_asks_the_device_for_nothing(store, tmp_path, monkeypatch):
    """Tensors of the device "meta" have no values: whatever would wait for one raises. It has no fused kernels."""
    monkeypatch.setattr(train_run, "step_unless", lambda optimizer, bad: optimizer.step())
    config = config_of(store, tmp_path / "none", run__device="meta", model__mask="causal")
    this = loop.Run(config, quiet)
    for _ in range(2):
        this.step(next(this.loader))
    this.loader.close()
    with pytest.raises(NotImplementedError, match="meta"):
        this.fetch()


def test_the_garbage_collector_is_off_while_training_and_as_before_after_it(store, tmp_path, monkeypatch):
    update, seen = loop.Run.update, set()

    def watched(self, batch):
        seen.add(gc.isenabled())
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", watched)
    loop.run(config_of(store, tmp_path / "run", run__epochs=None, run__total_tokens=100), warn=fail)
    assert seen == {False}
    assert gc.isenabled()


def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(store, tmp_path):
    gradients = []
    for size in (10**6, 16):
        config = config_of(store, tmp_path / "none", batch__micro_batch_tokens=size)
        this = loop.Run(config, quiet)
        batch = next(this.loader)
        parts = list(micro_batches(batch, size, this.device))
        for part in parts:
            (this.model(*part) / batch.targets).backward()
        gradients.append((len(parts), {name: p.grad.clone() for name, p in this.model.named_parameters()}))
        this.loader.close()
    (one, whole_batch), (several, added) = gradients
    assert one == 1 < several
    for name in whole_batch:
        torch.testing.assert_close(whole_batch[name], added[name], atol=1e-6, rtol=1e-4)


def test_what_truncation_lost_is_told_at_the_end(store, tmp_path):
    config = config_of(store, tmp_path / "run", curriculum__dealing="truncate")
    outcome = loop.run(config, warn=quiet)
    with config.loader(Store.open(store)) as loader:
        ledger = rehearse(loader)
    assert (outcome.tokens_seen, outcome.padding, outcome.lost) == (ledger.targets, ledger.padding, ledger.lost)
    assert outcome.lost > 0 and outcome.epochs < 1


def test_a_run_folder_with_other_settings_is_refused_by_name(store, whole, tmp_path):
    with pytest.raises(RunError, match=r"optimizer\.lr: 0\.01 there, 0\.02 asked"):
        loop.run(config_of(store, whole, optimizer__lr=2e-2), warn=quiet)
    mixed = {**settings_of(store, whole), "mixture": {"a": {"weight": 0.5}}}
    with pytest.raises(RunError, match=r"mixture\.a: nothing there, weight = 0\.5, max_epochs = 1 asked"):
        loop.run(parse_config(mixed, where="a test"), warn=quiet)
    with pytest.raises(RunError, match="--reschedule"):
        loop.run(config_of(store, whole, curriculum__duration_steps=30), warn=quiet)
    (tmp_path / "mine.txt").write_text("not yours")
    with pytest.raises(RunError, match="holds no run"):
        loop.run(config_of(store, tmp_path), warn=quiet)
    assert (tmp_path / "mine.txt").exists()


def test_a_run_goes_on_with_a_store_that_was_moved_but_not_with_another(store, whole, tmp_path, monkeypatch):
    folder, moved, update = tmp_path / "run", tmp_path / "moved", loop.Run.update

    def killed(self, batch):
        if batch.step == 19:  # after the checkpoint of step 14
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.run(config_of(store, folder), warn=fail)
    monkeypatch.undo()
    write_store(tmp_path / "other", documents_of([40] * 60))
    with pytest.raises(RunError, match=r"another store[\s\S]*step-00000014"):
        loop.run(config_of(tmp_path / "other", folder), warn=quiet)
    shutil.copytree(store, moved)
    loop.run(config_of(moved, folder), warn=quiet)
    assert_equal_runs(folder, whole)
    assert load_run(folder).tokenizer_path == moved / "tokenizer.json"


def test_a_finished_run_can_go_on_with_a_longer_schedule(store, tmp_path):
    folder = tmp_path / "longer"
    tokens = Store.open(store).tokens
    changes = {"run__epochs": None, "run__total_tokens": tokens // 2}
    first = loop.run(config_of(store, folder, **changes), warn=fail)
    longer = config_of(store, folder, **{**changes, "run__total_tokens": tokens})
    second = loop.run(longer, change_schedule=True, warn=quiet)
    assert first.tokens_seen < tokens == second.tokens_seen


def test_force_starts_over_but_not_where_torchrun_may_repeat_it(store, tmp_path, monkeypatch):
    config = config_of(store, tmp_path / "run", run__epochs=None, run__total_tokens=200)
    loop.run(config, warn=fail)
    heard = []
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match=r"each time[\s\S]*--max-restarts 3"):
        loop.run(config, force=True, warn=fail)
    loop.run(config, warn=heard.append)
    assert "going on" in heard[0]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    loop.run(config, force=True, warn=fail)


def test_a_changed_schedule_may_be_shorter_but_not_longer_than_the_model(store, tmp_path):
    folder = tmp_path / "changed"
    tokens = Store.open(store).tokens
    half = {"run__epochs": None, "run__total_tokens": tokens // 2}
    whole_epoch = {"run__epochs": None, "run__total_tokens": tokens}
    loop.run(config_of(store, folder, **half), warn=fail)
    with pytest.raises(RunError, match="longer than the model"):
        longer = config_of(store, folder, **whole_epoch, curriculum__seqlen_end=64)
        loop.run(longer, change_schedule=True, warn=quiet)
    shorter = config_of(store, folder, **whole_epoch, curriculum__seqlen_end=16)
    assert loop.run(shorter, change_schedule=True, warn=quiet).tokens_seen == tokens
    assert read_metrics(folder)[-1]["seqlen"] == 16
    assert load_run(folder).shape.positions == 32


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_do(store, tmp_path):
    with pytest.raises(RunError, match=r"step \d+[\s\S]*lower optimizer\.lr"):
        loop.run(config_of(store, tmp_path / "hot", optimizer__lr=1e30, optimizer__clip=0.0), warn=quiet)


def test_validation_is_the_mean_over_all_held_out_tokens(store, tmp_path):
    this = loop.Run(config_of(store, tmp_path / "none"), quiet)
    held_out = Store.open(store, "validation")
    schedule = Schedule.constant(seqlen=32, global_batch_sequences=1, epochs=1)
    total = 0.0
    with CurriculumLoader(held_out, schedule, seed=0) as loader, torch.no_grad():
        for batch in loader:
            arrays = (batch.input_ids, batch.position_ids, batch.labels)
            ids, positions, labels = (torch.from_numpy(array) for array in arrays)
            total += float(this.model(ids, positions, labels=labels))
    assert this.validate() == pytest.approx(total / held_out.tokens, rel=1e-4)


def test_odd_devices_are_refused(store, tmp_path):
    with pytest.raises(ConfigError, match="no such device"):
        loop.Run(config_of(store, tmp_path / "none", run__device="abacus"), quiet)


def test_checkpoints_hold_plain_json_and_tensors_only(whole):
    for folder in checkpoint.find(whole):
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        json.loads((folder / "state.json").read_text())
