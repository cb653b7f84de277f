"""Steps that are not finite: their update never reaches the weights, and what happens then is exactly resumable."""

import json
import re
import shlex

import pytest
import torch
from click.testing import CliRunner
from rank_runs import assert_same as assert_same_losses
from ranks import launch
from runs import as_toml, config_of, settings_of, tiny_store
from test_kill import assert_same, ends_in

from pipeline.errors import RunError
from train import checkpoint, loop
from train import run as train_run
from train.cli import main
from train.config_file import parse_config
from train.distributed import together
from train.faults import Faults, Guard, step_unless
from train.figures import figures, read_curves
from train.metrics import read_metrics
from train.parallel import Parallel

SMALL = {"model__layers": 1, "model__width": 8, "batch__global_batch_sequences": 6, "run__keep_checkpoints": 99}
SMALL |= {"run__epochs": None, "run__total_tokens": 1200, "run__checkpoint_every_steps": 2}
SKIP = SMALL | {"run__on_nonfinite": "skip", "run__max_skips": 2}
BACK = SMALL | {"run__on_nonfinite": "rollback", "run__rollback_steps": 3, "run__max_rollbacks": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def quiet(text):
    pass


def fail(text):
    raise AssertionError(text)


@pytest.fixture
def broken(monkeypatch):
    """Batches whose loss, and so gradient, is infinite: a list to fill."""
    batches = []
    update, loss = loop.Run.update, Parallel.loss
    now = []

    def updated(self, batch):
        now[:] = [batch.step]
        return update(self, batch)

    def lost(self, part):
        found = loss(self, part)
        return found * torch.inf if now and now[0] in batches and torch.is_grad_enabled() else found

    monkeypatch.setattr(loop.Run, "update", updated)
    monkeypatch.setattr(Parallel, "loss", lost)
    return batches


def weights_at(folder, step):
    return checkpoint.read_model(folder / f"checkpoints/step-{step:08d}")


def equal(left, right):
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_flag_on_the_device_keeps_an_update_out_entirely(bad):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    guard = Guard("skip", parameter.device)
    for norm, changes in ((1.0, True), (bad, False), (1.0, True)):
        before = parameter.detach().clone(), optimizer.state[parameter].get("step", torch.zeros(())).clone()
        parameter.grad = torch.full((3,), norm)
        step_unless(optimizer, guard.judge(torch.tensor(1.0), torch.tensor(norm)))
        assert torch.equal(parameter, before[0]) != changes
        assert float(optimizer.state[parameter]["step"] - before[1]) == changes
    assert parameter.isfinite().all()


def test_all_later_updates_are_held_until_the_host_has_heard():
    good, bad = torch.tensor(1.0), torch.tensor(torch.nan)
    guard = Guard("stop", good.device)
    assert [float(guard.judge(value)) for value in (good, bad, good)] == [0, 1, 1]
    guard.release()
    assert float(guard.judge(good)) == 0


def test_without_the_guard_one_bad_step_is_the_end(store, tmp_path, broken, monkeypatch):
    broken.append(5)
    monkeypatch.setattr(train_run, "step_unless", lambda optimizer, bad: optimizer.step())
    with pytest.raises(RunError, match="3 times in a row"):
        loop.run(config_of(store, tmp_path / "run", **SKIP), warn=quiet)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_skipped_update_changes_nothing_and_is_counted(store, tmp_path, broken, log_every):
    broken += [0, 5, 8, 9]
    folder, heard = tmp_path / "run", []
    changes = SKIP | {"run__checkpoint_every_steps": 1, "run__log_every_steps": log_every}
    outcome = loop.run(config_of(store, folder, **changes), warn=heard.append)
    assert outcome.unlearnt == [[0, 0], [5, 5], [8, 9]]
    assert [text.split(" is not")[0] for text in heard] == ["step 1", "step 6", "step 9", "step 10"]
    for step in range(2, outcome.step):
        assert equal(weights_at(folder, step), weights_at(folder, step + 1)) == (step in broken), step
    assert all(value.isfinite().all() for value in weights_at(folder, outcome.step).values())
    lines = [line for line in read_metrics(folder) if line["step"] - 1 in broken and line["step"]]
    assert [line["skipped"] for line in lines] == [1, 2, 3, 4]
    assert all("loss" not in line and line["nonfinite"]["loss"] == "inf" for line in lines)
    json.loads((folder / "metrics.jsonl").read_text().splitlines()[6], parse_constant=fail)  # strict JSON
    assert figures(read_curves(folder)).steps == outcome.step


def test_more_skips_in_a_row_than_allowed_stop_the_run(store, tmp_path, broken):
    broken += [4, 5, 7, 8, 9]
    with pytest.raises(RunError, match=r"3 times in a row[\s\S]*step 10"):
        loop.run(config_of(store, tmp_path / "run", **SKIP), warn=quiet)


@pytest.mark.parametrize("log_every", [1, 5])
def test_the_default_stops_with_a_report_and_the_run_can_go_on(store, tmp_path, broken, log_every):
    broken.append(6)
    folder = tmp_path / "a run"
    changes = {"run__log_every_steps": log_every, "run__checkpoint_every_steps": 5}
    with pytest.raises(RunError) as error:
        loop.run(config_of(store, folder, **SMALL | changes), warn=quiet)
    for part in ("step 7", "loss inf", "gradient norm nan", "learning rate 0.00", "documents: ", "--step 6"):
        assert part in str(error.value), part
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(8))
    assert "nonfinite" in lines[-1]
    assert checkpoint.find(folder)[-1].name == "step-00000005"
    (command,) = re.findall(r"\(slw-train (trace .*)\)", str(error.value))
    traced = CliRunner().invoke(main, [*shlex.split(command), "--json"])
    documents = sorted({piece["document"] for piece in json.loads(traced.stdout)["pieces"]})
    assert f"{len(documents)} documents: {documents[0]}, {documents[1]}" in str(error.value)
    again = loop.run(config_of(store, folder, **SMALL | changes | {"run__on_nonfinite": "skip"}), warn=quiet)
    assert (again.finished, again.unlearnt) == (True, [[6, 6]])


