"""The eight guarantees of dealing, over random corpora, schedules and windows; each test shows that it can fail."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import columns, lengths_of, orders, planned, same, schedules, times_served
from stores import documents_of, write_store

from curriculum.dealer import Dealer
from curriculum.loader import CurriculumLoader
from curriculum.order import Order
from curriculum.planner import plan_steps
from curriculum.saved import from_json
from curriculum.schedule import Schedule
from curriculum.window import Lengths
from pipeline.packing import Packed, least_cuts, pack
from pipeline.reader import Store

EIGHT = 8


@pytest.fixture(scope="module")
def lognormal():
    """100,000 documents of lognormal(6.0, 1.1) tokens: 74 million."""
    return np.maximum(np.random.default_rng(3).lognormal(6.0, 1.1, 100_000).astype(np.int64), 1)


def check_exactly_once(lengths, batches):
    """Every token once in each whole epoch, one epoch after another; none twice in the rest."""
    document, start, length = columns(batches)
    served, total = np.cumsum(length), int(lengths.sum())
    for first in range(0, int(served[-1]), total):
        pieces = (served > first) & (served <= first + total)
        times = times_served(lengths, document[pieces], start[pieces], length[pieces])
        assert times.max() == 1
        assert times.min() == 1 or first + total > served[-1]


@settings(max_examples=60)
@given(orders())
def test_1_every_token_is_a_target_exactly_once_an_epoch(order):
    lengths, batches = lengths_of(order.corpus), planned(order)
    check_exactly_once(lengths, batches)
    pieces = columns(batches)
    if lengths.sum() > pieces[2][0] and lengths.sum() <= pieces[2].sum():
        again = Packed(*(np.append(part[:1], part) for part in pieces), np.empty(0))
        with pytest.raises(AssertionError):
            check_exactly_once(lengths, [again])
        elsewhere = Packed(np.append(pieces[0][:-1], pieces[0][0]), *pieces[1:], np.empty(0))
        if lengths.sum() == pieces[2].sum() and pieces[0][0] != pieces[0][-1]:
            with pytest.raises(AssertionError):
                check_exactly_once(lengths, [elsewhere])


def check_full(schedule, batches):
    """Every sequence is full, and every batch has all of them, but the last sequences of the last batch."""
    assert len(batches) == schedule.total_steps
    for step, batch in enumerate(batches):
        filled = np.add.reduceat(batch.length, batch.offsets[:-1])
        if step < schedule.total_steps - 1:
            assert batch.sequences == schedule.sequences(step)
            assert (filled == schedule.seqlen(step)).all()
        assert batch.sequences <= schedule.sequences(step)
        assert (filled[:-1] == schedule.seqlen(step)).all() and 0 < filled[-1] <= schedule.seqlen(step)


@settings(max_examples=60)
@given(orders())
def test_2_no_padding_but_in_the_last_batch_of_the_data(order):
    batches, schedule = planned(order), order.schedule
    check_full(schedule, batches)
    targets = sum(int(batch.length.sum()) for batch in batches)
    most = schedule.max_epochs * int(lengths_of(order.corpus).sum())
    assert targets == min(schedule.tokens_before(schedule.total_steps), most)
    if len(batches) > 1:
        with pytest.raises(AssertionError):
            check_full(schedule, [batches[0]._replace(length=batches[0].length - 1), *batches[1:]])


def excess_cuts(lengths, seqlen, document):
    """Cuts a document beyond the least possible; share of the documents of at most `seqlen` tokens that are cut."""
    pieces = np.bincount(document, minlength=len(lengths))
    fit = lengths <= seqlen
    return (pieces.sum() - len(lengths) - least_cuts(lengths, seqlen)) / len(lengths), float((pieces[fit] > 1).mean())


@pytest.mark.parametrize("seqlen", [64, 128, 256, 512, 1024, 2048])
def test_3_few_cuts_beyond_the_least_possible(lognormal, seqlen):
    packed, cut = excess_cuts(lognormal, seqlen, pack(lognormal, seqlen).document)
    assert 0 <= packed <= 0.01 and cut < 0.01
    schedule = Schedule.constant(seqlen=seqlen, global_batch_sequences=(1 << 18) // seqlen, epochs=1)
    document, _, _ = columns(planned(Order.begin(Lengths(lognormal), schedule, seed=1)))
    dealt, cut = excess_cuts(lognormal, seqlen, document)
    assert 0 <= dealt <= 0.03 and cut < 0.01
    # Concatenating all documents and chopping every `seqlen` tokens, the usual way, is far outside.
    ends = np.cumsum(lognormal)
    chopped = np.repeat(np.arange(len(ends)), (ends - 1) // seqlen - (ends - lognormal) // seqlen + 1)
    assert excess_cuts(lognormal, seqlen, chopped)[0] > 0.2


def distinct_share(batch):
    return len(np.unique(batch.document)) / len(batch.document)


def opening_bias(lengths, seqlen, document, start, length):
    """(share of pieces that begin a document, the same share over a whole epoch, distance of starts from uniform).

    Over documents of at least 2 sequences. The third is Kolmogorov's distance of start / (n - length) from uniform.
    """
    long = lengths[document] >= 2 * seqlen
    document, start, length = document[long], start[long], length[long]
    fair = float((1 / np.ceil(lengths[document] / seqlen)).mean())
    place = np.sort((start + 0.5) / (lengths[document] - length + 1))
    distance = float(np.abs(place - (np.arange(len(place)) + 0.5) / len(place)).max())
    return float((start == 0).mean()), fair, distance


def test_read_from_the_beginning_short_pieces_are_served_early_and_are_openings(lognormal):
    ramp = {"seqlen_start": EIGHT, "seqlen_end": 256, "duration_steps": 400, "global_batch_sequences": 256}
    bias = {}
    for first_piece in ("random", "beginning"):
        schedule = Schedule.linear(**ramp, total_tokens=20_000_000, first_piece=first_piece)
        batches = planned(Order.begin(Lengths(lognormal), schedule, seed=1, window_tokens=20_000_000))
        bias[first_piece] = opening_bias(lognormal, EIGHT, *columns(batches[:20]))
        # A window is read to its end: what comes late are ends of documents.
        places = [(batch.start / lognormal[batch.document]).mean() for batch in (batches[0], batches[-30])]
        assert (places[0] < 0.05 and places[1] > 0.5) == (first_piece == "beginning")
    opened, fair, _ = bias["random"]
    assert abs(opened - fair) < 0.02
    opened, fair, distance = bias["beginning"]
    assert opened > 20 * fair and distance > 0.9


def test_4_rows_of_a_batch_come_from_distinct_documents_and_start_anywhere(lognormal):
    schedule = Schedule.constant(seqlen=EIGHT, global_batch_sequences=512, total_tokens=EIGHT * 512 * 50)
    batches = planned(Order.begin(Lengths(lognormal), schedule, seed=1))
    # Drawing 512 tokens of the corpus at random, with replacement, and a row around each.
    draws = np.random.default_rng(1).choice(len(lognormal), (50, 512), p=lognormal / lognormal.sum())
    at_random = np.mean([len(np.unique(draw)) for draw in draws])
    assert np.mean([len(np.unique(batch.document)) for batch in batches]) >= at_random
    opened, fair, distance = opening_bias(lognormal, EIGHT, *columns(batches[:10]))
    assert abs(opened - fair) < 0.01 and distance < 0.03
    # As many documents as rows, all equal: none comes twice; half as many rows: none while others wait.
    for seqlen, sequences in ((EIGHT, 500), (64, 250)):
        equal = np.full(500, 3000)
        schedule = Schedule.constant(seqlen=seqlen, global_batch_sequences=sequences, total_tokens=500_000)
        batches = planned(Order.begin(Lengths(equal), schedule, seed=1))
        assert min(distinct_share(batch) for batch in batches) > 0.98
        opened, fair, distance = opening_bias(equal, seqlen, *columns(batches[:2]))
        assert opened < 2 * fair and distance < 0.1
    # Reading every document from its beginning is outside.
    document, start = np.arange(512), np.zeros(512, dtype=np.int64)
    opened, fair, distance = opening_bias(lognormal, EIGHT, document, start, np.full(512, EIGHT))
    assert opened > 2 * fair and distance > 0.9


LENGTHS = [1 + (i * 37) % 90 for i in range(60)] + [400, 333, 1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of(LENGTHS), shards=3, bos_id=49)
    return Store.open(path)


def equal_batches(a, b):
    names = ("input_ids", "labels", "position_ids")
    return (a.step, a.seqlen, a.targets) == (b.step, b.seqlen, b.targets) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in names
    )


@settings(max_examples=10)
@given(
    schedule=schedules(sum(LENGTHS), 30), world_size=st.integers(1, 3), window_tokens=st.sampled_from([300, 1 << 26])
)
def test_5_the_same_batches_on_any_ranks_and_with_any_prefetch(store, schedule, world_size, window_tokens):
    world_size = min(world_size, *(phase.sequences for phase in schedule.phases))

    def batches(**options):
        with CurriculumLoader(store, schedule, window_tokens=window_tokens, **{"seed": 3, **options}) as loader:
            return list(loader)

    alone = batches()
    ranks = [batches(rank=rank, world_size=world_size, prefetch=1 + rank) for rank in range(world_size)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        joined = replace(
            whole,
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("input_ids", "labels", "position_ids")
            },
        )
        assert equal_batches(whole, joined)
        assert {part.targets for part in parts} == {whole.targets}
    assert not all(equal_batches(a, b) for a, b in zip(alone, batches(seed=4), strict=True))


@settings(max_examples=40)
@given(orders(steps=25))
def test_6_planning_goes_on_from_any_single_step(order):
    batches = planned(order)
    for step in range(order.schedule.total_steps):
        at, batch = next(plan_steps(order, step))
        assert at == step and same(batch, batches[step])
    assert list(plan_steps(order, len(batches))) == []
    lengths = lengths_of(order.corpus)
    if len(lengths) >= 4 and order.schedule.total_tokens >= lengths.sum():
        others = [planned(replace(order, seed=order.seed + 1 + i)) for i in range(3)]
        assert not all(all(map(same, batches, moved)) for moved in others), "the comparison compares nothing"


@settings(max_examples=15)
@given(data=st.data(), window_tokens=st.sampled_from([300, 900, 1 << 26]))
def test_6_what_was_served_stays_served_over_kills_and_changed_schedules_and_ranks(store, data, window_tokens):
    parts = []
    state, stop, epochs = None, 0, 1
    for _ in range(data.draw(st.integers(2, 4))):
        changed = state is None or data.draw(st.booleans())
        if changed:
            epochs = data.draw(st.integers(epochs, 2))
            schedule = data.draw(schedules(store.tokens, 30))
            schedule = replace(schedule, epochs=epochs, total_tokens=None, max_epochs=1, settings=None)
        else:
            schedule = from_json(state["schedules"][-1][1])
        with CurriculumLoader(
            store, schedule, seed=3, window_tokens=window_tokens, prefetch=data.draw(st.integers(1, 4))
        ) as loader:
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)), change_schedule=changed)
            assert loader.step == stop
            stop = data.draw(st.integers(stop, min(stop + 30, loader.schedule.total_steps)))
            parts += [next(loader) for _ in range(stop - loader.step)]
            state = loader.state_dict()
            assert len(json.dumps(state)) < 64_000
    with CurriculumLoader(store, schedule, seed=3, window_tokens=window_tokens) as loader:
        loader.load_state_dict(state, change_schedule=changed)
        parts += list(loader)
    assert [batch.step for batch in parts] == list(range(len(parts)))
    check_exactly_once(store.lengths, [batch.pieces for batch in parts])
    assert sum(batch.targets for batch in parts) == epochs * store.tokens
    assert all(map(same, planned(loader.order), [batch.pieces for batch in parts])), "not what the last state says"


@settings(max_examples=40)
@given(
    seqlen=st.integers(1, 300),
    sequences=st.integers(1, 40),
    tokens=st.integers(300, 4000),
    constant_tokens=st.booleans(),
    lengths=st.lists(st.integers(1, 500), min_size=20, max_size=60),
)
def test_7_any_length_and_constant_sequences_or_tokens(seqlen, sequences, tokens, constant_tokens, lengths):
    size = {"global_batch_tokens": tokens} if constant_tokens else {"global_batch_sequences": sequences}
    schedule = Schedule.constant(seqlen=seqlen, **size, epochs=1)
    order = Order.begin(Lengths(np.array(lengths)), schedule, seed=1)
    batches = planned(order)
    check_full(order.schedule, batches)
    check_exactly_once(np.array(lengths), batches)
    if constant_tokens and len(batches) > 1:
        assert tokens - seqlen < batches[0].length.sum() <= tokens
    other = Schedule.constant(seqlen=seqlen + 1, **size, epochs=1).resolve(sum(lengths))
    if len(batches) > 1:
        with pytest.raises(AssertionError):
            check_full(other, batches)


@settings(max_examples=10)
@given(schedule=schedules(sum(LENGTHS), 30), window_tokens=st.sampled_from([300, 1 << 26]))
def test_8_a_batch_names_the_documents_and_positions_in_it(store, schedule, window_tokens):
    documents = [store.document(i).tolist() for i in range(store.documents)]

    def check(batch, pieces):
        at = 0
        labels, inputs = batch.labels.ravel().tolist(), batch.input_ids.ravel().tolist()
        for d, s, n in zip(pieces.document, pieces.start, pieces.length, strict=True):
            assert labels[at : at + n] == documents[d][s : s + n]
            assert inputs[at : at + n] == [49, *documents[d]][s : s + n]
            at += n
        assert at == batch.targets

    with CurriculumLoader(store, schedule, seed=3, window_tokens=window_tokens) as loader:
        batches = list(loader)
    for batch in batches:
        check(batch, batch.pieces)
    with pytest.raises(AssertionError):
        check(batches[0], batches[0].pieces._replace(start=batches[0].pieces.start + 1))
    # Without serving anything before it, and without the loader.
    _, packed = next(plan_steps(loader.order, len(batches) // 2))
    check(batches[len(batches) // 2], packed)


def test_a_long_document_is_read_at_even_pace_all_along():
    lengths = np.append(np.full(300, 300), 30_000)
    dealer, shares = Dealer(lengths, key=1), []
    while dealer.tokens >= 100 * EIGHT:
        packed = dealer.deal(EIGHT, np.array([100]))
        shares.append(np.count_nonzero(packed.document == 300))
    assert 15 < min(shares) <= max(shares) < 36, shares  # 25 is its share
