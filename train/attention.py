"""What attention may see, described once (`Sight`), and which kernel computes it.

Each position sees itself and what is before it in its span: a piece of a document, a SkyLadder window, or the whole
row. `Sight` says so in the form that the kernel at hand wants:

    rows      x [B, L, C], no mask    every row is one span: SDPA with is_causal (flash or cuDNN on CUDA)
    rows      x [B, L, C], mask       SDPA with a boolean mask: any device, any dtype; L**2 bytes a row
    flat      x [1, T, C], cu_seqlens `varlen_attn` on CUDA in half precision: skips what a span hides, and its shape
                                      does not change with the length of rows

On the CPU the flat form is SDPA with a mask of T**2 bytes: slow, but tests run it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LONGEST_HEAD = 256
"""Largest head that flash attention's kernels take; its size must also be a multiple of 8."""


class Sight(NamedTuple):
    """What positions may look at. All at their defaults: rows that are one span each."""

    mask: Tensor | None = None
    """bool [B, 1, L, L]: True where a position (second last) may look."""
    cu_seqlens: Tensor | None = None
    """int32 [spans + 1 or more]: where spans begin in the one flat row, then its length, repeated as padding."""
    longest: int = 0
    """Upper bound of the tokens of a span of `cu_seqlens`."""


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `varlen_attn` runs there: CUDA of compute capability 8.0 or later, half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or head_size > LONGEST_HEAD or head_size % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """q, k, v [B, L, H, D] -> [B, L, H, D]; B = 1 where `sight` is of the flat form."""
    if sight.cu_seqlens is not None:
        return _varlen(q[0], k[0], v[0], sight.cu_seqlens, sight.longest)[None]
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, L, D]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, is_causal=sight.mask is None)
    return y.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """Causal attention within spans: [T, H, D] each."""
    if q.device.type == "cpu":
        at = torch.arange(len(q), dtype=cu_seqlens.dtype)
        mask = span_mask(torch.searchsorted(cu_seqlens, at, right=True)[None])[0]  # [1, T, T]
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))  # [H, T, D]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))  # type: ignore[return-value]


def sight_of_positions(position_ids: Tensor) -> Sight:
    """The `Sight` of rows [B, L] whose spans begin where a position is 0."""
    starts = position_ids == 0
    if position_ids.device.type == "cpu" and int(starts.sum()) == len(starts):
        return Sight()  # on CUDA this would wait for the device
    return Sight(mask=span_mask(starts.cumsum(1)))


def span_mask(spans: Tensor) -> Tensor:
    """bool [B, 1, L, L]: True for positions of one span of a row, `spans` [B, L], that are not later."""
    same = spans[:, None, :, None] == spans[:, None, None, :]
    seqlen = spans.shape[1]
    return same & torch.ones(seqlen, seqlen, dtype=torch.bool, device=spans.device).tril()
