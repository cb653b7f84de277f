"""A model over several ranks: replicated (DDP), or sharded by blocks (FSDP2) where it does not fit.

The loss of a batch is the mean over its targets on all ranks. Both kinds average gradients over ranks, so each rank's
share of the loss is multiplied by `world_size` first: then the average is the sum. All ranks run the same number of
micro-batches a step, because collectives wait for all: one with fewer rows repeats its last without targets.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from pipeline.packing import NO_TARGET
from train.data import MicroBatch
from train.distributed import Ranks
from train.model import GPT2

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Kind = Literal["alone", "ddp", "fsdp"]
BYTES_A_PARAMETER = 16
"""Weight, gradient and two moments, float32."""
SHARE_OF_MEMORY = 0.6
"""A device filled further by these leaves too little for activations: "auto" shards."""


class Parallel:
    """A model and how it is spread. Make the optimizer after this: sharding replaces the parameters."""

    def __init__(self, model: GPT2, ranks: Ranks, device: torch.device, asked: str, half: bool) -> None:
        self.ranks = ranks
        self.model = model
        self.device = device
        self.half = half
        """Matrix products are of bfloat16."""
        self.kind: Kind = kind_of(model, ranks, device, asked)
        self._replicas: nn.parallel.DistributedDataParallel | None = None
        if self.kind == "fsdp":
            _shard(model, ranks, device, half)
        else:
            model.to(device)
        if self.kind == "ddp":
            ids = [device] if device.type == "cuda" else None
            self._replicas = nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def loss(self, part: MicroBatch) -> Tensor:
        """The loss of this rank's micro-batch, see `GPT2.forward`; all ranks call it equally often."""
        with self.autocast():
            loss: Tensor = (self._replicas or self.model)(*part)
        if self.kind == "fsdp" and not torch.is_grad_enabled():
            # No backward pass will: and `parameters()` would name the gathered ones, with gradients of their own.
            self.model.reshard()  # type: ignore[operator]
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products, where asked for; shards are gathered as bfloat16 instead."""
        if self.half and self.kind != "fsdp":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: DDP reduces gradients at the `last` one of a step only."""
        if self._replicas is not None and not last:
            return self._replicas.no_sync()
        return nullcontext()

    def norms(self, norms: Tensor) -> Tensor:
        """Norms [tensors] of whole tensors, from those of this rank's shards."""
        if self.kind != "fsdp":
            return norms
        squares = norms.square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def combined(self, ranks: list[dict[str, float]]) -> dict[str, float]:
        """Figures of a step out of those of each rank.

        A loss is the sum of the ranks' shares. Statistics of Adam are the same on all ranks, but where each has its
        shards: there l1 norms add up, and the largest element is that of the rank that has the largest.
        """
        total = {**ranks[0], "loss": math.fsum(figures["loss"] for figures in ranks)}
        if self.kind == "fsdp":
            total["variance_l1"] = math.fsum(figures["variance_l1"] for figures in ranks)
            largest = max(ranks, key=lambda f: (math.isnan(f["variance_max"]), f["variance_max"]))
            total |= {name: largest[name] for name in ("variance_max", "variance_argmax")}
        return total

    def distributed(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Rank 0's `tensors` on all ranks; one called NAME or KIND:NAME is sharded as the parameter NAME is."""
        if not self.ranks.several:
            return tensors
        forms = self.ranks.from_first(
            lambda: [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
        )
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        out: dict[str, Tensor] = {}
        for name, shape, dtype in forms:
            full = tensors[name] if self.ranks.first else torch.empty(shape, dtype=getattr(torch, dtype))
            full = full.to(self.device).contiguous()
            like = parameters.get(name.rpartition(":")[2])
            if like is not None and _sharded(like) and like.shape == full.shape:
                from torch.distributed.tensor import distribute_tensor

                out[name] = distribute_tensor(full, like.device_mesh, like.placements)
            else:
                dist.broadcast(full, 0)
                out[name] = full
        return out


def _sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether it is one of FSDP's; their module, a second to import, is only asked where FSDP has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the whole of one that is not sharded; no copy."""
    return tensor.to_local() if _sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, which all call this; one that is not sharded as it is."""
    return tensor.full_tensor() if _sharded(tensor) else tensor


def kind_of(model: nn.Module, ranks: Ranks, device: torch.device, asked: str) -> Kind:
    """`asked`, "ddp" or "fsdp"; "auto" shards what would fill a GPU by more than SHARE_OF_MEMORY."""
    if not ranks.several:
        return "alone"
    if asked == "auto" and device.type == "cuda":
        needed = BYTES_A_PARAMETER * sum(p.numel() for p in model.parameters())
        fits = needed <= SHARE_OF_MEMORY * torch.cuda.get_device_properties(device).total_memory
        return "ddp" if fits else "fsdp"
    return "fsdp" if asked == "fsdp" else "ddp"


def same_number(parts: Iterator[MicroBatch], count: int) -> Iterator[tuple[MicroBatch, bool]]:
    """`count` pairs (micro-batch, whether it is the last): `parts`, then its last one repeated without targets."""
    part: MicroBatch | None = None
    for index in range(count):
        following = next(parts, None)
        if following is not None:
            part = following
        elif part is not None:
            part = part._replace(labels=torch.full_like(part.labels, NO_TARGET))
        assert part is not None, "a rank without rows"
        yield part, index == count - 1


def recompute_blocks(model: GPT2) -> None:
    """Keep only the inputs of blocks for the backward pass, which computes the rest again: a third more work."""
    block: Any
    for block in model.blocks:
        again = functools.partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again


def _shard(model: GPT2, ranks: Ranks, device: torch.device, half: bool) -> None:
    """Moves it to the device too, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks.world_size,))
    weights, sums = (torch.bfloat16, torch.float32) if half else (None, None)
    # Inputs stay as they are: hidden states come in bfloat16 from the embeddings, rotations keep float32.
    policy = MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=sums, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
