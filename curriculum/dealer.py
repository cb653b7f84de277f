"""Documents dealt into sequences of any length: every token once an epoch, no padding, few cuts.

The dealer keeps the unread spans of documents in a queue ordered by due time, on a clock of tokens served:

    queue   [aaaaaaaaaa] [bb] [cccccc] [d] ...          a deal of sequences of 4 tokens
    long    aaaa | cccc                                 a span of 4 or more gives one; its rest is due later
    short   bb d ...                                    shorter ones are packed together by best fit
    queue   ... [aaaaaa] [cc]                           the next deal may ask for another length

Due times spread the pieces of a span evenly over what is left of the epoch, from a random offset. So a batch is a
fair sample of the tokens left, short and long documents run out together, and rows come from different documents. (A
plain round robin serves the short documents early and ends on the longest few.) A document is first read at a random
multiple of the length, so that short sequences are not all openings. A gap that best fit leaves is filled by cutting
a span, never by padding; spans that find no place keep their due time.

Integers only, from counted hashes: the same on every machine, whatever numpy's or Python's generators become.
Price: 40 bytes a span in memory, and planning anew at resume (1.5 to 2.5 s for 1e9 tokens).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.packing import Packed, place

LOOKAHEAD = 8192
"""Short spans beyond those needed that best fit may choose from: makes perfect rows likely in small deals."""
DEAL_SEQUENCES = 65_536
"""Most sequences of one deal; a deal ends earlier where the schedule changes length or the epoch ends."""


OVERDUE = -1
"""Due time of what was taken back or left over from an epoch: comes first, and no drawing changes that."""
REKEY_FACTOR = 2
"""Due times depend on the pieces to come: they are drawn anew when the length has changed by this factor."""


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
        self._spans = np.empty((3, 0), dtype=np.int64)  # document, first, end; in any order
        self._due = np.empty(0, dtype=np.int64)  # the heap: due times ...
        self._slot = np.empty(0, dtype=np.int64)  # ... and whose they are
        self._free = np.empty(0, dtype=np.int64)  # slots of `_spans` that hold nothing
        self._size = 0
        self._keyed_for = 0
        if epochs:
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
        key = _key(self.seed, self.epoch, 1 + self.deals)
        self.deals += 1
        if max(seqlen, self._keyed_for) >= REKEY_FACTOR * min(seqlen, self._keyed_for):
            self._draw_due_times(seqlen, key)
        self._make_room(2 * sequences)
        horizon = int(self.lengths.sum())
        heap = (self._due, self._slot, self._size, self._spans, self._free)
        long, short, self._size = _take(*heap, self.lengths, seqlen, sequences, LOOKAHEAD, horizon, key)
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
            spans = np.stack([short[0][item[left]], first, first + length[left]])
            self._push(spans, short[3][item[left]])
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
        overdue = np.full(len(first), OVERDUE, dtype=np.int64)
        self._push(np.stack([packed.document[pieces], first, first + length]), overdue)
        self.tokens += int(length.sum())

    def _begin_epoch(self) -> None:
        """Queue every document; what is left of the epoch before is due first."""
        self.epoch += 1
        self._make_room(len(self.lengths))
        left = self._size
        slots = self._free[left : left + len(self.lengths)]
        self._spans[0, slots] = np.arange(len(self.lengths))
        self._spans[1, slots] = 0
        self._spans[2, slots] = self.lengths
        self._due[:left] = OVERDUE
        self._due[left : left + len(self.lengths)] = 0
        self._slot[left : left + len(self.lengths)] = slots
        self._size += len(self.lengths)
        self.tokens += int(self.lengths.sum())
        self._keyed_for = 0  # due times are drawn at the next deal, for its length

    def _draw_due_times(self, seqlen: int, key: int) -> None:
        now = int(self.lengths.sum()) - self.tokens
        _draw(self._due, self._slot, self._size, self._spans, seqlen, now, int(self.lengths.sum()), key)
        self._keyed_for = seqlen

    def _push(self, spans: np.ndarray, due: np.ndarray) -> None:
        self._make_room(len(due))
        self._size = _push_all(self._due, self._slot, self._size, self._spans, self._free, spans, due)

    def _make_room(self, more: int) -> None:
        """Grow the arrays so that `more` spans fit."""
        capacity = len(self._due)
        if self._size + more <= capacity:
            return
        grown = 2 * self._size + more + 1024
        self._spans = np.concatenate([self._spans, np.empty((3, grown - capacity), dtype=np.int64)], axis=1)
        self._due = np.concatenate([self._due, np.empty(grown - capacity, dtype=np.int64)])
        self._slot = np.concatenate([self._slot, np.empty(grown - capacity, dtype=np.int64)])
        self._free = np.concatenate([self._free, np.arange(capacity, grown)])


@njit(nogil=True, cache=True)
def _push(
    due: np.ndarray,
    slot: np.ndarray,
    size: int,
    spans: np.ndarray,
    free: np.ndarray,
    span: tuple[int, int, int],
    time: int,
) -> int:
    """Queue `span` (document, first, end) for `time`; returns the new size. `free[size:]` are the free slots."""
    s = free[size]
    spans[0, s], spans[1, s], spans[2, s] = span
    i = size
    while i > 0 and due[(i - 1) // 2] > time:
        due[i], slot[i] = due[(i - 1) // 2], slot[(i - 1) // 2]
        i = (i - 1) // 2
    due[i], slot[i] = time, s
    return size + 1


@njit(nogil=True, cache=True)
def _sift(due: np.ndarray, slot: np.ndarray, size: int, i: int, time: int, what: int) -> None:
    """Put (`time`, `what`) at place `i` of the heap or below it."""
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and due[child + 1] < due[child]:
            child += 1
        if due[child] >= time:
            break
        due[i], slot[i] = due[child], slot[child]
        i = child
    due[i], slot[i] = time, what


@njit(nogil=True, cache=True)
def _pop(due: np.ndarray, slot: np.ndarray, size: int, free: np.ndarray) -> int:
    """Take the span that is due first out of the heap of `size`; returns its slot, which is free from then on."""
    first = slot[0]
    size -= 1
    free[size] = first
    _sift(due, slot, size, 0, due[size], slot[size])
    return int(first)


@njit(nogil=True, cache=True)
def _push_all(
    due: np.ndarray,
    slot: np.ndarray,
    size: int,
    spans: np.ndarray,
    free: np.ndarray,
    more: np.ndarray,
    times: np.ndarray,
) -> int:
    for i in range(len(times)):
        size = _push(due, slot, size, spans, free, (more[0, i], more[1, i], more[2, i]), times[i])
    return size


@njit(nogil=True, cache=True)
def _draw(
    due: np.ndarray, slot: np.ndarray, size: int, spans: np.ndarray, seqlen: int, now: int, horizon: int, key: int
) -> None:
    """Due times for all spans but the overdue: a random offset within the time between two pieces of the span."""
    for i in range(size):
        s = slot[i]
        pieces = -(-(spans[2, s] - spans[1, s]) // seqlen)
        if due[i] != OVERDUE:
            due[i] = now + _hash(key, s) % max((horizon - now) // pieces, 1)
    for i in range(size // 2 - 1, -1, -1):
        _sift(due, slot, size, i, due[i], slot[i])


@njit(nogil=True, cache=True)
def _take(
    due: np.ndarray,
    slot: np.ndarray,
    size: int,
    spans: np.ndarray,
    free: np.ndarray,
    lengths: np.ndarray,
    seqlen: int,
    sequences: int,
    lookahead: int,
    horizon: int,
    key: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Pop spans for `sequences` sequences.

    Returns (long [2, n]: document, start of a full sequence; short [4, m]: spans and due times; the heap's new size).
    """
    long = np.empty((2, sequences), dtype=np.int64)
    short = np.empty((4, size + 2 * sequences), dtype=np.int64)
    n = m = tokens = 0
    while tokens < seqlen * sequences and size > 0:
        time = due[0]
        s = _pop(due, slot, size, free)
        size -= 1
        document, first, end = spans[0, s], spans[1, s], spans[2, s]
        if end - first < seqlen:
            short[0, m], short[1, m], short[2, m], short[3, m] = document, first, end, time
            m += 1
            tokens += end - first
            continue
        time = max(time, 0)
        if first == 0 and end == lengths[document] and end >= 2 * seqlen:
            first = _hash(key, document) % (end // seqlen) * seqlen
            if first > 0:
                offset = _hash(key + 1, document) % max((horizon - time) // (first // seqlen), 1)
                size = _push(due, slot, size, spans, free, (document, 0, first), time + offset)
        long[0, n], long[1, n] = document, first
        n += 1
        tokens += seqlen
        first += seqlen
        if end > first:
            pause = max(horizon - time, 0) // (-(-(end - first) // seqlen) + 1)
            size = _push(due, slot, size, spans, free, (document, first, end), time + pause)
    # More short spans for best fit to choose from; the long ones passed over go back as they were.
    passed = np.empty((4, lookahead), dtype=np.int64)
    lookahead = min(lookahead, 1024 + 4 * m)  # few in a small deal: what is due soon, not what fits best
    p, most = 0, m + lookahead
    while n < sequences and size > 0 and m < most and p < lookahead:
        time = due[0]
        s = _pop(due, slot, size, free)
        size -= 1
        if spans[2, s] - spans[1, s] < seqlen:
            short[0, m], short[1, m], short[2, m], short[3, m] = spans[0, s], spans[1, s], spans[2, s], time
            m += 1
        else:
            passed[0, p], passed[1, p], passed[2, p], passed[3, p] = spans[0, s], spans[1, s], spans[2, s], time
            p += 1
    for i in range(p):
        size = _push(due, slot, size, spans, free, (passed[0, i], passed[1, i], passed[2, i]), passed[3, i])
    return long[:, :n], short[:, :m], size


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
