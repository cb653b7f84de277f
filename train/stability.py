"""How stable training is, step by step; `docs/stability.md` says how to read it.

The measures are those of the SLW paper (arXiv 2108.06084, section 3) and of its code. All but the loss ratio are
made on the device, and nothing here waits for it: who wants numbers fetches them when it suits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from curriculum.batch import Batch
from train.parallel import local

SPIKE_RATIO = 1.2
"""A loss ratio above this counts as a spike, where nothing else is said."""
ROOTS_AT_ONCE = 1 << 25
"""Elements of v whose roots are held at once on a device, or one tensor: 128 MiB."""
BLOCK = 4096
"""Elements of v that are added up in float32, on a CPU, before they join a sum in float64."""


@dataclass(frozen=True)
class Ratio:
    """The loss ratios of one step."""

    own: float
    """loss / least loss before *at this length*; 1.0 at a length's first step."""
    overall: float
    """loss / least loss before at any length, the paper's definition; 1.0 at the first step."""


@dataclass
class LossRatio:
    """loss_t / min(loss before t): above 1 the loss has gone up. State of a run, kept in checkpoints.

    A loss at another length is another quantity: short sequences have less to look at, and Dataset Decomposition's
    buckets even other documents. So the running minimum is kept per length, and a change of length is no spike. The
    price: at a length's first step there is nothing to compare with (the ratio is 1.0), and where the length changes
    every few steps a rise that lasts longer than one length stays shows only while it begins. The overall ratio sees
    that: where the length only grows, the minimum before it is mostly one of shorter sequences, which were harder.
    """

    thresholds: Sequence[float] = (SPIKE_RATIO,)
    least: dict[int, float] = field(default_factory=dict)
    """seqlen -> least loss so far."""
    spikes: dict[str, int] = field(default_factory=dict)
    """Threshold, as text -> steps whose own ratio was above it."""

    def __post_init__(self) -> None:
        self.spikes = {f"{ratio:g}": self.spikes.get(f"{ratio:g}", 0) for ratio in self.thresholds}

    def update(self, loss: float, seqlen: int) -> Ratio:
        """The ratios of a step with `loss` nats a token. A loss that is not a number leaves the minimum alone."""
        own = self.least.get(seqlen, math.inf)
        overall = min(self.least.values(), default=math.inf)
        ratio = Ratio(*(loss / least if math.isfinite(least) else 1.0 for least in (own, overall)))
        if loss < own:
            self.least[seqlen] = loss
        for threshold in self.thresholds:
            self.spikes[f"{threshold:g}"] += not ratio.own <= threshold
        return ratio

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"least": list(self.least.items()), "spikes": self.spikes}

    @classmethod
    def from_state(cls, state: dict[str, Any], thresholds: Sequence[float] = (SPIKE_RATIO,)) -> LossRatio:
        """What `state_dict` gave; a threshold that is new counts from here on."""
        return cls(thresholds, {int(seqlen): loss for seqlen, loss in state["least"]}, state["spikes"])


