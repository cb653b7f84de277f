"""What the bench of training does where the plain trainer beside ours needs more memory."""

from pathlib import Path

import pytest
import torch


def test_the_plain_trainer_takes_smaller_micro_batches_where_ours_do_not_fit_it(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from bench_train import settled

    class Plain:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])

        def step(self, rows, seqlen, micro_steps):
            if rows * seqlen > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return torch.zeros(())

    Plain.most = 40
    assert settled(Plain(), 12, 10, 3) == (3, 12)
    Plain.most = 9
    with pytest.raises(torch.OutOfMemoryError):
        settled(Plain(), 12, 10, 3)
