"""Several ranks: batches and losses of one, whatever their number and kind; they start, stop and fail together."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ranks import launch
from runs import as_toml, config_of, settings_of, tiny_store
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from pipeline.errors import RunError, StoreError
from pipeline.packing import NO_TARGET
from train import checkpoint, distributed, loop
from train.cli import main
from train.config_file import parse_config
from train.data import micro_batches, row_parts
from train.distributed import Ranks, together
from train.metrics import read_metrics
from train.model import Attention
from train.parallel import kind_of, same_number

UNEVEN = {
    "batch__global_batch_sequences": 7,
    "batch__micro_batch_tokens": 32,
    "run__attention_logits_every_steps": 5,
}
"""Rows that neither 2 nor 4 divide, in micro-batches of which some ranks need one more than others."""
KINDS = {
    "ddp": {"run__parallel": "ddp"},
    "fsdp": {"run__parallel": "fsdp"},
    "recomputed": {"run__parallel": "fsdp", "run__activation_checkpointing": True},
    "half": {"run__parallel": "fsdp", "run__dtype": "bfloat16"},
}

TIMES = ("elapsed_s", "tokens_per_s")


def quiet(text):
    pass


def train(*settings):
    """On every rank: run after run."""
    with together() as ranks:
        for each in settings:
            loop.run(parse_config(each, where="test"), warn=quiet, ranks=ranks)


def train_until(settings, rank, step, failure):
    """As `train`; before the update of `step` this happens to `rank`: an error, or a signal to itself."""
    update = loop.Run.update

    def updated(self, batch):
        if batch.step == step and self.ranks.rank == rank:
            if isinstance(failure, signal.Signals):
                os.kill(os.getpid(), failure)
            else:
                raise failure
        return update(self, batch)

    loop.Run.update = updated
    main(["run", str(settings)], standalone_mode=False)


def written(settings, path):
    path.write_text(as_toml(settings))
    return path


def steps_of(folder):
    return [line for line in read_metrics(folder) if "loss" in line]


def assert_same(folder, whole):
    """Metrics of `folder` are those of `whole` within float error, exactly where they are whole numbers."""
    ours, theirs = read_metrics(folder), read_metrics(whole)
    for key in ("step", "tokens_seen", "seqlen", "sequences"):
        assert [line.get(key) for line in ours] == [line.get(key) for line in theirs]
    for key in (
        "loss",
        "validation_loss",
        "grad_norm",
        "loss_ratio",
        "variance_l1",
        "variance_max",
        "attention_logit_max",
    ):
        a, b = ([line[key] for line in lines if key in line] for lines in (ours, theirs))
        assert len(a) > 1
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5), key
    left, right = (load_file(checkpoint.find(run)[-1] / "model.safetensors") for run in (folder, whole))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-2, atol=1e-4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The same run on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop.run(config_of(store, folder, **UNEVEN), warn=quiet)
    return folder


@pytest.fixture(scope="module")
def spread(store, tmp_path_factory):
    """Runs on several ranks: {(ranks, kind): folder}."""
    base = tmp_path_factory.mktemp("spread")
    folders = {}
    for world_size, kinds in ((2, ("ddp", "fsdp", "recomputed", "half")), (4, ("ddp",))):
        runs = {(world_size, kind): base / f"{kind}{world_size}" for kind in kinds}
        rare = {"run__checkpoint_every_steps": 1000}
        settings = [settings_of(store, run, **UNEVEN, **rare, **KINDS[kind]) for (_, kind), run in runs.items()]
        codes, output = launch(world_size, train, *settings, folder=base / f"output{world_size}")
        assert codes == [0] * world_size, output
        folders |= runs
    return folders


@pytest.mark.parametrize("kind", [(2, "ddp"), (2, "fsdp"), (4, "ddp")], ids=str)
def test_ranks_see_the_same_batches_and_compute_the_same_losses(whole, spread, kind):
    assert_same(spread[kind], whole)
    ours, theirs = (steps_of(folder) for folder in (spread[kind], whole))
    same = np.mean([a["variance_argmax"] == b["variance_argmax"] for a, b in zip(ours, theirs, strict=True)])
    assert same > 0.8  # two tensors may be as large as one another


def test_shards_computed_again_are_the_same_to_the_bit(spread):
    ours, theirs = (steps_of(spread[2, kind]) for kind in ("recomputed", "fsdp"))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {k: v for k, v in b.items() if k not in TIMES}


def test_shards_in_half_precision_learn_as_much_and_keep_whole_weights(spread, whole):
    ours, theirs = (steps_of(run) for run in (spread[2, "half"], whole))
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=0.02)
    assert [line["loss"] for line in ours] != pytest.approx([line["loss"] for line in theirs], rel=1e-6)
    weights = load_file(checkpoint.find(spread[2, "half"])[-1] / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_some_ranks_of_these_runs_need_more_micro_batches_than_others(store, whole):
    schedule = config_of(store, whole, **UNEVEN).schedule()
    counts = set()
    for seqlen in {line["seqlen"] for line in steps_of(whole)}:
        rows = [7 * (rank + 1) // 2 - 7 * rank // 2 for rank in range(2)]
        counts.add(tuple(len(row_parts(own, seqlen, 32)) for own in rows))
    assert schedule.max_seqlen == 32
    assert any(a != b for a, b in counts)
    assert any(a == b for a, b in counts)


def test_a_killed_run_goes_on_on_other_ranks_of_another_kind(store, whole, tmp_path):
    """One rank stopped, two with shards of which one is killed, one to the end."""
    folder = tmp_path / "run"
    settings = settings_of(store, folder, **UNEVEN, run__parallel="fsdp")
    update = loop.Run.update

    def stopped(self, batch):
        if batch.step == 9:
            raise KeyboardInterrupt
        return update(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "update", stopped)
        loop.run(parse_config(settings, where="test"), warn=quiet)
    toml = written(settings, tmp_path / "run.toml")
    codes, output = launch(2, train_until, toml, 1, 17, signal.SIGKILL, folder=tmp_path / "output")
    assert codes == [1, -signal.SIGKILL], output
    assert "another rank is gone" in output[0]
    assert "going on after step 7" in output[0]
    assert checkpoint.find(folder)[-1].name == "step-00000014"
    loop.run(parse_config(settings, where="test"), warn=quiet)
    assert_same(folder, whole)


def test_an_error_of_one_rank_ends_all_and_is_told_once(store, whole, tmp_path):
    folder = tmp_path / "run"
    toml = written(settings_of(store, folder, **UNEVEN), tmp_path / "run.toml")
    error = StoreError("a shard is damaged", found="three flipped bits")
    codes, output = launch(2, train_until, toml, 1, 12, error, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "three flipped bits" in output[1]
    assert not output[0].strip()
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [0, 0], output
    assert "22 steps" in output[0]
    assert not output[1].strip()
    assert_same(folder, whole)


def train_as_rank(settings):
    """A learning rate of its own on each rank."""
    main(["run", str(settings), f"lr=1e-{os.environ['RANK']}"], standalone_mode=False)


def test_ranks_of_different_configs_are_refused_once(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    codes, output = launch(2, train_as_rank, toml, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "".join(output).count("the ranks are not at the same place") == 1
    assert not (tmp_path / "run").exists()


def test_what_only_rank_0_finds_wrong_ends_all(store, whole, tmp_path):
    toml = written(settings_of(store, whole, **UNEVEN, optimizer__lr=2e-2), tmp_path / "run.toml")
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [1, 1], output
    assert "0.01 there, 0.02 asked" in output[0]
    assert not output[1].strip()


def test_a_bad_config_is_told_once(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run", run__device="abacus"), tmp_path / "run.toml")
    codes, output = launch(2, train_until, toml, 0, -1, None, folder=tmp_path / "output")
    assert codes == [2, 2], output
    assert "".join(output).count("no such device") == 1


def never_cleaned_up():
    """A rank fails; what both do afterwards takes for ever, as a context of CUDA can with a kernel that waits."""
    distributed.GRACE_S = 1.0
    try:
        with together() as ranks:
            if ranks.rank == 1:
                raise StoreError("a shard is damaged")
            ranks.barrier()
    finally:
        threading.Event().wait()


def test_a_rank_that_is_stuck_in_its_clean_up_ends_all_the_same(tmp_path):
    codes, output = launch(2, never_cleaned_up, folder=tmp_path)
    assert codes == [-signal.SIGALRM] * 2, output


def test_without_an_agent_too_rank_0_is_heard_before_its_store_goes_with_it(store, tmp_path):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    error = StoreError("a shard is damaged", found="three flipped bits")
    codes, output = launch(2, train_until, toml, 0, 3, error, folder=tmp_path / "output", rank_0_stores=True)
    assert codes == [1, 1], output
    assert "three flipped bits" in output[0]
    assert not output[1].strip()


def test_torchrun_starts_ranks_and_a_signal_to_one_of_them_stops_all_at_one_step(store, whole, tmp_path):
    folder = tmp_path / "run"
    toml = written(settings_of(store, folder, **UNEVEN, run__parallel="ddp"), tmp_path / "run.toml")
    code = f"""
