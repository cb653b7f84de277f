"""GPT-2 in plain torch: learned positions, pre-norm blocks, tied embeddings.

Shapes: B sequences, L tokens a sequence, C width, H heads, D = C / H. The document mask keeps attention within a
span (a piece of one document); positions count from 0 in each span, so a sequence of several pieces costs no quality.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.config import ModelConfig

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this: matrix products are faster, the extra ids never occur."""


class Attention(nn.Module):
    """Causal self-attention, within spans where a mask is given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, C], mask bool [B, 1, L, L] or None for plain causal."""
        batch, seqlen, width = x.shape
        shape = (batch, seqlen, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))  # [B, H, L, D]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).reshape(batch, seqlen, width))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        x = x + self.attention(self.norm_1(x), mask)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """A decoder for `vocab_size` tokens and up to `max_seqlen` positions."""

    def __init__(self, config: ModelConfig, vocab_size: int, max_seqlen: int) -> None:
        super().__init__()
        self.config = config
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.tokens = nn.Embedding(padded, config.width)
        self.positions = nn.Embedding(max_seqlen, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights, zero biases; smaller by sqrt(2 * layers) where a block adds to the residual, as in GPT-2.

        "gpt2": deviation 0.02. "small": sqrt(2 / (5 C)), the baseline of "Spike No More" (arXiv 2312.16903), after
        Nguyen and Salazar (arXiv 1910.05895). "scaled_embedding": that, and what the embedding layer puts out is
        multiplied by sqrt(C), the paper's remedy: a residual stream that is large beside what blocks add keeps
        gradients small. Not the weights, since the output layer is tied to them.
        """
        deviation = 0.02 if self.config.init == "gpt2" else math.sqrt(2 / (5 * self.config.width))
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for layer in (module.attention.out, module.down):
                nn.init.normal_(layer.weight, std=deviation / math.sqrt(2 * self.config.layers))

    def forward(self, input_ids: Tensor, position_ids: Tensor, spans: Tensor | None = None) -> Tensor:
        """Logits [B, L, padded vocabulary] of int64 [B, L] ids and positions.

        `spans` [B, L] says which span of its row each position is in, where attention windows cut it. Without, a span
        begins where a position is 0; with the mask "causal" a row is one span and positions count from its start.
        """
        mask = None
        if spans is not None:
            mask = span_mask(spans)
        elif self.config.mask == "document":
            mask = document_mask(position_ids)
        else:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x = self.tokens(input_ids) + self.positions(position_ids)  # [B, L, C]
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        for block in self.blocks:
            x = block(x, mask)
        return F.linear(self.norm(x), self.tokens.weight)

    def loss(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor, spans: Tensor | None = None) -> Tensor:
        """Sum of the cross entropies (nats) of all labels but -100, float32 []."""
        logits = self(input_ids, position_ids, spans)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def document_mask(position_ids: Tensor) -> Tensor | None:
    """bool [B, 1, L, L]: True where a position may look, itself and what is before it in its span.

    None where every row is one span: plain causal, which has faster kernels.
    """
    starts = position_ids == 0  # [B, L]
    if position_ids.device.type == "cpu" and int(starts.sum()) == len(starts):
        return None
    return span_mask(starts.cumsum(1))


def span_mask(spans: Tensor) -> Tensor:
    """bool [B, 1, L, L]: True for positions of one span of a row, `spans` [B, L], that are not later."""
    same = spans[:, None, :, None] == spans[:, None, None, :]
    seqlen = spans.shape[1]
    return same & torch.ones(seqlen, seqlen, dtype=torch.bool, device=spans.device).tril()
