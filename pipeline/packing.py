"""Pieces of documents into rows of exactly `seqlen` tokens, with hardly a cut.

    documents   aaaaaaa  bbbbb  ccc  dd                seqlen 4
    full rows   aaaa | bbbb                            a document of n tokens gives n // seqlen rows of its own
    the rest    aaa b ccc dd   ->  aaab | cccd | d     longest first

The rest is packed in four passes (`recipes`, `fitting`). The first forms pairs that fill a row exactly, and threes
that fill one or two. The second makes full rows of any number of pieces: a piece, then the longest that fit, and as
soon as one or two pieces close the row exactly, those. The third does the same for two, three and four rows at once,
which costs a cut at each border between them. What cannot be closed goes to best-fit decreasing: each piece into the
fullest row it still fits in. Gaps that are left are filled by cutting a piece (`d` above), never by padding: only the
last row may be short.

The excess cuts are the rows of the rest less the groups of pieces that fill rows exactly: see `least_excess_cuts`.
Price: 5-15 ns a piece and 45 bytes on one core.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.errors import ConfigError
from pipeline.fitting import Groups, Stock, append, fill_rest, fill_rows, room_for
from pipeline.recipes import Recipes, close_exactly, pairs_and_threes

NO_TARGET = -100
"""The label of a position without a target, as in torch and Hugging Face."""
DOCUMENTS_PER_ROW = 1000
"""Closing several rows at once goes on while more rows are open than one per this many documents."""


class Packed(NamedTuple):
    """Sequences as runs of pieces: sequence i holds pieces offsets[i] to offsets[i + 1] - 1."""

    document: np.ndarray
    """int64 [pieces]"""
    start: np.ndarray
    """int64 [pieces]: first token of the piece within its document."""
    length: np.ndarray
    """int64 [pieces]: tokens of the piece, at least 1."""
    offsets: np.ndarray
    """int64 [sequences + 1]"""

    @property
    def sequences(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def padding(self, seqlen: int) -> int:
        """Unfilled positions: only the last sequence has any."""
        return self.sequences * seqlen - int(self.length.sum())


def least_cuts(lengths: np.ndarray, seqlen: int) -> int:
    """The least number of cuts with which documents of `lengths` tokens fit rows of `seqlen`: sum(ceil(n/L) - 1)."""
    return int(((np.asarray(lengths) - 1) // seqlen).sum())


def least_excess_cuts(lengths: np.ndarray, seqlen: int) -> int:
    """A bound: no packing of documents of `lengths` tokens makes fewer cuts than `least_cuts` and these; at least 0.

    What full sequences leave of N documents fills R rows. Excess cuts are R less the groups that fill rows exactly.
    A group has two pieces or more, and at most P have just two: the pairs of n and `seqlen` - n tokens that can be
    formed. So there are at most P + (N - 2 P) / 3 groups.
    """
    count = np.bincount(np.asarray(lengths) % seqlen, minlength=seqlen)
    count[0] = 0
    pairs = int(np.minimum(count[1:], count[:0:-1]).sum()) // 2  # each is counted from both sides
    rows = int((count * np.arange(seqlen)).sum()) // seqlen
    return max(0, rows - pairs - (int(count.sum()) - 2 * pairs) // 3)


def pack(lengths: np.ndarray, seqlen: int) -> Packed:
    """Pack whole documents of `lengths` tokens (int [documents], each at least 1) into sequences of `seqlen` tokens.

    Every token goes into exactly one sequence; every sequence but the last is full. Documents longer than `seqlen`
    give full sequences first, and their last tokens to the packer. Raises ConfigError for a length or seqlen under 1,
    and for what is no whole number.
    """
    for name, given in (("lengths", lengths), ("seqlen", seqlen)):
        kind = np.asarray(given).dtype
        if kind.kind not in "iu" and np.size(given):
            raise ConfigError("a number of tokens is a whole number", found=f"{name} of {kind}", allowed="integers")
    if np.ndim(lengths) > 1 or np.ndim(seqlen):
        raise ConfigError("lengths is a list of numbers, seqlen is one", found=f"{np.shape(lengths)}, {seqlen}")
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if seqlen < 1:
        raise ConfigError("a sequence needs at least one token", found=f"seqlen {seqlen}", allowed="1 or more")
    if len(lengths) and lengths.min() < 1:
        at = int(np.argmin(lengths))
        raise ConfigError(
            "a document needs at least one token", found=f"lengths[{at}] = {lengths[at]}", allowed=">= 1"
        )
    # Memory from numpy is in huge pages where it is large; page faults would take as long as the packing.
    order = np.empty(len(lengths), dtype=np.int64)
    stock = Stock(order, *np.zeros((2, seqlen + 1), dtype=np.int64))
    whole, rest = _count_rests(lengths, seqlen, stock.left)
    most = whole + len(lengths) - int(stock.left[0]) + rest // seqlen + 1
    document, start, length = np.empty((3, most), dtype=np.int64)
    offsets = np.empty(whole - (-rest // seqlen) + 1, dtype=np.int64)
    pieces = _pack(lengths, seqlen, stock, whole, rest // seqlen, Packed(document, start, length, offsets))
    return Packed(document[:pieces], start[:pieces], length[:pieces], offsets)


@njit(nogil=True, cache=True)
def _whole_sequences(length: int, seqlen: int, inverse: float) -> int:
    """length // seqlen, without a division, which would take longer than all else; `inverse` is 1 / seqlen."""
    full = int(length * inverse)  # or one less; one more only beyond 2**51
    return full + (length - full * seqlen >= seqlen)


