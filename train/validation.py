"""The loss on held-out documents: at full length, always the same batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curriculum.batch import Batch
from curriculum.loader import full_length_batches
from pipeline.reader import Store


@torch.no_grad()
def validation_loss(
    loss_of: Callable[[Batch], Tensor], held_out: Store, seqlen: int, rows: int, most_tokens: int
) -> float:
    """Mean loss in nats a token over at most `most_tokens` held-out tokens, rounded up to batches of `rows` rows.

    `loss_of` gives the sum of the losses of a batch, float32 []; the sums are added in float64.
    """
    losses, targets = [], 0
    for batch in full_length_batches(held_out, seqlen, rows):
        losses.append(loss_of(batch))
        targets += batch.targets
        if targets >= most_tokens:
            break
    return float(torch.stack(losses).double().sum()) / targets
