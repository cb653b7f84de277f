"""Clipping: by norm as torch does it, AdaGC as its slow twin, and both go on exactly where they left off."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config_of, tiny_store
from safetensors.torch import load_file

from train import checkpoint, loop
from train.clipping import Clipping
from train.config import OptimizerConfig
from train.metrics import read_metrics

SIZES = ((3, 4), (5,), (2, 2))


def gradients(seed, loud=None):
    """One step's: random, the second tensor zero at every fourth seed, one tensor `loud` times a thousand."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator) for size in SIZES]
    if seed % 4 == 3:
        made[1].zero_()
    if loud is not None:
        made[loud] *= 1000
    return made


class SlowAdaGC:
    """The paper's algorithm for one tensor after the other, in float64; what it scaled down, as a share."""

    def __init__(self, clip, warmup):
        self.clip, self.warmup, self.step, self.gamma = clip, warmup, 0, [math.inf] * len(SIZES)

    def apply(self, made):
        made = [g.double().numpy() for g in made]
        total = math.sqrt(sum((g**2).sum() for g in made))
        clipped, scaled = [], 0
        for i, g in enumerate(made):
            norm = math.sqrt((g**2).sum())
            if self.step < self.warmup:
                scale = min(1, self.clip / total)
            else:
                scale = min(1, 1.05 * self.gamma[i] / norm) if norm else 1
            clipped.append(g * scale)
            scaled += scale < 1
            after = np.linalg.norm(clipped[-1])
            if norm and self.step < self.warmup:
                self.gamma[i] = min(self.gamma[i], after)
            elif norm:
                self.gamma[i] = after if math.isinf(self.gamma[i]) else 0.98 * self.gamma[i] + 0.02 * after
        self.step += 1
        return clipped, scaled / len(made)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 6), st.floats(0.1, 5))
def test_adagc_equals_its_slow_twin(seed, warmup, clip):
    fast = Clipping(OptimizerConfig(clip=clip, clipping="adagc", clipping_warmup_steps=warmup))
    slow = SlowAdaGC(clip, warmup)
    for step in range(12):
        made = gradients(seed + step, loud=1 if step == 9 else None)
        expected, scaled = slow.apply(made)
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in made))
        found, share = fast.apply(made, step)
        assert float(found) == pytest.approx(norm, rel=1e-5)
        for g, e in zip(made, expected, strict=True):
            np.testing.assert_allclose(g.numpy(), e, rtol=1e-4, atol=1e-6)
        assert float(share) == pytest.approx(scaled)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
@pytest.mark.parametrize("step", [2, 6])
def test_a_step_that_is_not_finite_is_not_remembered(odd, step):
    adapted = Clipping(OptimizerConfig(clip=1.0, clipping="adagc", clipping_warmup_steps=4))
    for before in range(step):
        adapted.apply(gradients(4 * before), before)
    history, broken = adapted.history.clone(), gradients(64)
    broken[1][0] = odd
    adapted.apply(broken, step)
    assert torch.equal(adapted.history, history)


def test_a_burst_in_one_tensor_is_held_to_its_history_and_leaves_the_others_alone():
    config = {"clip": 1e9, "clipping_warmup_steps": 5}
    by_norm, adapted = Clipping(OptimizerConfig(clip=1.0)), Clipping(OptimizerConfig(clipping="adagc", **config))
    for step in range(8):
        adapted.apply(gradients(4 * step), step)
    before = adapted.history.clone()
    loud, calm = gradients(64, loud=0), gradients(64)
    norm, share = adapted.apply(loud, 8)
    assert float(norm) > 1000
    assert float(loud[0].norm()) == pytest.approx(1.05 * float(before[0]), rel=1e-5)
    assert all(float(a.norm()) <= float(b.norm()) for a, b in zip(loud[1:], calm[1:], strict=True))
    assert 0 < float(share) <= 1
    again = gradients(64, loud=0)
    by_norm.apply(again, 0)
    assert float(again[1].norm()) < 0.01 < float(loud[1].norm())  # by norm the burst silences everything else


@pytest.mark.parametrize("clip", [0.0, 0.7, 100.0])
def test_by_norm_equals_torch(clip):
    made, twin = gradients(1), [torch.nn.Parameter(torch.zeros(size)) for size in SIZES]
    for parameter, gradient in zip(twin, made, strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(twin, clip or math.inf)
    norm, clipped = Clipping(OptimizerConfig(clip=clip)).apply(made, 0)
    assert torch.equal(norm, expected)
    assert all(torch.equal(a, b.grad) for a, b in zip(made, twin, strict=True))
    assert bool(clipped) == (0 < clip < float(expected))


@pytest.mark.parametrize("at", [0, 2, 6])
def test_adagc_goes_on_from_its_saved_state_to_the_bit(at):
    config = OptimizerConfig(clip=1.0, clipping="adagc", clipping_warmup_steps=4)
    whole, part = Clipping(config), Clipping(config)
    for step in range(10):
        made, again = gradients(step), gradients(step)
        if step == at:
            state = json.loads(json.dumps(part.state_dict(), allow_nan=False))
            part = Clipping(config)
            part.load_state_dict(state, torch.device("cpu"))
        whole.apply(made, step)
        part.apply(again, step)
        assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert torch.equal(whole.history, part.history)


def test_a_run_with_adagc_that_breaks_off_ends_with_the_same_weights_to_the_last_bit(tmp_path, monkeypatch):
    store = tiny_store(tmp_path / "store")
    changes = {
        "optimizer__clipping": "adagc",
        "optimizer__clipping_warmup_steps": 4,
        "model__init": "scaled_embedding",
    }

    def run(name):
        return loop.run(config_of(store, tmp_path / name, **changes), warn=lambda text: None)

    run("whole")
    update = loop.Run.update

    def breaks(self, batch):
        if batch.step == 17:
            raise KeyboardInterrupt
        return update(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Run, "update", breaks)
        run("broken")
    run("broken")
    whole, broken = (load_file(checkpoint.find(tmp_path / n)[-1] / "model.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    lines = [
        [
            {k: v for k, v in line.items() if k not in ("elapsed_s", "tokens_per_s")}
            for line in read_metrics(tmp_path / n)
        ]
        for n in ("whole", "broken")
    ]
    assert lines[0] == lines[1]
    assert max(line["clipped"] for line in lines[0] if "clipped" in line) > 0
