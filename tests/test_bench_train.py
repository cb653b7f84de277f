"""The bench of training beside the plain trainer: smaller micro-batches for that, no other graphs for ours."""

import functools
from pathlib import Path

import pytest
import torch
from test_compile import fresh  # noqa: F401


def test_the_plain_trainer_takes_smaller_micro_batches_where_ours_do_not_fit_it(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from bench_train import Plain

    class Trainer:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

        def step(self, rows, seqlen, micro_steps):
            if rows * seqlen > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.zeros(())

    plain = object.__new__(Plain)
    plain.trainer = Trainer()
    for most, expected in ((120, (12, 3)), (40, (3, 12))):
        Trainer.most = most
        plain.settle(10, 36, 120)
        assert (plain.rows, plain.micro_steps) == expected
        assert plain.steps(1) == 360
    Trainer.most = 9
    with pytest.raises(torch.OutOfMemoryError):
        plain.settle(10, 36, 120)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_plain_trainer_beside_ours_makes_none_of_our_graphs_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import bench_train

    from train import run as runs
    from train.compile import Compiler

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(runs, "Compiler", functools.partial(Compiler, backend="aot_eager"))
    plain = bench_train.NanoTrainer.__init__

    def eager(self, *, compiled, **shape):
        assert compiled
        plain(self, compiled=False, **shape)

    monkeypatch.setattr(bench_train.NanoTrainer, "__init__", eager)
    shape = "--layers 1 --width 32 --heads 2 --vocab-size 512 --batch-tokens 64 --steps 1 --rounds 1 --device cpu"
    given = f"{shape} --compile true --lengths 32 16 --nanogpt 32"
    try:
        found = bench_train.bench(bench_train.arguments(given.split()))
    finally:
        torch.set_float32_matmul_precision(before)
    assert found["compiled"] and found["graphs"] > 0
    assert found["recompiles"] == 0
