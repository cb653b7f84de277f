"""The optimizer: what decays, and the learning rate by steps and by tokens."""

import math

import pytest
import torch

from train.config import ModelConfig, OptimizerConfig
from train.model import GPT2
from train.optimizer import learning_rate, make_optimizer
from train.stability import LossRatio, adam_variance, named_variance


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


def test_adam_variance_equals_the_slow_sum_and_names_the_largest():
    net = GPT2(ModelConfig(layers=1, width=16, heads=1), 50, 8)
    optimizer = make_optimizer(net, OptimizerConfig())
    assert adam_variance(net, optimizer) == {}
    assert named_variance({}, net, optimizer)["variance_l1"] == 0
    net.loss(torch.randint(0, 50, (2, 8)), torch.arange(8).expand(2, 8), torch.randint(0, 50, (2, 8))).backward()
    optimizer.step()
    figures = {name: float(value) for name, value in adam_variance(net, optimizer).items()}
    found = named_variance(figures, net, optimizer)
    roots = {name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in net.named_parameters()}
    assert found["variance_l1"] == pytest.approx(sum(float(r.sum()) for r in roots.values()), rel=1e-5)
    assert found["variance_max"] == pytest.approx(max(float(r.max()) for r in roots.values()), rel=1e-6)
    assert found["variance_argmax"] == max(roots, key=lambda name: float(roots[name].max()))


def test_the_loss_ratio_compares_with_the_least_loss_before():
    ratio = LossRatio()
    assert [ratio.update(loss) for loss in (4.0, 2.0, 3.0, 1.0)] == [1.0, 0.5, 1.5, 0.5]
    assert ratio.spikes == 1
    assert math.isinf(LossRatio().least)
