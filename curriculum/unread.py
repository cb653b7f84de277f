"""The unread rests of a window's documents by due time: a wheel of buckets, O(1) a rest, as arrays for kernels.

    heads   bucket 0 -> rest -> rest     bucket 1 ->     bucket 2 -> rest ...     of WIDTH tokens of time each
    rests   DOCUMENT FIRST END WRAP DUE NEXT, a column a rest; free columns are a list too

What is looked at beyond the rests that a deal needs is bounded by the tokens dealt: a window is dealt in time
proportional to its tokens and its deals, however small those are. Price: 56 bytes a rest in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from curriculum.hashes import hash_at

LOOKAHEAD = 8192
"""Most rests beyond those needed that are looked at for short ones: makes full rows likely in small deals."""
FREE_LOOKS = 1 << 21
LOOK_TOKENS = 16
"""In all, FREE_LOOKS rests, two for each document, and one for every LOOK_TOKENS tokens dealt are looked at or drawn
anew beyond those needed: only thousands of tiny deals would be more."""
REDRAW_FACTOR = 2
"""Due times depend on the pieces to come: they are drawn anew when the length has changed by this factor."""
MOST_BUCKETS = 1 << 16
PLACES = 1 << 16
"""Steps within the time of a piece that its place is counted in."""

DOCUMENT, FIRST, END, WRAP, DUE, NEXT = range(6)
"""Rows of the rest table: [FIRST, END) of DOCUMENT is unread, and after it [0, WRAP); NEXT is the list it is in."""
CURSOR, SIZE, FREE, WIDTH, HORIZON, LEFT, DRAWN_FOR, LOOKS = range(8)
"""The clock: earliest bucket that may hold a rest; rests held; first free slot; tokens a bucket; tokens in all;
tokens not dealt; the length that due times are drawn for; how many more rests may be looked at."""


class Queue(NamedTuple):
    """The unread rests of documents, as kernels take them; what they change is in the arrays."""

    rests: np.ndarray
    """int64 [6, slots]: see DOCUMENT."""
    heads: np.ndarray
    """int64 [buckets]: the first slot of each bucket's list, -1 where it is empty."""
    clock: np.ndarray
    """int64 [8]: see CURSOR."""
    lengths: np.ndarray
    """int64 [documents]: tokens of each."""


