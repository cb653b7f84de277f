"""Cross entropy of a tied head without all logits at once.

Logits exist for a chunk of tokens at a time; where gradients are wanted they are computed in the same pass, so
nothing is computed twice: forward makes logits and, from them, the gradients of hidden states and weight; backward
multiplies by its factor. Memory: one chunk of logits in float32 (CHUNK_BYTES) and one gradient of the weight.

Ids from `vocab_size` on (padding of the embedding) have probability 0: the loss is that of a model without them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.packing import NO_TARGET

CHUNK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 30}
"""Size of a chunk of float32 logits: what a cache holds on the CPU, enough rows for full matrix products on CUDA."""

Kernel = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]
"""`log_likelihoods`, or the same compiled."""


def log_likelihoods(logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """From logits [N, V], targets int64 [N]: log softmax(logits)[target], float32 [N], and softmax(logits) - one-hot.

    The second is the gradient of -log softmax by the logits, in their dtype; None without `gradient`. `logits` may be
    overwritten.
    """
    compiling = torch.compiler.is_compiling()  # then comparisons are free, and a change of `logits` is a copy of it
    ids = torch.arange(logits.shape[1], device=logits.device)
    if compiling:
        logits = torch.where(ids < vocab_size, logits, -torch.inf)
    else:
        logits[:, vocab_size:] = -torch.inf
    scores = torch.log_softmax(logits, 1, dtype=torch.float32)
    likelihoods = scores.gather(1, targets[:, None])[:, 0]
    if not gradient:
        return likelihoods, None
    if compiling:
        return likelihoods, (scores.exp() - (ids == targets[:, None]).float()).to(logits.dtype)
    softmax = scores.exp_()
    softmax[torch.arange(len(targets), device=logits.device), targets] -= 1
    return likelihoods, softmax.to(logits.dtype)


def cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernel: Kernel = log_likelihoods
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[label] in nats over all labels but -100: float32 [].

    hidden [N, C], weight [V, C], labels int64 [N]; only the first `vocab_size` of V ids count. Under autocast matrix
    products are of its dtype; softmax and sums are float32. Differentiable once.
    """
    return _CrossEntropy.apply(hidden, weight, labels, vocab_size, kernel)  # type: ignore[no-untyped-call, no-any-return]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernel: Kernel) -> Tensor:
        device = hidden.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if mixed else weight.dtype
        wanted = any(ctx.needs_input_grad[:2])
        with torch.autocast(device, enabled=False) if mixed else nullcontext():
            valid = labels != NO_TARGET
            targets = torch.where(valid, labels, 0)
            h, w = torch.where(valid[:, None], hidden, 0).to(dtype), weight.to(dtype)
            # With hidden states of 0 a position adds nothing to the gradient of the weight.
            h_grad = torch.empty_like(h) if wanted else None
            w_grad = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            total = torch.zeros((), device=hidden.device)
            rows = max(1, CHUNK_BYTES.get(device, 1 << 30) // (4 * len(weight)))
            rows -= rows % 128 if rows > 128 else 0
            for first in range(0, len(h), rows):
                part = slice(first, first + rows)
                likelihoods, gradient = kernel(h[part] @ w.T, targets[part], vocab_size, wanted)
                total -= torch.where(valid[part], likelihoods, 0).sum()
                if h_grad is not None and w_grad is not None and gradient is not None:
                    torch.mm(gradient, w, out=h_grad[part])
                    _add_product(w_grad, gradient.T, h[part])
            if h_grad is not None:
                h_grad.masked_fill_(~valid[:, None], 0)
        ctx.save_for_backward(h_grad, w_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        h_grad, w_grad = ctx.saved_tensors
        h_dtype, w_dtype = ctx.dtypes
        return (h_grad * factor).to(h_dtype), (w_grad * factor).to(w_dtype), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in float32 from chunk to chunk."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
