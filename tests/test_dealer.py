"""The dealer of one window: every token once at any lengths, even pace, no padding, integers only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import columns, same, times_served

from curriculum.dealer import SWAPS, Dealer, _lay_out, _Rows, _spread_documents
from curriculum.hashes import hash_at, hashes
from curriculum.unread import LOOK_TOKENS, LOOKS, first_read, place_of

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)
DEALS = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=40)


def positions(packed, first=0, last=None):
    pieces = slice(packed.offsets[first], packed.offsets[packed.sequences if last is None else last])
    triples = zip(packed.document[pieces], packed.start[pieces], packed.length[pieces], strict=True)
    return [(int(d), int(s + k)) for d, s, n in triples for k in range(n)]


def one_batch(sequences):
    return np.array([sequences])


@given(LENGTHS, DEALS, st.integers(0, 2**62))
def test_every_token_once_at_any_lengths_with_deals_taken_back(lengths, deals, seed):
    dealer = Dealer(np.array(lengths), key=seed)
    served = []
    while dealer.tokens:
        for seqlen, sequences, kept in deals:
            packed = dealer.deal(seqlen, np.arange(1, sequences + 1) if kept % 2 else one_batch(sequences))
            held = [int(packed.length[a:b].sum()) for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
            assert all(n == seqlen for n in held[:-1])
            assert all(0 < n <= seqlen for n in held)
            if packed.sequences == sequences and 0 < kept < sequences:
                dealer.take_back(packed, kept)
                served += positions(packed, 0, kept)
            else:
                assert (packed.sequences == sequences and held[-1] == seqlen) or not dealer.tokens
                served += positions(packed)
            assert dealer.tokens == sum(lengths) - len(served)
    assert sorted(served) == [(d, k) for d, n in enumerate(lengths) for k in range(n)]


@given(LENGTHS, DEALS, st.integers(0, 2**62), st.booleans())
def test_deals_that_are_skipped_leave_what_dealing_them_leaves(lengths, deals, seed, from_beginning):
    dealt, skipped = Dealer(np.array(lengths), key=seed), Dealer(np.array(lengths), key=seed)
    reading, done, left = {"from_beginning": from_beginning}, [], sum(lengths)
    for seqlen, sequences, _ in deals:
        if seqlen * sequences <= left:
            dealt.deal(seqlen, one_batch(sequences), **reading)
            done.append((seqlen, sequences))
            left -= seqlen * sequences
    skipped.skip(*np.array(done, dtype=np.int64).reshape(-1, 2).T, **reading)
    assert dealt.tokens == skipped.tokens == left
    rest = [dealer.deal(5, np.arange(1, 2 + left // 5), **reading) for dealer in (dealt, skipped)]
    assert same(*rest)


@given(LENGTHS, DEALS, st.integers(0, 2**62), st.integers(0, 30))
def test_every_token_once_where_no_more_spans_may_be_looked_at(lengths, deals, seed, looks):
    dealer, batches = Dealer(np.array(lengths), key=seed), []
    dealer._queue.clock[LOOKS] = looks
    while dealer.tokens:
        for seqlen, sequences, _ in deals:
            batches.append(dealer.deal(seqlen, one_batch(sequences)))
    assert (times_served(np.array(lengths), *columns(batches)) == 1).all()


def test_tiny_deals_look_at_few_spans_beyond_those_they_need():
    """In the long run a deal costs what its tokens cost, also where lengths go to and fro by a factor of 2."""
    lengths = np.array([(i * 7919) % 300 + 1 for i in range(3000)])
    dealer, looks = Dealer(lengths, key=7), []
    dealer._queue.clock[LOOKS] = 0
    for i in range(4000):
        dealer.deal(8 + 8 * (i % 2), one_batch(4))
        looks.append(int(dealer._queue.clock[LOOKS]))
    earned = 4000 * 4 * 12 // LOOK_TOKENS
    assert -len(lengths) < min(looks) and earned - looks[-1] > earned // 2, "none is looked at"


@pytest.mark.parametrize("seqlens", [[64], [8, 8, 8, 64], [128, 8]])
def test_short_and_long_documents_run_out_together(seqlens):
    lengths = np.repeat([40, 400, 4000, 40_000], [4000, 400, 40, 4])
    dealer = Dealer(lengths, key=1)
    shares = []
    while dealer.tokens > 32 * 512:
        seqlen = seqlens[min(len(shares), len(seqlens) - 1)]
        packed = dealer.deal(seqlen, one_batch(65_536 // seqlen))
        by_size = np.bincount(np.log10(lengths[packed.document]).astype(int) - 1, packed.length, 4)
        shares.append(by_size / by_size.sum())
    early = np.array(shares[: len(shares) * 3 // 4])
    assert len(early) >= 6
    assert np.all(np.abs(early - 0.25) < 0.1), np.round(shares, 2)


@pytest.mark.parametrize("batches", [1, 16])
def test_the_batches_of_a_deal_are_alike(batches):
    """Rows of short documents do not stand before those of long ones within a deal."""
    lengths = np.repeat([40, 400, 4000], [4000, 400, 40])
    dealer = Dealer(lengths, key=1)
    ends = 16 * np.arange(1, batches + 1)
    shares = []
    while dealer.tokens >= 160 * ends[-1]:
        packed = dealer.deal(160, ends)
        short = np.where(lengths[packed.document] == 40, packed.length, 0)
        shares += np.add.reduceat(short, packed.offsets[:-1]).reshape(-1, 16).sum(axis=1).tolist()
    shares = np.array(shares) / (16 * 160)
    half = len(shares) // 2
    assert abs(shares[:half].mean() - shares[half:].mean()) < 0.1
    assert np.quantile(shares, 0.1) > 0.05 and np.quantile(shares, 0.9) < 0.65, np.round(shares, 2)


def rows_of(packed):
    return [tuple(positions(packed, i, i + 1)) for i in range(packed.sequences)]


def test_long_and_packed_rows_are_mixed_at_random_the_long_ones_as_they_are_due():
    count, full = 60, 40
    one = np.ones(full, dtype=np.int64)
    long = np.stack([np.arange(count), np.zeros(count, dtype=np.int64)])
    short = np.stack([count + np.arange(full), 0 * one, one, 0 * one])
    rows = _Rows(long, short, np.arange(full), 0 * one, one, np.arange(full + 1), full)
    seen, orders = np.zeros(count + full, dtype=np.int64), []
    for key in range(300):
        order = _lay_out(rows, 1, one_batch(count + full), seen, key, key).document
        assert order[order < count].tolist() == list(range(count))
        orders.append(np.argsort(order))  # the place of each row
    place = np.mean(orders, axis=0)
    assert np.array_equal(np.sort(orders[-1]), np.arange(count + full))
    assert abs(place[:count].mean() - 49.5) < 2, "the long ones, as a whole"
    assert (abs(place[count:] - 49.5) < 5 * 100 / 12**0.5 / 300**0.5).all(), "each packed one"


def test_each_deal_is_laid_out_in_an_order_of_its_own():
    first, later = (Dealer(np.full(99, 4), key=1) for _ in range(2))
    later.deals += 1
    rows = [rows_of(dealer.deal(8, one_batch(40))) for dealer in (first, later)]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


@given(
    st.lists(st.frozensets(st.integers(0, 5), min_size=1, max_size=2), min_size=1, max_size=90),
    st.lists(st.integers(1, 30), min_size=1, max_size=9),
)
def test_documents_are_spread_over_batches_as_by_a_slow_twin(rows, sizes):
    sizes.append(max(len(rows) - sum(sizes), 1))
    document, ends = np.array([d for row in rows for d in row]), np.cumsum(sizes)
    order, firsts = np.arange(len(rows)), np.cumsum([0] + [len(row) for row in rows])
    _spread_documents(order, document, firsts, ends, np.zeros(6, dtype=np.int64), 0)
    slow = list(range(len(rows)))
    for size, end in zip(sizes, ends.tolist(), strict=True):
        held, tries = set(), 0
        for i in range(end - size, min(end, len(rows))):
            later = iter(range(end, min(end + SWAPS, len(rows))))
            j = i
            while j is not None and rows[slow[j]] & held:
                j = next(later, None) if 2 * tries <= 2 * SWAPS + i - (end - size) else None
                tries += j is not None
            if j is not None:
                slow[i], slow[j] = slow[j], slow[i]
            held |= rows[slow[i]]
    assert order.tolist() == slow


def test_what_is_taken_back_is_served_next():
    dealer = Dealer(np.full(400, 80), key=1)
    packed = dealer.deal(8, np.array([100, 200]))
    dealer.take_back(packed, 100)
    soon = {*positions(dealer.deal(8, one_batch(150)))}
    assert len(soon & {*positions(packed, 100)}) > 0.9 * 800


def test_the_documents_of_a_batch_meet_others_the_next_time():
    dealer = Dealer(np.full(400, 4000), key=1)
    rounds = [set(dealer.deal(8, one_batch(200)).document.tolist()) for _ in range(40)]
    assert len(rounds[0] & rounds[2]) > 150  # near the same place at first
    assert 60 < len(rounds[0] & rounds[38]) < 140  # by chance: 100


@given(st.integers(0, 2**62), st.integers(1, 10**6))
def test_the_place_of_a_piece_moves_little_from_one_to_the_next(key, pieces):
    own = hash_at(key, 5)
    assert 0 <= place_of(own, pieces) < 1 << 16
    assert abs(place_of(own, pieces) - place_of(own, pieces + 1)) <= (1 << 16) // 8 + 1


@given(st.integers(2, 500), st.integers(1, 90))
def test_a_document_is_first_read_at_any_piece_without_an_extra_cut(length, seqlen):
    length += seqlen
    firsts = {first_read(length, seqlen, key, 3) for key in range(40)}
    pieces = -(-length // seqlen)
    assert len(firsts) > 1
    for first in firsts:
        assert 0 <= first < length
        assert -(-first // seqlen) + -(-(length - first) // seqlen) == pieces


@given(LENGTHS, DEALS, st.integers(0, 2**62))
def test_read_from_the_beginning_a_document_is_served_in_its_order(lengths, deals, seed):
    dealer, served = Dealer(np.array(lengths), key=seed), {}
    while dealer.tokens:
        for seqlen, sequences, _ in deals:
            packed = dealer.deal(seqlen, one_batch(sequences), from_beginning=True)
            for document, start, length in sorted(
                zip(packed.document.tolist(), packed.start.tolist(), packed.length.tolist(), strict=True)
            ):
                assert start == served.get(document, 0)  # within a deal any order of rows: sorted
                served[document] = start + length
    assert served == dict(enumerate(lengths))


def test_the_seed_changes_the_order():
    orders = [Dealer(np.full(99, 8), key=key).deal(8, one_batch(99)).document.tolist() for key in (1, 2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_long_run_of_small_deals_leaves_nothing_behind():
    lengths = np.array([(i * 7919) % 300 + 1 for i in range(500)])
    dealer, batches = Dealer(lengths, key=7), []
    while dealer.tokens:
        batches.append(dealer.deal(3 + dealer.deals % 50, one_batch(1 + dealer.deals % 7)))
    assert (times_served(lengths, *columns(batches)) == 1).all()


@given(st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_the_kernel_hash_equals_the_vector_one(key, index):
    assert hash_at(key, index) == int(hashes(key, index + 1)[index]) >> 1
