"""A model over ranks: batches and losses of one, whatever their number and kind."""

import signal

import numpy as np
import pytest
import torch
from rank_runs import UNEVEN, assert_same, quiet, run_alone, steps_of, train_until, written
from ranks import launch
from runs import config_of, settings_of, tiny_store
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from pipeline.packing import NO_TARGET
from train import checkpoint, loop
from train.config_file import parse_config
from train.data import micro_batches, row_parts
from train.distributed import Ranks, together
from train.model import Attention
from train.parallel import kind_of, same_number

KINDS = {
    "ddp": {"run__parallel": "ddp"},
    "fsdp": {"run__parallel": "fsdp"},
    "recomputed": {"run__parallel": "fsdp", "run__activation_checkpointing": True},
    "half": {"run__parallel": "fsdp", "run__dtype": "bfloat16"},
}

TIMES = ("elapsed_s", "tokens_per_s")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The same run on one rank."""
    return run_alone(store, tmp_path_factory.mktemp("whole") / "run")


def train(*settings):
    """On every rank: run after run."""
    with together() as ranks:
        for each in settings:
            loop.run(parse_config(each, where="test"), warn=quiet, ranks=ranks)


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
        assert this.model(*added).item() == 0


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