def test_a_rollback_takes_old_weights_and_the_batch_after_the_bad_one(store, tmp_path, broken):
    broken.append(8)
    folder, heard = tmp_path / "run", []
    outcome = loop.run(config_of(store, folder, **BACK), warn=heard.append)
    assert outcome.unlearnt == [[4, 8]]
    assert heard == ["step 9 is not finite: on with the next batch and the weights of step-00000004"]
    assert equal(weights_at(folder, 9), weights_at(folder, 4))  # kept at once
    assert not equal(weights_at(folder, 8), weights_at(folder, 9))
    assert not equal(weights_at(folder, 10), weights_at(folder, 9))
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(outcome.step + 1))  # each batch once
    assert (lines[9]["rolled_back_to"], lines[9]["rollbacks"]) == (4, 1)
    moments = checkpoint.read_optimizer(checkpoint.find(folder)[-1])
    assert float(moments["step:tokens.weight"]) == outcome.step - 5
    broken.clear()
    loop.run(config_of(store, tmp_path / "sound", **SMALL), warn=fail)
    for key in ("tokens_seen", "seqlen"):
        assert [line[key] for line in lines[1:]] == [line[key] for line in read_metrics(tmp_path / "sound")[1:]]


def test_a_second_rollback_passes_over_weights_that_were_given_up(store, tmp_path, broken):
    broken += [8, 10]
    folder = tmp_path / "run"
    outcome = loop.run(config_of(store, folder, **BACK), warn=quiet)
    assert outcome.unlearnt == [[4, 10]]  # that of step 6 is far enough back, but was given up
    assert equal(weights_at(folder, 11), weights_at(folder, 4))
    broken.append(14)
    with pytest.raises(RunError, match="after 2 rollbacks"):
        loop.run(config_of(store, tmp_path / "thrice", **BACK), warn=quiet)
    with pytest.raises(RunError, match="no checkpoint 9 steps before"):
        loop.run(config_of(store, tmp_path / "early", **BACK | {"run__rollback_steps": 9}), warn=quiet)


