"""Before the first step: every shape of the schedule once, the largest first, so that nothing is compiled later.

A batch that does not fit the device fails in the first seconds; `micro_batch_tokens = "auto"` is halved until it
fits. Weights and optimizer state are not changed: tensors of their size stand in for the moments that Adam makes at
its first step. Gradients are dropped and random generators restored: the run is bit for bit what it is without this.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from curriculum.batch import Batch, with_attention_window
from curriculum.plan import stretches
from curriculum.schedule import Schedule
from pipeline.errors import RunError
from pipeline.packing import Packed
from train.compile import STATIC_SHAPES, sizes_of
from train.data import MicroBatch, row_parts
from train.out_of_memory import largest_that_fits, out_of_memory_explained
from train.state import load_random_state, random_state

if TYPE_CHECKING:
    from train.run import Run

MOST_SHAPES = 96
"""More shapes than this are sampled evenly: those between two others need no other graph."""
MOST_TOKENS = 1 << 17
"""Largest automatic micro-batch: at this size the cost of launching kernels no longer shows."""
CPU_TOKENS = 1 << 14
"""The automatic micro-batch of a CPU, whose memory is not worth a search."""
SPARE = 0.05
"""Share of the device's memory that the search leaves free, for fragmentation."""
FEW_SHAPES = 8
"""A run of no more may take cuDNN's attention."""


