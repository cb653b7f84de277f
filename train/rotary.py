"""Rotary positions (RoPE, Su et al. 2021, arXiv 2104.09864): queries and keys turned by angles of their positions.

The halves of a head make the pairs, as GPT-NeoX and Llama have it: element i turns with element i + D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, float32 [B, L, 1, D / 2]."""


def rotation(position_ids: Tensor, head_size: int, theta: float) -> Rotation:
    """Rotation by int64 [B, L] positions: the angle of pair i is position * theta ** (-2 i / D)."""
    pairs = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids.float()[..., None, None] * theta ** (-pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """x [B, L, H, D], turned; float32 inside, the dtype of x outside."""
    cos, sin = by
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
