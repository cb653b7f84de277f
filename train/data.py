"""Batches as tensors: where numpy ends and torch begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curriculum.batch import Batch


def micro_batches(
    batch: Batch, micro_batch_tokens: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids, position_ids, labels), int64 [rows, seqlen], of at most `micro_batch_tokens` tokens or one row.

    Sized in tokens, so that short sequences fill a device as well as long ones.
    """
    rows = max(1, micro_batch_tokens // batch.seqlen)
    arrays = (batch.input_ids, batch.position_ids, batch.labels)
    for first in range(0, len(batch.labels), rows):
        ids, positions, labels = (
            torch.from_numpy(array[first : first + rows]).to(device, non_blocking=True) for array in arrays
        )
        yield ids, positions, labels


def document_mask(batch: Batch) -> Tensor:
    """bool [sequences, 1, seqlen, seqlen]: True where a position may look, itself and what is before it in its piece.

    For models of others that take a 4-D attention mask; made from `cu_seqlens`, so whatever the positions are.
    Costs sequences * seqlen**2 bytes.
    """
    shape = batch.labels.shape
    spans = torch.from_numpy(batch.cu_seqlens).long().diff()
    span = torch.repeat_interleave(torch.arange(len(spans)), spans).view(shape)  # [sequences, seqlen]
    same = span[:, None, :, None] == span[:, None, None, :]
    return same & torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
