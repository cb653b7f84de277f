"""The dealer: every token once an epoch, no padding, few cuts, diverse rows, integers only."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.dealer import DEAL_SEQUENCES, Dealer, _hash, _hashes
from pipeline.packing import least_cuts

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)
DEALS = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=40)


def positions(packed, first=0, last=None):
    pieces = slice(packed.offsets[first], packed.offsets[packed.sequences if last is None else last])
    triples = zip(packed.document[pieces], packed.start[pieces], packed.length[pieces], strict=True)
    return [(int(d), int(s + k)) for d, s, n in triples for k in range(n)]


@given(LENGTHS, DEALS, st.integers(0, 2**62), st.integers(1, 3))
def test_every_token_once_an_epoch_at_any_lengths_with_deals_taken_back(lengths, deals, seed, epochs):
    dealer = Dealer(np.array(lengths), seed=seed, epochs=epochs)
    served = []
    while dealer.tokens_left:
        for seqlen, sequences, kept in deals:
            packed = dealer.deal(seqlen, sequences)
            held = [int(packed.length[a:b].sum()) for a, b in zip(packed.offsets, packed.offsets[1:], strict=False)]
            assert all(n == seqlen for n in held[:-1])
            assert all(0 < n <= seqlen for n in held)
            if packed.sequences == sequences and kept < sequences and kept:
                dealer.take_back(packed, kept)
                served += positions(packed, 0, kept)
            else:
                assert (packed.sequences == sequences and held[-1] == seqlen) or not dealer.tokens_left
                served += positions(packed)
            assert dealer.tokens_left == epochs * sum(lengths) - len(served)
    every = [(d, k) for d, n in enumerate(lengths) for k in range(n)]
    assert sorted(served) == sorted(every * epochs)


@given(LENGTHS, st.integers(1, 24), st.integers(1, 5))
def test_an_epoch_is_finished_before_the_next_begins(lengths, seqlen, sequences):
    dealer = Dealer(np.array(lengths), seed=1, epochs=2)
    served = []
    while dealer.tokens >= seqlen * sequences:
        served += positions(dealer.deal(seqlen, sequences))
    assert len(set(served)) == len(served)


@pytest.mark.parametrize("seqlen", [128, 1024])
def test_few_cuts_when_a_whole_store_is_dealt(seqlen):
    lengths = np.random.default_rng(3).lognormal(6, 1.2, 50_000).astype(np.int64) + 1
    dealer = Dealer(lengths, seed=1)
    pieces = 0
    while dealer.tokens_left:
        pieces += len(dealer.deal(seqlen, DEAL_SEQUENCES).document)
    assert 0 <= (pieces - len(lengths) - least_cuts(lengths, seqlen)) / len(lengths) <= 0.03


def test_four_in_five_rows_of_a_batch_come_from_documents_of_their_own():
    dealer = Dealer(np.full(500, 3000), seed=1)
    for _ in range(20):
        assert len(set(dealer.deal(64, 250).document)) >= 200


@pytest.mark.parametrize("seqlens", [[64], [8, 8, 8, 64], [128, 8]])
def test_short_and_long_documents_run_out_together(seqlens):
    lengths = np.repeat([40, 400, 4000, 40_000], [4000, 400, 40, 4])
    dealer = Dealer(lengths, seed=1)
    shares = []
    while dealer.tokens_left > 32 * 512:
        seqlen = seqlens[min(len(shares), len(seqlens) - 1)]
        packed = dealer.deal(seqlen, 65_536 // seqlen)
        by_size = np.bincount(np.log10(lengths[packed.document]).astype(int) - 1, packed.length, 4)
        shares.append(by_size / by_size.sum())
    early = np.array(shares[: len(shares) * 3 // 4])
    assert len(early) >= 6
    assert np.all(np.abs(early - 0.25) < 0.1), np.round(shares, 2)


def test_short_pieces_are_not_all_openings():
    packed = Dealer(np.full(500, 3000), seed=1).deal(8, 500)
    assert np.count_nonzero(packed.start == 0) < 125
    assert np.quantile(packed.start, 0.9) > 2000


def test_the_seed_and_the_epoch_change_the_order():
    first, other = Dealer(np.full(99, 8), seed=1, epochs=2), Dealer(np.full(99, 8), seed=2)
    epochs = [first.deal(8, 99).document.tolist() for _ in range(2)]
    assert epochs[0] != epochs[1] != other.deal(8, 99).document.tolist() != epochs[0]


def test_the_order_is_the_same_on_every_machine():
    lengths = np.array([(i * 7919) % 300 + 1 for i in range(2000)])
    dealer = Dealer(lengths, seed=7)
    digest = hashlib.sha256()
    while dealer.tokens_left:
        packed = dealer.deal(8 + 8 * (dealer.deals % 20), 100)
        for part in (packed.document, packed.start, packed.length, packed.offsets):
            digest.update(part.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "923f85a3fcb51313"


@given(st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_the_kernel_hash_equals_the_vector_one(key, index):
    assert _hash(key, index) == int(_hashes(key, index + 1)[index]) >> 1
