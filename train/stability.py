"""How stable training is: the loss ratio and Adam's variance (arXiv 2108.06084, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def adam_variance(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """l1 norm and largest element of sqrt(v), v being Adam's second moments, and the tensor that holds it.

    {variance_l1, variance_max_squared, variance_argmax (a number: see `named_variance`)}, [] each, on the device.
    Bursts of the maximum go with divergence; the gradient norm and clipping do not show them. Before the first update
    nothing: {}.
    """
    moments = [optimizer.state[parameter]["exp_avg_sq"] for _, parameter in _with_moments(model, optimizer)]
    if not moments:
        return {}
    l1 = torch.stack(torch._foreach_norm(torch._foreach_sqrt(moments), 1)).sum()
    largest = torch.stack(torch._foreach_norm(moments, math.inf))
    return {"variance_l1": l1, "variance_max_squared": largest.max(), "variance_argmax": largest.argmax()}


def named_variance(figures: dict[str, float], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{variance_l1, variance_max: float; variance_argmax: name} of the fetched figures of `adam_variance`."""
    if "variance_l1" not in figures:
        return {"variance_l1": 0.0, "variance_max": 0.0, "variance_argmax": ""}
    names = [name for name, _ in _with_moments(model, optimizer)]
    return {
        "variance_l1": figures["variance_l1"],
        "variance_max": math.sqrt(figures["variance_max_squared"]),
        "variance_argmax": names[int(figures["variance_argmax"])],
    }


def _with_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if "exp_avg_sq" in optimizer.state.get(p, {})]
