"""Warm-up runs what the run will run, and leaves no trace."""

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from runs import config_of, tiny_store
from test_compile import fresh  # noqa: F401
from torch.nn import functional as F

from curriculum.schedule import Schedule
from pipeline.packing import NO_TARGET
from train import run as runs
from train import warmup
from train.compile import Compiler
from train.run import Run
from train.state import load_random_state, optimizer_tensors, random_state
from train.warmup import MicroBatchSize, largest_first, shapes_of

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

RAMP = {
    "curriculum": {
        "pacing": "linear",
        "seqlen_start": 8,
        "seqlen_end": 32,
        "duration_steps": 25,
        "seqlen_multiple": 1,
    }
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def ramp(store, folder, **changes):
    config = config_of(store, folder, **changes)
    return config.model_copy(update={"curriculum": type(config.curriculum)(**RAMP["curriculum"])})


def quiet(text):
    pass


def state(run):
    tensors = {**run.model.state_dict(), **optimizer_tensors(run.model, run.optimizer)}
    return {name: value.clone() for name, value in tensors.items()}, random_state()


def assert_same_state(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]


def test_a_compiled_run_over_a_ramp_is_the_eager_one_without_a_recompile(store, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Compiler", functools.partial(Compiler, backend="aot_eager"))
    made = {}
    for compiled in (False, True):
        this = Run(ramp(store, tmp_path / "none", run__compile=compiled), quiet)
        for count in (0, 30):  # a fresh run, then one that has moments and goes on
            lines = [this.step(batch) for _, batch in zip(range(count), this.loader, strict=False)]
            assert len(lines) == count
            before = state(this)
            warmup.warm_up(this)
            assert_same_state(before, state(this))
            assert all(parameter.grad is None for parameter in this.model.parameters())
            if compiled:
                torch.compiler.set_stance("fail_on_recompile")
        lengths = {line["seqlen"] for line in this.fetch()}
        assert len(lengths) >= 20
        validation = this.validate()
        made[compiled] = (this.model.state_dict(), validation)
        if compiled:
            assert this.compiler.recompiles == 0
            assert this.compiler.graphs < 20
        this.loader.close()
    (eager, loss), (compiled, ours) = made[False], made[True]
    assert ours == pytest.approx(loss, rel=1e-3)
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], atol=5e-3, rtol=1e-2)


@pytest.mark.parametrize("micro_batch_tokens", [16, 64, 1000])
def test_every_shape_of_the_run_is_known_before_it(store, tmp_path, micro_batch_tokens):
    this = Run(ramp(store, tmp_path / "none", batch__global_batch_sequences=5), quiet)
    formed = Counter()
    for batch in this.loader:
        for part in this.feed.parts(batch, micro_batch_tokens):
            formed[MicroBatchSize(part.labels.numel(), batch.seqlen)] += part.labels.numel()
    assert shapes_of(this.schedule, micro_batch_tokens) == formed
    ordered = largest_first(formed)
    assert ordered[0].tokens == max(shape.tokens for shape in formed)
    assert ordered[-1] == min(formed)


def test_lengths_behind_the_end_of_the_run_are_not_warmed_up():
    schedule = Schedule.linear(
        seqlen_start=8, seqlen_end=64, duration_steps=100, global_batch_sequences=4, total_tokens=2000
    )
    served = {schedule.seqlen(step) for step in range(schedule.total_steps)}
    assert {shape.seqlen for shape in shapes_of(schedule, 64)} == served < {phase.seqlen for phase in schedule.phases}


def test_two_ranks_warm_up_the_same_shapes_and_more_than_either_has(store, tmp_path):
    config = ramp(store, tmp_path / "none", batch__global_batch_sequences=5)
    schedule = Run(config, quiet).schedule
    known = shapes_of(schedule, 40, world_size=2)
    for rows in (2, 3):
        assert all(any(shape.rows <= rows for shape in known if shape.seqlen == n) for n in range(8, 33))
    assert {shape.rows for shape in known if shape.seqlen == 8} == {2, 3}


def test_many_shapes_are_sampled_evenly_with_both_ends():
    shapes = [MicroBatchSize(tokens, 8) for tokens in range(8, 8000, 8)]
    chosen = largest_first(shapes)
    assert len(chosen) == warmup.MOST_SHAPES
    assert (chosen[0], chosen[-1]) == (shapes[-1], shapes[0])


def test_the_shapes_that_need_most_memory_are_those_of_most_tokens_and_of_most_spans():
    long, short, windows = MicroBatchSize(1024, 1024), MicroBatchSize(1000, 8), MicroBatchSize(1024, 512, 8)
    assert warmup.heaviest([short, MicroBatchSize(960, 8), long]) == [long, short]
    assert warmup.heaviest([short, windows, long]) == [long, windows]
    assert warmup.heaviest([long]) == [long]


def test_cudnn_plans_its_attention_for_few_shapes_only(monkeypatch):
    told = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", told.append)
    for lengths in (8, 9):
        warmup.choose_attention([MicroBatchSize(64, seqlen) for seqlen in range(1, lengths + 1)])
    assert told == [True, False]


def test_a_run_on_a_cpu_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(random_state()) == {"cpu"}
    load_random_state({**random_state(), "cuda": "none"})


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_step_is_that_of_the_mean_over_all_targets_in_any_number_of_micro_batches(store, tmp_path, parts):
    """Of 7 rows, of which the first have few targets: the mean of the means of parts is another number."""
    config = config_of(store, tmp_path / "none", batch__global_batch_sequences=7, run__seed=3, optimizer__clip=0.0)
    this, plain = Run(config, quiet), Run(config, quiet)
    batch = next(this.loader)
    labels = batch.labels.copy()
    labels[:3, 1:] = NO_TARGET
    batch = replace(batch, labels=labels, targets=int((labels != NO_TARGET).sum()))
    this.micro_batch_tokens = -(-7 // parts) * batch.seqlen
    split = list(this.feed.parts(batch, this.micro_batch_tokens))
    assert [len(part.labels) for part in split] == {1: [7], 2: [3, 4], 3: [2, 2, 3]}[parts]
    (whole,) = plain.feed.parts(batch, labels.size)
    logits = plain.model(whole.input_ids, whole.position_ids, whole.sight)
    loss = F.cross_entropy(logits.flatten(0, 1), whole.labels.flatten(), ignore_index=NO_TARGET)
    loss.backward()
    gradients = {name: p.grad for name, p in plain.model.named_parameters()}
    taken, zero_grad = {}, this.optimizer.zero_grad

    def kept(**how):
        taken.update({name: p.grad.clone() for name, p in this.model.named_parameters()})
        zero_grad(**how)

    this.optimizer.zero_grad = kept
    figures = this.update(batch)
    for run in (this, plain):
        run.loader.close()
    torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in gradients.values()]))
    torch.testing.assert_close(figures["grad_norm"], norm, rtol=1e-4, atol=1e-6)
    for name, grad in gradients.items():
        torch.testing.assert_close(taken[name], grad, rtol=1e-4, atol=1e-6)
