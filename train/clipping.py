"""Gradient clipping: by the norm of all gradients, or by each tensor's own history (AdaGC, arXiv 2502.11034).

AdaGC, with g the gradient of one tensor at step t, c its clipped form, lambda and beta as in the paper:

    t < warmup    c = g min(1, lambda_abs / norm of all gradients)    gamma_t = min(gamma_{t-1}, |c|)
    after         c = g min(1, lambda_rel gamma_{t-1} / |g|)          gamma_t = beta gamma_{t-1} + (1 - beta) |c|

Ours on top: a tensor without any gradient at a step leaves its gamma alone, else it would be held at zero for ever.
Nothing here waits for the device; price: one norm of each tensor, as clipping by norm has, and one scaling of each,
which on a CPU is left out where nothing is to be clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.config import OptimizerConfig

ADAGC_RATIO = 1.05
"""lambda_rel: how far above its history a tensor's gradient may be. Later implementations have 1.04."""
ADAGC_BETA = 0.98
"""beta: decay of the moving average of clipped norms. Later implementations have 0.99."""


class Clipping:
    """Scales the gradients of one step; its history is state of a run, kept in checkpoints."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.history: Tensor | None = None
        """AdaGC's gamma of every tensor, float32 [tensors]; infinite where a tensor had no gradient yet."""

    @torch.no_grad()
    def apply(
        self, gradients: Sequence[Tensor], step: int, whole: Callable[[Tensor], Tensor] = lambda norms: norms
    ) -> tuple[Tensor, Tensor]:
        """Scale `gradients`, always the same tensors in the same order, in place; `step` counts updates from 0.

        `whole` makes norms [tensors] of shards into those of whole tensors, where `gradients` are shards.
        Returns (norm of all before clipping, share of the tensors that were scaled down), float32 [] on their device.
        """
        gradients = list(gradients)
        norms = whole(torch.stack(torch._foreach_norm(gradients)))  # [tensors]
        total = torch.linalg.vector_norm(norms)
        scale = ((self.config.clip or math.inf) / (total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ of torch
        if self.config.clipping == "norm":
            if not (scale.is_cpu and scale == 1):  # on a CPU there is nothing to wait for
                torch._foreach_mul_(gradients, scale)
            return total, (scale < 1).float()
        scales = self._adapted(norms, scale, step)
        torch._foreach_mul_(gradients, list(scales.unbind()))
        return total, (scales < 1).float().mean()

    def _adapted(self, norms: Tensor, scale: Tensor, step: int) -> Tensor:
        """AdaGC's scales [tensors] of `norms`, and its history one step on; `scale` [] is that of all together."""
        if self.history is None:
            self.history = torch.full_like(norms, math.inf)
        scales = scale.expand_as(norms)
        if step >= self.config.clipping_warmup_steps:
            scales = (ADAGC_RATIO * self.history / norms).clamp(max=1.0)
            scales = torch.where(norms > 0, scales, 1.0)
        clipped = norms * scales
        if step < self.config.clipping_warmup_steps:
            after = torch.minimum(self.history, clipped)
        else:
            after = torch.where(self.history.isinf(), clipped, self.history.lerp(clipped, 1 - ADAGC_BETA))
        # Of a step that is not finite nothing is remembered: its update is left out.
        self.history = torch.where((norms > 0) & norms.isfinite().all(), after, self.history)
        return scales

    def state_dict(self) -> list[float | None] | None:
        """Plain JSON values, exact."""
        if self.history is None:
            return None
        return [value if math.isfinite(value) else None for value in self.history.tolist()]

    def load_state_dict(self, state: list[float | None] | None, device: torch.device) -> None:
        """Go on with the history of `state`."""
        values = [math.inf if value is None else value for value in state or []]
        self.history = torch.tensor(values, dtype=torch.float32, device=device) if state else None
