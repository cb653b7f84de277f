"""Runs that several ranks share: how they are started, and what makes two of them the same."""

import os
import signal

import pytest
import torch
from runs import as_toml, config_of
from safetensors.torch import load_file

from train import checkpoint, loop
from train.cli import main
from train.metrics import read_metrics

UNEVEN = {
    "batch__global_batch_sequences": 7,
    "batch__micro_batch_tokens": 32,
    "run__attention_logits_every_steps": 5,
}
"""Rows that neither 2 nor 4 divide, in micro-batches of which some ranks need one more than others."""


def quiet(text):
    pass


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


def run_alone(store, folder):
    """The run of UNEVEN settings on one rank; returns its folder."""
    loop.run(config_of(store, folder, **UNEVEN), warn=quiet)
    return folder
