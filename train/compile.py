"""One policy for `torch.compile`: few graphs, all made before the first step, never a silent fallback to eager.

What is compiled is a block, once for all layers: a graph of the whole model would take a minute for each shape. A
run's shapes are known from its schedule. Those that make most of its tokens (STATIC_SHAPES) get a graph each; all
others share one graph of symbolic sizes. Nothing changes between two shapes but sizes: rows and their length, or in
the flat form the tokens, the room for spans and the longest span. So a ramp of 128 lengths takes as many graphs as
one of 2.

Warm-up runs them all, the largest shape first (see `train.warmup`); afterwards a new graph is counted as a recompile.
torch falls back to eager when it has made 8 graphs of a function: here it raises instead, and the limit is LIMIT.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from train.attention import Sight
from train.loss import log_likelihoods
from train.model import GPT2, Block, Rotation

STATIC_SHAPES = 2
"""Shapes with a graph of their own: constant length has one or two (an uneven last micro-batch), a ramp its end."""
LIMIT = 64
"""Most graphs of one function; only a bug reaches it."""
Sizes = tuple[int, ...]
"""The sizes in which micro-batches of one run differ, see `sizes_of`."""


class Compiler:
    """Compiles the blocks and the loss of `model`, in place: before they are wrapped for recomputation or ranks."""

    def __init__(self, model: GPT2, backend: str = "inductor") -> None:
        self.static: Collection[Sizes] = ()
        """Sizes that get a graph of their own; set before the warm-up."""
        self.graphs = 0
        """Graphs compiled so far."""
        self._warm = 0
        _never_fall_back()
        compiled = functools.partial(torch.compile, fullgraph=True, backend=self._counting(backend))
        self._symbolic = compiled(_twin(Block.forward), dynamic=True)
        self._fixed = compiled(_twin(Block.forward), dynamic=False)
        self._kernel = compiled(_twin(log_likelihoods))
        block: Any
        for block in model.blocks:
            block.forward = functools.partial(self._block, block)
        model.kernel = self._likelihoods

    @property
    def recompiles(self) -> int:
        """Graphs made after the warm-up."""
        return self.graphs - self._warm if self._warm else 0

    def warmed_up(self) -> None:
        """From now on a new graph is a recompile."""
        self._warm = self.graphs

    def _block(self, block: Block, x: Tensor, sight: Sight, turned: Rotation | None = None) -> Tensor:
        run = self._fixed if sizes_of(x, sight) in self.static else self._symbolic
        return run(block, x, sight, turned)  # type: ignore[no-any-return]

    def _likelihoods(
        self, logits: Tensor, targets: Tensor, vocab_size: int, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        for tensor in (logits, targets):  # the last chunk is shorter
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return self._kernel(logits, targets, vocab_size, gradient)  # type: ignore[no-any-return]

    def _counting(self, backend: str) -> Callable[..., Any]:
        make = torch._dynamo.lookup_backend(backend)

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor], **options: Any) -> Any:
            self.graphs += 1
            return make(graph, inputs, **options)

        return count


def sizes_of(x: Tensor, sight: Sight) -> Sizes:
    """(rows, seqlen, masked?) of x [B, L, C], or (1, tokens, size of cu_seqlens, longest span) in the flat form."""
    rows, seqlen = x.shape[:2]
    if sight.cu_seqlens is not None:
        return rows, seqlen, len(sight.cu_seqlens), sight.longest
    return rows, seqlen, sight.mask is not None


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a cache of graphs of its own: torch keeps graphs by code object."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )


def _never_fall_back() -> None:
    """Set torch._dynamo.config, for the whole process."""
    config: Any = torch._dynamo.config
    config.recompile_limit = LIMIT
    config.accumulated_recompile_limit = max(LIMIT, config.accumulated_recompile_limit)
    config.fail_on_recompile_limit_hit = True
    config.optimize_ddp = False  # it would cut each block's graph at DDP's buckets; blocks are apart already
    # Sizes that happen to be equal when a graph is made are not taken to be always equal.
    torch.fx.experimental._config.use_duck_shape = False
