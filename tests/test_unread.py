"""The queue of a dealer: documents as rings, pieces at even pace, due times drawn anew where lengths change much."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curriculum.dealer import Dealer
from curriculum.hashes import hash_at
from curriculum.unread import DUE, HORIZON, LOOKS, PLACES, draw, first_read, place_of, take, unread

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)
KEYS = st.integers(0, 2**62)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 9), KEYS)
def test_a_document_is_read_to_its_end_and_then_from_its_beginning(pieces, seqlen, key):
    lengths = seqlen * np.array(pieces)  # a short piece may wait for others to fill a row with
    dealer, served = Dealer(lengths, key=key), [[] for _ in pieces]
    while dealer.tokens:
        packed = dealer.deal(seqlen, np.ones(1, dtype=np.int64))
        served[packed.document[0]].append(int(packed.start[0]))
    for starts, length in zip(served, lengths.tolist(), strict=True):
        assert starts == [(starts[0] + k) % length for k in range(0, length, seqlen)]


def test_a_document_is_first_read_at_every_piece_of_both_grids_as_often():
    for length, seqlen in ((23, 10), (40, 10), (19, 12), (71, 9)):
        pieces = -(-length // seqlen)
        shift = pieces * seqlen - length
        both = [0, 0] + [at for k in range(1, pieces) for at in (k * seqlen, k * seqlen - shift)]
        firsts = [first_read(length, seqlen, key, 3) for key in range(400 * pieces)]
        assert set(firsts) == set(both)
        for first in set(both):
            expected = 200 * both.count(first)
            assert abs(firsts.count(first) - expected) < 5 * expected**0.5


@given(st.integers(2, 20), st.integers(1000, 3000), KEYS)
def test_each_piece_is_due_at_its_place_in_an_equal_share_of_the_time(pieces, seqlen, key):
    queue = unread(np.array([pieces * seqlen]))
    draw(queue, seqlen, key)
    for left in range(pieces, 0, -1):
        place = place_of(hash_at(key, 0), left) / PLACES
        assert abs(queue.clock[HORIZON] - queue.rests[DUE, 0] - seqlen * (left - place)) <= pieces
        take(queue, seqlen, 1, key, False)


@given(LENGTHS, st.integers(1, 40), st.integers(1, 40), KEYS)
def test_due_times_are_drawn_anew_and_paid_for_where_the_length_changes_by_a_factor_of_two(lengths, old, new, key):
    lengths = np.array(lengths)
    queue, fresh = unread(lengths), unread(lengths)
    draw(queue, old, key)
    before, looks = queue.rests[DUE].copy(), int(queue.clock[LOOKS])
    draw(queue, new, key)
    draw(fresh, new, key)
    anew = max(old, new) >= 2 * min(old, new)
    assert (queue.rests[DUE] == (fresh.rests[DUE] if anew else before)).all()
    assert queue.clock[LOOKS] == looks - anew * len(lengths)
