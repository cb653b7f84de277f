"""What the bench of training does where the plain trainer beside ours needs more memory."""

from pathlib import Path

import pytest
import torch


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
