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

import numpy as np
from numba import njit

from pipeline.bits import flip, has, highest_up_to, lowest, lowest_from, word_from

ROWS_AT_ONCE = 4
"""Most rows that one group of items may fill exactly together."""
CLOSING_PAIRS = 4096
"""Most pairs looked at to close a row: bounds a search at very long sequences."""


@njit(nogil=True, cache=True)
def fill_rows(lengths: np.ndarray, seqlen: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All passes over items of `lengths`; returns (entry [items], begin [groups + 1], used [groups]), int64.

    Group g holds entry[begin[g]:begin[g + 1]], used[g] tokens in all: a row, or exactly two, three or four while
    fewer than `rows` are exactly full. Best fit's rows come last. An entry is item << 32 | length: with the
    length at hand nothing is looked up at random.
    """
    order = np.empty_like(lengths)
    count, after = longest_first(lengths, seqlen, order)
    entry, begin, used = room_for(len(lengths))
    groups = _close(order, count, after, seqlen, entry, begin, used, 0)
    groups = fill_rest(order, count, after, seqlen, rows - groups, entry, begin, used, groups)
    return entry, begin[: groups + 1], used[:groups]


@njit(nogil=True, cache=True)
def fill_rest(
    order: np.ndarray,
    count: np.ndarray,
    after: np.ndarray,
    seqlen: int,
    rows: int,
    entry: np.ndarray,
    begin: np.ndarray,
    used: np.ndarray,
    groups: int,
) -> int:
    """What is left when no row is exactly full any more: several at once, until `rows` are, then best fit.

    Appends to `entry`, `begin`, `used` and returns the groups then.
    """
    for wide in range(2, ROWS_AT_ONCE + 1):
        if rows > 0:
            before = groups
            groups = _close(order, count, after, wide * seqlen, entry, begin, used, groups)
            rows -= wide * (groups - before)
    return int(best_fit(order, count, after, seqlen, entry, begin, used, groups))


@njit(nogil=True, cache=True)
def room_for(items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(entry, begin, used) for the groups of so many items."""
    begin = np.empty(items + 1, dtype=np.int64)
    begin[0] = 0
    return np.empty(items, dtype=np.int64), begin, np.empty(items, dtype=np.int64)


@njit(nogil=True, cache=True)
def _close(
    order: np.ndarray,
    count: np.ndarray,
    after: np.ndarray,
    total: int,
    entry: np.ndarray,
    begin: np.ndarray,
    used: np.ndarray,
    groups: int,
) -> int:
    """Groups of exactly `total` tokens, appended to `entry`, `begin`, `used`; returns the groups then."""
    n, first, cursor = begin[groups], 0, after - count
    part, end, times = close_exactly(count, total)
    for recipe in range(len(end)):
        for _ in range(times[recipe]):
            for size in part[first : end[recipe]]:
                entry[n] = order[cursor[size]]
                cursor[size] += 1
                n += 1
            used[groups] = total
            groups += 1
            begin[groups] = n
        first = end[recipe]
    return groups


@njit(nogil=True, cache=True)
def longest_first(lengths: np.ndarray, seqlen: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write entries to `order` by decreasing length; returns (how many of each length, where those end in it).

    While items are taken, `count` says how many of a length are left: the last ones, order[after - count : after].
    """
    count = np.zeros(seqlen + 1, dtype=np.int64)
    for size in lengths:
        count[size] += 1
    count[0] = 0
    after = np.zeros(seqlen + 1, dtype=np.int64)
    cursor = np.zeros(seqlen + 1, dtype=np.int64)
    total = 0
    for size in range(seqlen, 0, -1):
        cursor[size] = total
        total += count[size]
        after[size] = total
    for i in range(len(lengths)):
        if lengths[i] > 0:
            order[cursor[lengths[i]]] = i << 32 | lengths[i]
            cursor[lengths[i]] += 1
    return count, after


@njit(nogil=True, cache=True)
def close_exactly(count: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Groups of items that make up exactly `total` tokens, a row or several, as recipes. Takes them from `count`.

    Recipe r makes times[r] groups of the lengths part[end[r - 1]:end[r]]; returns (part, end, times), int64. A group
    begins with the longest item left. While no single item and no pair (the most unequal first) closes it, it takes
    the longest item that fits; where none does, its first item and all others of that length are set aside.
    """
    longest = len(count) - 1
    present = np.zeros(total // 64 + 4, dtype=np.uint64)  # bit `size`: some are left; 0s beyond for `word_from`
    mirrored = np.zeros(total // 64 + 4, dtype=np.uint64)  # bit `total - size`: the same
    for size in range(1, longest + 1):
        if count[size] > 0:
            flip(present, size)
            flip(mirrored, total - size)
    chosen = np.empty(total, dtype=np.int64)
    taken = np.zeros(longest + 1, dtype=np.int64)  # by one group, of each length
    part, end, times = np.empty((3, count.sum()), dtype=np.int64)
    n = recipes = 0
    aside = longest + 1  # the shortest length set aside
    for size in range(longest, 0, -1):
        while count[size] > 0:
            parts, closed = _choose(count, taken, present, mirrored, size, aside, total, chosen)
            most = len(part)
            for one in chosen[:parts]:  # give back; the same parts make as many groups as the scarcest allows
                if taken[one] > 0:
                    if count[one] == 0:
                        flip(present, one)
                        flip(mirrored, total - one)
                    count[one] += taken[one]
                    most = min(most, count[one] // taken[one])
                    taken[one] = 0
            if not closed:
                aside = size
                break
            for one in chosen[:parts]:
                part[n] = one
                n += 1
                count[one] -= most
            for one in chosen[:parts]:
                if count[one] == 0 and has(present, one):
                    flip(present, one)
                    flip(mirrored, total - one)
            end[recipes], times[recipes] = n, most
            recipes += 1
    return part[:n], end[:recipes], times[:recipes]


@njit(nogil=True, cache=True)
def _choose(
    count: np.ndarray,
    taken: np.ndarray,
    present: np.ndarray,
    mirrored: np.ndarray,
    first: int,
    aside: int,
    total: int,
    chosen: np.ndarray,
) -> tuple[int, bool]:
    """Take lengths that begin with `first` into `chosen`: (how many, whether they add up to `total`).

    Of lengths between `first` and `aside` none are left.
    """
    parts, gap = 0, total
    one, two = first, 0
    while one > 0:
        for part in (one, two):
            if part > 0:
                chosen[parts] = part
                parts += 1
                gap -= part
                count[part] -= 1
                taken[part] += 1
                if count[part] == 0:
                    flip(present, part)
                    flip(mirrored, total - part)
        if gap == 0:
            return parts, True
        one, two = gap, 0
        longest = min(first, gap - 1) if gap <= aside else gap - 1
        if gap >= len(count) or count[gap] == 0:
            one, two = _pair(count, present, mirrored, gap, longest, total)
        if one == 0:
            one = highest_up_to(present, longest)
    return parts, False


@njit(nogil=True, cache=True)
def _pair(
    count: np.ndarray, present: np.ndarray, mirrored: np.ndarray, gap: int, longest: int, total: int
) -> tuple[int, int]:
    """The most unequal two lengths left, up to `longest`, that add up to `gap`; (0, 0) where there are none."""
    limit = min(gap // 2, CLOSING_PAIRS)
    for word in range((gap - longest) // 64, limit // 64 + 1):
        # Bit `two` of the first: `two` is left. Bit `two` of the second: `gap - two` is left.
        both = present[word] & word_from(mirrored, total - gap + 64 * word)
        if both != 0:
            two = 64 * word + lowest(both)
            one = gap - two
            if two > limit or (one == two and count[one] < 2):
                break
            return one, two
    return 0, 0


@njit(nogil=True, cache=True)
def best_fit(
    order: np.ndarray,
    count: np.ndarray,
    after: np.ndarray,
    seqlen: int,
    entry: np.ndarray,
    begin: np.ndarray,
    used: np.ndarray,
    rows: int,
) -> int:
    """Best-fit decreasing of what `count` left over; appends to `entry`, `begin`, `used` and returns the rows then.

    Longest item first (equal ones in the order given), into the row with the least free space that takes it, the one
    that was last changed among equals; a new row where none does.
    """
    first_row, n = rows, 0
    row_of = np.empty(count.sum(), dtype=np.int64)
    below = np.empty(len(row_of), dtype=np.int64)  # rows of equal free space form a stack
    top = np.full(seqlen + 1, -1, dtype=np.int64)
    occupied = np.zeros(seqlen // 64 + 1, dtype=np.uint64)  # bit `free`: some row has this much free space
    for size in range(seqlen, 0, -1):
        left = count[size]
        while left > 0:
            free = lowest_from(occupied, size)
            if free < 0:
                row, free = rows, seqlen
                rows += 1
                used[row] = 0
            else:
                row = top[free] + first_row
                top[free] = below[row - first_row]
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
                below[row - first_row] = top[free]
                top[free] = row - first_row
    _append_rows(order, count, after, row_of, first_row, rows, entry, begin)
    return rows


@njit(nogil=True, cache=True)
def _append_rows(
    order: np.ndarray,
    count: np.ndarray,
    after: np.ndarray,
    row_of: np.ndarray,
    first_row: int,
    rows: int,
    entry: np.ndarray,
    begin: np.ndarray,
) -> None:
    """Write what is left, longest first and in rows `row_of`, to `entry` and `begin`: a counting sort."""
    cursor = np.zeros(rows - first_row + 1, dtype=np.int64)
    for row in row_of:
        cursor[row - first_row + 1] += 1
    cursor[0] = begin[first_row]
    for row in range(first_row, rows):
        cursor[row - first_row + 1] += cursor[row - first_row]
        begin[row + 1] = cursor[row - first_row + 1]
    n = 0
    for size in range(len(count) - 1, 0, -1):
        for at in range(after[size] - count[size], after[size]):
            row = row_of[n] - first_row
            entry[cursor[row]] = order[at]
            cursor[row] += 1
            n += 1
