"""Documents dealt into sequences of any length: every token once an epoch, no padding, few cuts.

The dealer keeps a queue of unread spans of documents, at first all documents in seeded random order:

    queue   [aaaaaaaaaa] [bb] [cccccc] [d] ...          a deal of sequences of 4 tokens
    long    aaaa | cccc                                 a span of 4 or more gives one, its rest goes to the back
    short   bb d ...                                    shorter ones are packed together by best fit
    queue   ... [aaaaaa] [cc]                           the next deal may ask for another length

So neighbouring sequences come from different documents, and a gap that best fit leaves is filled by cutting a span,
never by padding. Spans that find no place go back to the front of the queue. A document's first piece starts at a
random multiple of the length (its beginning is read later), so that short sequences are not all openings.

Integers only, from counted hashes: the same on every machine, whatever numpy's or Python's generators become.
Price: 24 bytes a span in memory, and planning anew at resume (about a second for 1e9 tokens).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.packing import Packed, place

LOOKAHEAD = 8192
"""Short spans beyond those needed that best fit may choose from: makes perfect rows likely in small deals."""
DEAL_SEQUENCES = 65_536
"""Most sequences of one deal; a deal ends earlier where the schedule changes length or the epoch ends."""


class Dealer:
    """The unread spans of `epochs` passes over documents of `lengths` tokens (int64 [documents])."""

    def __init__(self, lengths: np.ndarray, *, seed: int, epochs: int = 1) -> None:
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self.seed = seed
        self.epochs = epochs
        self.epoch = 0
        self.deals = 0
        self.tokens = 0
        """Tokens in the queue."""
        self._spans = np.empty((3, 0), dtype=np.int64)  # document, first, end
        self._head = self._tail = 0
        self._begin_epoch()

    @property
    def tokens_left(self) -> int:
        """Tokens that can still be dealt, over all epochs left."""
        return self.tokens + max(self.epochs - self.epoch, 0) * int(self.lengths.sum())

    def deal(self, seqlen: int, sequences: int) -> Packed:
        """Deal `sequences` full sequences of `seqlen` tokens, or what is left at the very end (the last one short).

        A deal that the current epoch cannot fill goes on with the next one.
        """
        while self.tokens < seqlen * sequences and self.epoch < self.epochs:
            self._begin_epoch()
        self._make_room(front=1, back=2 * sequences)
        key = _key(self.seed, self.epoch, 1 + self.deals)
        self.deals += 1
        long, short, self._head, self._tail = _take(
            self._spans, self._head, self._tail, self.lengths, seqlen, sequences, LOOKAHEAD, key
        )
        short_lengths = short[2] - short[1]
        wanted = min(sequences - long.shape[1], int(short_lengths.sum()) // seqlen)
        item, start, length, row = place(short_lengths, seqlen, wanted)
        left, partial = np.flatnonzero(row < 0), False
        if long.shape[1] + wanted < sequences and len(left):
            partial = True  # the end of the last epoch: less than a sequence is left
            row[left] = wanted
        else:
            left = left[np.argsort(item[left], kind="stable")]
            first = short[1][item[left]] + start[left]
            self._push_front(np.stack([short[0][item[left]], first, first + length[left]]))
            placed = row >= 0
            item, start, length, row = item[placed], start[placed], length[placed], row[placed]
        self.tokens -= long.shape[1] * seqlen + int(length.sum())
        long_rows, packed_rows = _interleave(long.shape[1], wanted, key)
        packed_rows = np.append(packed_rows, long.shape[1] + wanted)  # a partial sequence comes last
        rows = np.concatenate([long_rows, packed_rows[row]])
        order = np.argsort(rows, kind="stable")
        return Packed(
            document=np.concatenate([long[0], short[0][item]])[order],
            start=np.concatenate([long[1], short[1][item] + start])[order],
            length=np.concatenate([np.full(long.shape[1], seqlen, dtype=np.int64), length])[order],
            offsets=np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=long.shape[1] + wanted + partial))]),
        )

    def take_back(self, packed: Packed, first_sequence: int) -> None:
        """Return the sequences from `first_sequence` on, unserved, to the front of the queue."""
        pieces = slice(int(packed.offsets[first_sequence]), None)
        first, length = packed.start[pieces], packed.length[pieces]
        self._push_front(np.stack([packed.document[pieces], first, first + length]))
        self.tokens += int(length.sum())

    def _begin_epoch(self) -> None:
        self.epoch += 1
        documents = np.arange(len(self.lengths), dtype=np.int64)
        order = np.argsort(_hashes(_key(self.seed, self.epoch, 0), len(documents)), kind="stable")
        self._make_room(front=0, back=len(order))
        end = self._tail + len(order)
        self._spans[0, self._tail : end] = order
        self._spans[1, self._tail : end] = 0
        self._spans[2, self._tail : end] = self.lengths[order]
        self._tail = end
        self.tokens += int(self.lengths.sum())

    def _push_front(self, spans: np.ndarray) -> None:
        count = spans.shape[1]
        self._make_room(front=count, back=0)
        self._spans[:, self._head - count : self._head] = spans
        self._head -= count

    def _make_room(self, *, front: int, back: int) -> None:
        size = self._tail - self._head
        if self._head >= front and self._tail + back <= self._spans.shape[1]:
            return
        grown = np.empty((3, front + back + 2 * size + 1024), dtype=np.int64)
        head = front + size // 2
        grown[:, head : head + size] = self._spans[:, self._head : self._tail]
        self._spans, self._head, self._tail = grown, head, head + size


@njit(nogil=True, cache=True)
def _take(
    spans: np.ndarray,
    head: int,
    tail: int,
    lengths: np.ndarray,
    seqlen: int,
    sequences: int,
    lookahead: int,
    key: int,
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Pop spans for `sequences` sequences.

    Returns (long [2, n]: document, start of a full sequence; short [3, m]: spans; head; tail).
    """
    long = np.empty((2, sequences), dtype=np.int64)
    short = np.empty((3, tail - head + 2 * sequences), dtype=np.int64)
    openings = np.empty((3, sequences), dtype=np.int64)
    n = m = o = tokens = 0
    while tokens < seqlen * sequences and (head < tail or o > 0):
        if head == tail:
            spans[:, tail : tail + o] = openings[:, :o]
            tail += o
            o = 0
        document, first, end = spans[0, head], spans[1, head], spans[2, head]
        head += 1
        size = end - first
        if size < seqlen:
            short[0, m], short[1, m], short[2, m] = document, first, end
            m += 1
            tokens += size
            continue
        if first == 0 and end == lengths[document] and size >= 2 * seqlen:
            skipped = _hash(key, document) % (size // seqlen) * seqlen
            if skipped > 0:
                openings[0, o], openings[1, o], openings[2, o] = document, 0, skipped
                o += 1
                first = skipped
        long[0, n], long[1, n] = document, first
        n += 1
        tokens += seqlen
        if end > first + seqlen:
            spans[0, tail], spans[1, tail], spans[2, tail] = document, first + seqlen, end
            tail += 1
    spans[:, tail : tail + o] = openings[:, :o]  # last, so that they stay away from the rest of their document
    tail += o
    if n < sequences and head < tail:
        # More short spans for best fit to choose from; the long ones passed over keep their order.
        scanned = head
        last = min(tail, head + 4 * lookahead)
        most = m + lookahead
        kept = np.empty((3, last - head), dtype=np.int64)
        k = 0
        while scanned < last and m < most:
            target = short if spans[2, scanned] - spans[1, scanned] < seqlen else kept
            at = m if spans[2, scanned] - spans[1, scanned] < seqlen else k
            target[0, at], target[1, at], target[2, at] = spans[0, scanned], spans[1, scanned], spans[2, scanned]
            if spans[2, scanned] - spans[1, scanned] < seqlen:
                m += 1
            else:
                k += 1
            scanned += 1
        head = scanned - k
        spans[:, head:scanned] = kept[:, :k]
    return long[:, :n], short[:, :m], head, tail


def _interleave(long: int, packed: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the long and of the packed sequences, mixed at random; each kind keeps its order."""
    shuffled = np.argsort(_hashes(key, long + packed), kind="stable")
    return np.sort(shuffled[:long]), np.sort(shuffled[long:])


def _key(*numbers: int) -> int:
    """One 63-bit number from several."""
    key = 0
    for number in numbers:
        key = int(_hashes((key + number) & (2**63 - 1), 1)[0]) >> 1
    return key


def _hashes(key: int, count: int) -> np.ndarray:
    """uint64 [count]: SplitMix64 at `key` + 1, `key` + 2, ... (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


@njit(nogil=True, cache=True)
def _hash(key: int, index: int) -> int:
    """`_hashes(key, index + 1)[index]` without its top bit."""
    z = np.uint64(key) + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))) >> np.uint64(1))