@dataclass(frozen=True, order=True)
class MicroBatchSize:
    """The size of a micro-batch."""

    tokens: int
    seqlen: int
    attention_window: int = 0
    """0: none."""

    @property
    def rows(self) -> int:
        """Rows of `seqlen`."""
        return self.tokens // self.seqlen

    @property
    def spans(self) -> int:
        """Rows, cut at attention windows."""
        return self.rows * -(-self.seqlen // (self.attention_window or self.seqlen))


def shapes_of(
    schedule: Schedule, micro_batch_tokens: int, world_size: int = 1, asked: Schedule | None = None
) -> Counter[MicroBatchSize]:
    """Each micro-batch shape of a run, with the tokens that one rank serves in it; the same on all ranks.

    The lengths that an adaptive schedule may come to count as one step each; `asked` is it where `schedule`
    is what it has become by now.
    """
    asked = asked or schedule
    found: Counter[MicroBatchSize] = Counter()
    phases = [(part.phase, part.steps) for part in stretches(schedule)]
    if notches := asked.notches:
        lengths = range(notches.seqlen_start, notches.seqlen_end + 1, notches.seqlen_multiple)
        phases += [(asked.raised_to(seqlen).phases[-1], 1) for seqlen in lengths]
    for phase, steps in phases:
        least, rest = divmod(phase.sequences, world_size)
        for rows in {least, least + (rest > 0)} - {0}:
            for part in row_parts(rows, phase.seqlen, micro_batch_tokens):
                tokens = (part.stop - part.start) * phase.seqlen
                found[MicroBatchSize(tokens, phase.seqlen, phase.attention_window or 0)] += steps * tokens
    return found


def largest_first(shapes: Iterable[MicroBatchSize]) -> list[MicroBatchSize]:
    """At most MOST_SHAPES of them, evenly spread, first and last among them."""
    ordered = sorted(shapes, reverse=True)
    if len(ordered) <= MOST_SHAPES:
        return ordered
    return [ordered[int(i)] for i in np.linspace(0, len(ordered) - 1, MOST_SHAPES).round()]


def heaviest(shapes: Iterable[MicroBatchSize]) -> list[MicroBatchSize]:
    """The one or two that may need most memory: of most tokens, and of most spans.

    Flash attention's backward pass takes memory for 128 positions of each span, however short it is.
    """
    shapes = list(shapes)
    return list(dict.fromkeys((max(shapes), max(shapes, key=lambda shape: (shape.spans, shape)))))


def choose_attention(shapes: Collection[MicroBatchSize]) -> None:
    """Whether `scaled_dot_product_attention` may take cuDNN's kernels on CUDA, for the whole process.

    torch prefers them on Hopper. They are faster for rows of one span, but the first time that a shape is met they
    are planned anew, which takes longer than a step, and is no graph that `Compiler` would count.
    """
    torch.backends.cuda.enable_cudnn_sdp(len(shapes) <= FEW_SHAPES)


def sample_batches(shape: MicroBatchSize, masked: bool) -> Iterator[Batch]:
    """Dummy batches of `shape`: one with one span a row; if `masked` and longer than a token, one with two a row."""
    rows, seqlen = shape.rows, shape.seqlen
    for spans in (1, 2) if masked and seqlen > 1 else (1,):
        starts = np.arange(rows * spans + 1, dtype=np.int32) * seqlen // spans
        lengths = np.diff(starts)
        ids = np.zeros((rows, seqlen), dtype=np.int64)
        batch = Batch(
            input_ids=ids,
            labels=ids,
            position_ids=(np.arange(rows * seqlen) - np.repeat(starts[:-1], lengths)).reshape(rows, seqlen),
            cu_seqlens=starts,
            max_seqlen=int(lengths.max()),
            step=0,
            seqlen=seqlen,
            targets=rows * seqlen,
            pieces=Packed(*np.zeros((4, 0), dtype=np.int64)),
        )
        yield with_attention_window(batch, shape.attention_window or None, "kept")


@contextmanager
def untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Computing inside changes neither, with the memory a step has."""
    random = random_state()
    moments = [torch.empty_like(p) for p in model.parameters() if p not in optimizer.state for _ in range(2)]
    try:
        yield
    finally:
        moments.clear()
        model.zero_grad(set_to_none=True)
        load_random_state(random)


def warm_up(run: Run) -> None:
    """Settle `run.micro_batch_tokens` where it is "auto", then run every shape if it is compiled; leaves no trace.

    On cuda without compilation the heaviest alone; on a CPU nothing. Raises RunError where a batch does not fit.
    """
    cuda, compiler, schedule, world_size = run.device.type == "cuda", run.compiler, run.schedule, run.ranks.world_size
    if not cuda and compiler is None:
        return
    if cuda:
        choose_attention(shapes_of(schedule, run.micro_batch_tokens, world_size, run.asked))
    with untouched(run.model, run.optimizer):
        if cuda and run.config.batch.micro_batch_tokens == "auto":
            run.micro_batch_tokens = micro_batch_that_fits(run)
        counted = shapes_of(schedule, run.micro_batch_tokens, world_size, run.asked)
        shapes = largest_first(counted)
        with out_of_memory_explained(lambda: run.micro_batch_tokens):
            if compiler is not None:
                often = [shape for shape, _ in counted.most_common(STATIC_SHAPES)]
                parts = (part for shape in often for part in _micro_batches(run, shape))
                compiler.static = {sizes_of(part.input_ids, part.sight) for part in parts}
            for shape in shapes if compiler is not None else heaviest(shapes):
                try_shape(run, shape)
            if compiler is not None and run.held_out is not None:
                with torch.no_grad():
                    seqlen = schedule.max_seqlen
                    try_shape(run, MicroBatchSize(run.validation_rows * seqlen, seqlen))
                    try_shape(run, MicroBatchSize(seqlen, seqlen))
    if compiler is not None:
        compiler.warmed_up()


def micro_batch_that_fits(run: Run) -> int:
    """The automatic micro-batch: halved until the heaviest shapes of the schedule fit.

    A run that goes on begins with what it had, which is less only where the device or the share of it is smaller.
    """
    gc.collect()  # a run before this one in the process, as when tuning, is garbage in cycles and holds memory
    torch.cuda.empty_cache()
    schedule, ranks = run.schedule, run.ranks
    begun = run.at.step > 0
    whole = max(shapes_of(schedule, sys.maxsize, ranks.world_size, run.asked)).tokens
    free, size = torch.cuda.mem_get_info(run.device)
    # Shards are gathered by all ranks at once: so they have equally much, and run out of it at the same place.
    held = free - int(ranks.gather(torch.tensor(free)).min()) + (0 if begun else int(SPARE * size))

    def attempt(tokens: int) -> None:
        spare = torch.empty(held, dtype=torch.uint8, device=run.device)
        for shape in heaviest(shapes_of(schedule, tokens, ranks.world_size, run.asked)):
            try_shape(run, shape)
        del spare

    def agreed(mine: bool) -> bool:
        enough = ranks.gather(torch.tensor(int(mine))).bool()
        if run.parallel.kind == "fsdp" and enough.any() and not enough.all():
            out = ", ".join(str(rank) for rank in (~enough).nonzero().flatten().tolist())
            raise RunError(
                "some ranks ran out of memory, others did not, and wait for them",
                found=f"out of memory: rank {out}",
                remedy="does another program use that GPU? or give batch.micro_batch_tokens as a number",
            )
        return bool(enough.all())

    most = run.micro_batch_tokens if begun else min(MOST_TOKENS, whole)
    found = largest_that_fits(attempt, most, schedule.max_seqlen, agreed)
    if found < most and run.config.run.deterministic:
        # Kernels are chosen for the sizes that a graph is made for, and a run that goes on begins with those found.
        torch._dynamo.reset()
    return found


def try_shape(run: Run, shape: MicroBatchSize) -> None:
    """Forward and, where gradients are on, backward of micro-batches of that shape, in every form they can have."""
    for part in _micro_batches(run, shape):
        with run.parallel.gradient_sync(False):
            loss = run.parallel.loss(part)
            if torch.is_grad_enabled():
                loss.backward()  # type: ignore[no-untyped-call]


def _micro_batches(run: Run, shape: MicroBatchSize) -> Iterator[MicroBatch]:
    for batch in sample_batches(shape, run.config.model.mask == "document"):
        yield from run.feed.parts(batch, shape.tokens)
