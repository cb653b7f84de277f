"""Weighted sources: exact shares in every batch, per-source epochs, caps, resume; nothing redistributed silently."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orders import columns, lengths_of, planned, same, times_served
from runs import as_toml, settings_of, tiny_tokenizer
from stores import documents_of, write_store

from curriculum.ledger import rehearse
from curriculum.loader import CurriculumLoader
from curriculum.mixture import Mixture, Share
from curriculum.order import Order
from curriculum.planner import plan_steps
from curriculum.schedule import Schedule
from curriculum.window import Lengths
from pipeline.errors import ConfigError, RunError
from pipeline.reader import Store
from train.config_file import load_config, parse_config

SIZES = {
    "books": [1 + (i * 37) % 90 for i in range(60)],
    "web": [1 + (i * 13) % 40 for i in range(90)],
    "code": [333, 8],
}
EVEN = Mixture.from_settings({"a": {"weight": 1}, "b": {"weight": 1}})
WEIGHTS = st.lists(st.one_of(st.integers(0, 9), st.decimals(0, 9, places=3)), min_size=3, max_size=3).filter(any)


def mixture_of(weights, max_epochs=1000):
    sources = zip(SIZES, weights, strict=True)
    return Mixture.from_settings({name: {"weight": float(w), "max_epochs": max_epochs} for name, w in sources})


@given(WEIGHTS, st.integers(1, 600), st.integers(0, 10**6))
@example([0.155, 0.155, 7], 1, 100)  # 31 : 31 : 1400, where the number next to the golden section is near 13/21
def test_every_batch_has_each_share_within_one_row_and_a_period_has_it_exactly(weights, sequences, step):
    mixture = mixture_of(weights)
    rows = np.array([mixture.rows(source, step, 300, sequences) for source in range(3)])
    assert (rows.sum(axis=0) == sequences).all()
    share = np.array(mixture.weights)[:, None] * sequences / mixture.total
    assert (np.abs(rows - share) < 1).all()
    assert np.abs((rows - share).sum(axis=1)).max() < 5  # no drift over 300 batches
    if mixture.total <= 300:
        period = rows[:, : mixture.total].sum(axis=1)
        assert period.tolist() == [sequences * weight for weight in mixture.weights]


@given(WEIGHTS, st.lists(st.integers(1, 40), min_size=2, max_size=5, unique=True), st.integers(0, 300))
def test_the_tokens_before_a_step_are_the_sum_of_its_rows(weights, seqlens, step):
    boundaries = [17 * i for i in range(1, len(seqlens))]
    schedule = Schedule.staged(seqlens=seqlens, boundaries=boundaries, global_batch_sequences=7, total_tokens=10**9)
    mixture = mixture_of(weights)
    for source in range(3):
        expected = sum(int(mixture.rows(source, s, 1, 7)[0]) * schedule.seqlen(s) for s in range(step))
        assert Share(mixture, source, schedule).tokens_before(step) == expected


@settings(max_examples=25)
@given(
    weights=WEIGHTS,
    seqlens=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    sequences=st.integers(1, 9),
    window_tokens=st.sampled_from([200, 700, 1 << 26]),
    seed=st.integers(0, 99),
    total=st.integers(500, 6000),
)
def test_each_source_is_served_epoch_by_epoch_from_any_step_on(
    weights, seqlens, sequences, window_tokens, seed, total
):
    corpus = Lengths({name: np.array(lengths) for name, lengths in SIZES.items()}, shards=2)
    boundaries = [9 * i for i in range(1, len(seqlens))]
    schedule = Schedule.staged(
        seqlens=seqlens, boundaries=boundaries, global_batch_sequences=sequences, total_tokens=total
    )
    mixture = mixture_of(weights)
    order = Order.begin(corpus, schedule, seed=seed, mixture=mixture, window_tokens=window_tokens)
    batches, lengths = planned(order), lengths_of(corpus)
    document, start, length = columns(batches)
    assert all(
        (np.add.reduceat(batch.length, batch.offsets[:-1]) == schedule.seqlen(step)).all()
        and batch.sequences == sequences
        for step, batch in enumerate(batches)
    )
    first = 0
    for source, sizes in enumerate(SIZES.values()):
        own = (document >= first) & (document < first + len(sizes))
        served = np.cumsum(length[own])
        expected = Share(mixture, source, order.schedule).tokens_before(len(batches))
        assert (served[-1] if own.any() else 0) == expected
        for before in range(0, expected, sum(sizes)):
            # Batches are shuffled by row, so an epoch ends within a batch of the end of the one before.
            part = own.nonzero()[0][served <= before + sum(sizes)]
            times = times_served(lengths, document[part], start[part], length[part])[lengths[:first].sum() :]
            slack = sequences * max(seqlens)
            most = before // sum(sizes) + 1
            assert np.count_nonzero(times[: sum(sizes)] > most) <= slack
            assert np.count_nonzero(times[: sum(sizes)] < most - 1) <= slack
        first += len(sizes)
    for step in {0, 1, len(batches) // 3, len(batches) // 2, len(batches) - 1} & set(range(len(batches))):
        assert same(next(plan_steps(order, step))[1], batches[step])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    for name, lengths in SIZES.items():
        documents = documents_of(lengths)
        write_store(path, documents, shards=2, source=name, tokenizer=tiny_tokenizer().to_str().encode())
    return Store.open(path)


def schedule_of(total_tokens):
    return Schedule.linear(
        seqlen_start=8, seqlen_end=24, duration_steps=9, global_batch_sequences=6, total_tokens=total_tokens
    )


def test_the_loader_serves_the_shares_on_any_ranks_and_resumes(store):
    mixture = mixture_of([0.5, 0.3, 0.2], max_epochs=9)
    options = {"seed": 3, "mixture": mixture, "window_tokens": 500}
    with CurriculumLoader(store, schedule_of(5000), **options) as loader:
        batches = list(loader)
        ledger = rehearse(loader)
    for source in ledger.sources:
        weight = {"books": 0.5, "web": 0.3, "code": 0.2}[source.source]
        assert abs(source.targets / ledger.targets - weight) < 0.01
    assert [source.epochs > 1 for source in ledger.sources] == [False, False, True]
    with CurriculumLoader(store, schedule_of(5000), **options) as first:
        for _ in range(17):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
    ranks = [CurriculumLoader(store, schedule_of(5000), rank=rank, world_size=2, **options) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for whole, *parts in zip(batches[17:], *ranks, strict=True):
        assert np.array_equal(whole.labels, np.concatenate([part.labels for part in parts]))
    for other in (None, mixture_of([0.5, 0.4, 0.1], 9)):
        with pytest.raises(RunError, match="another mixture"):
            CurriculumLoader(store, schedule_of(4000), **{**options, "mixture": other}).load_state_dict(state)


def test_a_schedule_changed_midway_keeps_the_shares_and_what_was_served(store):
    mixture = mixture_of([2, 1, 0], max_epochs=2)
    order = Order.begin(store, schedule_of(3000), seed=1, mixture=mixture, window_tokens=400)
    changed = order.changed_at(11, Schedule.constant(seqlen=5, global_batch_sequences=9, total_tokens=3500))
    before, after = planned(order), planned(changed)
    assert all(map(same, before[:11], after[:11]))
    document, start, length = columns(after)
    times = times_served(store.lengths, document, start, length)
    assert times[store.lengths[:150].sum() :].max() == 0  # weight 0
    assert times.max() == 1 and abs(length[document < 60].sum() / length.sum() - 2 / 3) < 0.01


def test_more_than_the_store_is_served_and_goes_on_after_a_change_of_schedule(store):
    then = Schedule.constant(seqlen=9, global_batch_sequences=6, total_tokens=2 * store.tokens)
    options = {"seed": 3, "mixture": mixture_of([1, 1, 1])}
    with CurriculumLoader(store, schedule_of(3 * store.tokens), **options) as loader:
        for _ in range(7):
            next(loader)
        loader.change_schedule(then)
        state = json.loads(json.dumps(loader.state_dict()))
        rest = list(loader)
    with CurriculumLoader(store, then, **options) as resumed:
        resumed.load_state_dict(state)
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(rest, resumed, strict=True))


def test_a_rare_source_is_passed_by_in_the_deals_that_serving_it_makes():
    corpus = Lengths({"a": np.array([4, 5, 10, 8, 7, 5, 10, 6, 4]), "b": np.full(200, 50)})
    mixture = Mixture.from_settings({"a": {"weight": 1, "max_epochs": 99}, "b": {"weight": 8}})
    lengths = {"seqlens": [8, 5], "boundaries": [33]}  # 7 rows of 8 in 33 steps, but 6 in the 32 that 7 would take
    schedule = Schedule.staged(**lengths, global_batch_sequences=2, total_tokens=2000)
    for seed in range(5):
        order = Order.begin(corpus, schedule, seed=seed, mixture=mixture)
        batches = planned(order)
        assert all(same(next(plan_steps(order, step))[1], batch) for step, batch in enumerate(batches))


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"books": {"weight": 1}}, "no weight for 'web'"),
        ({"books": {"weight": 1}, "web": {"weight": 1}, "kode": {"weight": 1}}, "'kode' is not in the store"),
        ({"books": {"weight": 0}, "web": {"weight": 0}, "code": {"weight": 0}}, "no source with a weight"),
        ({"books": {"weight": -1}, "web": {"weight": 1}, "code": {"weight": 1}}, "no share"),
        ({"books": {"weight": 1e-12}, "web": {"weight": 1}, "code": {"weight": 1}}, "finer than"),
        ({"books": {"weight": 1, "max_epochs": 0}, "web": {"weight": 1}, "code": {"weight": 1}}, "positive"),
        (
            {"books": {"weight": 1}, "web": {"weight": 1}, "code": {"weight": 8}},
            r"'code' runs out[\s\S]*max_epochs = 3",
        ),
    ],
)
def test_what_does_not_fit_the_store_is_refused_before_the_run(store, settings_, match):
    with pytest.raises(ConfigError, match=match):
        Order.begin(store, schedule_of(1000), seed=1, mixture=Mixture.from_settings(settings_))


@pytest.mark.parametrize("cap", [1, 3])
def test_a_source_is_read_as_often_as_its_cap_says_and_no_batch_more(cap):
    corpus = Lengths({"a": np.full(10, 8), "b": np.full(99, 8)})
    mixture = Mixture.from_settings({"a": {"weight": 1, "max_epochs": cap}, "b": {"weight": 3}})

    def order(batches):
        schedule = Schedule.constant(seqlen=8, global_batch_sequences=8, total_tokens=64 * batches)
        return Order.begin(corpus, schedule, seed=1, mixture=mixture)

    times = times_served(lengths_of(corpus), *columns(planned(order(5 * cap))))
    assert (times[:80] == cap).all()
    with pytest.raises(ConfigError, match=r"'a' runs out"):
        order(5 * cap + 1)


def test_rows_of_sources_change_places_and_sources_alike_are_dealt_apart():
    """So a rank, whose rows are always the same part of the batch, is served all sources."""
    corpus = Lengths({"a": np.full(200, 40), "b": np.full(200, 40)})
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=16, total_tokens=8 * 16 * 60)
    document = np.array([batch.document for batch in planned(Order.begin(corpus, schedule, seed=1, mixture=EVEN))])
    assert document.shape == (60, 16)  # a document of 40 is five rows
    share = (document < 200).mean(axis=0)  # of the first source, by place in the batch
    assert share.min() > 0.2 and share.max() < 0.8, share
    in_order = np.sort(document, axis=1)  # of each batch: 8 rows of the first source, 8 of the other
    assert not np.array_equal(in_order[:, :8], in_order[:, 8:] - 200)


def test_a_store_without_names_has_no_mixture(tmp_path):
    write_store(tmp_path, documents_of([10] * 200))
    with pytest.raises(ConfigError, match=r"has none[\s\S]*leave \[mixture\] out"):
        Order.begin(
            Store.open(tmp_path), schedule_of(1000), seed=1, mixture=Mixture.from_settings({"a": {"weight": 1}})
        )


def test_a_mixture_has_no_common_epoch(store):
    schedule = replace(schedule_of(1000), total_tokens=None, epochs=1)
    with pytest.raises(ConfigError, match=r"no common epoch[\s\S]*in place of epochs"):
        Order.begin(store, schedule, seed=1, mixture=mixture_of([1, 1, 1]))


def test_the_table_mixture_of_a_runs_toml_and_its_overrides(store, tmp_path):
    path = tmp_path / "run.toml"
    data = settings_of(store.path, tmp_path / "run")
    data["run"] = {"dir": str(tmp_path / "run"), "total_tokens": 3000}
    tables = (
        "\n[mixture.books]\nweight = 0.5\n[mixture.web]\nweight = 0.25\n[mixture.code]\nweight = 0.25\nmax_epochs = 3"
    )
    path.write_text(as_toml(data) + tables)
    loader = load_config(path).loader(store)
    assert loader.order.mixture == Mixture(("books", "web", "code"), (2, 1, 1), (1, 1, 3))
    loader = load_config(path, ["mixture.code.weight=0", "mixture.code.max_epochs=1"]).loader(store)
    assert loader.order.mixture.weights == (2, 1, 0)
    with pytest.raises(
        ConfigError, match=r"mixture.code.wight\s+allowed: .*\s+to do:   did you mean mixture.NAME.weight"
    ):
        load_config(path, ["mixture.code.wight=0"])
    assert parse_config(data, where="test").loader(store).order.mixture is None
