"""Attention windows: the published formula at every step, spans cut where it says, trained with that very mask."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config_of, tiny_store
from torch.nn import functional as F

from curriculum.loader import CurriculumLoader
from curriculum.saved import from_json, to_json
from curriculum.schedule import Schedule
from pipeline.errors import ConfigError
from pipeline.reader import Store
from train import loop
from train.data import document_mask, micro_batches
from train.metrics import read_metrics


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("store"))


def schedule_of(**settings):
    return Schedule.skyladder(**{"global_batch_sequences": 3, "total_tokens": 900, **settings})


WINDOWS = st.tuples(st.integers(1, 40), st.integers(0, 60), st.integers(1, 9), st.integers(0, 200))


@given(WINDOWS, st.fractions(Fraction(1, 9), Fraction(9)))
def test_windows_equal_the_published_formulas_at_every_step(windows, rate):
    start, more, multiple, duration = windows
    end = start + more
    seqlen = end + 1
    ends = {
        "seqlen": seqlen,
        "attention_window_start": start,
        "attention_window_end": end,
        "attention_window_multiple": multiple,
    }

    def p(t):
        return min(mpmath.mpf(t) / duration, mpmath.mpf(1)) if duration else mpmath.mpf(1)

    tie = mpmath.mpf(10) ** -25
    formulas = {
        "linear": lambda t: start + (min(more * t // duration, more) if duration else more),
        "sine": lambda t: start + int(mpmath.floor(more * mpmath.sin(mpmath.pi / 2 * p(t)) + tie)),
        "exponential": lambda t: int(mpmath.floor(start * (mpmath.mpf(end) / start) ** p(t) + tie)),
    }
    with mpmath.workdps(60):
        for shape, formula in formulas.items():
            schedule = schedule_of(**ends, attention_window_shape=shape, duration_steps=duration)
            for step in range(duration + 3):
                raw = formula(step)
                expected = end if step >= duration or raw >= end else max(raw // multiple * multiple, start)
                assert schedule.attention_window(step) == expected, (shape, step)
                assert (schedule.seqlen(step), schedule.sequences(step)) == (seqlen, 3)
    schedule = schedule_of(**ends, attention_window_rate=str(rate))
    for step in range(60):
        raw = start + math.floor(rate * step)
        assert schedule.attention_window(step) == (end if raw >= end else max(raw // multiple * multiple, start))
    assert from_json(to_json(schedule)) == schedule
    assert schedule.end_of_phase(0) == schedule.total_steps  # windows do not break up the dealing


def test_the_papers_rate_takes_the_papers_steps():
    # alpha = 1 / 8 from 32 to 8192: one position every 8 steps, then whole rows.
    schedule = Schedule.skyladder(
        seqlen=8192,
        attention_window_start=32,
        attention_window_rate="1/8",
        global_batch_tokens=1 << 20,
        total_tokens=10**11,
    )
    assert [schedule.attention_window(step) for step in (0, 7, 8, 65_279, 65_280)] == [32, 32, 33, 8191, None]
    assert {schedule.sequences(step) for step in (0, 70_000)} == {128}


def test_a_duration_in_tokens_and_a_rate_that_divides_nothing():
    given = {"seqlen": 64, "attention_window_start": 4, "global_batch_sequences": 3, "total_tokens": 10**5}
    in_steps = Schedule.skyladder(**given, duration_steps=50)
    in_tokens = Schedule.skyladder(**given, duration_tokens=50 * 3 * 64)
    assert in_tokens.phases == in_steps.phases
    ends = {"attention_window_end": 11, "attention_window_shape": "sine"}
    assert (
        Schedule.skyladder(**given, **ends, attention_window_rate="2/3").phases
        == Schedule.skyladder(**given, **ends, duration_steps=11).phases
    ), "7 positions at 2 in 3 steps take 10.5"


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(["kept", "restart"]))
def test_spans_are_pieces_cut_at_the_multiples_of_the_window_in_each_row(store, window, seqlen, positions):
    size = {"global_batch_sequences": 4, "epochs": 1}
    windows = {
        "attention_window_start": window,
        "attention_window_end": window,
        "attention_window_positions": positions,
        "duration_steps": 0,
    }
    cut = Schedule.skyladder(seqlen=max(seqlen, window), **windows, **size)
    whole = Schedule.constant(seqlen=max(seqlen, window), **size)
    opened = Store.open(store)
    with CurriculumLoader(opened, cut, seed=3) as ours, CurriculumLoader(opened, whole, seed=3) as plain:
        for batch, other in zip(ours, plain, strict=True):
            assert np.array_equal(batch.input_ids, other.input_ids)
            assert np.array_equal(batch.labels, other.labels)
            cuts = {int(c) for c in other.cu_seqlens}
            if window < seqlen:
                cuts |= {i for i in range(batch.labels.size) if i % batch.seqlen % window == 0}
            assert batch.cu_seqlens.tolist() == sorted(cuts)
            assert batch.max_seqlen == np.diff(batch.cu_seqlens).max()
            if positions == "kept" or window >= seqlen:
                assert np.array_equal(batch.position_ids, other.position_ids)
            else:
                restarted = np.concatenate([np.arange(n) for n in np.diff(batch.cu_seqlens)])
                assert np.array_equal(batch.position_ids.ravel(), restarted)


def slow_mask(batch, mask):
    """bool [rows, L, L] of the definition: earlier or equal, in one block of the row, in one piece."""
    pieces = np.repeat(np.arange(len(batch.pieces.length)), batch.pieces.length)
    pieces = np.append(pieces, np.full(batch.labels.size - len(pieces), -1)).reshape(batch.labels.shape)
    result = np.zeros((*batch.labels.shape, batch.seqlen), dtype=bool)
    for row in range(len(batch.labels)):
        for i in range(batch.seqlen):
            for j in range(i + 1):
                block = i // batch.attention_window == j // batch.attention_window
                result[row, i, j] = block and (mask == "causal" or pieces[row, i] == pieces[row, j])
    return torch.from_numpy(result)


@pytest.mark.parametrize("mask", ["document", "causal"])
@pytest.mark.parametrize("positions", ["kept", "restart"])
def test_a_run_trains_with_exactly_the_mask_of_the_definition(store, tmp_path, mask, positions):
    windows = {
        "pacing": "skyladder",
        "seqlen": 24,
        "attention_window_start": 5,
        "duration_steps": 9,
        "attention_window_positions": positions,
    }
    config = config_of(store, tmp_path / "run", model__mask=mask)
    config = config.model_copy(update={"curriculum": type(config.curriculum)(**windows)})
    this = loop.Run(config, lambda text: None)
    batch = next(this.loader)
    assert batch.attention_window == 5
    expected = slow_mask(batch, mask)
    if mask == "document":
        assert torch.equal(document_mask(batch)[:, 0], expected)
    ids, places, spans, _ = next(micro_batches(batch, 10**6, this.device, mask))
    seen = []

    def attend(q, k, v, attn_mask, is_causal):
        seen.append((attn_mask, is_causal))
        return (
            F.softmax((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~expected[:, None], -math.inf), 3) @ v
        )

    with pytest.MonkeyPatch.context() as patch:
        logits = this.model(ids, places, spans)
        patch.setattr(F, "scaled_dot_product_attention", attend)
        torch.testing.assert_close(this.model(ids, places, spans), logits, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(attn_mask[:, 0], expected) and not is_causal for attn_mask, is_causal in seen)
    column = torch.arange(24).expand_as(ids)
    if mask == "causal":
        assert torch.equal(places, column if positions == "kept" else column % 5)
    this.loader.close()
    outcome = loop.run(config, warn=lambda text: None)
    assert outcome.finished
    used = [line.get("attention_window") for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert used[0] == 5
    assert used[-1] is None
    assert [n for n in used if n] == sorted(n for n in used if n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"seqlen": 16, "attention_window_start": 32, "duration_steps": 1},
            "attention_window_start <= attention_window_end <= seqlen",
        ),
        ({"seqlen": 64, "attention_window_end": 65, "duration_steps": 1}, "attention_window_end <= seqlen"),
        ({"seqlen": 64, "attention_window_rate": 0}, "1/8"),
        ({"seqlen": 64, "attention_window_rate": "fast"}, "1/8"),
        ({"seqlen": 64, "attention_window_rate": 1, "duration_steps": 1}, "several"),
        ({"seqlen": 64}, "duration_steps"),
        ({"seqlen": 64, "attention_window_shape": "cubic", "duration_steps": 1}, "exponential"),
        ({"seqlen": 64, "attention_window_shape": "stepwise", "duration_steps": 1}, "stages"),
        ({"seqlen": 64, "duration_steps": 1, "attention_window_positions": "lost"}, "kept, restart"),
    ],
)
def test_odd_windows_are_refused_with_what_is_allowed(settings, message):
    with pytest.raises(ConfigError, match=message):
        schedule_of(**settings)
