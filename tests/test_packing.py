"""The packer: nothing lost, nothing padded, equal to a slow and obvious twin."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bits import highest_up_to, lowest_from, word_from
from pipeline.errors import ConfigError
from pipeline.fitting import best_fit, fill_rows, longest_first, room_for
from pipeline.packing import _spare, _whole_sequences, least_cuts, least_excess_cuts, pack, pack_rows
from pipeline.recipes import LEAST_TIMES, close_exactly, pairs_and_threes

ITEMS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 300])).flatmap(
    lambda seqlen: st.tuples(st.just(seqlen), st.lists(st.integers(1, seqlen), max_size=60))
)


def bins_of(groups, rows, items):
    """The row of each item, -1 where it is in none."""
    bins = [-1] * items
    for row in range(rows):
        for e in groups.entry[groups.begin[row] : groups.begin[row + 1]].tolist():
            bins[e >> 32] = row
    return bins


def slow_best_fit(lengths, seqlen):
    """Best fit decreasing by looking at every bin; among bins with equal space the one changed last."""
    bins, used, changed = [None] * len(lengths), [], []
    for tick, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b in range(len(used)) if used[b] + lengths[i] <= seqlen]
        if fitting:
            best = min(fitting, key=lambda b: (seqlen - used[b], -changed[b]))
        else:
            best = len(used)
            used.append(0)
            changed.append(0)
        used[best] += lengths[i]
        changed[best] = tick
        bins[i] = best
    return bins, used


@given(ITEMS)
def test_best_fit_equals_its_slow_twin(case):
    seqlen, lengths = case
    groups = room_for(len(lengths))
    rows = best_fit(longest_first(np.array(lengths, dtype=np.int64), seqlen), seqlen, groups, 0)
    assert (bins_of(groups, rows, len(lengths)), groups.used[:rows].tolist()) == slow_best_fit(lengths, seqlen)


def slow_pairs_and_threes(lengths, seqlen):
    """(lengths of a group, how often) by trying every pair; what is left of each length."""
    left, made, tried = Counter(lengths), [], set()
    for small in range(1, seqlen // 2 + 1):
        pair = Counter([seqlen - small, small])
        made.append((pair, min(left[size] // parts for size, parts in pair.items())))
        left.subtract({size: parts * made[-1][1] for size, parts in pair.items()})
    while first := max(left.keys() - tried, key=lambda size: (left[size], -size), default=0):
        others = [size for size in left if size != first and size not in tried]
        threes = [
            (-min(left[small], large_left), first + small + large, small, large)
            for small in others
            for large, large_left in left.items()
            if small < large and large in others and first + small + large in (seqlen, 2 * seqlen)
        ]
        scarcer, _, small, large = min(threes, default=(0, 0, 0, 0))
        if min(left[first], -scarcer) < LEAST_TIMES:
            if left[first] < LEAST_TIMES:
                break
            tried.add(first)
            continue
        made.append((Counter([first, small, large]), min(left[first], -scarcer)))
        left.subtract(dict.fromkeys((first, small, large), made[-1][1]))
    return [(group, times) for group, times in made if times], left


@given(st.integers(2, 40), st.lists(st.tuples(st.integers(1, 39), st.integers(1, 9)), max_size=40))
def test_pairs_and_threes_equal_their_slow_twin(seqlen, heaps):
    lengths = [size % seqlen for size, copies in heaps for _ in range(copies) if size % seqlen]
    left = np.bincount(lengths, minlength=seqlen + 1) if lengths else np.zeros(seqlen + 1, dtype=np.int64)
    part, end, times = pairs_and_threes(left, seqlen)
    groups = [Counter(sizes.tolist()) for sizes in np.split(part, end[:-1])] if len(end) else []
    made, rest = slow_pairs_and_threes(lengths, seqlen)
    assert list(zip(groups, times.tolist(), strict=True)) == made
    assert left.tolist() == [rest[size] for size in range(seqlen + 1)]


def slow_close_exactly(lengths, total):
    """Full bins of `total` by looking at every item and every pair."""
    bins, full = [-1] * len(lengths), 0
    for size in range(max(lengths, default=0), 0, -1):
        while True:
            left = [i for i in range(len(lengths)) if bins[i] < 0]
            chosen = [i for i in left if lengths[i] == size][:1]
            if not chosen:
                break
            while gap := total - sum(lengths[i] for i in chosen):
                free = sorted((i for i in left if i not in chosen and lengths[i] <= gap), key=lambda i: -lengths[i])
                ones = [[i] for i in free if lengths[i] == gap]
                pairs = [[a, b] for a in free for b in free[::-1] if a != b and lengths[a] + lengths[b] == gap]
                best = ones or sorted(pairs, key=lambda pair: min(lengths[i] for i in pair)) or [[i] for i in free]
                if not best:
                    break
                chosen += best[0]
            if gap:
                break
            for part in [lengths[i] for i in chosen]:
                bins[next(i for i in left if bins[i] < 0 and lengths[i] == part)] = full
            full += 1
    return bins, full


@given(ITEMS, st.integers(1, 4))
def test_closing_rows_exactly_equals_its_slow_twin(case, rows_at_once):
    seqlen, lengths = case
    total = rows_at_once * seqlen
    order, left, after = longest_first(np.array(lengths, dtype=np.int64), seqlen)
    cursor = after - left
    part, end, times = close_exactly(left, total)
    bins, full = [-1] * len(lengths), 0
    for sizes, copies in zip(np.split(part, end[:-1]), times.tolist(), strict=False):
        assert sizes.sum() == total
        for _ in range(copies):
            for size in sizes:
                bins[order[cursor[size]] >> 32] = full
                cursor[size] += 1
            full += 1
    assert (bins, full) == slow_close_exactly(lengths, total)
    assert (cursor == after - left).all()


@given(ITEMS, st.integers(1, 3), st.integers(0, 12))
def test_rows_hold_every_item_once_the_full_rows_first(case, copies, rows):
    seqlen, lengths = case[0], case[1] * copies + [0]  # an item of no tokens is in no row
    entry, begin, used = fill_rows(np.array(lengths, dtype=np.int64), seqlen, rows)
    entry = entry[: begin[-1]]
    assert sorted(entry.tolist()) == [i << 32 | n for i, n in enumerate(lengths) if n]
    for group, tokens in enumerate(used.tolist()):
        held = entry[begin[group] : begin[group + 1]].tolist()
        assert 0 < sum(e & 0xFFFFFFFF for e in held) == tokens
    several = used[used > seqlen]
    assert (several % seqlen == 0).all()
    assert (several <= 4 * seqlen).all()
    bins, alone = slow_close_exactly(lengths[:-1], seqlen)
    assert (used[:alone] == seqlen).all()
    assert alone < rows or not len(several)
    for row in range(alone):
        assert {e >> 32 for e in entry[begin[row] : begin[row + 1]].tolist()} == {
            i for i, placed in enumerate(bins) if placed == row
        }


@given(st.sets(st.integers(1, 255)), st.integers(0, 255))
def test_bits_are_a_set_of_numbers(numbers, at):
    whole = sum(1 << n for n in numbers)
    bits = np.array([whole >> (64 * word) & (2**64 - 1) for word in range(5)], dtype=np.uint64)
    assert lowest_from(bits, at) == min((n for n in numbers if n >= at), default=-1)
    assert highest_up_to(bits, at) == max((n for n in numbers if n <= at), default=0)
    assert word_from(bits, at) == whole >> at & (2**64 - 1)


@given(ITEMS, st.integers(0, 12))
def test_pack_rows_fills_every_row_while_tokens_last_and_loses_none(case, rows):
    seqlen, lengths = case
    items = np.array(lengths, dtype=np.int64)
    item, start, length, offsets = pack_rows(items, seqlen, rows, items)
    served = sorted((i, s + k) for i, s, n in zip(item, start, length, strict=True) for k in range(n))
    assert served == [(i, k) for i, n in enumerate(lengths) for k in range(n)]
    held = [int(length[a:b].sum()) for a, b in pairwise(offsets)]
    assert max(held, default=0) <= seqlen
    assert sum(held) == min(sum(lengths), rows * seqlen)
    assert len(held) == rows
    assert offsets[0] == 0


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_rows_come_by_their_earliest_item_and_items_as_they_are_numbered(halves, random):
    lengths = halves + [10 - n for n in halves]  # each has its counterpart: all rows are exactly full
    random.shuffle(lengths)
    items = np.array(lengths, dtype=np.int64)
    item, _, _, offsets = pack_rows(items, 10, len(halves), items)
    rows = [item[a:b].tolist() for a, b in pairwise(offsets)]
    assert rows == sorted(sorted(row) for row in rows)


@given(st.lists(st.integers(81, 99), min_size=1, max_size=30), st.integers(1, 30))
def test_the_fullest_rows_are_kept_and_not_cut(lengths, rows):
    rows = min(rows, sum(lengths) // 100)  # of one item each: no two fit, no few fill several rows exactly
    items = np.array(lengths, dtype=np.int64)
    item, _, length, offsets = pack_rows(items, 100, rows, items)
    whole = [i for i, n in zip(item.tolist(), length.tolist(), strict=True) if n == lengths[i]]
    assert set(sorted(range(len(lengths)), key=lambda i: -lengths[i])[:rows]) <= set(whole)
    assert len(offsets) == rows + 1


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=9), st.integers(1, 9))
def test_spared_is_a_whole_document_that_fits_else_a_piece(items, gap):
    entry = np.array([i << 32 | n for i, (n, _) in enumerate(items)])
    sizes = np.array([n if whole else n + 1 for n, whole in items])
    fitting = [i for i, (n, whole) in enumerate(items) if whole and n <= gap]
    pieces = [i for i, (_, whole) in enumerate(items) if not whole]
    _spare(entry, sizes, gap)
    assert entry[0] >> 32 in (fitting or pieces or [0])
    assert sorted(entry >> 32) == list(range(len(items)))


def test_rows_filled_together_are_cut_in_no_whole_document_where_another_can_be():
    items = np.array([7, 6, 7])  # no two make up 10 or 20, all three do
    for whole in range(3):
        sizes = items.copy()
        sizes[whole] += 10
        item, _, length, offsets = pack_rows(items, 10, 2, sizes)
        assert item.tolist().count(whole) == 2
        assert len(item) == 4
        assert [int(length[a:b].sum()) for a, b in pairwise(offsets)] == [10, 10]


@given(st.lists(st.integers(1, 300), max_size=50), st.integers(1, 64))
def test_pack_serves_every_token_once_and_pads_only_the_last_sequence(lengths, seqlen):
    packed = pack(np.array(lengths, dtype=np.int64), seqlen)
    served = sorted(
        (d, s + k) for d, s, n in zip(packed.document, packed.start, packed.length, strict=True) for k in range(n)
    )
    assert served == [(d, k) for d, n in enumerate(lengths) for k in range(n)]
    assert packed.sequences == -(-sum(lengths) // seqlen)
    held = [int(packed.length[a:b].sum()) for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
    assert all(n == seqlen for n in held[:-1])
    assert packed.padding(seqlen) == packed.sequences * seqlen - sum(lengths) < seqlen


def excess_cuts(lengths, seqlen):
    return len(pack(lengths, seqlen).document) - len(lengths) - least_cuts(lengths, seqlen)


@pytest.mark.parametrize(("seqlen", "most"), [(64, 0.0055), (128, 0.0055), (256, 0.0015), (1024, 0.0005)])
def test_excess_cuts_are_rare_when_a_whole_store_is_packed(seqlen, most):
    for seed in range(5):
        lengths = np.random.default_rng(seed).lognormal(6, 1.1, 100_000).astype(np.int64) + 1
        assert 0 <= excess_cuts(lengths, seqlen) <= most * len(lengths)


@pytest.mark.parametrize(("seqlen", "most"), [(64, 1.2), (128, 1.1), (256, 1.1)])
def test_excess_cuts_are_near_the_least_where_few_pieces_have_a_counterpart(seqlen, most):
    """Lengths that come in heaps, as with a corpus whose documents were drawn several times."""
    seen = np.random.default_rng(0).lognormal(6, 1.1, 10_000).astype(np.int64) + 1
    lengths = np.random.default_rng(1).choice(seen, 100_000)
    least = least_excess_cuts(lengths, seqlen)
    assert 0 < least <= excess_cuts(lengths, seqlen) <= most * least


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 12))
def test_no_packing_is_better_than_the_least(lengths, seqlen):
    lengths = np.array(lengths, dtype=np.int64)
    assert excess_cuts(lengths, seqlen) >= least_excess_cuts(lengths, seqlen)


@pytest.mark.parametrize(("lengths", "seqlen"), [([3, 0], 8), ([3], 0), ([-1], 8)])
def test_impossible_lengths_are_refused(lengths, seqlen):
    with pytest.raises(ConfigError, match="at least one token"):
        pack(np.array(lengths), seqlen)


@pytest.mark.parametrize(("lengths", "seqlen"), [([1.5], 8), ([3, 4.0], 8), ([3], 8.5), (["3"], 8), ([True], 8)])
def test_what_is_no_whole_number_is_refused_not_cut_down(lengths, seqlen):
    with pytest.raises(ConfigError, match="whole number"):
        pack(np.array(lengths), seqlen)
    assert pack([], 8).sequences == 0


@pytest.mark.parametrize(("lengths", "seqlen"), [([[3, 4]], 8), ([3], [8])])
def test_what_is_not_one_list_and_one_number_is_refused(lengths, seqlen):
    with pytest.raises(ConfigError, match="lengths is a list of numbers"):
        pack(lengths, seqlen)


@given(st.integers(1, 1 << 20), st.integers(0, 1 << 20), st.integers(-1, 1))
def test_whole_sequences_are_counted_as_by_a_division(seqlen, whole, beside):
    length = max(seqlen * whole + beside, 0)
    assert _whole_sequences(length, seqlen, 1 / seqlen) == length // seqlen