@njit(nogil=True, cache=True)
def _count_rests(lengths: np.ndarray, seqlen: int, left: np.ndarray) -> tuple[int, int]:
    """Count in `left` what full sequences leave of documents, by tokens; returns (those sequences, tokens left)."""
    inverse = 1.0 / seqlen
    whole = tokens = 0
    for length in lengths:
        full = _whole_sequences(length, seqlen, inverse)
        rest = length - full * seqlen
        left[rest] += 1
        whole += full
        tokens += rest
    return whole, tokens


@njit(nogil=True, cache=True)
def _pack(lengths: np.ndarray, seqlen: int, stock: Stock, whole: int, rows: int, out: Packed) -> int:
    """Write `whole` sequences of one document each, then `rows` of what is left and the last; returns the pieces.

    `stock.left` is as `_count_rests` left it; `out` has room for one piece more.
    """
    document, start, length, offsets = out
    _write_whole(lengths, seqlen, stock, out)
    stock.left[0] = 0
    cursor = stock.after - stock.left
    few = pairs_and_threes(stock.left, seqlen)
    groups = room_for(stock.left.sum() + 3 * few.times.sum())
    p, row = _write_recipes(few, seqlen, stock.order, cursor, whole, whole, out)
    p, row = _write_recipes(close_exactly(stock.left, seqlen), seqlen, stock.order, cursor, p, row, out)
    made = append(few, 2 * seqlen, stock.order, cursor, groups, 0)
    enough = whole + rows - row - 2 * made - len(lengths) // DOCUMENTS_PER_ROW
    used = groups.used[: fill_rest(stock, seqlen, enough, groups, made)]
    entry = groups.entry
    for i in range(groups.begin[len(used)]):
        d = entry[i] >> 32
        entry[i] = d << 32 | lengths[d] - (entry[i] & 0xFFFFFFFF) * seqlen
    groups = Groups(entry, groups.begin, used)
    ranked = _fullest_first(used, seqlen, np.arange(len(used)))
    rest = Packed(document[p:], start[p:], length[p:], offsets[row:])
    pieces = p + _write_rows(lengths, lengths, seqlen, whole + rows - row, groups, ranked, rest)
    offsets[-1] = pieces  # less than a row is left over: the last sequence
    return int(pieces)