class AdamVariance:
    """l1 norm and largest element of sqrt(v), v being Adam's second moments, over all parameters, and where it is.

    sum(sqrt(v)) and max(sqrt(v)), v as Adam keeps it, before bias correction: what the paper's code logs as
    `variance_sqrt_l1` and `variance_sqrt_abs_max` (Megatron-DeepSpeed, megatron/training.py). Bursts of the largest
    element go with divergence; the gradient norm and clipping do not show them. Price: on a CPU v is read once, and
    takes as long as its square roots take; on a device it is read twice.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.names, parameters = zip(*model.named_parameters(), strict=True)
        self.parameters: Sequence[nn.Parameter] = parameters
        self.parts = _parts([parameter.numel() for parameter in parameters])

    @torch.no_grad()
    def measure(self) -> dict[str, Tensor]:
        """{variance_l1, variance_max, variance_argmax (an index of `names`)}, [] each, on the device.

        After the optimizer's first step. Of this rank's shards, where the model is sharded: see `Parallel.combined`.
        """
        moments = [local(self.optimizer.state[parameter]["exp_avg_sq"]) for parameter in self.parameters]
        moments = [v if v.numel() else v.new_zeros(1) for v in moments]  # a rank may have nothing of a small tensor
        l1, most, index = _on_cpu(moments) if moments[0].is_cpu else self._on_device(moments)
        return {"variance_l1": l1, "variance_max": most.sqrt(), "variance_argmax": index}

    def _on_device(self, moments: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of all roots, the largest element and the index of its tensor, in few kernels."""
        sums = [torch._foreach_norm(torch._foreach_sqrt(moments[part]), 1) for part in self.parts]
        most, index = torch.stack(list(torch._foreach_norm(moments, math.inf))).max(0)
        return torch.stack([value for values in sums for value in values]).sum(), most, index

    def named(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """The fetched figures of `measure`, the tensor by its name."""
        name = self.names[int(figures["variance_argmax"])]
        return {**{key: figures[key] for key in ("variance_l1", "variance_max")}, "variance_argmax": name}


@torch.no_grad()
def largest_attention_logit(model: nn.Module, forward: Callable[[], object]) -> Tensor:
    """The largest q k / sqrt(D) of all layers and heads over the pairs seen, float32 [], on the device.

    `forward` runs `model` on one row of L tokens in the form for rows. Logits that grow without bound saturate the
    softmax, and training diverges (Dehghani et al. 2023, arXiv 2302.05442). It is a pass of its own that nothing
    compiled takes part in: the step stays as it is. Price: a forward of one row, its queries and keys made twice, and
    H L^2 logits at once.
    """
    largest = []

    def look(attention: Any, inputs: tuple[Any, ...]) -> None:
        x, sight, turned = inputs
        q, k, _v = (part[0].transpose(0, 1).float() for part in attention.projected(x, turned))  # [H, L, D]
        logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])  # [H, L, L]
        seen = torch.ones_like(logits, dtype=torch.bool).tril() if sight.mask is None else sight.mask[0]
        largest.append(logits.masked_fill(~seen, -math.inf).max())

    hooks = [part.register_forward_pre_hook(look) for part in model.modules() if hasattr(part, "projected")]
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(largest).max()


def first_row(batch: Batch) -> Batch:
    """The first row of a batch, as a batch."""
    spans = batch.cu_seqlens[batch.cu_seqlens <= batch.seqlen]
    arrays = {name: getattr(batch, name)[:1] for name in ("input_ids", "labels", "position_ids")}
    return replace(batch, **arrays, cu_seqlens=spans, max_seqlen=int(np.diff(spans).max()))


def _on_cpu(moments: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As `_on_device`: torch there takes six times as long as v takes to be read."""
    sums, bits = zip(*(_roots(moment.numpy().reshape(-1)) for moment in moments), strict=True)
    l1, most = torch.tensor(math.fsum(sums)), torch.tensor(max(bits), dtype=torch.int32).view(torch.float32)
    if not l1.isnan():
        return l1, most, torch.tensor(bits.index(max(bits)))
    return l1, l1, torch.tensor([math.isnan(value) for value in sums].index(True))


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _roots(v: np.ndarray) -> tuple[float, int]:
    """(sum of the roots of `v`, float32 and not negative, and its largest element as int32: these have its order).

    It takes as long as the processor's square roots take: the maximum costs nothing beside them.
    """
    bits, total, most = v.view(np.int32), 0.0, np.int32(0)
    for first in range(0, len(v), BLOCK):
        block, block_bits, part = v[first : first + BLOCK], bits[first : first + BLOCK], np.float32(0)
        for i in range(len(block)):
            part += np.sqrt(block[i])
            most = max(most, block_bits[i])
        total += float(part)
    return total, int(most)


def _parts(sizes: Sequence[int]) -> list[slice]:
    """Runs of tensors of at most ROOTS_AT_ONCE elements, or of one."""
    parts, first, held = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and held + size > ROOTS_AT_ONCE:
            parts.append(slice(first, index))
            first, held = index, 0
        held += size
    return [*parts, slice(first, len(sizes))]
