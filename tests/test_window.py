"""Windows: every document in one of them an epoch, each a fair sample of its group, in an order of its own."""

from itertools import takewhile

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curriculum.window import GROUP_WINDOWS, Lengths, windows


def first_windows(corpus, key, tokens, window_tokens):
    """Those that begin before token number `tokens`."""
    from_the_start = windows(corpus, list(range(len(corpus.shards))), key, 0, window_tokens)
    return list(takewhile(lambda window: window.first_token < tokens, from_the_start))


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    shards=st.integers(1, 9),
    window_tokens=st.integers(5, 3000),
    key=st.integers(0, 2**62),
    data=st.data(),
)
def test_every_document_is_in_one_window_an_epoch_and_the_one_of_a_token_is_found(
    lengths, shards, window_tokens, key, data
):
    corpus, total = Lengths(np.array(lengths), shards=shards), sum(lengths)
    found = first_windows(corpus, key, 3 * total, window_tokens)
    ends = np.cumsum([window.lengths.sum() for window in found])
    assert [window.first_token for window in found] == [0, *ends[:-1]]
    for epoch in range(3):
        documents = np.concatenate([w.documents for w in found if w.first_token // total == epoch])
        assert np.array_equal(np.sort(documents), np.arange(len(lengths)))
    for window in found:
        assert np.array_equal(window.lengths, np.array(lengths)[window.documents])
    assert len({window.key for window in found}) == len(found), "windows dealt in one and the same order"
    token = data.draw(st.integers(0, 3 * total - 1))
    window = next(windows(corpus, list(range(shards)), key, token, window_tokens))
    same = found[int(np.searchsorted(ends, token, side="right"))]
    assert (window.first_token, window.key) == (same.first_token, same.key)
    assert np.array_equal(window.documents, same.documents)


def test_a_window_is_a_fair_sample_of_its_group():
    corpus = Lengths(np.full(200 * GROUP_WINDOWS, 10), shards=GROUP_WINDOWS)
    found = first_windows(corpus, 1, 2000 * GROUP_WINDOWS, 2000)
    assert len(found) == GROUP_WINDOWS
    for window in found:
        assert set(window.documents // 200) == set(range(GROUP_WINDOWS)), "some shard gives nothing"
        assert 0.8 * 2000 < window.lengths.sum() < 1.2 * 2000


def test_shards_come_in_another_order_in_each_epoch():
    corpus = Lengths(np.full(64, 160), shards=32)  # of two documents each, a group by itself
    found = first_windows(corpus, 1, 4 * 64 * 160, 20)
    shards = np.array([window.documents[0] // 2 for window in found])
    groups = shards[np.append(True, np.diff(shards) != 0)].reshape(4, 32)
    assert (np.sort(groups) == np.arange(32)).all()
    assert len({tuple(order) for order in [range(32), *groups.tolist()]}) == 5
