"""Dataset Decomposition: pieces as the paper cuts them, batches in the paper's order, only its own losses."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.buckets import Buckets, Pieces, bucket_batches
from curriculum.saved import from_json, to_json
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError

LENGTHS = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 2000)), min_size=1, max_size=40)


def cut(length, smallest, largest):
    """The paper's decomposition of one document: (start, seqlen), the longest that fits first."""
    start, pieces = 0, []
    while length - start >= smallest:
        seqlen = largest
        while seqlen > length - start:
            seqlen //= 2
        pieces.append((start, seqlen))
        start += seqlen
    return pieces


@given(LENGTHS, st.integers(0, 4), st.integers(0, 4), st.integers(1, 3))
def test_the_sequences_of_every_bucket_are_the_papers_pieces_once_an_epoch(lengths, low, more, epochs):
    buckets = Buckets(1 << low, 1 << (low + more), batch_tokens=1 << (low + more))
    pieces = Pieces(buckets, np.array(lengths), key=7, epochs=epochs)
    expected = [
        (d, *piece) for d, n in enumerate(lengths) for piece in cut(n, buckets.seqlen_start, buckets.seqlen_end)
    ]
    for bucket, seqlen in enumerate(buckets.seqlens):
        wanted = sorted((d, start) for d, start, n in expected if n == seqlen)
        assert pieces.sequences[bucket] == len(wanted)
        for epoch in range(epochs):
            taken = pieces.take(bucket, epoch * len(wanted), len(wanted)) if wanted else None
            if taken is not None:
                assert sorted(zip(taken.document.tolist(), taken.start.tolist(), strict=True)) == wanted
                assert set(taken.length.tolist()) == {seqlen}


ODDS = st.sampled_from(["uniform", "natural", "grow-linear", "grow-p2", "grow-p100"])


