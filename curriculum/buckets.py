"""Dataset Decomposition (arXiv 2405.13226): pieces of powers of two, batches of one length each, in an order by odds.

    document of 27   aaaaaaaaaaaaaaaa aaaaaaaa aa a      the longest power of two first, then of what is left
    seqlen 4 to 16   aaaaaaaaaaaaaaaa aaaaaaaa           what is below the smallest bucket is dropped
    buckets          16: a b b   8: a c d   4: b d e     each holds sequences of one document, no padding
    batches of 32    16 x 2, 8 x 4, 4 x 8                as many tokens in each; the last of a bucket is dropped

The order is the paper's Algorithm 1: the batches of each bucket are split over `cycles`; in a cycle the bucket of the
next batch is drawn by the odds of those that still have one. Odds are listed from the shortest bucket on. Draws are
counted hashes compared in integers: the same on every machine.

What is lost, and nothing else: pieces below the smallest bucket (none with seqlen_start = 1), and at the end of the
run less than a batch of each bucket; with `carry` these are halved into the bucket below, so that less than one batch
of the smallest is lost. Price: 16 bytes a piece in memory, of all documents at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from curriculum.hashes import hashes, key_of
from curriculum.pacing import require_positive
from curriculum.phases import Phase, Phases
from pipeline.errors import ConfigError
from pipeline.packing import Packed

ODDS: dict[str, Callable[[int], list[int] | None]] = {
    "natural": lambda count: None,
    "uniform": lambda count: [1] * count,
    "grow-linear": lambda count: list(range(count, 0, -1)),
    "grow-p2": lambda count: [2**i for i in range(count)][::-1],
    "grow-p100": lambda count: [100**i for i in range(count)][::-1],
}
"""Name in the paper -> (number of buckets -> odds, shortest first; None: each batch left is equally likely)."""


@dataclass(frozen=True)
class Buckets:
    """How documents are decomposed and in which order batches come."""

    seqlen_start: int
    seqlen_end: int
    batch_tokens: int
    odds: str | Sequence[int] = "grow-p2"
    cycles: int = 8
    order_seed: int = 1
    carry: bool = False

    def __post_init__(self) -> None:
        require_positive(seqlen_start=self.seqlen_start, cycles=self.cycles, seqlen_end=self.seqlen_end)
        for name, value in (("seqlen_start", self.seqlen_start), ("seqlen_end", self.seqlen_end)):
            if value & (value - 1):
                below = 1 << (value.bit_length() - 1)
                raise ConfigError(f"{name} is no power of two", found=value, allowed=f"{below} or {2 * below}")
        if self.seqlen_start > self.seqlen_end:
            raise ConfigError("seqlen_start is above seqlen_end", found=f"{self.seqlen_start} > {self.seqlen_end}")
        if self.batch_tokens % self.seqlen_end:
            raise ConfigError(
                "a batch is as many tokens in every bucket",
                found=f"global_batch_tokens = {self.batch_tokens}",
                allowed=f"a multiple of seqlen_end = {self.seqlen_end}",
            )
        if isinstance(self.odds, str):
            if self.odds not in ODDS:
                raise ConfigError("unknown odds", found=self.odds, allowed=", ".join(ODDS))
        elif len(self.odds) != len(self.seqlens) or any(odd < 1 for odd in self.odds):
            raise ConfigError(
                "odds are positive, one for each bucket",
                found=list(self.odds),
                allowed=f"{len(self.seqlens)} numbers, for {', '.join(map(str, self.seqlens))}",
            )

    @property
    def seqlens(self) -> list[int]:
        """The length of each bucket, shortest first."""
        return [1 << i for i in range(self.seqlen_start.bit_length() - 1, self.seqlen_end.bit_length())]

    def count(self, lengths: np.ndarray) -> np.ndarray:
        """int64 [buckets]: sequences that documents of `lengths` (int64 [documents]) give, shortest bucket first."""
        counts = [int(np.count_nonzero(lengths & seqlen)) for seqlen in self.seqlens]
        counts[-1] = int((lengths // self.seqlen_end).sum())
        return np.array(counts, dtype=np.int64)

    def batches(self, sequences: Sequence[int], epochs: int) -> tuple[list[int], list[int]]:
        """(full batches, sequences handed down from the bucket above) of each bucket, over all `epochs`.

        `sequences`: of each bucket in one epoch, as `count` says.
        """
        full, handed = [0] * len(self.seqlens), [0] * len(self.seqlens)
        for i in reversed(range(len(self.seqlens))):
            rows = self.batch_tokens // self.seqlens[i]
            full[i], left = divmod(epochs * sequences[i] + handed[i], rows)
            if self.carry and i:
                handed[i - 1] = 2 * left
        return full, handed

    def phases(self, sequences: Sequence[int], epochs: int, total_tokens: int | None) -> Phases:
        """The order of batches of a run: all there are, or of each bucket its share of `total_tokens`."""
        counts, _ = self.batches(sequences, epochs)
        if total_tokens is not None:
            counts = _share(counts, min(-(-total_tokens // self.batch_tokens), sum(counts)))
        odds = ODDS[self.odds](len(counts)) if isinstance(self.odds, str) else list(self.odds)
        order = [self.seqlens[bucket] for bucket in _order(counts, odds, self.cycles, self.order_seed)]
        return Phases.of((step, seqlen, self.batch_tokens // seqlen, 0) for step, seqlen in enumerate(order))


class Pieces:
    """The sequences of every bucket in the order they are served, from any one on."""

    def __init__(self, buckets: Buckets, lengths: np.ndarray, key: int, epochs: int) -> None:
        self.buckets, self.lengths, self.key, self.epochs = buckets, lengths, key, epochs
        self.sequences = buckets.count(lengths).tolist()
        self.full, self.handed = buckets.batches(self.sequences, epochs)
        self._cache: dict[int, tuple[int, np.ndarray]] = {}

    def take(self, bucket: int, first: int, count: int) -> Packed:
        """Sequences `first` to `first` + `count` - 1 of `bucket`, over all epochs."""
        parts, own = [], self.sequences[bucket]
        while count:
            epoch = min(first // own, self.epochs) if own else self.epochs
            at = first - epoch * own
            pieces = self._pieces(bucket, epoch)[:, at : at + count]
            assert pieces.shape[1], "a bucket is asked for more than it holds"
            parts.append(pieces)
            first, count = first + pieces.shape[1], count - pieces.shape[1]
        document, start = np.concatenate(parts, axis=1)
        seqlen = self.buckets.seqlens[bucket]
        return Packed(document, start, np.full(len(document), seqlen, dtype=np.int64), np.arange(len(document) + 1))

    def _pieces(self, bucket: int, epoch: int) -> np.ndarray:
        """int64 [2, sequences]: document and start of one epoch, in its order; after the last, those handed down."""
        if self._cache.get(bucket, (-1,))[0] != epoch:
            pieces = self._halved(bucket) if epoch == self.epochs else self._shuffled(bucket, epoch)
            self._cache[bucket] = epoch, pieces
        return self._cache[bucket][1]

    def _shuffled(self, bucket: int, epoch: int) -> np.ndarray:
        seqlen = self.buckets.seqlens[bucket]
        if seqlen == self.buckets.seqlen_end:
            counts = self.lengths // seqlen
            document = np.repeat(np.arange(len(self.lengths)), counts)
            start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seqlen
        else:
            document = np.flatnonzero(self.lengths & seqlen)
            start = self.lengths[document] // (2 * seqlen) * (2 * seqlen)
        order = np.argsort(hashes(key_of(self.key, seqlen, epoch), len(document)), kind="stable")
        return np.stack([document[order], start[order]])

    def _halved(self, bucket: int) -> np.ndarray:
        """What the bucket above cannot make a batch of, in halves."""
        above, rows = bucket + 1, self.buckets.batch_tokens // self.buckets.seqlens[bucket + 1]
        left = self.take(above, self.full[above] * rows, self.handed[bucket] // 2)
        document, start = np.repeat(left.document, 2), np.repeat(left.start, 2)
        start[1::2] += self.buckets.seqlens[bucket]
        return np.stack([document, start])


def bucket_batches(pieces: Pieces, phases: Sequence[Phase], first: int, end: int) -> Iterator[tuple[int, Packed]]:
    """(step, its batch) for steps `first` to `end` - 1 of `phases`."""
    served = dict.fromkeys(pieces.buckets.seqlens, 0)
    ends = [phase.first_step for phase in phases[1:]] + [end]
    for phase, last in zip(phases, ends, strict=True):
        bucket = pieces.buckets.seqlens.index(phase.seqlen)
        for step in range(phase.first_step, min(last, end)):
            if step >= first:
                yield step, pieces.take(bucket, served[phase.seqlen], phase.sequences)
            served[phase.seqlen] += phase.sequences


def _share(counts: list[int], total: int) -> list[int]:
    """`total` divided in proportion to `counts`: rounded down, the rest to the largest remainders."""
    everything = sum(counts) or 1
    shares = [count * total // everything for count in counts]
    remainders = [count * total % everything for count in counts]
    for i in sorted(range(len(counts)), key=lambda i: -remainders[i])[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _order(counts: list[int], odds: list[int] | None, cycles: int, seed: int) -> list[int]:
    """The bucket of each batch: in each cycle a share of all, drawn by the odds of the buckets not yet empty."""
    order: list[int] = []
    for cycle in range(cycles):
        left = [(cycle + 1) * count // cycles - cycle * count // cycles for count in counts]
        for draw in hashes(key_of(seed, cycle), sum(left)).tolist():
            weights = [odd if n else 0 for n, odd in zip(left, odds, strict=True)] if odds else left
            at = sum(weights) * draw >> 64
            bucket = 0
            while at >= weights[bucket]:
                at -= weights[bucket]
                bucket += 1
            order.append(bucket)
            left[bucket] -= 1
    return order
