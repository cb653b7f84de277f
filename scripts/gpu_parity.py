"""How far loss and gradients of a form of attention are from rows with a mask, in float32, on the CPU."""

import copy
import functools
from dataclasses import replace
from typing import Any

Result = dict[str, Any]


def worst_error(cpu: bool, mask: str, dtype: Any, flat: Any, compiled: bool, allowed: float) -> Result:
    """Of the lengths and windows, the case that differs most; compiled, the longest rows without a window."""
    import torch

    from train.attention import has_varlen
    from train.compile import Compiler, sizes_of
    from train.data import micro_batches

    device = torch.device("cpu" if cpu else "cuda")
    half = dtype if dtype == torch.bfloat16 else None
    if flat is not None and not cpu:
        assert has_varlen(device, dtype, 64), "no variable-length kernels"
    lengths = (8, 40) if cpu else (8, 24, 128, 1024)
    cases = [(seqlen, window) for seqlen in lengths for window in (None, seqlen // 2 + 1)]
    found = []
    for seqlen, window in [(lengths[-1], None)] if compiled else cases:
        model, batch, expected = reference(cpu, seqlen, mask, window)
        model.to(device)
        (part,) = micro_batches(batch, 10**9, device, mask, flat)
        # cuDNN's attention where a run may take it: without a mask. It is planned anew for each shape.
        torch.backends.cuda.enable_cudnn_sdp(part.sight.mask is None)
        made = [gradients(model, part, half)] if not compiled else []
        if compiled:
            model = copy.deepcopy(model)
            compiler = Compiler(model, "aot_eager" if cpu else "inductor")
            for compiler.static in ((), {sizes_of(part.input_ids, part.sight)}):
                made.append(gradients(model, part, half))
        error = max(
            float((a.cpu() - b).norm() / b.norm()) for ours in made for a, b in zip(ours, expected, strict=True)
        )
        found.append((error, f"L={seqlen}" + (f" window {window}" if window else "")))
    error, where = max(found)
    return {"ok": error < allowed, "error": float(f"{error:.1e}"), "at": where, "cases": len(found)}


@functools.cache
def reference(cpu: bool, seqlen: int, mask: str, window: int | None) -> tuple[Any, Any, list[Any]]:
    """A model, a batch of random spans, and loss and gradients with a mask in float32 on the CPU."""
    import torch

    from train.attention import Sight, span_mask
    from train.config import ModelConfig
    from train.data import document_mask, micro_batches
    from train.model import GPT2

    shape = {"layers": 2, "width": 128, "heads": 2} if cpu else {"layers": 4, "width": 256, "heads": 4}
    batch = spans_batch(seqlen, rows=4 if cpu else 24, window=window)
    torch.manual_seed(1)
    model = GPT2(ModelConfig(**shape, mask=mask), 500, seqlen)
    (part,) = micro_batches(batch, 10**9, torch.device("cpu"), mask)
    blocks = torch.arange(seqlen) // (window or seqlen)  # of plain causal rows, cut at windows
    seen = document_mask(batch) if mask == "document" else span_mask(blocks.expand(batch.labels.shape))
    return model, batch, gradients(model, part._replace(sight=Sight(seen)), None)


def spans_batch(seqlen: int, rows: int, window: int | None) -> Any:
    """Rows of random spans."""
    import numpy as np

    from curriculum.batch import with_attention_window
    from train.warmup import MicroBatchSize, sample_batches

    random = np.random.default_rng(seqlen)
    (batch,) = sample_batches(MicroBatchSize(rows * seqlen, seqlen), False)
    begins = random.random((rows, seqlen)) < 3 / seqlen
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=begins.size)
    batch = replace(
        batch,
        input_ids=random.integers(0, 500, begins.shape),
        labels=random.integers(0, 500, begins.shape),
        position_ids=(np.arange(begins.size) - np.repeat(starts, lengths)).reshape(begins.shape),
        cu_seqlens=np.append(starts, begins.size).astype(np.int32),
        max_seqlen=int(lengths.max()),
    )
    return with_attention_window(batch, window, "kept")


def gradients(model: Any, part: Any, half: Any) -> list[Any]:
    """The loss and all gradients, flat."""
    import torch

    model.zero_grad()
    with torch.autocast(part.labels.device.type, half, enabled=half is not None):
        loss = model(*part) / part.labels.numel()
    loss.backward()
    return [loss.detach().float(), torch.cat([p.grad.flatten().float() for p in model.parameters()])]
