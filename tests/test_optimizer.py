"""The optimizer: what decays, and the learning rate by steps and by tokens."""

import pytest

from train.config import ModelConfig, OptimizerConfig
from train.model import GPT2
from train.optimizer import learning_rate, make_optimizer


def test_biases_norms_and_positions_do_not_decay():
    net = GPT2(ModelConfig(layers=1, width=16, heads=1), 50, 8)
    groups = make_optimizer(net, OptimizerConfig(weight_decay=0.3)).param_groups
    names = {id(p): name for name, p in net.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    kept = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | kept == set(names.values())
    assert "positions.weight" in kept
    assert "tokens.weight" in decayed
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)


def test_the_rate_warms_up_by_steps_and_decays_by_tokens():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(config, 0, 0, 100) == pytest.approx(0.1)
    assert learning_rate(config, 9, 0, 100) == pytest.approx(1.0)
    assert learning_rate(config, 500, 50, 100) == pytest.approx(0.55)
    assert learning_rate(config, 500, 100, 100) == learning_rate(config, 900, 10**6, 100) == pytest.approx(0.1)
    linear = OptimizerConfig(lr=1.0, decay="linear", decay_tokens=200)
    assert learning_rate(linear, 0, 50, 100) == pytest.approx(0.75)
    assert learning_rate(OptimizerConfig(lr=1.0, decay="constant"), 0, 99, 100) == 1.0