@njit(nogil=True, cache=True)
def _write_recipes(
    recipes: Recipes, seqlen: int, order: np.ndarray, cursor: np.ndarray, p: int, row: int, out: Packed
) -> tuple[int, int]:
    """Write the groups of one row, after `p` pieces and `row` rows; returns how many there are then. See `append`."""
    document, start, length, offsets = out
    first = 0
    offsets[row] = p
    for recipe in range(len(recipes.end)):
        parts = recipes.part[first : recipes.end[recipe]]
        first = recipes.end[recipe]
        if parts.sum() != seqlen:
            continue
        for _ in range(recipes.times[recipe]):
            for tokens in parts:
                item = order[cursor[tokens]]
                cursor[tokens] += 1
                document[p], start[p], length[p] = item >> 32, (item & 0xFFFFFFFF) * seqlen, tokens
                p += 1
            row += 1
            offsets[row] = p
    return p, row


@njit(nogil=True, cache=True)
def _write_whole(lengths: np.ndarray, seqlen: int, stock: Stock, out: Packed) -> None:
    """Write the sequences that documents fill alone, and what each leaves to `stock`, whose `left` is known.

    An entry of `stock.order` is here document << 32 | its sequences.
    """
    order, left, after = stock
    document, start, length, offsets = out
    total = 0
    for size in range(seqlen, -1, -1):
        after[size] = total
        total += left[size]
    inverse, p = 1.0 / seqlen, 0
    for d in range(len(lengths)):
        full = _whole_sequences(lengths[d], seqlen, inverse)
        rest = lengths[d] - full * seqlen
        order[after[rest]] = d << 32 | full
        after[rest] += 1
        document[p], start[p], length[p], offsets[p] = d, 0, seqlen, p  # if it has none, the next one's comes here
        p += full > 0
        for sequence in range(1, full):
            document[p], start[p], length[p], offsets[p] = d, sequence * seqlen, seqlen, p
            p += 1


@njit(nogil=True, cache=True)
def pack_rows(lengths: np.ndarray, seqlen: int, rows: int, sizes: np.ndarray) -> Packed:
    """Pieces for `rows` rows of `seqlen` out of items of 1..seqlen tokens; the fullest rows are kept.

    An item is of a document of sizes[item] tokens: where a cut between rows may be in any of several, one that is a
    whole document is spared.

    Among equally full rows the one with the earliest item comes first, so that nothing waits for ever. Within a row
    items come as they are numbered, not the longest first.

    Returns `rows` rows with items as documents, and after their pieces, from offsets[rows] on, the leftovers. All
    rows are full if the items hold at least rows * seqlen tokens; else the last ones are not.
    """
    groups = fill_rows(lengths, seqlen, rows)
    ranked = _fullest_first(groups.used, seqlen, _earliest_first(groups, len(lengths)))
    item = np.empty(len(lengths) + rows, dtype=np.int64)
    out = Packed(item, np.empty_like(item), np.empty_like(item), np.zeros(rows + 1, dtype=np.int64))
    pieces = _write_rows(lengths, sizes, seqlen, rows, groups, ranked, out)
    return Packed(item[:pieces], out.start[:pieces], out.length[:pieces], out.offsets)


@njit(nogil=True, cache=True)
def _earliest_first(groups: Groups, items: int) -> np.ndarray:
    """Rows by their earliest item; sorts the items of each row, in place."""
    entry, begin, _ = groups
    opens = np.full(items, -1, dtype=np.int64)  # the row that begins with this item
    for r in range(len(begin) - 1):
        _sort(entry[begin[r] : begin[r + 1]])
        opens[entry[begin[r]] >> 32] = r
    return opens[opens >= 0]


@njit(nogil=True, cache=True)
def _sort(entries: np.ndarray) -> None:
    """Sort in place, which is by item: by insertion where they are few, as in most rows."""
    if len(entries) > 32:
        entries.sort()
        return
    for i in range(1, len(entries)):
        moved, j = entries[i], i
        while j > 0 and entries[j - 1] > moved:
            entries[j] = entries[j - 1]
            j -= 1
        entries[j] = moved


