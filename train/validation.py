"""The loss on held-out documents: at full length, always the same batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from curriculum.batch import Batch
from curriculum.loader import full_length_batches
from pipeline.reader import Store
from train.distributed import Ranks


@torch.no_grad()
def validation_loss(
    loss_of: Callable[[Batch], Tensor], held_out: Store, seqlen: int, rows: int, most_tokens: int, ranks: Ranks
) -> float:
    """Mean loss in nats a token over at most `most_tokens` held-out tokens, rounded up to batches of `rows` rows.

    `loss_of` gives the sum of the losses of a batch, float32 []. Ranks take turns at the batches, and all call it
    equally often: for want of a batch with one that does not count. The sums are added in float64 and in one order.
    """
    losses, targets = [], 0
    batches = _chosen(held_out, seqlen, rows, most_tokens)
    while turn := list(islice(batches, ranks.world_size)):
        has = ranks.rank < len(turn)
        loss = loss_of(turn[ranks.rank if has else 0]).double()
        losses.append(loss if has else torch.zeros_like(loss))
        targets += sum(batch.targets for batch in turn)
    return float(ranks.gather(torch.stack(losses)).T.sum()) / targets


def _chosen(held_out: Store, seqlen: int, rows: int, most_tokens: int) -> Iterator[Batch]:
    targets = 0
    for batch in full_length_batches(held_out, seqlen, rows):
        yield batch
        targets += batch.targets
        if targets >= most_tokens:
            return
