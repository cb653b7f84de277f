"""The model: masks equal a slow twin, and documents in one row do not see each other."""

import cmath
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.attention import Sight, sight_of_positions
from train.config import PRESETS, ModelConfig
from train.model import GPT2, rotate, rotation

CONFIG = {"layers": 2, "width": 32, "heads": 2}


def model(mask="document", positions="learned"):
    torch.manual_seed(0)
    return GPT2(ModelConfig(**CONFIG, mask=mask, positions=positions), 50, 64).eval()


def positions(rows):
    return torch.tensor([[p for n in spans for p in range(n)] for spans in rows])


ROWS = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=4).map(
    lambda rows: [[*spans, 40 - sum(spans)] for spans in rows]
)


@given(ROWS)
def test_the_document_mask_equals_its_slow_twin(rows):
    mask = sight_of_positions(positions(rows)).mask
    if mask is None:
        assert all(len(spans) == 1 for spans in rows)
        return
    for row, spans in enumerate(rows):
        span = [s for s, n in enumerate(spans) for _ in range(n)]
        expected = [[span[i] == span[j] and j <= i for j in range(40)] for i in range(40)]
        assert mask[row, 0].tolist() == expected


@settings(max_examples=10)
@given(ROWS, st.sampled_from(["learned", "rope"]))
def test_packed_documents_give_the_logits_they_give_alone(rows, kind):
    net = model(positions=kind)
    ids = torch.randint(0, 50, (len(rows), 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = net(ids, positions(rows))
        for row, spans in enumerate(rows):
            first = 0
            for n in spans:
                alone = net(ids[row : row + 1, first : first + n], torch.arange(n)[None])
                torch.testing.assert_close(together[row, first : first + n], alone[0], atol=1e-5, rtol=1e-4)
                first += n


def test_the_causal_mask_sees_the_whole_row_before_but_nothing_after():
    net = model("causal")
    ids = torch.randint(0, 50, (1, 20))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50
    with torch.no_grad():
        a, b = net(ids, positions([[5, 15]])), net(changed, positions([[5, 15]]))
    assert torch.equal(a[0, :10], b[0, :10])
    assert not torch.allclose(a[0, 10:], b[0, 10:])


def test_the_loss_is_a_sum_over_targets_only():
    net = model()
    ids, labels = torch.randint(0, 50, (2, 16)), torch.randint(0, 50, (2, 16))
    with torch.no_grad():
        whole = net(ids, positions([[16], [16]]), labels=labels)
        masked = labels.clone()
        masked[1] = -100
        first = net(ids, positions([[16], [16]]), labels=masked)
        second = net(ids[1:], positions([[16]]), labels=labels[1:])
    torch.testing.assert_close(first + second, whole)
    assert whole.item() / 32 == pytest.approx(math.log(50), abs=0.3)  # not of the padded vocabulary


@torch.no_grad()
def test_rotary_logits_depend_on_distances_only():
    torch.manual_seed(0)
    net = GPT2(ModelConfig(**CONFIG, positions="rope"), 50, 64).eval()
    for block in net.blocks:
        block.attention.qkv.weight *= 20  # or attention is all but even, whatever the positions
    ids = torch.randint(0, 50, (2, 24))
    at = torch.arange(24).expand_as(ids)
    torch.testing.assert_close(net(ids, at, Sight()), net(ids, at + 1000, Sight()), atol=1e-3, rtol=0)
    assert not torch.allclose(net(ids, at, Sight()), net(ids, at * 2, Sight()), atol=1e-2)


@pytest.mark.parametrize("theta", [10_000.0, 100.0])
def test_rotation_equals_its_slow_twin(theta):
    x, at = torch.randn(2, 5, 3, 8), torch.randint(0, 500, (2, 5))
    expected = torch.empty_like(x)
    for b, t, h, i in itertools.product(range(2), range(5), range(3), range(4)):
        pair = complex(x[b, t, h, i], x[b, t, h, i + 4]) * cmath.exp(1j * int(at[b, t]) * theta ** (-2 * i / 8))
        expected[b, t, h, i], expected[b, t, h, i + 4] = pair.real, pair.imag
    torch.testing.assert_close(rotate(x, rotation(at, 8, theta)), expected, atol=1e-4, rtol=0)


PUBLISHED = {  # GPT-2: exactly, as the checkpoints that OpenAI released; GPT-3: as its paper rounds
    "gpt2-124m": (1024, 124_439_808, 0),
    "gpt2-350m": (1024, 354_823_168, 0),
    "gpt2-774m": (1024, 774_030_080, 0),
    "gpt2-1.5b": (1024, 1_557_611_200, 0),
    "gpt3-125m": (2048, 125e6, 1e6),
    "gpt3-350m": (2048, 350e6, 10e6),
    "gpt3-760m": (2048, 760e6, 5e6),
    "gpt3-1.3b": (2048, 1.3e9, 20e6),
}


def test_every_published_preset_has_its_size_in_a_test():
    assert PUBLISHED.keys() == {name for name in PRESETS if name not in ("gpt2-nano", "gpt2-micro")}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_numbers_of_parameters(preset):
    context, published, rounding = PUBLISHED[preset]
    config = ModelConfig(preset=preset)
    with torch.device("meta"):
        net = GPT2(config, 50_257, context)
    padding = (50_304 - 50_257) * config.width
    assert sum(p.numel() for p in net.parameters()) - padding == pytest.approx(published, abs=rounding)


@pytest.mark.parametrize("init", ["gpt2", "small", "scaled_embedding"])
def test_initial_deviations_are_those_of_the_papers(init):
    torch.manual_seed(0)
    net = GPT2(ModelConfig(layers=3, width=64, heads=2, init=init), 2000, 256)
    expected = 0.02 if init == "gpt2" else (2 / (5 * 64)) ** 0.5
    for name, parameter in net.state_dict().items():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" not in name:
            adds = name.endswith(("attention.out.weight", "down.weight"))
            assert float(parameter.std()) == pytest.approx(expected / (6**0.5 if adds else 1), rel=0.05), name


def test_a_scaled_embedding_multiplies_what_enters_the_blocks_and_nothing_else():
    nets = {}
    for init in ("small", "scaled_embedding"):
        torch.manual_seed(0)
        nets[init] = GPT2(ModelConfig(**CONFIG, init=init), 50, 64).eval()
    entered = {}
    ids = torch.randint(0, 50, (2, 40))
    for init, net in nets.items():
        net.blocks[0].register_forward_pre_hook(lambda _, args, init=init: entered.update({init: args[0]}))
        with torch.no_grad():
            net(ids, positions([[40], [40]]))
    torch.testing.assert_close(entered["scaled_embedding"], entered["small"] * 32**0.5)
    small, scaled = (net.state_dict() for net in nets.values())
    assert all(torch.equal(small[name], scaled[name]) for name in small)
    # the residual stream is of the order of one, as the paper asks
    assert float(entered["scaled_embedding"].std()) == pytest.approx((2 * 2 / 5) ** 0.5, rel=0.1)
