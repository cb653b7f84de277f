"""The instruments: each equals a plain recomputation."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import config_of, tiny_store
from torch.nn import functional as F

from train import checkpoint, loop, stability
from train.config import ModelConfig, OptimizerConfig
from train.data import micro_batches
from train.metrics import read_metrics
from train.model import GPT2
from train.optimizer import make_optimizer
from train.stability import SPIKE_RATIO, AdamVariance, LossRatio, Ratio, first_row

STEPS = st.lists(st.tuples(st.floats(0.1, 10), st.sampled_from([8, 16, 64])), min_size=1, max_size=40)


def stepped(layers=1, steps=1):
    """A model and its optimizer after so many steps."""
    torch.manual_seed(0)
    net = GPT2(ModelConfig(layers=layers, width=16, heads=1), 50, 8)
    optimizer = make_optimizer(net, OptimizerConfig())
    for _ in range(steps):
        ids, labels = torch.randint(0, 50, (2, 2, 8))
        net(ids, torch.arange(8).expand(2, 8), labels=labels).backward()
        optimizer.step()
    return net, optimizer


def named(variance):
    return variance.named({name: float(value) for name, value in variance.measure().items()})


@given(STEPS)
def test_loss_ratios_equal_the_slow_ones(steps):
    ratio = LossRatio((1.1, SPIKE_RATIO, 2.0))
    found = [ratio.update(*step) for step in steps]
    for i, (loss, seqlen) in enumerate(steps):
        before = [other for other, length in steps[:i] if length == seqlen]
        assert found[i].own == (loss / min(before) if before else 1.0)
        assert found[i].overall == (loss / min(other for other, _ in steps[:i]) if i else 1.0)
    assert ratio.spikes == {name: sum(r.own > float(name) for r in found) for name in ("1.1", "1.2", "2")}


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
    assert ratio.spikes == {"1.2": 0}
    assert ratio.update(6.0, 8).own == 1.5
    assert ratio.spikes == {"1.2": 1}
    assert math.isnan(ratio.update(math.nan, 8).own)
    assert ratio.spikes == {"1.2": 2}  # a loss that is no number is one
    assert ratio.least == {64: 2.0, 8: 4.0}


@pytest.mark.parametrize("at_once", [1, 300, 1 << 25])
def test_adam_variance_equals_the_slow_sum_and_names_the_largest(at_once, monkeypatch):
    monkeypatch.setattr(stability, "ROOTS_AT_ONCE", at_once)
    net, optimizer = stepped(layers=2, steps=3)
    variance = AdamVariance(net, optimizer)
    parts = {1: len(variance.names), 300: 20, 1 << 25: 1}
    assert len(variance.parts) == pytest.approx(parts[at_once], abs=5)
    found = named(variance)
    moments = [optimizer.state[parameter]["exp_avg_sq"] for parameter in net.parameters()]
    for here, there in zip(stability._on_cpu(moments), variance._on_device(moments), strict=True):
        torch.testing.assert_close(here, there)
    roots = {name: optimizer.state[p]["exp_avg_sq"].sqrt() for name, p in net.named_parameters()}
    assert found["variance_l1"] == pytest.approx(sum(float(r.sum()) for r in roots.values()), rel=1e-5)
    assert found["variance_max"] == pytest.approx(max(float(r.max()) for r in roots.values()), rel=1e-6)
    assert found["variance_argmax"] == max(roots, key=lambda name: float(roots[name].max()))


@given(st.lists(st.integers(0, 9000), min_size=1, max_size=4), st.integers(0, 2**32), st.data())
def test_roots_on_a_cpu_equal_the_slow_ones_whatever_is_among_them(sizes, seed, data):
    generator = torch.Generator().manual_seed(seed)
    moments = [torch.rand(size + 1, generator=generator) ** 20 for size in sizes]
    odd = data.draw(st.sampled_from([None, 0.0, 1e-45, 3e38, math.inf, math.nan, -math.nan]))
    tensor = data.draw(st.integers(0, len(sizes) - 1))
    if odd is not None:
        moments[tensor][data.draw(st.integers(0, sizes[tensor]))] = odd
    l1, most, index = stability._on_cpu(moments)
    slow = torch.tensor(math.fsum(root for v in moments for root in v.double().sqrt().tolist()))
    torch.testing.assert_close(l1, slow, rtol=1e-5, atol=0, equal_nan=True)
    largest, where = torch.stack([v.max() for v in moments]).max(0)
    assert torch.equal(most.nan_to_num(-1), largest.nan_to_num(-1))
    assert index == where


def test_adam_variance_follows_an_injected_burst():
    net, optimizer = stepped()
    weight = dict(net.named_parameters())["blocks.0.down.weight"]
    optimizer.state[weight]["exp_avg_sq"][3, 5] = 49.0
    found = named(AdamVariance(net, optimizer))
    assert (found["variance_max"], found["variance_argmax"]) == (7.0, "blocks.0.down.weight")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def slow_attention_logit(net, part, spans):
    """All pairs of all heads of all blocks, one after the other; `spans` says which positions see each other."""
    entered = []
    hooks = [block.register_forward_pre_hook(lambda _, args: entered.append(args[0][0])) for block in net.blocks]
    with torch.no_grad():
        net(part.input_ids, part.position_ids, part.sight)
    for hook in hooks:
        hook.remove()
    found = []
    at = part.position_ids[0].tolist()
    for x, block in zip(entered, net.blocks, strict=True):
        projected = F.linear(block.norm_1(x), block.attention.qkv.weight, block.attention.qkv.bias).detach()
        width, heads = x.shape[1], block.attention.heads
        size = width // heads
        for head in range(heads):
            q = projected[:, head * size : (head + 1) * size]
            k = projected[:, width + head * size : width + (head + 1) * size]
            for i in range(len(x)):
                for j in range(i + 1):
                    if spans[i] == spans[j]:
                        turn = at[i] - at[j] if net.config.positions == "rope" else 0
                        found.append(float(dot(q[i], k[j], turn, net.config.rope_theta)) / size**0.5)
    return max(found)


def dot(q, k, turn, theta):
    """q k with each pair of elements turned by the angle between the positions, as complex numbers are multiplied."""
    (a, b), (c, d) = q.chunk(2), k.chunk(2)
    angle = turn * theta ** (-torch.arange(len(a)) / len(a))
    return ((a * c + b * d) * angle.cos() - (b * c - a * d) * angle.sin()).sum()


SCHEDULES = {
    "document": {},
    "causal": {"model__mask": "causal"},
    "rope": {"model__positions": "rope"},
    "windows": {
        "curriculum": {"pacing": "skyladder", "seqlen": 32, "attention_window_start": 8, "duration_steps": 9}
        | {"attention_window_multiple": 8}
    },
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_largest_attention_logit_equals_all_of_them_one_by_one(kind, store, tmp_path):
    changes = dict(SCHEDULES[kind])
    curriculum = changes.pop("curriculum", None)
    config = config_of(store, tmp_path / "none", **changes, run__attention_logits_every_steps=1)
    if curriculum:
        data = config.model_dump(mode="json") | {"curriculum": curriculum}
        config = type(config).model_validate(data)
    this = loop.Run(config, lambda text: None)
    with torch.no_grad():  # attention of random models is flat: make some of it sharp
        for parameter in this.model.parameters():
            parameter.mul_(3)
    for _ in range(3):
        batch = next(this.loader)
        row = first_row(batch)
        assert row.labels.shape == (1, batch.seqlen)
        assert row.cu_seqlens[-1] == batch.seqlen
        assert row.max_seqlen == np.diff(row.cu_seqlens).max() <= batch.seqlen
        begins = {int(i) for i in batch.cu_seqlens} if kind != "causal" else {0}
        spans = [sum(b <= i for b in begins) for i in range(batch.seqlen)]
        (part,) = micro_batches(row, row.seqlen, this.device, config.model.mask)
        expected = slow_attention_logit(this.model, part, spans)
        assert float(this.attention_logit(batch)) == pytest.approx(expected, rel=1e-5)
    this.loader.close()


def test_attention_logits_are_taken_when_asked_and_leave_training_as_it_was(store, tmp_path):
    for name, every in (("without", 0), ("with", 5)):
        config = config_of(store, tmp_path / name, run__attention_logits_every_steps=every, run__log_every_steps=4)
        loop.run(config, warn=lambda text: None)
    steps = [line["step"] for line in read_metrics(tmp_path / "with") if "attention_logit_max" in line]
    last = read_metrics(tmp_path / "with")[-1]["step"]
    assert steps == list(range(1, last + 1, 5))
    assert not any("attention_logit_max" in line for line in read_metrics(tmp_path / "without"))
    a, b = (checkpoint.find(tmp_path / name)[-1] / "model.safetensors" for name in ("with", "without"))
    assert a.read_bytes() == b.read_bytes()


def test_what_a_run_counts_is_what_its_lines_say(store, tmp_path):
    ratios = [1.01, 1.05]
    outcome = loop.run(
        config_of(store, tmp_path / "run", run__spike_ratios=ratios, optimizer__clip=0.9), warn=lambda text: None
    )
    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert outcome.spikes == {str(r): sum(line["loss_ratio"] > r for line in lines) for r in ratios}
    assert outcome.clipped_share == sum(line["grad_norm"] > 0.9 for line in lines) / len(lines)
    assert 0 < outcome.clipped_share < 1
    assert outcome.spikes["1.01"] > 0
