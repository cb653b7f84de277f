"""The plan: its table adds up, and the rehearsal counts what the loader then serves."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import documents_of, write_store

from curriculum.ledger import rehearse
from curriculum.loader import CurriculumLoader
from curriculum.plan import plan, render
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.reader import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of([1 + (i * 37) % 90 for i in range(60)]))
    return Store.open(path)


@settings(max_examples=25)
@example(low=1, high=40, duration=60, total=2000)
@given(low=st.integers(1, 40), high=st.integers(1, 40), duration=st.integers(0, 60), total=st.integers(1, 2000))
def test_the_table_covers_every_step_and_token_once(store, low, high, duration, total):
    schedule = Schedule.linear(
        seqlen_start=low,
        seqlen_end=high,
        duration_steps=duration,
        seqlen_multiple=1,
        global_batch_sequences=3,
        total_tokens=total,
    )
    table = plan(schedule, store)
    assert len(table.rows) <= 18
    assert all(row.seqlen_first == row.seqlen_last for row in (table.rows[0], table.rows[-1]))
    steps = [step for row in table.rows for step in range(row.first_step, row.last_step + 1)]
    assert steps == list(range(schedule.total_steps))
    assert sum(row.tokens for row in table.rows) == table.total_tokens >= total
    assert all(schedule.seqlen(row.first_step) == row.seqlen_first for row in table.rows)
    assert all(schedule.seqlen(row.last_step) == row.seqlen_last for row in table.rows)
    assert all(schedule.tokens_before(row.first_step) == row.tokens_before for row in table.rows)
    assert sum(row.share for row in table.rows) == pytest.approx(1)
    assert sum(part.steps for part in table.lengths) == table.total_steps
    assert sum(part.tokens for part in table.lengths) == table.total_tokens
    json.dumps(table.to_json())


@settings(max_examples=25)
@given(seqlens=st.lists(st.sampled_from([4, 8, 16]), min_size=20, max_size=60), tokens=st.sampled_from([16, 48]))
def test_lengths_that_take_turns_are_one_row_each(store, seqlens, tokens):
    rows = [[step, seqlen] for step, seqlen in enumerate(seqlens)]
    schedule = Schedule.table(
        table=rows, global_batch_tokens=tokens, total_tokens=tokens * len(seqlens), max_epochs=9
    )
    table = plan(schedule, store)
    assert sum(row.steps for row in table.rows) == table.total_steps == len(seqlens)
    assert sum(row.tokens for row in table.rows) == table.total_tokens
    if table.take_turns:
        assert [row.seqlen_first for row in table.rows] == sorted(set(seqlens))
        assert [row.steps for row in table.rows] == [seqlens.count(n) for n in sorted(set(seqlens))]
        assert "take turns" in render(table)


def test_truncation_throws_away_what_the_paper_run_did(store):
    schedule = Schedule.linear(
        seqlen_start=8,
        seqlen_end=1024,
        duration_steps=60_000,
        global_batch_sequences=512,
        total_tokens=157_286_400_000,
    )
    store_like = SimpleNamespace(tokens=10**12, documents=1, shards=[SimpleNamespace(tokens=10**12)])
    assert round(100 * plan(schedule, store_like).thrown_away_by_truncation, 1) == 9.1
    other = Schedule.linear(
        seqlen_start=8, seqlen_end=16, duration_steps=9, global_batch_tokens=32, total_tokens=store.tokens
    )
    assert plan(other, store).thrown_away_by_truncation is None, "batches of as many tokens have nothing to cut"


def test_the_rehearsal_counts_what_the_loader_serves(store):
    schedule = Schedule.linear(seqlen_start=8, seqlen_end=48, duration_steps=9, global_batch_sequences=4, epochs=2)
    with CurriculumLoader(store, schedule, seed=5) as loader:
        ledger = rehearse(loader)
        batches = list(loader)
    assert ledger.targets == sum(int((batch.labels >= 0).sum()) for batch in batches) == 2 * store.tokens
    assert ledger.padding == sum(int((batch.labels < 0).sum()) for batch in batches)
    assert ledger.pieces == sum(len(batch.pieces.document) for batch in batches)
    assert (ledger.served_least, ledger.served_most, ledger.lost) == (2, 2, 0)
    assert ledger.attended == sum(int((batch.pieces.length**2).sum()) for batch in batches)
    assert ledger.cuts == ledger.pieces - 2 * store.documents
    assert ledger.least_cuts == 2 * int(np.sum((store.lengths - 1) // 48))


@settings(max_examples=15)
@given(total=st.integers(1, 5000))
@example(total=16 * 60)  # ends where the longer length would begin
@example(total=1200)  # half an epoch
def test_documents_served_in_part_are_counted_as_what_was_served_of_them(store, total):
    schedule = Schedule.staged(
        seqlens=[8, 40], boundaries=[60], global_batch_sequences=2, total_tokens=total, max_epochs=3
    )
    with CurriculumLoader(store, schedule, seed=5) as loader:
        ledger, batches = rehearse(loader), list(loader)
    served = np.zeros(store.documents, int)
    for batch in batches:
        np.add.at(served, batch.pieces.document, batch.pieces.length)
    longest = max(batch.seqlen for batch in batches)
    readings = [  # tokens of each time that a document is read, to its end or not
        min(tokens - begin, length)
        for tokens, length in zip(served.tolist(), store.lengths.tolist(), strict=True)
        for begin in range(0, tokens, length)
    ]
    assert ledger.served_least == min(served // store.lengths)
    assert ledger.served_most == max(-(-served // store.lengths))
    assert ledger.cuts == ledger.pieces - len(readings)
    assert ledger.least_cuts == sum((tokens - 1) // longest for tokens in readings) <= ledger.cuts


def test_every_source_has_its_ledger(tmp_path):
    write_store(tmp_path, documents_of([30, 50, 9]), source="books")
    write_store(tmp_path, documents_of([400, 1, 70]), source="code")
    store = Store.open(tmp_path)
    schedule = Schedule.constant(seqlen=16, global_batch_sequences=2, epochs=2)
    ledger = rehearse(CurriculumLoader(store, schedule, seed=5))
    assert [(s.source, s.documents, s.tokens, s.targets, s.epochs) for s in ledger.sources] == [
        ("books", 3, 89, 178, 2.0),
        ("code", 3, 471, 942, 2.0),
    ]
    text = render(dataclasses.replace(plan(schedule, store), ledger=ledger))
    assert "books: 178 targets, 2.00 epochs of 89 tokens" in text


def test_too_little_data_is_refused(store):
    schedule = Schedule.constant(seqlen=8, global_batch_sequences=1, total_tokens=10_000, max_epochs=2)
    message = (
        rf"(?s)longer than the data.*total_tokens = 10,000, {store.tokens:,} tokens in the store: "
        rf"{10_000 / store.tokens:.2f} epochs.*add {10_000 - 2 * store.tokens:,} tokens.*max_epochs = 4"
    )
    with pytest.raises(ConfigError, match=message):
        plan(schedule, store)


def test_a_ramp_that_the_data_end_before_is_noted(tmp_path):
    write_store(tmp_path, documents_of([50] * 40))
    store = Store.open(tmp_path)
    ramp = {"seqlen_start": 8, "seqlen_end": 64, "global_batch_sequences": 4, "epochs": 1}
    fits, slow = (plan(Schedule.linear(**ramp, duration_steps=steps), store) for steps in (5, 1000))
    assert fits.not_reached is None
    stages = {"seqlens": [8, 16], "global_batch_sequences": 5, "epochs": 1}  # 2,000 tokens are 50 steps of the first
    late, in_time = (plan(Schedule.staged(**stages, boundaries=[at]), store).not_reached for at in (50, 49))
    assert (late, in_time) == ("seqlen 8, where the schedule would come to 16 at step 50", None)
    with CurriculumLoader(store, Schedule.linear(**ramp, duration_steps=1000), seed=1) as loader:
        assert rehearse(loader).least_cuts == 40 * 6, "at seqlen 8, all that the run serves"
    assert "note" not in render(fits)
    assert slow.not_reached == "seqlen 8, where the schedule would come to 64 at step 999"
    assert f"note: the run ends at {slow.not_reached}" in render(slow)
    windows = Schedule.skyladder(
        seqlen=64, attention_window_start=8, attention_window_rate="1/100", global_batch_tokens=256, epochs=1
    )
    assert plan(windows, store).not_reached == "attention window 8, where it would be 64 at step 5,600"