@njit(nogil=True, cache=True)
def _fullest_first(used: np.ndarray, seqlen: int, sequence: np.ndarray) -> np.ndarray:
    """Rows by decreasing `used`, equal ones as they stand in `sequence`: a counting sort."""
    position = np.zeros(seqlen + 2, dtype=np.int64)
    for tokens in used:
        position[max(seqlen - tokens, 0) + 1] += 1
    position = np.cumsum(position)
    ranked = np.empty_like(sequence)
    for r in sequence:
        free = max(seqlen - used[r], 0)
        ranked[position[free]] = r
        position[free] += 1
    return ranked


@njit(nogil=True, cache=True)
def _spare(entry: np.ndarray, sizes: np.ndarray, gap: int) -> None:
    """Move to the front of `entry` a whole document that fits into `gap`, else a piece of a document.

    So where the border of a row has to cut, it cuts what is a piece already, if there is any.
    """
    chosen = 0
    for k in range(len(entry)):
        tokens = entry[k] & 0xFFFFFFFF
        if tokens < sizes[entry[k] >> 32]:
            chosen = k
        elif tokens <= gap:
            chosen = k
            break
    entry[0], entry[chosen] = entry[chosen], entry[0]


@njit(nogil=True, cache=True)
def _filled(row: int, gap: int, seqlen: int, n: int, offsets: np.ndarray) -> tuple[int, int]:
    """(row, gap) to go on with after piece `n`, when `row` has `gap` tokens free: the next row where it is full."""
    if gap > 0:
        return row, gap
    offsets[row + 1] = offsets[0] + n
    return row + 1, seqlen


@njit(nogil=True, cache=True)
def _write_rows(
    ends: np.ndarray,
    sizes: np.ndarray,
    seqlen: int,
    rows: int,
    groups: Groups,
    ranked: np.ndarray,
    out: Packed,
) -> int:
    """Write `rows` rows as pieces, the first of `ranked`, and fill their gaps from the others; returns the pieces.

    offsets[r + 1] is set to offsets[0] + the pieces up to row r; what is left over of the others comes after them.
    `start` is such that an item ends at `ends`. `sizes`: see `pack_rows`.
    """
    (entry, begin, used), (item, start, length, offsets) = groups, out
    kept, room = 0, rows * seqlen
    while kept < len(ranked) and room >= max(used[ranked[kept]], seqlen):
        room -= max(used[ranked[kept]], seqlen)
        kept += 1
    donor = kept  # the row that gives
    at = begin[ranked[kept]] if kept < len(ranked) else 0  # which of its entries
    i, left = 0, 0  # that entry's item, and its tokens not given yet
    n, row, gap = 0, 0, seqlen
    for r in range(kept + 1):
        if r < kept:
            group = entry[begin[ranked[r]] : begin[ranked[r] + 1]]
            for k in range(len(group)):
                if used[ranked[r]] > seqlen:
                    _spare(group[k:], sizes, gap)
                own, more = group[k] >> 32, group[k] & 0xFFFFFFFF
                while more > 0:
                    taken = min(gap, more)
                    item[n], start[n], length[n] = own, ends[own] - more, taken
                    more -= taken
                    n += 1
                    row, gap = _filled(row, gap - taken, seqlen, n, offsets)
        while (gap < seqlen or r == kept) and donor < len(ranked):  # beyond the last row goes all that is left
            if left == 0:
                i, left = entry[at] >> 32, entry[at] & 0xFFFFFFFF
            taken = left if row == rows else min(gap, left)
            item[n], start[n], length[n] = i, ends[i] - left, taken
            left -= taken
            n += 1
            if row < rows:
                row, gap = _filled(row, gap - taken, seqlen, n, offsets)
            if left == 0:
                at += 1
                if at == begin[ranked[donor] + 1]:
                    donor += 1
                    at = begin[ranked[donor]] if donor < len(ranked) else 0
    offsets[row + 1 : rows + 1] = offsets[0] + n
    return n
