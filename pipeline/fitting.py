"""Items of 1..seqlen tokens into rows: first groups that fill rows exactly (`recipes`), then best-fit decreasing.

Price: 1-4 ns an item, beside the recipes, and copying.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.bits import flip, lowest_from
from pipeline.recipes import Recipes, close_exactly

ROWS_AT_ONCE = 4
"""Most rows that one group of items may fill exactly together."""


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


@njit(nogil=True, cache=True)
def fill_rows(lengths: np.ndarray, seqlen: int, rows: int) -> Groups:
    """All passes over items of `lengths`, int64 [items]; an item of no tokens is in no group.

    A group is a row, or exactly two, three or four while fewer than `rows` are exactly full. Best fit's come last.
    """
    stock = longest_first(lengths, seqlen)
    groups = room_for(len(lengths))
    made = _close(stock, seqlen, groups, np.int64(0))  # a plain 0 would be compiled for by itself
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
    cursor = stock.after - stock.left
    return int(append(close_exactly(stock.left, total), total, stock.order, cursor, groups, made))


@njit(nogil=True, cache=True)
def append(recipes: Recipes, total: int, order: np.ndarray, cursor: np.ndarray, groups: Groups, made: int) -> int:
    """Append the groups of `recipes` that have `total` tokens to the `made` so far; returns how many there are then.

    order[cursor[size]] is the next item of each length, see `Stock`; `cursor` moves on.
    """
    part, end, times = recipes
    entry, begin, used = groups
    n, first = begin[made], 0
    for recipe in range(len(end)):
        parts = part[first : end[recipe]]
        first = end[recipe]
        if parts.sum() != total:
            continue
        for _ in range(times[recipe]):
            for size in parts:
                entry[n] = order[cursor[size]]
                cursor[size] += 1
                n += 1
            used[made] = total
            made += 1
            begin[made] = n
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
