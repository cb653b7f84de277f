"""GPT-2 in plain torch: learned or rotary positions, pre-norm blocks, tied embeddings.

Shapes: B sequences, L tokens a sequence, C width, H heads, D = C / H. The document mask keeps attention within a
span (a piece of one document); positions count from 0 in each span, so a sequence of several pieces costs no quality.
Only attention knows rows from spans (train/attention.py): all else is the same for one flat row [1, T, C].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.attention import Sight, attend, sight_of_positions
from train.config import ModelConfig
from train.loss import Kernel, cross_entropy, log_likelihoods

VOCAB_MULTIPLE = 128
"""The embedding is padded to a multiple of this: matrix products are faster. The extra ids never occur
and have no probability: logits are without them, the loss counts only real ids."""
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, float32 [B, L, 1, D / 2]."""


class Attention(nn.Module):
    """Causal self-attention within spans."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, sight: Sight, turned: Rotation | None) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        q, k, v = self.projected(x, turned)
        return self.out(attend(q, k, v, sight).flatten(2))  # type: ignore[no-any-return]

    def projected(self, x: Tensor, turned: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, L, H, D] of x [B, L, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)
        return (q, k, v) if turned is None else (rotate(q, turned), rotate(k, turned), v)


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised input and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, sight: Sight, turned: Rotation | None = None) -> Tensor:
        """x [B, L, C] -> [B, L, C]; `turned` by rotary positions."""
        x = x + self.attention(self.norm_1(x), sight, turned)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """A decoder for `vocab_size` tokens and up to `max_seqlen` positions."""

    def __init__(self, config: ModelConfig, vocab_size: int, max_seqlen: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size, self.max_seqlen = vocab_size, max_seqlen
        self.kernel: Kernel = log_likelihoods
        """The loss's inner function; `train.compile` replaces it by a compiled one."""
        padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.tokens = nn.Embedding(padded, config.width)
        self.positions = nn.Embedding(max_seqlen, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights, zero biases; smaller by sqrt(2 * layers) where a block adds to the residual, as in GPT-2.

        "gpt2": deviation 0.02. "small": sqrt(2 / (5 C)), the baseline of "Spike No More" (arXiv 2312.16903), after
        Nguyen and Salazar (arXiv 1910.05895). "scaled_embedding": that, and what the embedding layer puts out is
        multiplied by sqrt(C), the paper's "Scaled Embed": a residual stream that is large beside what blocks add
        keeps gradients small. Not the weights, since the output layer is tied to them.
        """
        deviation = 0.02 if self.config.init == "gpt2" else math.sqrt(2 / (5 * self.config.width))
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=deviation)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for layer in (module.attention.out, module.down):
                nn.init.normal_(layer.weight, std=deviation / math.sqrt(2 * self.config.layers))

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, sight: Sight | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, vocabulary] of int64 [B, L] ids and positions; with `labels` [B, L] the loss, float32 [].

        The loss is the sum of the cross entropies (nats) of all labels but -100. `sight` says what attention may see.
        Without, a span begins where a position is 0; with the mask "causal" a row is one span and positions count
        from its start.
        """
        x = self.hidden(input_ids, position_ids, sight)
        if labels is None:
            return F.linear(x, self.tokens.weight[: self.vocab_size])
        return cross_entropy(x.flatten(0, 1), self.tokens.weight, labels.flatten(), self.vocab_size, self.kernel)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, sight: Sight | None = None) -> Tensor:
        """What the output layer, `tokens.weight`, is multiplied with: [B, L, C]. Arguments as those of `forward`."""
        if sight is None and self.config.mask == "document":
            sight = sight_of_positions(position_ids)
        elif sight is None:
            sight = Sight()
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        x, turned = self.tokens(input_ids), None  # [B, L, C]
        if self.positions is not None:
            x = x + self.positions(position_ids)
        else:
            turned = rotation(position_ids, self.config.width // self.config.heads, self.config.rope_theta)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        for block in self.blocks:
            x = block(x, sight, turned)
        return self.norm(x)  # type: ignore[no-any-return]


def rotation(position_ids: Tensor, head_size: int, theta: float) -> Rotation:
    """RoPE (Su et al. 2021, arXiv 2104.09864) of int64 [B, L] ids: pair i turns by position * theta ** (-2 i / D).

    The halves of a head make the pairs, as GPT-NeoX and Llama have it: element i turns with element i + D / 2.
    """
    pairs = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids.float()[..., None, None] * theta ** (-pairs / head_size)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Queries or keys x [B, L, H, D], turned; float32 inside, the dtype of x outside."""
    cos, sin = by
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