def test_few_checkpoints_are_enough_for_a_rollback(store, tmp_path, broken):
    broken.append(8)
    outcome = loop.run(config_of(store, tmp_path / "run", **BACK | {"run__keep_checkpoints": 1}), warn=quiet)
    assert outcome.unlearnt == [[4, 8]]


@pytest.mark.parametrize("changes", [SKIP, BACK], ids=["skip", "rollback"])
def test_killed_before_any_step_and_run_again_it_ends_the_same(store, tmp_path, broken, monkeypatch, changes):
    broken += [8, 13]
    loop.run(config_of(store, tmp_path / "whole", **changes), warn=quiet)
    whole = ends_in(tmp_path / "whole")
    update, end = loop.Run.update, checkpoint.step_of(checkpoint.find(tmp_path / "whole")[-1])
    stops = list(range(1, end))

    def killed(self, batch):
        if stops and batch.step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(loop.Run, "update", killed)
    config = config_of(store, tmp_path / "killed", **changes | {"run__log_every_steps": 3})
    while stops:
        with pytest.raises(KeyboardInterrupt):
            loop.run(config, warn=quiet)
    loop.run(config, warn=quiet)
    assert_same(ends_in(tmp_path / "killed"), whole)


def train_hurt(*settings):
    """On every rank: run after run, in which batch 7 makes one rank's share of the loss infinite."""
    update, loss = loop.Run.update, Parallel.loss
    hurt = []

    def updated(self, batch):
        hurt[:] = [batch.step == 7 and self.ranks.rank == self.ranks.world_size - 1]
        return update(self, batch)

    loop.Run.update = updated
    Parallel.loss = lambda self, part: (
        loss(self, part) * (torch.inf if hurt == [True] and torch.is_grad_enabled() else 1.0)
    )
    with together() as ranks:
        for each in settings:
            loop.run(parse_config(each, where="test"), warn=quiet, ranks=ranks)


@pytest.mark.parametrize("changes", [SKIP, BACK], ids=["skip", "rollback"])
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(store, tmp_path, broken, changes):
    broken.append(7)
    changes = changes | {"run__attention_logits_every_steps": 5}
    loop.run(config_of(store, tmp_path / "one", **changes), warn=quiet)
    kinds = ("ddp", "fsdp")
    settings = [settings_of(store, tmp_path / kind, **changes, run__parallel=kind) for kind in kinds]
    codes, output = launch(2, train_hurt, *settings, folder=tmp_path / "output")
    assert codes == [0, 0], output
    for kind in kinds:
        assert_same_losses(tmp_path / kind, tmp_path / "one")
        assert [line["step"] for line in read_metrics(tmp_path / kind) if "nonfinite" in line] == [8]


def test_batches_in_no_weights_are_told_once_each():
    faults = Faults()
    for batch in (3, 4, 9):
        faults.skip(batch)
    faults.roll_back(4, 11)
    assert faults.unlearnt == [[3, 3], [4, 11]]
    assert [step for step in range(15) if faults.is_undone(step)] == [5, 6, 7, 8, 9, 10, 11]
    faults.roll_back(2, 20)
    assert faults.unlearnt == [[2, 20]]


def test_the_command_tells_what_is_in_no_weights(store, tmp_path, broken):
    broken.append(5)
    (tmp_path / "run.toml").write_text(as_toml(settings_of(store, tmp_path / "run", **SKIP)))
    done = CliRunner().invoke(main, ["run", str(tmp_path / "run.toml")])
    assert done.exit_code == 0
    assert "batches 5 to 5 (counted from 0) were served and are in no weights" in done.stdout
