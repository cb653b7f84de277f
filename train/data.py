"""Batches as tensors: where numpy ends and torch begins."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from curriculum.batch import Batch
from pipeline.reader import Store
from train.attention import Sight, has_varlen, span_mask
from train.config import ModelConfig

MOST_ROWS = 1 << 13
"""Of a micro-batch: flash attention's backward pass takes memory for 128 positions of each row, counts it in 32 bits
where rows are wide, and no kernel is launched for more than 65,535 rows."""


def allocate_pinned(shape: tuple[int, ...]) -> np.ndarray:
    """int64 in page-locked memory, which a device copies from by itself: for `CurriculumLoader`."""
    return torch.empty(shape, dtype=torch.int64, pin_memory=True).numpy()


class MicroBatch(NamedTuple):
    """What `GPT2.forward` takes, in its order, to return the loss."""

    input_ids: Tensor
    """int64 [rows, seqlen], or [1, rows * seqlen] in the flat form; so are positions and labels."""
    position_ids: Tensor
    sight: Sight
    labels: Tensor


class Flat(NamedTuple):
    """How spans are handed to kernels that take `cu_seqlens` (see `train.attention`)."""

    mean_document: float
    """Tokens; says how many spans to expect."""

    def capacity(self, rows: int, tokens: int, spans: int, window: int | None = None) -> int:
        """Size of `cu_seqlens`, less one: the same for a shape whatever its documents, unless these are very short.

        Rows, their documents and windows, four standard deviations and some, to a multiple of 64, doubled until
        `spans` fit. Kernels start work for what is not there, if only to end it, so it is no larger.
        """
        expected = rows + tokens / max(1.0, self.mean_document) + (tokens / window if window else 0)
        capacity = -(-int(expected + 4 * expected**0.5 + 16) // 64) * 64
        while capacity < spans:
            capacity *= 2
        return capacity


class Feed:
    """Micro-batches on a device, in the layout of its kernels: flat where it has some for that, else with masks."""

    def __init__(self, store: Store, model: ModelConfig, device: torch.device, half: bool) -> None:
        self.device = device
        self.mask = model.mask
        kernels = has_varlen(device, torch.bfloat16 if half else torch.float32, model.width // model.heads)
        self.flat = Flat(store.tokens / max(1, store.documents)) if kernels else None
        self._in_flight: deque[tuple[torch.cuda.Event, Batch]] = deque()

    def parts(self, batch: Batch, most_tokens: int) -> Iterator[MicroBatch]:
        """`micro_batches`, copied while the device computes."""
        for part in micro_batches(batch, most_tokens, self.device, self.mask, self.flat):
            if self.device.type == "cuda":  # before it is handed out: nobody may ask what comes after the last
                self._hold(batch)
            yield part

    def _hold(self, batch: Batch) -> None:
        """Keep `batch`, whose memory must not be given out again, until it is copied; let go of those that are."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._in_flight.append((event, batch))
        while self._in_flight[0][0].query() and len(self._in_flight) > 1:  # type: ignore[no-untyped-call]
            self._in_flight.popleft()


def micro_batches(
    batch: Batch, micro_batch_tokens: int, device: torch.device, mask: str = "document", flat: Flat | None = None
) -> Iterator[MicroBatch]:
    """Parts of at most `micro_batch_tokens` tokens, or one row.

    Sized in tokens, so that short sequences fill a device as well as long ones. Spans end where documents end and at
    the multiples of an attention window; with `mask` "causal" the former do not count, and positions are those in the
    row, or in the window where these restart. Without `flat` spans are a mask, where one is needed.
    """
    starts = _span_starts(batch, mask)
    for rows in row_parts(len(batch.labels), batch.seqlen, micro_batch_tokens):
        ids, positions, labels = (
            torch.from_numpy(array[rows]).to(device, non_blocking=True)
            for array in (batch.input_ids, batch.position_ids, batch.labels)
        )
        if mask == "causal":
            column = torch.arange(batch.seqlen, device=device)
            if batch.attention_window is not None and batch.attention_window_positions == "restart":
                column %= batch.attention_window
            positions = column.expand_as(ids)
        if starts is None:
            yield MicroBatch(ids, positions, Sight(), labels)
            continue
        tokens = labels.numel()
        begin, end = np.searchsorted(starts, (rows.start * batch.seqlen, rows.stop * batch.seqlen))
        inside = starts[begin:end] - rows.start * batch.seqlen
        if flat is not None:
            capacity = flat.capacity(len(labels), tokens, len(inside), batch.attention_window)
            padded = np.full(capacity + 1, tokens, np.int32)
            padded[: len(inside)] = inside
            sight = Sight(None, _copied(padded, device), min(batch.seqlen, batch.attention_window or batch.seqlen))
            yield MicroBatch(ids.view(1, -1), positions.reshape(1, -1), sight, labels.view(1, -1))
        elif len(inside) == len(labels):
            yield MicroBatch(ids, positions, Sight(), labels)
        else:
            spans = np.repeat(np.arange(len(inside)), np.diff(inside, append=tokens)).reshape(labels.shape)
            yield MicroBatch(ids, positions, Sight(span_mask(_copied(spans, device))), labels)


def row_parts(rows: int, seqlen: int, micro_batch_tokens: int) -> list[slice]:
    """As few parts as there can be of at most `micro_batch_tokens` tokens or one row, differing by a row at most.

    None has more than MOST_ROWS.
    """
    parts = -(-rows // min(max(1, micro_batch_tokens // seqlen), MOST_ROWS))
    edges = [rows * part // parts for part in range(parts + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def document_mask(batch: Batch) -> Tensor:
    """bool [sequences, 1, seqlen, seqlen]: True where a position may look, itself and what is before it in its piece.

    For models of others that take a 4-D attention mask; made from `cu_seqlens`, so whatever the positions are.
    Costs sequences * seqlen**2 bytes.
    """
    spans = np.diff(batch.cu_seqlens)
    return span_mask(torch.from_numpy(np.repeat(np.arange(len(spans)), spans).reshape(batch.labels.shape)))


def _span_starts(batch: Batch, mask: str) -> np.ndarray | None:
    """int [spans]: where spans begin in the flattened rows; None where each row is one."""
    if mask == "document":
        return batch.cu_seqlens[:-1]
    if batch.attention_window is None:
        return None
    begins = np.arange(batch.seqlen) % batch.attention_window == 0
    return np.flatnonzero(np.broadcast_to(begins, batch.labels.shape))


def _copied(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
