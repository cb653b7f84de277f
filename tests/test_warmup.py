"""Warm-up runs what the run will run, finds what fits, and leaves no trace."""

import functools
import gc
import weakref
from collections import Counter

import pytest
import torch
from runs import config_of, tiny_store
from test_compile import fresh  # noqa: F401

from pipeline.errors import RunError
from train import loop, warmup
from train import run as runs
from train.compile import Compiler
from train.run import Run
from train.snapshot import load_random_state, model_tensors, optimizer_tensors, random_state
from train.state import save
from train.warmup import Shape, Untouched, fitting, largest_first, shapes_of

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
    tensors = {**model_tensors(run.model), **optimizer_tensors(run.model, run.optimizer)}
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
            this.warm_up()
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
        for part in this.parts(batch, micro_batch_tokens):
            formed[Shape(part.labels.numel(), batch.seqlen)] += part.labels.numel()
    assert shapes_of(this.schedule, micro_batch_tokens) == formed
    ordered = largest_first(formed)
    assert ordered[0].tokens == max(shape.tokens for shape in formed)
    assert ordered[-1] == min(formed)


def test_two_ranks_warm_up_the_same_shapes_and_more_than_either_has(store, tmp_path):
    config = ramp(store, tmp_path / "none", batch__global_batch_sequences=5)
    schedule = Run(config, quiet).schedule
    known = shapes_of(schedule, 40, world_size=2)
    for rows in (2, 3):
        assert all(any(shape.rows <= rows for shape in known if shape.seqlen == n) for n in range(8, 33))
    assert {shape.rows for shape in known if shape.seqlen == 8} == {2, 3}


def test_many_shapes_are_sampled_evenly_with_both_ends():
    shapes = [Shape(tokens, 8) for tokens in range(8, 8000, 8)]
    chosen = largest_first(shapes)
    assert len(chosen) == warmup.MOST_SHAPES
    assert (chosen[0], chosen[-1]) == (shapes[-1], shapes[0])


def test_the_largest_micro_batch_that_fits_is_found_by_halving():
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        if tokens > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting(attempt, 16_384, 1024) == 2048
    assert tried == [16_384, 8192, 4096, 2048]
    assert fitting(attempt, 512, 2500) == 2500
    with pytest.raises(RunError, match="does not fit"):
        fitting(attempt, 16_384, 4096)


def test_all_ranks_take_what_fits_on_each():
    answers = iter([False, True])
    assert fitting(lambda tokens: None, 64, 8, lambda mine: mine and next(answers)) == 32


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def attempt(tokens):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        fitting(attempt, 64, 8)


def test_out_of_memory_in_the_search_leaves_no_trace(store, tmp_path, monkeypatch):
    this = Run(ramp(store, tmp_path / "none"), quiet)
    loss, sizes = this.parallel.loss, []

    def limited(part):
        total = loss(part)
        sizes.append(part.labels.numel())
        if sizes[-1] > 40:
            total.backward()
            torch.rand(3)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return total

    before = state(this)
    with monkeypatch.context() as patch, Untouched(this.model, this.optimizer):
        patch.setattr(this.parallel, "loss", limited)
        tokens = fitting(lambda n: warmup.try_shape(this, largest_first(shapes_of(this.schedule, n))[0]), 128, 32)
    assert tokens == 32
    assert max(sizes) > 40
    assert_same_state(before, state(this))
    assert all(parameter.grad is None for parameter in this.model.parameters())
    this.loader.close()


def test_the_search_begins_without_what_a_run_before_it_left_in_cycles(store, tmp_path, monkeypatch):
    this = Run(ramp(store, tmp_path / "none"), quiet)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    left = torch.nn.Linear(1, 1)
    left.forward = functools.partial(left.forward)
    gone = weakref.ref(left)
    gc.disable()
    try:
        del left
        assert gone() is not None
        warmup.found_by_trying(this)
        assert gone() is None
    finally:
        gc.enable()
        this.loader.close()


def test_a_run_on_a_cpu_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(random_state()) == {"cpu"}
    load_random_state({**random_state(), "cuda": "none"})


def test_a_micro_batch_that_does_not_fit_is_an_error_before_the_first_step(store, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Compiler", functools.partial(Compiler, backend="aot_eager"))

    def loss(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.parallel.Parallel.loss", loss)
    with pytest.raises(RunError, match="micro-batch does not fit"):
        loop.run(ramp(store, tmp_path / "run", run__compile=True), warn=quiet)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_step_is_the_same_in_any_number_of_micro_batches(store, tmp_path, parts):
    made = []
    for count in (1, parts):
        config = config_of(store, tmp_path / "none", batch__global_batch_sequences=6, run__seed=3)
        this = Run(config, quiet)
        batch = next(this.loader)
        this.micro_batch_tokens = batch.labels.size // count
        assert len(list(this.parts(batch, this.micro_batch_tokens))) == count
        figures = this.update(batch)
        made.append(({n: p.detach().clone() for n, p in this.model.named_parameters()}, figures))
        this.loader.close()
    (whole, figures), (split, ours) = made
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(ours[name], figures[name], rtol=1e-5, atol=1e-6)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-4, rtol=1e-4)


def test_an_automatic_micro_batch_is_kept_over_a_resume(store, tmp_path):
    config = config_of(store, tmp_path / "run", batch__micro_batch_tokens="auto")
    this = Run(config, quiet)
    assert this.micro_batch_tokens == warmup.CPU_TOKENS
    this.micro_batch_tokens = 4096  # as a search on a GPU would have found
    saved = {}
    this.saver.save = lambda step, **parts: saved.update(parts)
    this.step(next(this.loader))
    this.fetch()
    save(this)
    this.loader.close()
    assert saved["state"]["micro_batch_tokens"] == 4096
