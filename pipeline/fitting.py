"""Items of 1..seqlen tokens into rows: first groups that fill rows exactly, then best-fit decreasing.

Items of equal length are alike, so the work is done per length and copied to the items:

    count       12 x 700   9 x 300   40 x 24           seqlen 1024
    a row       700 + 300 + 24                         found once ...
    9 rows      700 + 300 + 24, nine times             ... made as often as the counts allow
    count        3 x 700             31 x 24

A row so found is a *recipe*; making it as often as may be uses a length up, so there are few: a million items of
2,048 lengths need some thousands. Which lengths are left is a set of bits, beside it the same set mirrored: whether
two items add up to a gap is 64 pairs an operation. Price: 40 ns a length in a recipe, 1-4 ns an item, and copying.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.bits import flip, has, highest_up_to, lowest, lowest_from, word_from

ROWS_AT_ONCE = 4
"""Most rows that one group of items may fill exactly together."""
CLOSING_PAIRS = 4096
"""Most pairs looked at to close a row: bounds a search at very long sequences."""


class Stock(NamedTuple):
    """Items to be packed, by length. Those of a length that are left are order[after - left : after]."""

    order: np.ndarray
    """int64 [items]: entries, the longest first. An entry is item << 32 | length: nothing is looked up at random."""
    left: np.ndarray
    """int64 [seqlen + 1]: how many items of each length are left."""
    after: np.ndarray
    """int64 [seqlen + 1]: where those of each length end in `order`."""


class Groups(NamedTuple):
    """Groups of items, or room for them: a row, or several rows that are exactly full together."""

    entry: np.ndarray
    """int64 [items]: as in `Stock`; group g holds entry[begin[g]:begin[g + 1]]."""
    begin: np.ndarray
    """int64 [groups + 1]"""
    used: np.ndarray
    """int64 [groups]: tokens of each."""


class _Search(NamedTuple):
    """What a search for items of `total` tokens goes by."""

    left: np.ndarray
    """See `Stock`."""
    present: np.ndarray
    """uint64 [words]: bit n is set where some of length n are left; a word of zeros follows, for `word_from`."""
    mirrored: np.ndarray
    """The same set with bit total - n for n."""
    total: int


@njit(nogil=True, cache=True)
def fill_rows(lengths: np.ndarray, seqlen: int, rows: int) -> Groups:
    """All passes over items of `lengths`, int64 [items]; an item of no tokens is in no group.

    A group is a row, or exactly two, three or four while fewer than `rows` are exactly full. Best fit's come last.
    """
    stock = longest_first(lengths, seqlen)
    groups = room_for(len(lengths))
    made = _close(stock, seqlen, groups, 0)
    made = fill_rest(stock, seqlen, rows - made, groups, made)
    return Groups(groups.entry, groups.begin[: made + 1], groups.used[:made])


@njit(nogil=True, cache=True)
def fill_rest(stock: Stock, seqlen: int, rows: int, groups: Groups, made: int) -> int:
    """What is left when no row is exactly full any more: several at once, until `rows` are, then best fit.

    Appends to the groups `made` so far and returns how many there are then.
    """
    for wide in range(2, ROWS_AT_ONCE + 1):
        if rows > 0:
            before = made
            made = _close(stock, wide * seqlen, groups, made)
            rows -= wide * (made - before)
    return int(best_fit(stock, seqlen, groups, made))


@njit(nogil=True, cache=True)
def room_for(items: int) -> Groups:
    """Room for the groups of so many items."""
    begin = np.empty(items + 1, dtype=np.int64)
    begin[0] = 0
    return Groups(np.empty(items, dtype=np.int64), begin, np.empty(items, dtype=np.int64))


@njit(nogil=True, cache=True)
def _close(stock: Stock, total: int, groups: Groups, made: int) -> int:
    """Append groups of exactly `total` tokens to the `made` so far; returns how many there are then."""
    entry, begin, used = groups
    n, first, cursor = begin[made], 0, stock.after - stock.left
    part, end, times = close_exactly(stock.left, total)
    for recipe in range(len(end)):
        for _ in range(times[recipe]):
            for size in part[first : end[recipe]]:
                entry[n] = stock.order[cursor[size]]
                cursor[size] += 1
                n += 1
            used[made] = total
            made += 1
            begin[made] = n
        first = end[recipe]
    return made


@njit(nogil=True, cache=True)
def longest_first(lengths: np.ndarray, seqlen: int) -> Stock:
    """Items of `lengths`, int64 [items], 0 to `seqlen` tokens each; those of none are left out."""
    left = np.zeros(seqlen + 1, dtype=np.int64)
    for size in lengths:
        left[size] += 1
    left[0] = 0
    order = np.empty_like(lengths)
    after = np.zeros(seqlen + 1, dtype=np.int64)
    cursor = np.zeros(seqlen + 1, dtype=np.int64)
    total = 0
    for size in range(seqlen, 0, -1):
        cursor[size] = total
        total += left[size]
        after[size] = total
    for i in range(len(lengths)):
        if lengths[i] > 0:
            order[cursor[lengths[i]]] = i << 32 | lengths[i]
            cursor[lengths[i]] += 1
    return Stock(order, left, after)


@njit(nogil=True, cache=True)
def close_exactly(left: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of items that make up exactly `total` tokens, a row or several, as recipes. Takes them from `left`.

    Recipe r makes times[r] groups of the lengths part[end[r - 1]:end[r]]; returns (part, end, times), int64. A group
    begins with the longest item left. While no single item and no pair (the most unequal first) closes it, it takes
    the longest item that fits; where none does, its first item and all others of that length are set aside.
    """
    longest, words = len(left) - 1, total // 64 + 4
    search = _Search(left, np.zeros(words, dtype=np.uint64), np.zeros(words, dtype=np.uint64), total)
    for size in range(1, longest + 1):
        if left[size] > 0:
            _flip(search, size)
    chosen = np.empty(total, dtype=np.int64)
    taken = np.zeros(longest + 1, dtype=np.int64)  # by one group, of each length
    part, end, times = np.empty((3, left.sum()), dtype=np.int64)
    n = recipes = 0
    aside = longest + 1  # the shortest length set aside
    for size in range(longest, 0, -1):
        while left[size] > 0:
            parts, closed = _choose(search, taken, size, aside, chosen)
            most = len(part)
            for one in chosen[:parts]:  # give back; the same parts make as many groups as the scarcest allows
                if taken[one] > 0:
                    if left[one] == 0:
                        _flip(search, one)
                    left[one] += taken[one]
                    most = min(most, left[one] // taken[one])
                    taken[one] = 0
            if not closed:
                aside = size
                break
            for one in chosen[:parts]:
                part[n] = one
                n += 1
                left[one] -= most
            for one in chosen[:parts]:
                if left[one] == 0 and has(search.present, one):
                    _flip(search, one)
            end[recipes], times[recipes] = n, most
            recipes += 1
    return part[:n], end[:recipes], times[:recipes]


@njit(nogil=True, cache=True)
def _flip(search: _Search, size: int) -> None:
    """Some of this length are left now and none were, or the other way round."""
    flip(search.present, size)
    flip(search.mirrored, search.total - size)


@njit(nogil=True, cache=True)
def _choose(search: _Search, taken: np.ndarray, first: int, aside: int, chosen: np.ndarray) -> tuple[int, bool]:
    """Take lengths that begin with `first` into `chosen`: (how many, whether they add up to the total).

    Of lengths between `first` and `aside` none are left.
    """
    left, parts, gap = search.left, 0, search.total
    one, two = first, 0
    while one > 0:
        for part in (one, two):
            if part > 0:
                chosen[parts] = part
                parts += 1
                gap -= part
                left[part] -= 1
                taken[part] += 1
                if left[part] == 0:
                    _flip(search, part)
        if gap == 0:
            return parts, True
        one, two = gap, 0
        longest = min(first, gap - 1) if gap <= aside else gap - 1
        if gap >= len(left) or left[gap] == 0:
            one, two = _pair(search, gap, longest)
        if one == 0:
            one = highest_up_to(search.present, longest)
    return parts, False


@njit(nogil=True, cache=True)
def _pair(search: _Search, gap: int, longest: int) -> tuple[int, int]:
    """The most unequal two lengths left, up to `longest`, that add up to `gap`; (0, 0) where there are none."""
    limit = min(gap // 2, CLOSING_PAIRS)
    for word in range((gap - longest) // 64, limit // 64 + 1):
        # Bit `two` of the first: `two` is left. Bit `two` of the second: `gap - two` is left.
        both = search.present[word] & word_from(search.mirrored, search.total - gap + 64 * word)
        if both != 0:
            two = 64 * word + lowest(both)
            one = gap - two
            if two > limit or (one == two and search.left[one] < 2):
                break
            return one, two
    return 0, 0


@njit(nogil=True, cache=True)
def best_fit(stock: Stock, seqlen: int, groups: Groups, made: int) -> int:
    """Best-fit decreasing of what is left; appends rows to the groups `made` so far, returns how many there are then.

    Longest item first (equal ones in the order given), into the row with the least free space that takes it, the one
    that was last changed among equals; a new row where none does.
    """
    used, rows, n = groups.used, made, 0
    row_of = np.empty(stock.left.sum(), dtype=np.int64)
    below = np.empty(len(row_of), dtype=np.int64)  # rows of equal free space form a stack
    top = np.full(seqlen + 1, -1, dtype=np.int64)
    occupied = np.zeros(seqlen // 64 + 1, dtype=np.uint64)  # bit `free`: some row has this much free space
    for size in range(seqlen, 0, -1):
        left = stock.left[size]
        while left > 0:
            free = lowest_from(occupied, size)
            if free < 0:
                row, free = rows, seqlen
                rows += 1
                used[row] = 0
            else:
                row = top[free] + made
                top[free] = below[row - made]
                if top[free] < 0:
                    flip(occupied, free)
            fitting = min(left, free // size)  # while another fits, no row has less free space that takes it
            row_of[n : n + fitting] = row
            n += fitting
            left -= fitting
            used[row] += fitting * size
            free -= fitting * size
            if free > 0:
                if top[free] < 0:
                    flip(occupied, free)
                below[row - made] = top[free]
                top[free] = row - made
    _append_rows(stock, row_of, groups, made, rows)
    return rows


@njit(nogil=True, cache=True)
def _append_rows(stock: Stock, row_of: np.ndarray, groups: Groups, made: int, rows: int) -> None:
    """Write what is left, longest first and in rows `row_of` from `made` to `rows`: a counting sort."""
    entry, begin, _ = groups
    cursor = np.zeros(rows - made + 1, dtype=np.int64)
    for row in row_of:
        cursor[row - made + 1] += 1
    cursor[0] = begin[made]
    for row in range(made, rows):
        cursor[row - made + 1] += cursor[row - made]
        begin[row + 1] = cursor[row - made + 1]
    n = 0
    for size in range(len(stock.left) - 1, 0, -1):
        for at in range(stock.after[size] - stock.left[size], stock.after[size]):
            row = row_of[n] - made
            entry[cursor[row]] = stock.order[at]
            cursor[row] += 1
            n += 1
