"""The instruments: each equals a plain recomputation."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train import stability
from train.config import ModelConfig, OptimizerConfig
from train.model import GPT2
from train.optimizer import make_optimizer
from train.stability import SPIKE_RATIO, AdamVariance, LossRatio, Ratio

STEPS = st.lists(st.tuples(st.floats(0.1, 10), st.sampled_from([8, 16, 64])), min_size=1, max_size=40)


def stepped(layers=1, steps=1):
    """A model and its optimizer after so many steps."""
    torch.manual_seed(0)
    net = GPT2(ModelConfig(layers=layers, width=16, heads=1), 50, 8)
    optimizer = make_optimizer(net, OptimizerConfig())
    for _ in range(steps):
        net.loss(torch.randint(0, 50, (2, 8)), torch.arange(8).expand(2, 8), torch.randint(0, 50, (2, 8))).backward()
        optimizer.step()
    return net, optimizer


def named(variance):
    return variance.named({name: float(value) for name, value in variance.measure().items()})


@given(STEPS)
def test_loss_ratios_equal_the_slow_ones(steps):
    ratio = LossRatio()
    found = [ratio.update(*step) for step in steps]
    for i, (loss, seqlen) in enumerate(steps):
        before = [other for other, length in steps[:i] if length == seqlen]
        assert found[i].own == (loss / min(before) if before else 1.0)
        assert found[i].overall == (loss / min(other for other, _ in steps[:i]) if i else 1.0)
    assert ratio.spikes == sum(r.own > SPIKE_RATIO for r in found)


@given(STEPS, st.integers(0, 40))
def test_loss_ratios_go_on_from_their_saved_state(steps, at):
    whole, first = LossRatio(), LossRatio()
    expected = [whole.update(*step) for step in steps]
    found = [first.update(*step) for step in steps[:at]]
    second = LossRatio.from_state(json.loads(json.dumps(first.state_dict())))
    assert found + [second.update(*step) for step in steps[at:]] == expected
    assert second == whole


def test_a_change_of_length_is_no_spike_but_a_rise_after_it_is():
    ratio = LossRatio()
    assert ratio.update(2.0, 64).own == 1.0
    assert ratio.update(4.0, 8) == Ratio(own=1.0, overall=2.0)
    assert ratio.spikes == 0
    assert ratio.update(6.0, 8).own == 1.5
    assert ratio.spikes == 1
    assert math.isnan(ratio.update(math.nan, 8).own)
    assert ratio.least == {64: 2.0, 8: 4.0}


@pytest.mark.parametrize("at_once", [1, 300, 1 << 25])
def test_adam_variance_equals_the_slow_sum_and_names_the_largest(at_once, monkeypatch):
    monkeypatch.setattr(stability, "ROOTS_AT_ONCE", at_once)
    net, optimizer = stepped(layers=2, steps=3)
    variance = AdamVariance(net, optimizer)
    parts = {1: len(variance.names), 300: 20, 1 << 25: 1}
    assert len(variance.parts) == pytest.approx(parts[at_once], abs=5)
    found = named(variance)
    roots = {name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in net.named_parameters()}
    assert found["variance_l1"] == pytest.approx(sum(float(r.sum()) for r in roots.values()), rel=1e-5)
    assert found["variance_max"] == pytest.approx(max(float(r.max()) for r in roots.values()), rel=1e-6)
    assert found["variance_argmax"] == max(roots, key=lambda name: float(roots[name].max()))


def test_adam_variance_follows_an_injected_burst():
    net, optimizer = stepped()
    weight = dict(net.named_parameters())["blocks.0.down.weight"]
    optimizer.state[weight]["exp_avg_sq"][3, 5] = 49.0
    found = named(AdamVariance(net, optimizer))
    assert (found["variance_max"], found["variance_argmax"]) == (7.0, "blocks.0.down.weight")
