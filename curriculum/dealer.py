"""The documents of a window dealt into sequences of any length: every token once, no padding, few cuts.

The dealer keeps the unread spans of documents by due time, on a clock of tokens served:

    queue   [aaaaaaaaaa] [bb] [cccccc] [d] ...          a deal of sequences of 4 tokens
    long    aaaa | cccc                                 a span of 4 or more gives one; its rest is due later
    short   bb d ...                                    shorter ones are packed together, exactly full where possible
    queue   ... [aaaaaa] [cc]                           the next deal may ask for another length

Due times spread the pieces of a document evenly over the window, each at a random place in its share of the time, the
next one at a similar place: a batch is a fair sample of the tokens left, short and long documents run out together,
rows come from different documents, and not from the same ones each time. A document is a ring: it is first read at a
random piece, to its end, and then from its beginning, so that every token is as likely early as late and openings do
not come first. Its one short piece is the last or the first, by a coin: both take the least possible cuts, and the
second shifts all starts off the multiples of the length. (Read from its beginning instead, where that is asked for:
what is served early is then openings.) A gap that the packer leaves is filled by cutting a span, never by padding.

Integers only, from counted hashes: the same on every machine, whatever numpy's or Python's generators become. The
queue is a wheel of buckets of due time: O(1) a piece. Price: 56 bytes a span in memory.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipeline.packing import Packed, place

LOOKAHEAD = 8192
"""Most spans beyond those needed that are looked at for short ones: makes full rows likely in small deals."""
REDRAW_FACTOR = 2
"""Due times depend on the pieces to come: they are drawn anew when the length has changed by this factor."""
MOST_BUCKETS = 1 << 16
PLACES = 1 << 16
"""Steps within the time of a piece that its place is counted in."""
SWAPS = 16
"""Most later rows tried in place of one whose document the batch has already; in all, one for every other row."""

DOCUMENT, FIRST, END, WRAP, DUE, NEXT = range(6)
"""Rows of the span table: [FIRST, END) of DOCUMENT is unread, and after it [0, WRAP); NEXT is the list it is in."""
CURSOR, SIZE, FREE, WIDTH, HORIZON = range(5)
"""The clock: earliest bucket that may hold a span; spans held; first free slot; tokens a bucket; tokens in all."""


class Dealer:
    """The unread tokens of documents of `lengths` (int64 [documents]); `key` decides their order."""

    def __init__(self, lengths: np.ndarray, *, key: int) -> None:
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self.key = key
        self.tokens = int(self.lengths.sum())
        """Tokens not dealt yet."""
        self.deals = 0
        count = len(self.lengths)
        buckets = max(1, min(MOST_BUCKETS, self.tokens))
        self._spans = np.zeros((6, count), dtype=np.int64)
        self._spans[DOCUMENT], self._spans[END] = np.arange(count), self.lengths
        self._spans[NEXT] = np.arange(1, count + 1)
        self._heads = np.full(buckets, -1, dtype=np.int64)
        self._clock = np.array([0, count, count, -(-self.tokens // buckets), self.tokens], dtype=np.int64)
        self._heads[0] = 0
        if count:
            self._spans[NEXT, -1] = -1
        self._drawn_for = 0

    def deal(self, seqlen: int, ends: np.ndarray, *, from_beginning: bool = False) -> Packed:
        """Deal `ends[-1]` full sequences of `seqlen` tokens; batch i ends before sequence ends[i], int64 [batches].

        Where fewer tokens are left, all of them, the last sequence short. Sequences of one batch come from distinct
        documents where a few exchanges within the deal can make it so. `from_beginning`: documents not touched yet
        are read from their beginning to their end, not as rings.
        """
        sequences = int(ends[-1])
        key = key_of(self.key, 1 + self.deals)
        self.deals += 1
        if max(seqlen, self._drawn_for) >= REDRAW_FACTOR * min(seqlen, self._drawn_for):
            _draw(self._spans, self._heads, self._clock, seqlen, self.tokens, self.key)
            self._drawn_for = seqlen
        table = (self._spans, self._heads, self._clock)
        long, short = _take(*table, self.lengths, seqlen, sequences, LOOKAHEAD, self.key, from_beginning)
        short_lengths = short[2] - short[1]
        wanted = min(sequences - long.shape[1], int(short_lengths.sum()) // seqlen)
        item, start, length, row = place(short_lengths, seqlen, wanted)
        left, last = np.flatnonzero(row < 0), wanted
        if long.shape[1] + wanted < sequences and len(left):
            row[left], last = wanted, wanted + 1  # all is dealt: less than a sequence is left
        else:
            left = left[np.argsort(item[left], kind="stable")]
            first = short[1][item[left]] + start[left]
            self._push(np.stack([short[0][item[left]], first, first + length[left], short[3][item[left]]]))
        placed = row >= 0
        item, start, length, row = item[placed], start[placed], length[placed], row[placed]
        packed = (short[0][item], short[1][item] + start, length)
        firsts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=last))])
        self.tokens -= long.shape[1] * seqlen + int(length.sum())
        return Packed(*_lay_out(long, *packed, firsts, wanted, seqlen, ends, len(self.lengths), key))

    def take_back(self, packed: Packed, first_sequence: int) -> None:
        """Return the sequences from `first_sequence` on, unserved: they are due next."""
        pieces = slice(int(packed.offsets[first_sequence]), None)
        first, length = packed.start[pieces], packed.length[pieces]
        now = np.full(len(first), self._clock[HORIZON] - self.tokens)
        self._push(np.stack([packed.document[pieces], first, first + length, now]))
        self.tokens += int(length.sum())

    def _push(self, spans: np.ndarray) -> None:
        """Queue spans (int64 [4, spans]: document, first, end, due time)."""
        grown = int(self._clock[SIZE]) + spans.shape[1]
        capacity = self._spans.shape[1]
        if grown > capacity:
            more = np.zeros((6, grown + grown // 2 - capacity), dtype=np.int64)
            more[NEXT] = np.arange(capacity + 1, capacity + more.shape[1] + 1)
            if int(self._clock[FREE]) != capacity:  # the new slots come before the free ones there are
                more[NEXT, -1] = self._clock[FREE]
                self._clock[FREE] = capacity
            self._spans = np.concatenate([self._spans, more], axis=1)
        _push_all(self._spans, self._heads, self._clock, spans)


@njit(nogil=True, cache=True)
def _link(spans: np.ndarray, heads: np.ndarray, clock: np.ndarray, slot: int) -> None:
    """Put a slot into the bucket of its due time."""
    bucket = max(0, min(spans[DUE, slot] // clock[WIDTH], len(heads) - 1))
    spans[NEXT, slot] = heads[bucket]
    heads[bucket] = slot
    clock[CURSOR] = min(clock[CURSOR], bucket)


@njit(nogil=True, cache=True)
def _pop(spans: np.ndarray, heads: np.ndarray, clock: np.ndarray) -> int:
    """Take a slot of the earliest bucket out of its list; there must be one."""
    bucket = clock[CURSOR]
    while heads[bucket] < 0:
        bucket += 1
    clock[CURSOR] = bucket
    slot = heads[bucket]
    heads[bucket] = spans[NEXT, slot]
    return int(slot)


@njit(nogil=True, cache=True)
def _release(spans: np.ndarray, clock: np.ndarray, slot: int) -> None:
    spans[NEXT, slot] = clock[FREE]
    clock[FREE] = slot
    clock[SIZE] -= 1


@njit(nogil=True, cache=True)
def _push_all(spans: np.ndarray, heads: np.ndarray, clock: np.ndarray, more: np.ndarray) -> None:
    for i in range(more.shape[1]):
        slot = clock[FREE]
        clock[FREE] = spans[NEXT, slot]
        clock[SIZE] += 1
        spans[DOCUMENT, slot], spans[FIRST, slot], spans[END, slot], spans[DUE, slot] = more[:, i]
        spans[WRAP, slot] = 0
        _link(spans, heads, clock, slot)


@njit(nogil=True, cache=True)
def _pieces(span: int, wrap: int, seqlen: int) -> int:
    return -(-span // seqlen) + -(-wrap // seqlen)


@njit(nogil=True, cache=True)
def _place(own: int, pieces: int) -> int:
    """Where within its share of time, 0 to PLACES - 1, piece number `pieces` stands of a document of hash `own`.

    Uniform over documents for any piece. From one piece to the next it moves by an eighth of the share at most, by a
    step that is the document's, and turns round at the ends.
    """
    x = (own + pieces * ((own >> 32) % (PLACES // 4) - PLACES // 8)) & (2 * PLACES - 1)
    return int(min(x, 2 * PLACES - 1 - x))


@njit(nogil=True, cache=True)
def _draw(spans: np.ndarray, heads: np.ndarray, clock: np.ndarray, seqlen: int, tokens: int, key: int) -> None:
    """Due times for all spans, over the `tokens` that are left."""
    held = np.empty(clock[SIZE], dtype=np.int64)
    for i in range(len(held)):
        held[i] = _pop(spans, heads, clock)
    for s in held:
        pieces = _pieces(spans[END, s] - spans[FIRST, s], spans[WRAP, s], seqlen)
        place = _place(_hash(key, spans[DOCUMENT, s]), pieces)
        spans[DUE, s] = clock[HORIZON] - tokens + tokens * place // (pieces * PLACES)
        _link(spans, heads, clock, s)


@njit(nogil=True, cache=True)
def _first_read(length: int, seqlen: int, key: int, document: int) -> int:
    """Where a document of `length` > `seqlen` tokens is first read: any of its pieces, all as likely.

    Pieces begin at the multiples of `seqlen`, or, by a coin, as many tokens before the end of the document.
    """
    pieces = -(-length // seqlen)
    chosen = _hash(key, document) % (2 * pieces)
    first = chosen // 2 * seqlen
    if chosen % 2 == 1 and first > 0:
        first -= pieces * seqlen - length
    return int(first)


@njit(nogil=True, cache=True)
def _take(
    spans: np.ndarray,
    heads: np.ndarray,
    clock: np.ndarray,
    lengths: np.ndarray,
    seqlen: int,
    sequences: int,
    lookahead: int,
    key: int,
    from_beginning: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Pieces for `sequences` sequences, out of the queue.

    Returns (long int64 [2, n]: document, start of full sequences; short int64 [4, m]: document, first, end, due).
    """
    horizon = clock[HORIZON]
    long = np.empty((2, sequences), dtype=np.int64)
    most_short = min(2 * clock[SIZE], seqlen * sequences) + lookahead
    short = np.empty((4, most_short), dtype=np.int64)
    n = m = tokens = 0
    while tokens < seqlen * sequences and clock[SIZE] > 0:
        s = _pop(spans, heads, clock)
        document, first, end, wrap, time = (
            spans[DOCUMENT, s],
            spans[FIRST, s],
            spans[END, s],
            spans[WRAP, s],
            spans[DUE, s],
        )
        if not from_beginning and first == 0 and wrap == 0 and end > seqlen and end == lengths[document]:
            first = wrap = _first_read(end, seqlen, key, document)
        served = min(seqlen, end - first)
        if served == seqlen:
            long[0, n], long[1, n] = document, first
            n += 1
        else:
            short[0, m], short[1, m], short[2, m], short[3, m] = document, first, end, time
            m += 1
        tokens += served
        first += served
        if first == end:
            first, end, wrap = 0, wrap, 0
        if first == end:
            _release(spans, clock, s)
            continue
        # Counted down, piece p is due at horizon - share * (p - place); the piece just served tells the share.
        own, pieces = _hash(key, document), _pieces(end - first, wrap, seqlen)
        before = _place(own, pieces + 1)
        apart = PLACES + _place(own, pieces) - before
        spans[DUE, s] = time + (horizon - time) * apart // ((pieces + 1) * PLACES - before)
        spans[FIRST, s], spans[END, s], spans[WRAP, s] = first, end, wrap
        _link(spans, heads, clock, s)
    # More short spans for the packer to choose from; the long ones passed over go back as they were.
    lookahead = min(lookahead, 2048 + 8 * m)  # few in a small deal: what is due soon, not what fits best
    passed = np.empty(lookahead, dtype=np.int64)
    p, most = 0, m + lookahead
    while n < sequences and clock[SIZE] > p and m < most and p < lookahead:
        s = _pop(spans, heads, clock)
        if spans[END, s] - spans[FIRST, s] < seqlen and spans[WRAP, s] == 0:
            short[0, m], short[1, m] = spans[DOCUMENT, s], spans[FIRST, s]
            short[2, m], short[3, m] = spans[END, s], spans[DUE, s]
            m += 1
            _release(spans, clock, s)
        else:
            passed[p] = s
            p += 1
    for i in range(p - 1, -1, -1):
        _link(spans, heads, clock, passed[i])
    return long[:, :n], short[:, :m]