def unread(lengths: np.ndarray) -> Queue:
    """All of documents of `lengths` tokens, int64 [documents], without due times yet."""
    count, tokens = len(lengths), int(lengths.sum())
    buckets = max(1, min(MOST_BUCKETS, tokens))
    rests = np.zeros((6, count), dtype=np.int64)
    rests[DOCUMENT], rests[END] = np.arange(count), lengths
    rests[NEXT] = np.arange(1, count + 1)
    heads = np.full(buckets, -1, dtype=np.int64)
    heads[0] = 0
    if count:
        rests[NEXT, -1] = -1
    looks = FREE_LOOKS + 2 * count
    clock = np.array([0, count, count, -(-tokens // buckets), tokens, tokens, 0, looks], dtype=np.int64)
    return Queue(rests, heads, clock, lengths)


@njit(nogil=True, cache=True)
def link(queue: Queue, slot: int) -> None:
    """Put a slot into the bucket of its due time."""
    rests, heads, clock, _ = queue
    bucket = max(0, min(rests[DUE, slot] // clock[WIDTH], len(heads) - 1))
    rests[NEXT, slot] = heads[bucket]
    heads[bucket] = slot
    clock[CURSOR] = min(clock[CURSOR], bucket)


@njit(nogil=True, cache=True)
def pop(queue: Queue) -> int:
    """Take a slot of the earliest bucket out of its list; there must be one."""
    rests, heads, clock, _ = queue
    bucket = clock[CURSOR]
    while heads[bucket] < 0:
        bucket += 1
    clock[CURSOR] = bucket
    slot = heads[bucket]
    heads[bucket] = rests[NEXT, slot]
    return int(slot)


@njit(nogil=True, cache=True)
def release(queue: Queue, slot: int) -> None:
    """Make a slot that was popped free."""
    rests, _, clock, _ = queue
    rests[NEXT, slot] = clock[FREE]
    clock[FREE] = slot
    clock[SIZE] -= 1


@njit(nogil=True, cache=True)
def push(queue: Queue, more: np.ndarray) -> Queue:
    """Add `more` (int64 [4, n]: document, first, end, due); returns the queue, with a larger table if need be."""
    rests, heads, clock, lengths = queue
    count, capacity = more.shape[1], rests.shape[1]
    grown = clock[SIZE] + count
    if grown > capacity:
        larger = np.zeros((6, grown + grown // 2), dtype=np.int64)
        for row in range(len(rests)):
            for slot in range(capacity):
                larger[row, slot] = rests[row, slot]
        for slot in range(capacity, larger.shape[1]):
            larger[NEXT, slot] = slot + 1
        if clock[FREE] != capacity:  # the new slots come before the free ones there are
            larger[NEXT, -1] = clock[FREE]
            clock[FREE] = capacity
        rests = larger
    queue = Queue(rests, heads, clock, lengths)
    for i in range(count):
        slot = clock[FREE]
        clock[FREE] = rests[NEXT, slot]
        clock[SIZE] += 1
        rests[DOCUMENT, slot], rests[FIRST, slot], rests[END, slot], rests[DUE, slot] = more[:, i]
        rests[WRAP, slot] = 0
        link(queue, slot)
    return queue


@njit(nogil=True, cache=True)
def pieces_of(rest: int, wrap: int, seqlen: int) -> int:
    """How many pieces of `seqlen` tokens `rest` tokens and then `wrap` more give."""
    return -(-rest // seqlen) + -(-wrap // seqlen)


@njit(nogil=True, cache=True)
def place_of(own: int, pieces: int) -> int:
    """Where within its share of time, 0 to PLACES - 1, piece number `pieces` stands of a document of hash `own`.

    Uniform over documents for any piece. From one piece to the next it moves by an eighth of the share at most, by a
    step that is the document's, and turns round at the ends.
    """
    x = (own + pieces * ((own >> 32) % (PLACES // 4) - PLACES // 8)) & (2 * PLACES - 1)
    return int(min(x, 2 * PLACES - 1 - x))


@njit(nogil=True, cache=True)
def draw(queue: Queue, seqlen: int, key: int) -> None:
    """Due times for all rests, over the tokens that are left; not where they have them for about this length."""
    rests, _, clock, _ = queue
    drawn_for, tokens = clock[DRAWN_FOR], clock[LEFT]
    if max(seqlen, drawn_for) < REDRAW_FACTOR * min(seqlen, drawn_for):
        return
    if drawn_for > 0:
        if clock[LOOKS] < clock[SIZE]:
            return  # lengths go to and fro too often for that
        clock[LOOKS] -= clock[SIZE]
    clock[DRAWN_FOR] = seqlen
    held = np.empty(clock[SIZE], dtype=np.int64)
    for i in range(len(held)):
        held[i] = pop(queue)
    for s in held:
        pieces = pieces_of(rests[END, s] - rests[FIRST, s], rests[WRAP, s], seqlen)
        place = place_of(hash_at(key, rests[DOCUMENT, s]), pieces)
        rests[DUE, s] = clock[HORIZON] - tokens + tokens * place // (pieces * PLACES)
        link(queue, s)


@njit(nogil=True, cache=True)
def first_read(length: int, seqlen: int, key: int, document: int) -> int:
    """Where a document of `length` > `seqlen` tokens is first read: any of its pieces, all as likely.

    Pieces begin at the multiples of `seqlen`, or, by a coin, as many tokens before the end of the document.
    """
    pieces = -(-length // seqlen)
    chosen = hash_at(key, document) % (2 * pieces)
    first = chosen // 2 * seqlen
    if chosen % 2 == 1 and first > 0:
        first -= pieces * seqlen - length
    return int(first)


@njit(nogil=True, cache=True)
def take(queue: Queue, seqlen: int, sequences: int, key: int, from_beginning: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pieces for `sequences` sequences, out of the queue.

    Returns (long int64 [2, n]: document, start of full sequences; short int64 [4, m]: document, first, end, due).
    """
    rests, _, clock, lengths = queue
    horizon = clock[HORIZON]
    long = np.empty((2, sequences), dtype=np.int64)
    most = min(2 * clock[SIZE], seqlen * sequences)
    short = np.empty((4, most if most < LOOKAHEAD else most + LOOKAHEAD), dtype=np.int64)  # tiny for a tiny deal
    n = m = tokens = 0
    while tokens < seqlen * sequences and clock[SIZE] > 0:
        s = pop(queue)
        document, first, end, wrap, time = (
            rests[DOCUMENT, s],
            rests[FIRST, s],
            rests[END, s],
            rests[WRAP, s],
            rests[DUE, s],
        )
        if not from_beginning and first == 0 and wrap == 0 and end > seqlen and end == lengths[document]:
            first = wrap = first_read(end, seqlen, key, document)
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
            release(queue, s)
            continue
        # Counted down, piece p is due at horizon - share * (p - place); the piece just served tells the share.
        own, pieces = hash_at(key, document), pieces_of(end - first, wrap, seqlen)
        before = place_of(own, pieces + 1)
        apart = PLACES + place_of(own, pieces) - before
        rests[DUE, s] = time + (horizon - time) * apart // ((pieces + 1) * PLACES - before)
        rests[FIRST, s], rests[END, s], rests[WRAP, s] = first, end, wrap
        link(queue, s)
    clock[LOOKS] += tokens // LOOK_TOKENS
    if n == sequences or clock[SIZE] == 0:
        return long[:, :n], short[:, :m]
    return long[:, :n], _look_ahead(queue, seqlen, short, m)


@njit(nogil=True, cache=True)
def _look_ahead(queue: Queue, seqlen: int, short: np.ndarray, m: int) -> np.ndarray:
    """The first `m` of `short`, and more short rests for the packer to choose from; long ones stay as they were."""
    rests, _, clock, _ = queue
    # Few in a small deal: what is due soon, not what fits best.
    lookahead = max(0, min(LOOKAHEAD, 2048 + 8 * m, clock[LOOKS]))
    passed = np.empty(lookahead, dtype=np.int64)
    if short.shape[1] < m + lookahead:
        small, short = short, np.empty((4, m + lookahead), dtype=np.int64)
        for i in range(m):
            short[0, i], short[1, i], short[2, i], short[3, i] = small[0, i], small[1, i], small[2, i], small[3, i]
    p, most = 0, m + lookahead
    while clock[SIZE] > p and m < most and p < lookahead:
        s = pop(queue)
        if rests[END, s] - rests[FIRST, s] < seqlen and rests[WRAP, s] == 0:
            short[0, m], short[1, m] = rests[DOCUMENT, s], rests[FIRST, s]
            short[2, m], short[3, m] = rests[END, s], rests[DUE, s]
            m += 1
            release(queue, s)
        else:
            passed[p] = s
            p += 1
    clock[LOOKS] -= p + m + lookahead - most
    for i in range(p - 1, -1, -1):
        link(queue, passed[i])
    return short[:, :m]
