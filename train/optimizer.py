"""AdamW and its learning rate: warmup by steps, decay by tokens (arXiv 2108.06084, section 4)."""

from __future__ import annotations

import math

import torch
from torch import nn

from train.config import OptimizerConfig


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; weights decay, but not biases, norms and positions.

    Positions beyond the current sequence length get no gradient: decay alone would shrink them before their time.
    Fused on CPUs too: it leaves out an update where a flag says so (`train.faults`), and takes a fifth of the time.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "positions" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")  # "meta", without values, is for tests
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused, foreach=not fused)


def learning_rate(config: OptimizerConfig, step: int, tokens_seen: int, total_tokens: int) -> float:
    """The rate of the update at `step` (from 0), after `tokens_seen` tokens.

    Rises linearly over `warmup_steps` steps; falls from `lr` to `min_lr` over the *tokens* of the run: counted in
    steps it would fall too fast a token while sequences are short.
    """
    warmup = min((step + 1) / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    progress = min(tokens_seen / (config.decay_tokens or total_tokens), 1.0)
    if config.decay == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif config.decay == "linear":
        left = 1 - progress
    else:
        left = 1.0
    return warmup * (config.min_lr + (config.lr - config.min_lr) * left)
