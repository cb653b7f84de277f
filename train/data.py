"""Batches as tensors: where numpy ends and torch begins."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from curriculum.batch import Batch

MicroBatch = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""input_ids, position_ids, labels: int64 [rows, seqlen]; spans: int64 of that shape, or None without a window."""


def micro_batches(
    batch: Batch, micro_batch_tokens: int, device: torch.device, mask: str = "document"
) -> Iterator[MicroBatch]:
    """Parts of at most `micro_batch_tokens` tokens, or one row: what `GPT2.loss` takes.

    Sized in tokens, so that short sequences fill a device as well as long ones. With an attention window the mask
    cannot be told from the positions: `spans` numbers the blocks, cut where documents end too unless `mask` is
    "causal", where positions count from the start of the row.
    """
    rows = max(1, micro_batch_tokens // batch.seqlen)
    positions, spans = batch.position_ids, None
    if batch.window is not None:
        column = np.broadcast_to(np.arange(batch.seqlen), batch.labels.shape)
        if mask == "causal":
            spans = column // batch.window
            positions = column % batch.window if batch.window_positions == "restart" else column.copy()
        else:
            spans = _span_numbers(batch)
    for first in range(0, len(batch.labels), rows):
        part = slice(first, first + rows)
        ids, places, labels = (
            torch.from_numpy(array[part]).to(device, non_blocking=True)
            for array in (batch.input_ids, positions, batch.labels)
        )
        yield ids, places, labels, None if spans is None else torch.from_numpy(spans[part]).to(device)


def _span_numbers(batch: Batch) -> np.ndarray:
    """int64 [sequences, seqlen]: the number of the span each position is in."""
    spans = np.diff(batch.cu_seqlens)
    return np.repeat(np.arange(len(spans)), spans).reshape(batch.labels.shape)


def document_mask(batch: Batch) -> Tensor:
    """bool [sequences, 1, seqlen, seqlen]: True where a position may look, itself and what is before it in its piece.

    For models of others that take a 4-D attention mask; made from `cu_seqlens`, so whatever the positions are.
    Costs sequences * seqlen**2 bytes.
    """
    shape = batch.labels.shape
    span = torch.from_numpy(_span_numbers(batch))  # [sequences, seqlen]
    same = span[:, None, :, None] == span[:, None, None, :]
    return same & torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