import os, time
from pathlib import Path
from train import loop
from train.cli import main
update, place = loop.Run.update, Path({str(tmp_path)!r})
def waits(self, batch):
    if self.ranks.rank == 1 and batch.step == 6:
        (place / "writing").write_text(str(os.getpid()))
        (place / "writing").rename(place / "pid")
        while not (place / "sent").exists():
            time.sleep(0.02)
    return update(self, batch)
loop.Run.update = waits
main()
"""
    (tmp_path / "waits.py").write_text(code)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, str(tmp_path / "waits.py"), "run", str(toml)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "pid").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    (tmp_path / "sent").touch()
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert output.count("the same command goes on") == 1, output
    step = steps_of(folder)[-1]["step"]
    assert step < steps_of(whole)[-1]["step"]
    assert checkpoint.find(folder)[-1].name == f"step-{step:08d}"
    assert output.count(f"{step:,} steps") == 1
    done = CliRunner().invoke(main, ["run", str(toml)])
    assert done.exit_code == 0, done.output
    assert_same(folder, whole)


def look_at_shards(settings):
    """Gradients of a step that is dropped after a validation, and what parameters are then."""
    with together() as ranks:
        this = loop.Run(parse_config(settings, where="test"), quiet, ranks=ranks)
        (part,) = micro_batches(next(this.loader), 10**6, this.device)
        this.parallel.loss(part).backward()
        assert all(parameter.grad is not None for parameter in this.model.parameters())
        this.validate()
        shards = list(this.model.parameters())
        assert all(isinstance(parameter, DTensor) and parameter.grad is not None for parameter in shards)
        this.model.zero_grad(set_to_none=True)
        this.parallel.loss(part).backward()
        once = [parameter.grad.to_local().clone() for parameter in this.model.parameters()]
        this.validate()
        this.model.zero_grad(set_to_none=True)
        this.parallel.loss(part).backward()
        again = [parameter.grad.to_local() for parameter in this.model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        this.loader.close()
        print("done")


def test_a_validation_leaves_shards_and_no_gradient_behind(store, tmp_path):
    settings = settings_of(store, tmp_path / "none", run__parallel="fsdp", batch__global_batch_sequences=4)
    codes, output = launch(2, look_at_shards, settings, folder=tmp_path)
    assert codes == [0, 0], output
    assert [text.strip() for text in output] == ["done", "done"]


def talk():
    """What ranks say to each other, on every one of two."""
    with together() as ranks:
        told = ranks.from_first(lambda: {"rank": ranks.rank, "text": "ä" * 10_000, "none": None})
        assert told == {"rank": 0, "text": "ä" * 10_000, "none": None}
        assert ranks.gather(torch.tensor([ranks.rank + 0.5])).tolist() == [[0.5], [1.5]]
        heard = [ranks.any(ranks.rank == 1 and turn == 2) for turn in range(5)]
        assert heard == [False, False, False, True, False]
        ranks.agree({"step": 3, "loader": 2**62})
        with pytest.raises(RunError, match="rank 0: loader 4611686018427387904; rank 1: loader 4611686018427387905"):
            ranks.agree({"step": 3, "loader": 2**62 + ranks.rank})
        print("done")


def test_ranks_tell_each_other_what_they_need(tmp_path):
    codes, output = launch(2, talk, folder=tmp_path)
    assert codes == [0, 0], output
    assert [text.strip() for text in output] == ["done", "done"]


def test_half_an_environment_is_refused(store, tmp_path, monkeypatch):
    toml = written(settings_of(store, tmp_path / "run"), tmp_path / "run.toml")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(main, ["run", str(toml)])
    assert done.exit_code == 2
    assert "start it with torchrun" in done.output


def test_ranks_with_fewer_micro_batches_repeat_one_that_counts_nothing(store, tmp_path):
    this = loop.Run(config_of(store, tmp_path / "none", **UNEVEN), quiet)
    batch = next(this.loader)
    this.loader.close()
    parts = list(micro_batches(batch, 32, this.device))
    more = list(same_number(iter(parts), len(parts) + 2))
    assert [last for _, last in more] == [False] * (len(parts) + 1) + [True]
    assert all(torch.equal(ours.labels, part.labels) for (ours, _), part in zip(more, parts, strict=False))
    for added, _ in more[len(parts) :]:
        assert added.labels.shape == parts[-1].labels.shape
        assert (added.labels == NO_TARGET).all()
        assert this.model.loss(*added).item() == 0


def test_activation_checkpointing_computes_blocks_again_and_changes_no_bit(store, tmp_path, monkeypatch):
    weights, calls = [], []
    for again in (False, True):
        this = loop.Run(config_of(store, tmp_path / "none", run__activation_checkpointing=again), quiet)
        calls.append(0)

        def counted(*args, forward=Attention.forward):
            calls[-1] += 1
            return forward(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Attention, "forward", counted)
            this.step(next(this.loader))
        this.loader.close()
        weights.append(this.model.state_dict())
    assert calls[1] == 2 * calls[0] > 0
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_one_process_is_alone_whatever_is_asked(whole, store):
    this = loop.Run(config_of(store, whole, run__parallel="fsdp"), quiet)
    assert this.parallel.kind == "alone"
    assert kind_of(this.model, Ranks(0, 2), this.device, "auto") == "ddp"
    assert kind_of(this.model, Ranks(0, 2), this.device, "fsdp") == "fsdp"
