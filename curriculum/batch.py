"""Rows of pieces to arrays: what a model reads, and where each document begins in it.

rows        aaab | cc__                     two sequences of 4: pieces a[0:3] b[0:1] c[5:7], 2 positions of padding
labels      a0 a1 a2 b0 | c5 c6 -100 -100
input_ids   <b a0 a1 <b | c4 c5 eod eod     the token before each label; <b is the beginning-of-document token
positions    0  1  2  0 |  0  1  0  1
cu_seqlens   0        3    4     6     8
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from pipeline.errors import ConfigError
from pipeline.packing import NO_TARGET, Packed
from pipeline.reader import Store


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one optimizer step."""

    input_ids: np.ndarray
    """int64 [sequences, seqlen]: the token before each label."""
    labels: np.ndarray
    """int64 [sequences, seqlen]: already shifted; -100 where there is no target (padding of the very last batch)."""
    position_ids: np.ndarray
    """int64 [sequences, seqlen]: from 0 in each piece."""
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
    attention_window: int | None = None
    """Spans are also cut at the multiples of it in each row (SkyLadder); None: where pieces end only."""
    attention_window_positions: str = "kept"
    """"restart": position_ids count from 0 in each span of an attention window, not in each piece."""


Allocate = Callable[[tuple[int, ...]], np.ndarray]
"""Shape -> C-contiguous int64 (or int32) array that nobody else writes to while a batch made in it is in use."""


def allocate_int64(shape: tuple[int, ...]) -> np.ndarray:
    """Fresh memory: a batch is its holder's for ever."""
    return np.empty(shape, dtype=np.int64)


def make_batches(
    store: Store,
    rows: list[Packed],
    *,
    seqlen: int,
    sequences: int,
    first_step: int,
    targets: list[int],
    allocate: Allocate = allocate_int64,
) -> list[Batch]:
    """Batches of consecutive steps from `first_step` on, each of `sequences` rows of `seqlen`, made in one go.

    Their arrays are parts of one `allocate((3, batches, sequences, seqlen))`: input_ids, labels, position_ids. All
    `rows` but the last fill their batch; that one is padded at its end. `targets` (labels of all ranks) is passed on.
    Raises StoreError at the first use of a damaged shard, ConfigError where `allocate` gives something else.
    """
    arrays = _allocated(allocate, (3, len(rows), sequences, seqlen))
    length = np.concatenate([batch.length for batch in rows])
    inputs, labels, positions = arrays.reshape(3, -1)
    filled = int(length.sum())
    store.gather(
        np.concatenate([batch.document for batch in rows]),
        np.concatenate([batch.start for batch in rows]),
        length,
        inputs[:filled],
        labels[:filled],
        positions[:filled],
    )
    inputs[filled:], labels[filled:] = store.manifest.eod_id, NO_TARGET
    cu_seqlens, first, longest = _spans(length, seqlen, sequences * seqlen, len(rows), positions)
    return [
        Batch(
            input_ids=arrays[0, index],
            labels=arrays[1, index],
            position_ids=arrays[2, index],
            cu_seqlens=cu_seqlens[begin:end],
            max_seqlen=most,
            step=first_step + index,
            seqlen=seqlen,
            targets=targets[index],
            pieces=rows[index],
        )
        for index, (begin, end, most) in enumerate(zip(first, first[1:], longest, strict=False))
    ]


def _allocated(allocate: Allocate, shape: tuple[int, ...]) -> np.ndarray:
    """What `allocate` gives for `shape`. Raises ConfigError where batches cannot be written into it."""
    arrays = allocate(shape)
    if not isinstance(arrays, np.ndarray) or (
        arrays.shape != shape or arrays.dtype not in (np.int64, np.int32) or not arrays.flags.c_contiguous
    ):
        found = type(arrays).__name__
        if isinstance(arrays, np.ndarray):
            found += f" of {arrays.dtype} {list(arrays.shape)}, C-contiguous: {arrays.flags.c_contiguous}"
        raise ConfigError(
            "`allocate` returned an array that does not do",
            found=found,
            allowed=f"ndarray of int64 or int32 {list(shape)}, C-contiguous",
        )
    return arrays


def with_attention_window(batch: Batch, window: int | None, positions: str) -> Batch:
    """`batch` with its spans cut at the multiples of `window` in each row; itself where there is none.

    `positions`: "kept" leaves position_ids as they are, "restart" counts them from 0 in each span.
    """
    if window is None:
        return batch
    begins = np.zeros(batch.labels.shape, dtype=np.bool_)
    begins[:, ::window] = True
    begins.reshape(-1)[batch.cu_seqlens[:-1]] = True
    starts = np.flatnonzero(begins)
    cu_seqlens = np.append(starts, begins.size).astype(np.int32)
    lengths = np.diff(cu_seqlens)
    if positions == "restart":
        batch.position_ids.reshape(-1)[:] = np.arange(begins.size) - np.repeat(starts, lengths)
    return replace(
        batch,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(lengths.max()),
        attention_window=window,
        attention_window_positions=positions,
    )


def _spans(
    length: np.ndarray, seqlen: int, batch_tokens: int, batches: int, positions: np.ndarray
) -> tuple[np.ndarray, list[int], list[int]]:
    """Where spans begin: (cu_seqlens of all batches, where each one's begins in it, longest span of each batch).

    Padding gets a span a row, and its place in `positions`.
    """
    padding_rows = -(-(batches * batch_tokens - int(length.sum())) // seqlen)
    cu_seqlens = np.empty(len(length) + padding_rows + batches, dtype=np.int32)
    first, longest = np.zeros((2, batches + 1), dtype=np.int64)
    _write_spans(length, seqlen, batch_tokens, positions, cu_seqlens, first, longest)
    return cu_seqlens, first.tolist(), longest[:batches].tolist()


@njit(nogil=True, cache=True)
def _write_spans(
    length: np.ndarray,
    seqlen: int,
    batch_tokens: int,
    positions: np.ndarray,
    cu_seqlens: np.ndarray,
    first: np.ndarray,
    longest: np.ndarray,
) -> None:
    """The loop of `_spans`."""
    n = piece = 0
    for batch in range(len(first) - 1):
        cu_seqlens[n] = at = 0
        n += 1
        while at < batch_tokens:
            if piece < len(length):
                span = length[piece]
                piece += 1
            else:
                span = seqlen - at % seqlen  # padding, to the end of the row
                for i in range(span):
                    positions[batch * batch_tokens + at + i] = i
            at += span
            cu_seqlens[n] = at
            n += 1
            longest[batch] = max(longest[batch], span)
        first[batch + 1] = n
