"""How stable training is: the loss ratio and Adam's variance (arXiv 2108.06084, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SPIKE_RATIO = 1.2
"""A loss ratio above this counts as a spike."""


@dataclass
class LossRatio:
    """loss_t / min(loss before t): above 1 the loss has gone up; state of a run, kept in checkpoints."""

    least: float = math.inf
    spikes: int = 0

    def update(self, loss: float) -> float:
        """The ratio at this step; 1.0 at the first."""
        ratio = loss / self.least if math.isfinite(self.least) else 1.0
        self.least = min(self.least, loss)
        self.spikes += ratio > SPIKE_RATIO
        return ratio


def adam_variance(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """l1 norm and largest element of sqrt(v), v being Adam's second moments, and the tensor that holds it.

    {variance_l1, variance_max: float; variance_argmax: name}. Bursts of the maximum go with divergence; the gradient
    norm and clipping do not show them.
    """
    names, moments = [], []
    for name, parameter in model.named_parameters():
        if "exp_avg_sq" in optimizer.state.get(parameter, {}):
            names.append(name)
            moments.append(optimizer.state[parameter]["exp_avg_sq"])
    if not moments:
        return {"variance_l1": 0.0, "variance_max": 0.0, "variance_argmax": ""}
    l1 = torch.stack(torch._foreach_norm(torch._foreach_sqrt(moments), 1)).sum()
    largest = torch.stack(torch._foreach_norm(moments, math.inf))
    index = int(largest.argmax())
    return {
        "variance_l1": float(l1),
        "variance_max": math.sqrt(float(largest[index])),
        "variance_argmax": names[index],
    }