@njit(nogil=True, cache=True)
def _lay_out(
    long: np.ndarray,
    document: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    firsts: np.ndarray,
    full: int,
    seqlen: int,
    ends: np.ndarray,
    documents: int,
    key: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Long and packed rows in one random order: (document, start, length, offsets) as in `Packed`.

    Long rows keep the order in which they are due, so that those of a document stay apart; packed ones are shuffled.
    Packed row i is pieces firsts[i] to firsts[i + 1]; `full` of them are full, one more is the last of all.
    """
    count = long.shape[1]
    rows = count + full
    order = np.empty(rows, dtype=np.int64)
    shuffled = np.arange(full)
    for i in range(full - 1, 0, -1):
        j = _hash(key, i) % (i + 1)
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    longs, packs = count, full
    for i in range(rows):
        if _hash(key + 1, i) % (longs + packs) < longs:
            order[i] = count - longs
            longs -= 1
        else:
            order[i] = count + shuffled[full - packs]
            packs -= 1
    _part(order, long, document, firsts, ends, documents)
    pieces = count + len(document)
    out = np.empty((3, pieces), dtype=np.int64)
    offsets = np.zeros(count + len(firsts), dtype=np.int64)
    n = 0
    for i in range(count + len(firsts) - 1):
        row = order[i] if i < rows else rows
        if row < count:
            out[0, n], out[1, n], out[2, n] = long[0, row], long[1, row], seqlen
            n += 1
        else:
            for j in range(firsts[row - count], firsts[row - count + 1]):
                out[0, n], out[1, n], out[2, n] = document[j], start[j], length[j]
                n += 1
        offsets[i + 1] = n
    return out[0], out[1], out[2], offsets


@njit(nogil=True, cache=True)
def _part(
    order: np.ndarray, long: np.ndarray, document: np.ndarray, firsts: np.ndarray, ends: np.ndarray, documents: int
) -> None:
    """Exchange a row that has a document which its batch has already for a later row of the deal that has none."""
    seen = np.zeros(documents, dtype=np.int64)  # the batch, from 1, that has the document
    batch = tries = begin = 0
    for i in range(len(order)):
        while i >= ends[batch]:
            batch, tries, begin = batch + 1, 0, i  # many fail where a few documents hold most of the tokens
        if _repeats(order[i], long, document, firsts, seen, batch + 1):
            for j in range(ends[batch], min(ends[batch] + SWAPS, len(order))):
                if 2 * tries > 2 * SWAPS + i - begin:
                    break
                tries += 1
                if not _repeats(order[j], long, document, firsts, seen, batch + 1):
                    order[i], order[j] = order[j], order[i]
                    break
        row = order[i] - long.shape[1]
        if row < 0:
            seen[long[0, order[i]]] = batch + 1
        else:
            for j in range(firsts[row], firsts[row + 1]):
                seen[document[j]] = batch + 1


@njit(nogil=True, cache=True)
def _repeats(
    row: int, long: np.ndarray, document: np.ndarray, firsts: np.ndarray, seen: np.ndarray, batch: int
) -> bool:
    """Whether a row has a document that the batch has already."""
    count = long.shape[1]
    if row < count:
        return bool(seen[long[0, row]] == batch)
    for j in range(firsts[row - count], firsts[row - count + 1]):  # noqa: SIM110 (no generators in a kernel)
        if seen[document[j]] == batch:
            return True
    return False


def key_of(*numbers: int) -> int:
    """One 63-bit number from several."""
    key = 0
    for number in numbers:
        key = int(hashes((key + number) & (2**63 - 1), 1)[0]) >> 1
    return key


def hashes(key: int, count: int) -> np.ndarray:
    """uint64 [count]: SplitMix64 at `key` + 1, `key` + 2, ... (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


@njit(nogil=True, cache=True)
def _hash(key: int, index: int) -> int:
    """`hashes(key, index + 1)[index]` without its top bit."""
    z = np.uint64(key) + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))) >> np.uint64(1))
