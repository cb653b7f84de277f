"""The chunked cross entropy equals torch's plain one, values and gradients, whatever the chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from train import loss
from train.loss import cross_entropy

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(1, 70), st.integers(0, 30))


def inputs(tokens, width, vocabulary, padding, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary + padding, width, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    return hidden, weight, labels, vocabulary


def plain(hidden, weight, labels, vocabulary):
    logits = F.linear(hidden, weight[:vocabulary]).float()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def gradients(function, hidden, weight, *rest):
    total = function(hidden, weight, *rest)
    return total.detach(), *torch.autograd.grad(total * 0.25, (hidden, weight))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 50))
def test_values_and_gradients_are_those_of_the_plain_loss(shape, rows):
    case = inputs(*shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(loss.CHUNK_BYTES, "cpu", rows * 4 * (shape[2] + shape[3]))
        found = gradients(cross_entropy, *case)
        with torch.no_grad():
            torch.testing.assert_close(cross_entropy(*case), found[0])
    for ours, expected in zip(found, gradients(plain, *case), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert not found[2][shape[2] :].any(), "padding of the vocabulary has a gradient"
    assert not found[1][case[2] == -100].any(), "a position without a target has a gradient"


def test_states_that_are_not_finite_do_no_harm_where_there_is_no_target():
    hidden, weight, labels, vocabulary = inputs(12, 8, 30, 2)
    with torch.no_grad():
        hidden[labels == -100] = torch.inf
    assert (labels == -100).any()
    assert all(torch.isfinite(part).all() for part in gradients(cross_entropy, hidden, weight, labels, vocabulary))


def test_under_autocast_products_are_half_and_sums_are_float(monkeypatch):
    hidden, weight, labels, vocabulary = inputs(64, 32, 200, 56)
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 16 * 4 * 256)
    exact = gradients(plain, hidden, weight, labels, vocabulary)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(cross_entropy, hidden, weight, labels, vocabulary)
    assert [part.dtype for part in found] == [torch.float32] * 3
    for ours, expected in zip(found, exact, strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()


def test_the_compiled_kernel_equals_the_eager_one():
    compiled = torch.compile(loss.log_likelihoods, backend="aot_eager", dynamic=True)
    case = inputs(40, 16, 60, 4)
    for ours, expected in zip(
        gradients(cross_entropy, *case, compiled), gradients(cross_entropy, *case), strict=True
    ):
        torch.testing.assert_close(ours, expected)
