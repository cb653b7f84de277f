"""Which items fill rows of `seqlen` tokens exactly, by their lengths alone.

Items of equal length are alike, so the work is done per length and copied to the items:

    count       12 x 700   9 x 300   40 x 24           seqlen 1024
    a row       700 + 300 + 24                         found once ...
    9 rows      700 + 300 + 24, nine times             ... made as often as the counts allow
    count        3 x 700             31 x 24

A row so found is a *recipe*; making it as often as may be uses a length up, so there are few: a million items of
2,048 lengths need some thousands. `pairs_and_threes` takes what is left most often, which is worth while where whole
corpora are packed; `close_exactly` looks for any number of items, of which there may be few. For that lengths left
are a set of bits, beside it the same set mirrored: whether two items add up to a gap is 64 pairs an operation.
Price: 2 ms at most, and 40 ns a length in a recipe.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.bits import flip, has, highest_up_to, lowest, word_from

CLOSING_PAIRS = 4096
"""Most pairs looked at to close a row: bounds a search at very long sequences."""
LOOKED_AT = 1 << 22
"""Most pairs looked at for threes: a search looks at `seqlen`. Reached above 2,048 tokens."""
LEAST_TIMES = 2
"""How often three lengths must be left at least for `pairs_and_threes`: single ones are left to `close_exactly`."""


class Recipes(NamedTuple):
    """Recipe r makes times[r] groups of the lengths part[end[r - 1]:end[r]]; all arrays are int64."""

    part: np.ndarray
    end: np.ndarray
    times: np.ndarray


class _Search(NamedTuple):
    """What a search for items of `total` tokens goes by."""

    left: np.ndarray
    """How many items of each length are left."""
    present: np.ndarray
    """uint64 [words]: bit n is set where some of length n are left; a word of zeros follows, for `word_from`."""
    mirrored: np.ndarray
    """The same set with bit total - n for n."""
    total: int


@njit(nogil=True, cache=True)
def pairs_and_threes(left: np.ndarray, seqlen: int) -> Recipes:
    """Groups of two or three items that fill a row exactly, and of three that fill two rows. Takes them from `left`.

    The fewer items to a group, the more groups, and the fewer cuts. All pairs that can be are formed. Then the length
    of which most are left is joined by the two others of whose scarcer one most are left, until one of the three is
    used up; a length that no two others close is set aside. So there are at most `seqlen` searches.
    """
    part, end, times = np.empty((3, 4 * seqlen), dtype=np.int64)
    n = recipes = 0
    for small in range(1, seqlen // 2 + 1):
        large = seqlen - small
        made = min(left[small], left[large]) if small < large else left[small] // 2
        if made > 0:
            part[n], part[n + 1] = large, small
            n += 2
            end[recipes], times[recipes] = n, made
            recipes += 1
            left[large] -= made
            left[small] -= made
    mirrored, aside = left[::-1].copy(), np.zeros_like(left)
    for _ in range(LOOKED_AT // seqlen):
        first = np.argmax(left)
        most, left[first], mirrored[seqlen - first] = left[first], 0, 0
        if most < LEAST_TIMES:
            left[first] = most
            break
        made, small, large = 0, 0, 0
        for gap in (seqlen - first, 2 * seqlen - first):
            scarcer, other = _richest_two(left, mirrored, gap)
            if scarcer > made:
                made, small, large = scarcer, other, gap - other
        if made < LEAST_TIMES:
            aside[first] = most
            continue
        made = min(made, most)
        left[first] = mirrored[seqlen - first] = most - made
        for size in (small, large):
            left[size] -= made
            mirrored[seqlen - size] = left[size]
        part[n], part[n + 1], part[n + 2] = first, large, small
        n += 3
        end[recipes], times[recipes] = n, made
        recipes += 1
    left += aside
    return Recipes(part[:n], end[:recipes], times[:recipes])


@njit(nogil=True, cache=True)
def _richest_two(left: np.ndarray, mirrored: np.ndarray, gap: int) -> tuple[int, int]:
    """Of two different lengths of `gap` tokens together, those of whose scarcer one most are left.

    Returns (how many, the smaller length); (0, 0) where there are none. mirrored[seqlen - size] is left[size].
    """
    seqlen = len(left) - 1
    low = max(1, gap - seqlen)
    one = left[low : (gap + 1) // 2]
    two = mirrored[seqlen - gap + low :][: len(one)]
    most = 0
    for i in range(len(one)):
        most = max(most, min(one[i], two[i]))
    for i in range(len(one)):
        if most > 0 and min(one[i], two[i]) == most:
            return most, low + i
    return 0, 0


@njit(nogil=True, cache=True)
def close_exactly(left: np.ndarray, total: int) -> Recipes:
    """Groups of items that make up exactly `total` tokens, a row or several. Takes them from `left`.

    A group begins with the longest item left. While no single item and no pair (the most unequal first) closes it, it
    takes the longest item that fits; where none does, its first item and all others of that length are set aside.
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
    return Recipes(part[:n], end[:recipes], times[:recipes])


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
