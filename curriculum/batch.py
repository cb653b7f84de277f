"""Rows of pieces to arrays: what a model reads, and where each document begins in it.

rows        aaab | cc__                     two sequences of 4: pieces a[0:3] b[0:1] c[5:7], 2 positions of padding
labels      a0 a1 a2 b0 | c5 c6 -100 -100
input_ids   <b a0 a1 <b | c4 c5 eod eod     the token before each label; <b is the beginning-of-document token
positions    0  1  2  0 |  0  1  0  1
cu_seqlens   0        3    4     6     8
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.packing import Packed
from pipeline.reader import Store

NO_TARGET = -100
"""The label of a position without a target, as in torch and Hugging Face."""


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one optimizer step."""

    input_ids: np.ndarray
    """int64 [sequences, seqlen]: the token before each label."""
    labels: np.ndarray
    """int64 [sequences, seqlen]: already shifted; -100 where there is no target (padding of the very last batch)."""
    position_ids: np.ndarray
    """int64 [sequences, seqlen]: from 0 in each span."""
    cu_seqlens: np.ndarray
    """int32 [spans + 1]: where spans (pieces of documents) begin in the flattened rows; FlashAttention's meaning."""
    max_seqlen: int
    """Tokens of the longest span."""
    step: int
    seqlen: int
    targets: int
    """Labels that are not -100, over all ranks."""
    pieces: Packed
    """Which positions of which documents: provenance."""


def make_batch(store: Store, rows: Packed, *, seqlen: int, sequences: int, step: int, targets: int) -> Batch:
    """The arrays of `rows`: `sequences` rows of `seqlen` positions, padded at the end where the pieces are fewer.

    `step` and `targets` (labels of all ranks) are passed on. Raises StoreError at the first use of a damaged shard.
    """
    size = sequences * seqlen
    filled = int(rows.length.sum())
    inputs, labels = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    store.gather(rows.document, rows.start, rows.length, inputs[:filled], labels[:filled])
    inputs[filled:], labels[filled:] = store.manifest.eod_id, NO_TARGET
    padding = np.diff(np.unique(np.append(np.arange(-(-filled // seqlen), sequences + 1) * seqlen, filled)))
    spans = np.concatenate([rows.length, padding])
    ends = np.cumsum(spans)
    return Batch(
        input_ids=inputs.reshape(-1, seqlen),
        labels=labels.reshape(-1, seqlen),
        position_ids=(np.arange(size) - np.repeat(ends - spans, spans)).reshape(-1, seqlen),
        cu_seqlens=np.concatenate([[0], ends]).astype(np.int32),
        max_seqlen=int(spans.max()),
        step=step,
        seqlen=seqlen,
        targets=targets,
        pieces=rows,
    )
