"""The documents of a window dealt into sequences of any length: every token once, no padding, few cuts.

The dealer keeps the unread rests of documents by due time (`unread`), on a clock of tokens served:

    queue   [aaaaaaaaaa] [bb] [cccccc] [d] ...          a deal of sequences of 4 tokens
    long    aaaa | cccc                                 a rest of 4 or more gives one; what is left of it is due later
    short   bb d ...                                    shorter ones are packed together, exactly full where possible
    queue   ... [aaaaaa] [cc]                           the next deal may ask for another length

Due times spread the pieces of a document evenly over the window, each at a random place in its share of the time, the
next one at a similar place: a batch is a fair sample of the tokens left, short and long documents run out together,
rows come from different documents, and not from the same ones each time. A document is a ring: it is first read at a
random piece, to its end, and then from its beginning, so that every token is as likely early as late and openings do
not come first. Its one short piece is the last or the first, by a coin: both take the least possible cuts, and the
second shifts all starts off the multiples of the length. (Read from its beginning instead, where that is asked for:
what is served early is then openings.) A gap that the packer leaves is filled by cutting a rest, never by padding.

Integers only, from counted hashes: the same on every machine, whatever numpy's or Python's generators become.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from curriculum.hashes import hash_at, key_of
from curriculum.unread import HORIZON, LEFT, Queue, draw, push, take, unread
from pipeline.packing import Packed, pack_rows

SWAPS = 16
"""Most later rows tried for one that repeats a document; over a batch, one try for every two rows."""


class _Rows(NamedTuple):
    """Rows of one deal, not in their order yet: those of one long piece, and packed ones."""

    long: np.ndarray
    """int64 [2, n]: document and start of each."""
    short: np.ndarray
    """int64 [4, m]: document, first, end, due of the rests that packed rows are cut from."""
    item: np.ndarray
    """int64 [pieces]: number of a rest in `short`; its tokens from `start` on, `length` of them."""
    start: np.ndarray
    length: np.ndarray
    firsts: np.ndarray
    """int64 [packed rows + 1]: packed row i is pieces firsts[i] to firsts[i + 1]."""
    full: int
    """Packed rows that are full: all, or all but the last."""


class Dealer:
    """The unread tokens of documents of `lengths` (int64 [documents]); `key` decides their order."""

    def __init__(self, lengths: np.ndarray, *, key: int) -> None:
        self.lengths = np.ascontiguousarray(lengths, dtype=np.int64)
        self.key = key
        self.deals = 0
        self._queue = unread(self.lengths)
        self._seen, self._batches = np.zeros(len(self.lengths), dtype=np.int64), 0

    @property
    def tokens(self) -> int:
        """Tokens not dealt yet."""
        return int(self._queue.clock[LEFT])

    def deal(self, seqlen: int, ends: np.ndarray, *, from_beginning: bool = False) -> Packed:
        """Deal `ends[-1]` full sequences of `seqlen` tokens; batch i ends before sequence ends[i], int64 [batches].

        Where fewer tokens are left, all of them, the last sequence short. Sequences of one batch come from distinct
        documents where a few exchanges within the deal can make it so. `from_beginning`: documents not touched yet
        are read from their beginning to their end, not as rings.
        """
        key = key_of(self.key, 1 + self.deals)
        self._queue, rows = _deal(self._queue, seqlen, int(ends[-1]), self.key, from_beginning)
        dealt: Packed = _lay_out(rows, seqlen, ends, self._seen, self._batches, key)
        self.deals += 1
        self._batches += len(ends)
        return dealt

    def skip(self, seqlens: np.ndarray, sequences: np.ndarray, *, from_beginning: bool = False) -> None:
        """Deal sequences[i] sequences of seqlens[i] tokens, int64 [deals], for all i, and forget them.

        There must be tokens for all of them.
        """
        self.deals += len(seqlens)
        self._queue = _skip(self._queue, seqlens, sequences, self.key, from_beginning)

    def take_back(self, packed: Packed, first_sequence: int) -> None:
        """Return the sequences from `first_sequence` on, unserved: they are due next."""
        pieces = slice(int(packed.offsets[first_sequence]), None)
        first, length = packed.start[pieces], packed.length[pieces]
        now = np.full(len(first), self._queue.clock[HORIZON] - self.tokens)
        back = np.stack([packed.document[pieces], first, first + length, now])
        self._queue = push(self._queue, back)
        self._queue.clock[LEFT] += length.sum()


@njit(nogil=True, cache=True)
def _skip(queue: Queue, seqlens: np.ndarray, sequences: np.ndarray, key: int, from_beginning: bool) -> Queue:
    """See `Dealer.skip`; returns the queue."""
    for i in range(len(seqlens)):
        queue = _deal(queue, seqlens[i], sequences[i], key, from_beginning)[0]
    return queue


@njit(nogil=True, cache=True)
def _deal(queue: Queue, seqlen: int, sequences: int, key: int, from_beginning: bool) -> tuple[Queue, _Rows]:
    """The queue after one deal, and its rows."""
    clock = queue.clock
    draw(queue, seqlen, key)
    long, short = take(queue, seqlen, sequences, key, from_beginning)
    if short.shape[1] == 0:
        clock[LEFT] -= long.shape[1] * seqlen
        none = np.empty(0, dtype=np.int64)
        return queue, _Rows(long, short, none, none, none, np.zeros(1, dtype=np.int64), 0)
    sizes = short[2] - short[1]
    full = min(sequences - long.shape[1], sizes.sum() // seqlen)
    item, start, length, firsts = pack_rows(sizes, seqlen, full, queue.lengths[short[0]])
    if long.shape[1] + full == sequences:
        queue = push(queue, _rest(short, item[firsts[full] :], start[firsts[full] :]))
    elif firsts[full] < len(item):
        firsts = np.append(firsts, len(item))  # all is dealt: less than a sequence is left
    item, start, length = item[: firsts[-1]], start[: firsts[-1]], length[: firsts[-1]]
    clock[LEFT] -= long.shape[1] * seqlen + length.sum()
    return queue, _Rows(long, short, item, start, length, firsts, full)


@njit(nogil=True, cache=True)
def _rest(short: np.ndarray, item: np.ndarray, start: np.ndarray) -> np.ndarray:
    """What is left of the rests number `item` of `short` from their token `start` on, in the order of `short`."""
    begin = np.full(short.shape[1], -1, dtype=np.int64)
    for i in range(len(item)):
        begin[item[i]] = start[i]
    more = np.empty((4, len(item)), dtype=np.int64)
    n = 0
    for i in range(len(begin)):
        if begin[i] >= 0:
            more[0, n], more[1, n], more[2, n], more[3, n] = (
                short[0, i],
                short[1, i] + begin[i],
                short[2, i],
                short[3, i],
            )
            n += 1
    return more


@njit(nogil=True, cache=True)
def _lay_out(rows: _Rows, seqlen: int, ends: np.ndarray, seen: np.ndarray, batches: int, key: int) -> Packed:
    """Long and packed rows in one random order, one that is not full last.

    Long rows keep the order in which they are due, so that those of a document stay apart; packed ones are shuffled.
    `seen` and `batches`: see `_spread_documents`.
    """
    full, count = rows.full, rows.long.shape[1]
    document = np.concatenate((rows.long[0], rows.short[0][rows.item]))
    start = np.concatenate((rows.long[1], rows.short[1][rows.item] + rows.start))
    length = np.concatenate((np.full(count, seqlen), rows.length))
    firsts = np.concatenate((np.arange(count), count + rows.firsts))  # row i is pieces firsts[i] to firsts[i + 1]
    order = np.arange(len(firsts) - 1)
    shuffled = np.arange(full)
    for i in range(full - 1, 0, -1):
        j = hash_at(key, i) % (i + 1)
        shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
    longs, packs = count, full
    for i in range(count + full):
        if hash_at(key + 1, i) % (longs + packs) < longs:
            order[i] = count - longs
            longs -= 1
        else:
            order[i] = count + shuffled[full - packs]
            packs -= 1
    _spread_documents(order[: count + full], document, firsts, ends, seen, batches)
    out, offsets = np.empty((3, len(document)), dtype=np.int64), np.zeros(len(firsts), dtype=np.int64)
    n = 0
    for i in range(len(order)):
        for piece in range(firsts[order[i]], firsts[order[i] + 1]):
            out[0, n], out[1, n], out[2, n] = document[piece], start[piece], length[piece]
            n += 1
        offsets[i + 1] = n
    return Packed(out[0], out[1], out[2], offsets)


@njit(nogil=True, cache=True)
def _spread_documents(
    order: np.ndarray, document: np.ndarray, firsts: np.ndarray, ends: np.ndarray, seen: np.ndarray, batches: int
) -> None:
    """Swap a row that repeats a document of its batch for a later row of the deal that repeats none.

    Row r is of documents `document[firsts[r] : firsts[r + 1]]`. `seen`, int64 [documents]: the batch, from 1, that
    had each last; `batches` were dealt before. All in one function: a call with arrays takes as long as many rows.
    """
    batch = tries = begin = 0
    for i in range(len(order)):
        while i >= ends[batch]:
            batch, tries, begin = batch + 1, 0, i  # many fail where a few documents hold most of the tokens
        now, last, j = batches + batch + 1, min(ends[batch] + SWAPS, len(order)), i
        while True:
            repeats = False
            for piece in range(firsts[order[j]], firsts[order[j] + 1]):
                if seen[document[piece]] == now:
                    repeats = True
                    break
            if not repeats:
                order[i], order[j] = order[j], order[i]
                break
            j = ends[batch] if j == i else j + 1
            if j >= last or 2 * tries > 2 * SWAPS + i - begin:
                break
            tries += 1
        for piece in range(firsts[order[i]], firsts[order[i] + 1]):
            seen[document[piece]] = now
