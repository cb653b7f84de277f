"""Arms to compare with, through the loader: truncation loses what it says, buckets what the paper drops; resume."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import as_toml, config_of, settings_of, tiny_store

from curriculum.ledger import rehearse
from curriculum.loader import CurriculumLoader
from curriculum.resolve import resolved_for
from curriculum.schedule import Schedule
from curriculum.truncate import cut_rows
from pipeline.errors import ConfigError, RunError
from pipeline.packing import Packed
from pipeline.reader import Store
from train import loop
from train.config_file import load_config
from train.metrics import read_metrics


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def store(path):
    return Store.open(path)


RAMP = {"seqlen_start": 4, "seqlen_end": 32, "duration_steps": 9, "seqlen_multiple": 4, "global_batch_sequences": 3}
TRUNCATE = Schedule.linear(**RAMP, epochs=2, dealing="truncate")
BUCKETS = Schedule.buckets(seqlen_start=8, seqlen_end=32, cycles=2, global_batch_tokens=64, epochs=2)
ARMS = pytest.mark.parametrize("schedule", [TRUNCATE, BUCKETS], ids=["truncate", "buckets"])


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), max_size=5), st.integers(1, 30))
def test_cutting_keeps_the_first_tokens_of_each_row(rows, seqlen):
    length = np.array([n for row in rows for n in row], dtype=np.int64)
    packed = Packed(
        np.arange(len(length)), 10 * np.arange(len(length)), length, np.cumsum([0] + [len(row) for row in rows])
    )
    cut = cut_rows(packed, seqlen)
    assert cut.sequences == len(rows)
    piece = 0
    for i, row in enumerate(rows):
        tokens = [(piece + j, 10 * (piece + j) + k) for j, n in enumerate(row) for k in range(n)]
        part = range(int(cut.offsets[i]), int(cut.offsets[i + 1]))
        kept = [(int(cut.document[p]), int(cut.start[p]) + k) for p in part for k in range(int(cut.length[p]))]
        assert kept == tokens[:seqlen]
        piece += len(row)


def test_truncation_serves_the_beginnings_of_full_length_rows_and_counts_the_rest(store):
    whole = Schedule.constant(seqlen=32, global_batch_sequences=3, epochs=2)
    with CurriculumLoader(store, TRUNCATE, seed=5) as ours, CurriculumLoader(store, whole, seed=5) as full:
        batches = list(ours)
        for batch, uncut in zip(batches, full, strict=False):
            seqlen = ours.schedule.seqlen(batch.step)
            assert batch.labels.shape == (3, seqlen)
            assert np.array_equal(batch.labels, uncut.labels[:, :seqlen])
            assert np.array_equal(batch.input_ids, uncut.input_ids[:, :seqlen])
            assert np.array_equal(batch.position_ids, uncut.position_ids[:, :seqlen])
    read = len(batches) * 3 * 32
    assert 2 * store.tokens - 3 * 32 < read <= 2 * store.tokens
    with CurriculumLoader(store, TRUNCATE, seed=5) as loader:
        ledger = rehearse(loader)
    served = sum(int((batch.labels >= 0).sum()) for batch in batches)
    assert (ledger.targets, ledger.padding, ledger.lost) == (served, 0, read - served)
    assert ledger.lost > 0


def test_a_truncating_run_in_tokens_needs_the_data_it_reads(store):
    most = resolved_for(Schedule.linear(**RAMP, epochs=1, dealing="truncate"), store).total_tokens
    asked = Schedule.linear(**RAMP, total_tokens=most, dealing="truncate")
    assert resolved_for(asked, store) == asked
    with pytest.raises(ConfigError, match=r"for which it reads[\s\S]*max_epochs = 2"):
        resolved_for(Schedule.linear(**RAMP, total_tokens=store.tokens, dealing="truncate"), store)
    exact = Schedule.constant(seqlen=64, global_batch_sequences=2, epochs=1, dealing="truncate")
    assert [exact.resolve(tokens).total_steps for tokens in (256, 383, 384)] == [2, 2, 3]
    with pytest.raises(ConfigError, match="less than one batch"):
        Schedule.constant(seqlen=64, global_batch_sequences=2, epochs=1, dealing="truncate").resolve(127)


def test_buckets_lose_what_the_ledger_says(store):
    with CurriculumLoader(store, BUCKETS, seed=5) as loader:
        ledger = rehearse(loader)
        served = np.zeros(store.documents, dtype=int)
        for batch in loader:
            assert (batch.labels >= 0).all()
            assert np.array_equal(batch.position_ids, np.tile(np.arange(batch.seqlen), (len(batch.labels), 1)))
            served += np.bincount(batch.pieces.document, batch.pieces.length, store.documents).astype(int)
    assert ledger.padding == 0
    assert ledger.targets + ledger.lost == 2 * store.tokens
    assert ledger.targets == served.sum()
    assert ledger.lost < 2 * int((store.lengths % 8).sum()) + 3 * 64


@ARMS
def test_resume_after_any_step_on_any_world_goes_on_with_the_next_batch(store, schedule):
    with CurriculumLoader(store, schedule, seed=5) as loader:
        batches, states = [], [loader.state_dict()]
        for batch in loader:
            batches.append(batch)
            states.append(json.loads(json.dumps(loader.state_dict())))
    for step in range(0, len(batches), 5):
        parts = []
        for rank in (0, 1):
            with CurriculumLoader(store, schedule, seed=5, rank=rank, world_size=2) as again:
                again.load_state_dict(states[step])
                parts.append(next(again))
        assert np.array_equal(np.concatenate([part.labels for part in parts]), batches[step].labels)
        assert {part.step for part in parts} == {step}
    with CurriculumLoader(store, schedule, seed=6) as other:
        assert any(not np.array_equal(a.labels, b.labels) for a, b in zip(batches, other, strict=False))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 400))
def test_every_arm_serves_the_shapes_and_tokens_of_its_schedule(store, start, rows, total):
    ramp = {"seqlen_start": 4 * start, "seqlen_end": 32, "duration_steps": 7, "seqlen_multiple": 4}
    for more in ({"dealing": "truncate"}, {"control": "batch_warmup"} if start <= 8 else {}, {}):
        schedule = Schedule.linear(**ramp, global_batch_sequences=rows, total_tokens=total, max_epochs=9, **more)
        with CurriculumLoader(store, schedule, seed=1) as loader:
            shapes = [batch.labels.shape for batch in loader]
        assert shapes == [(schedule.sequences(i), schedule.seqlen(i)) for i in range(schedule.total_steps)]


@ARMS
def test_another_kind_of_batches_midway_is_refused(store, schedule):
    with CurriculumLoader(store, schedule, seed=5) as loader:
        next(loader)
        state = loader.state_dict()
    with (
        CurriculumLoader(store, Schedule.linear(**RAMP, epochs=2), seed=5) as other,
        pytest.raises(RunError, match="cannot be changed midway"),
    ):
        other.load_state_dict(state, change_schedule=True)
    if schedule is BUCKETS:
        others = Schedule.buckets(seqlen_start=8, seqlen_end=32, cycles=3, global_batch_tokens=64, epochs=2)
        with (
            CurriculumLoader(store, others, seed=5) as again,
            pytest.raises(RunError, match="cannot be changed midway"),
        ):
            again.load_state_dict(state, change_schedule=True)


def test_runs_of_both_arms_finish_and_resume_to_the_same_weights(path, store, tmp_path):
    tables = {
        "truncate": {"dealing": "truncate"},
        "buckets": {
            "pacing": "buckets",
            "duration_steps": None,
            "odds": "grow-linear",
            "cycles": 2,
        },
    }
    for name, table in tables.items():
        changes = {f"curriculum__{key}": value for key, value in table.items()}
        if name == "buckets":
            changes |= {"batch__global_batch_sequences": None, "batch__global_batch_tokens": 96}
        config = config_of(path, tmp_path / name, **changes)
        outcome = loop.run(config, warn=lambda text: None)
        schedule = resolved_for(config.schedule(), store)
        lines = [line for line in read_metrics(tmp_path / name) if "loss" in line]
        assert [line["seqlen"] for line in lines] == [schedule.seqlen(i) for i in range(schedule.total_steps)]
        assert outcome.finished
        assert outcome.tokens_seen == schedule.total_tokens or name == "truncate"
    toml = tmp_path / "run.toml"
    text = as_toml(settings_of(path, tmp_path / "x", curriculum__dealing="truncate"))
    toml.write_text(text)
    assert load_config(toml, ["curriculum.dealing=pack"]).schedule().planner == "dealing"
