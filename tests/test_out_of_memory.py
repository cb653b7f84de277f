"""The largest micro-batch that fits is found, and what does not fit is told."""

import functools
import gc
import weakref

import pytest
import torch
from runs import config_of, tiny_store
from test_warmup import assert_same_state, quiet, ramp, state

from pipeline.errors import RunError
from train import loop, warmup
from train import run as runs
from train.compile import Compiler
from train.distributed import Ranks
from train.metrics import read_metrics
from train.out_of_memory import largest_that_fits, out_of_memory_explained
from train.run import Run
from train.state import save
from train.warmup import largest_first, shapes_of, untouched


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def test_the_largest_micro_batch_that_fits_is_found_by_halving():
    tried = []

    def attempt(tokens):
        tried.append(tokens)
        if tokens > 3000:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_that_fits(attempt, 16_384, 1024) == 2048
    assert tried == [16_384, 8192, 4096, 2048]
    assert largest_that_fits(attempt, 512, 2500) == 2500
    with pytest.raises(RunError, match="does not fit"):
        largest_that_fits(attempt, 16_384, 4096)


def test_all_ranks_take_what_fits_on_each():
    answers = iter([False, True])
    assert largest_that_fits(lambda tokens: None, 64, 8, lambda mine: mine and next(answers)) == 32


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 16),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 16),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 16),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (ValueError("a bug"), None),
    ],
)
def test_a_lack_of_memory_is_known_whoever_tells_it_and_nothing_else_is_taken_for_it(error, found):
    def attempt(tokens):
        if tokens > 16:
            raise error

    if found:
        assert largest_that_fits(attempt, 64, 8) == found
        with (
            pytest.raises(RunError, match=r"64 tokens: .*(?:out of memory|ALLOC)"),
            out_of_memory_explained(lambda: 64),
        ):
            attempt(64)
    else:
        for tried in (lambda: largest_that_fits(attempt, 64, 8), lambda: within(attempt)):
            with pytest.raises(type(error)) as raised:
                tried()
            assert raised.value is error


def within(attempt):
    with out_of_memory_explained(lambda: 64):
        attempt(64)


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
    with monkeypatch.context() as patch, untouched(this.model, this.optimizer):
        patch.setattr(this.parallel, "loss", limited)
        tokens = largest_that_fits(
            lambda n: warmup.try_shape(this, largest_first(shapes_of(this.schedule, n))[0]), 128, 32
        )
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
        warmup.micro_batch_that_fits(this)
        assert gone() is None
    finally:
        gc.enable()
        this.loader.close()


class Two(Ranks):
    """The other of two ranks has 400 bytes free, and what does not fit there does not fit."""

    def __init__(self, other_fits):
        super().__init__(0, 2)
        self.other_fits = other_fits

    def gather(self, tensor):
        return torch.stack([tensor, torch.tensor(400 if tensor > 1 else int(self.other_fits))])


def searching(store, folder, monkeypatch, ranks, step=0, fitting_tokens=10**6, **changes):
    """(micro-batch found, tokens tried, bytes held back at each) of a search with 1,000 of 2,000 bytes free."""
    this = Run(ramp(store, folder, **changes), quiet)
    this.ranks, this.at.step, this.micro_batch_tokens = ranks, step, 64
    tried, held, empty = [], [], torch.empty

    def tries(run, shape):
        tried.append(shape.tokens)
        if shape.tokens > fitting_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def noted(size, **form):
        held.append(size)
        return empty(size, **form)

    this.loader.close()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
        patch.setattr(warmup, "try_shape", tries)
        patch.setattr(torch, "empty", noted)
        return warmup.micro_batch_that_fits(this), tried, held


def test_ranks_search_with_the_memory_of_the_one_that_has_least(store, tmp_path, monkeypatch):
    _, _, held = searching(store, tmp_path / "none", monkeypatch, Two(other_fits=True))
    assert held == [1000 - 400 + 100]


def test_a_run_that_goes_on_halves_what_it_had_only_where_it_does_not_fit(store, tmp_path, monkeypatch):
    assert searching(store, tmp_path / "none", monkeypatch, Ranks(), step=5) == (64, [64, 63], [0])
    found, tried, _ = searching(store, tmp_path / "none", monkeypatch, Ranks(), step=5, fitting_tokens=40)
    assert (found, tried) == (32, [64, 32, 30])


@pytest.mark.parametrize(
    ("deterministic", "fitting_tokens", "resets"), [(True, 40, 1), (True, 64, 0), (False, 40, 0)]
)
def test_graphs_made_for_sizes_that_do_not_fit_are_no_part_of_a_deterministic_run(
    store, tmp_path, monkeypatch, deterministic, fitting_tokens, resets
):
    told = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: told.append("reset"))
    changes = {"fitting_tokens": fitting_tokens, "run__deterministic": deterministic}
    searching(store, tmp_path / "none", monkeypatch, Ranks(), step=5, **changes)
    assert len(told) == resets


def test_shards_of_which_one_rank_alone_ran_out_of_memory_end_at_once(store, tmp_path, monkeypatch):
    real = Run.__init__

    def sharded(self, *given):
        real(self, *given)
        self.parallel.kind = "fsdp"

    monkeypatch.setattr(Run, "__init__", sharded)
    with pytest.raises(RunError, match=r"out of memory: rank 1\n[\s\S]*micro_batch_tokens"):
        searching(store, tmp_path / "none", monkeypatch, Two(other_fits=False))


def test_a_micro_batch_that_does_not_fit_is_an_error_before_the_first_step(store, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "Compiler", functools.partial(Compiler, backend="aot_eager"))

    def loss(self, part):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("train.parallel.Parallel.loss", loss)
    with pytest.raises(RunError, match="micro-batch does not fit"):
        loop.run(ramp(store, tmp_path / "run", run__compile=True), warn=quiet)


def test_no_memory_for_a_later_step_is_told_and_the_run_goes_on_in_smaller_parts(store, tmp_path, monkeypatch):
    whole = loop.run(config_of(store, tmp_path / "whole"), warn=quiet)
    step = Run.step

    def no_room(self, batch):
        if batch.step == 9 and self.micro_batch_tokens == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, batch)

    monkeypatch.setattr(Run, "step", no_room)
    with pytest.raises(RunError, match="micro-batch does not fit"):
        loop.run(config_of(store, tmp_path / "run"), warn=quiet)
    told = []
    again = loop.run(config_of(store, tmp_path / "run", batch__micro_batch_tokens=32), warn=told.append)
    assert told == [f"going on after step 7 of {whole.step}"]
    assert again.validation_loss == pytest.approx(whole.validation_loss, rel=1e-3)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


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