@settings(max_examples=60)
@given(LENGTHS, st.integers(0, 3), st.integers(0, 4), st.integers(1, 3), ODDS, st.integers(1, 4), st.booleans())
def test_a_run_serves_each_sequence_once_an_epoch_but_for_incomplete_batches(
    lengths, low, more, epochs, odds, cycles, carry
):
    lengths = np.array(lengths * 4)
    schedule = Schedule.buckets(
        seqlen_start=1 << low,
        seqlen_end=1 << (low + more),
        odds=odds,
        cycles=cycles,
        carry=carry,
        global_batch_tokens=2 << (low + more),
        epochs=epochs,
    )
    buckets = schedule.decomposition
    counts = buckets.count(lengths).tolist()
    if not sum(buckets.batches(counts, epochs)[0]):
        with pytest.raises(ConfigError, match="in full batches"):
            schedule.resolve(int(lengths.sum()), counts)
        return
    schedule = schedule.resolve(int(lengths.sum()), counts)
    assert from_json(json.loads(json.dumps(to_json(schedule)))) == schedule
    assert from_json(json.loads(json.dumps(to_json(schedule)))).resolve(int(lengths.sum())) == schedule
    served = np.zeros((len(lengths), lengths.max()), dtype=int)
    pieces = Pieces(buckets, lengths, 3, epochs)
    steps = list(bucket_batches(pieces, schedule.phases, 0, schedule.total_steps))
    assert [step for step, _ in steps] == list(range(schedule.total_steps))
    for step, packed in steps:
        assert packed.sequences == schedule.sequences(step)
        assert packed.length.tolist() == [schedule.seqlen(step)] * packed.sequences  # one document a row, no padding
        assert int(packed.length.sum()) == buckets.batch_tokens
        for document, start, length in zip(packed.document, packed.start, packed.length, strict=True):
            assert start + length <= lengths[document]
            served[document, start : start + length] += 1
    assert served.max() <= epochs
    below = epochs * int((lengths % buckets.seqlen_start).sum())
    lost = epochs * int(lengths.sum()) - int(served.sum())
    most = buckets.batch_tokens * (1 if carry else len(buckets.seqlens))
    assert below <= lost < below + most
    for first in {0, schedule.total_steps // 2, schedule.total_steps - 1}:
        again = bucket_batches(Pieces(buckets, lengths, 3, epochs), schedule.phases, first, schedule.total_steps)
        for (a, left), (b, right) in zip(steps[first:], again, strict=True):
            assert a == b
            assert np.array_equal(left.document, right.document)
            assert np.array_equal(left.start, right.start)


def seqlens_of(odds, cycles, counts=(800, 400, 200, 100, 50, 25), seed=1, **end):
    # As many tokens in each bucket as in any other, as in the paper's table of curricula.
    schedule = Schedule.buckets(
        seqlen_start=4,
        seqlen_end=128,
        odds=odds,
        cycles=cycles,
        order_seed=seed,
        global_batch_tokens=128,
        **(end or {"epochs": 1}),
    ).resolve(sum(n << (i + 2) for i, n in enumerate(counts)), list(counts))
    return [schedule.seqlen(step) for step in range(schedule.total_steps)]


def test_odds_order_the_lengths_as_their_names_say():
    early = {odds: np.mean(seqlens_of(odds, 1)[:50]) for odds in ("uniform", "grow-linear", "grow-p2", "grow-p100")}
    assert early["uniform"] > early["grow-linear"] > early["grow-p2"] > early["grow-p100"]
    sharp = seqlens_of("grow-p100", 1)
    assert sum(a > b for a, b in pairwise(sharp)) < 20  # nearly sorted
    assert sorted(sharp) == sorted(seqlens_of("uniform", 1)) == sorted(seqlens_of([6, 5, 4, 3, 2, 1], 5))
    assert seqlens_of("grow-linear", 2) == seqlens_of([6, 5, 4, 3, 2, 1], 2)
    assert seqlens_of("grow-p2", 2) == seqlens_of([32, 16, 8, 4, 2, 1], 2)
    assert seqlens_of("grow-p2", 2, seed=2) != seqlens_of("grow-p2", 2)


def test_every_cycle_holds_its_share_of_every_bucket():
    cycles = 5
    order = np.array(seqlens_of("grow-p100", cycles)).reshape(cycles, -1)
    for part in order:
        assert [int((part == 4 << i).sum()) for i in range(6)] == [5] * 6
        assert part[:3].max() < 128 == part[-3:].max()
    mixed = np.array(seqlens_of("uniform", cycles)).reshape(cycles, -1)
    assert len(np.unique(mixed, axis=0)) == cycles, "drawn alike"


def test_sequences_come_in_another_order_in_each_epoch_and_bucket():
    pieces = Pieces(Buckets(8, 32, batch_tokens=32), np.full(50, 32 + 16 + 8), key=1, epochs=3)
    orders = [pieces.take(bucket, 50 * epoch, 50).document for bucket in range(3) for epoch in range(3)]
    assert (np.sort(orders) == np.arange(50)).all()
    assert len(np.unique(orders, axis=0)) == len(orders)


def test_natural_odds_keep_the_lengths_mixed_throughout():
    order = np.array(seqlens_of("natural", 1, counts=(3200, 1600, 200, 100, 50, 25)))
    first, last = order[: len(order) // 2], order[len(order) // 2 :]
    assert abs(np.mean(first < 32) - np.mean(last < 32)) < 0.1
    uniform = np.array(seqlens_of("uniform", 1, counts=(3200, 1600, 200, 100, 50, 25)))
    assert uniform[:100].mean() > 1.5 * order[:100].mean()  # the small buckets are as likely as the large ones


def test_a_run_in_tokens_takes_its_share_of_every_bucket():
    order = seqlens_of("uniform", 2, total_tokens=30 * 128 * 3 + 1)
    assert len(order) == 91
    assert sorted(order.count(4 << i) for i in range(6)) == [15] * 5 + [16]


def test_the_order_is_the_same_on_every_machine():
    assert seqlens_of("grow-p2", 8)[:12] == [32, 4, 4, 8, 8, 4, 64, 8, 16, 64, 32, 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seqlen_start": 6}, "4 or 8"),
        ({"seqlen_start": 128}, "above seqlen_end"),
        ({"global_batch_tokens": 100}, "multiple of seqlen_end = 64"),
        ({"odds": "steep"}, "grow-p100"),
        ({"odds": [1, 2]}, "4 numbers, for 8, 16, 32, 64"),
        ({"cycles": 0}, "cycles must be positive"),
        ({"degree": 2}, "degree not used"),
        ({"global_batch_tokens": None, "global_batch_sequences": 2}, "global_batch_tokens alone"),
    ],
)
def test_odd_buckets_are_refused_with_what_is_allowed(changes, message):
    given = {"seqlen_start": 8, "seqlen_end": 64, "global_batch_tokens": 128, "epochs": 1, **changes}
    with pytest.raises(ConfigError, match=message):
        Schedule.buckets(**given)


def test_more_than_the_buckets_hold_is_refused_with_what_they_do():
    schedule = Schedule.buckets(seqlen_start=8, seqlen_end=16, global_batch_tokens=32, total_tokens=100)
    with pytest.raises(ConfigError, match=r"96 in 1 epochs[\s\S]*carry"):
        schedule.resolve(1000, [7, 5])
    with pytest.raises(ConfigError, match="longer than the data"):
        schedule.resolve(90, [7, 5])
    with pytest.raises(ConfigError, match="counted in the store"):
        schedule.resolve(1000)
