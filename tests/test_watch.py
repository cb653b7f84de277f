"""The watch: an excursion is told at its step and once, calm figures and changes of length never."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import config_of, tiny_store

from curriculum.trace import trace_step
from train import loop
from train.metrics import read_metrics
from train.replay import loader_of
from train.stability import AdamVariance
from train.watch import FLOORS, LEAST, LENGTHS, RECENT, REST, Watch


def calm(steps, seed, spread=0.05):
    """Figures of `steps` steps: a slowly falling variance and a ratio around one, with noise of so many nats."""
    noise = np.exp(np.random.default_rng(seed).normal(0, spread, (steps, 2)))
    return [{"variance_max": 1e-3 * 0.999**i * a, "loss_ratio": 1.02 * b} for i, (a, b) in enumerate(noise.tolist())]


def alarms_of(figures, seqlens):
    watch = Watch()
    return [
        (i, alarm)
        for i, (line, seqlen) in enumerate(zip(figures, seqlens, strict=True))
        for alarm in watch.update(seqlen, line)
    ]


RAMP = [8 * (1 + i // 5) for i in range(300)]
"""A length that changes every five steps, fewer than a band needs."""
LENGTHS_OF = st.sampled_from([[64] * 300, RAMP, [(64, 256, 16)[i % 3] for i in range(300)], [64] * 100 + [512] * 200])


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.001, 0.15), LENGTHS_OF)
def test_calm_figures_are_never_told(seed, spread, seqlens):
    assert alarms_of(calm(300, seed, spread), seqlens) == []


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(list(FLOORS)), st.integers(120, 250), st.integers(1, 25), LENGTHS_OF)
def test_an_excursion_is_told_once_at_its_step(seed, figure, at, lasting, seqlens):
    figures = calm(300, seed)
    for line in figures[at : at + lasting]:
        line[figure] *= 6
    ((step, alarm),) = alarms_of(figures, seqlens)
    assert (step, alarm.figure, alarm.value) == (at, figure, figures[at][figure])
    assert alarm.median == pytest.approx(np.median([line[figure] for line in figures[:at]]), rel=0.25)
    assert alarm.median * FLOORS[figure] <= alarm.limit < alarm.value


@pytest.mark.parametrize(("before", "after"), [(64, 8), (8, 64), (64, 63)])
def test_a_change_of_length_that_moves_every_figure_is_not_told_but_what_comes_after_it_is(before, after):
    figures = calm(200, 1)
    for line in figures[100:]:
        line["variance_max"] *= 8
        line["loss_ratio"] *= 1.5
    assert alarms_of(figures, [before] * 100 + [after] * 100) == []
    assert {i for i, _ in alarms_of(figures, [before] * 200)} == {100}  # the same figures without a change of length
    figures[180]["variance_max"] *= 10
    assert [i for i, _ in alarms_of(figures, [before] * 100 + [after] * 100)] == [180]


def test_a_second_excursion_is_told_after_a_rest_and_not_before():
    figures = calm(400, 2)
    for at in (150, 150 + REST // 2, 300):
        figures[at]["variance_max"] *= 10
    assert [i for i, _ in alarms_of(figures, [64] * 400)] == [150, 300]


@pytest.mark.parametrize("spread", [0.02, 0.2])
def test_the_band_is_that_of_its_definition(spread):
    figures = calm(100, 6, spread)
    figures[90]["variance_max"] *= 1000
    ((step, alarm),) = alarms_of(figures, [64] * 100)
    recent = np.log([line["variance_max"] for line in figures[90 - RECENT : 90]])
    deviation = 1.4826 * np.median(abs(recent - np.median(recent)))
    room = max(8 * deviation, math.log(2))
    assert (room > math.log(2)) == (spread == 0.2)
    assert step == 90
    assert (alarm.median, alarm.limit) == pytest.approx(np.exp([np.median(recent), np.median(recent) + room]))


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_told_and_does_not_enter_the_band(odd):
    watch, figures = Watch(), calm(60, 3)
    assert not any(watch.update(64, line) for line in figures)
    before = json.dumps(watch.bands[64]["variance_max"])
    (alarm,) = watch.update(64, figures[-1] | {"variance_max": odd})
    assert (alarm.figure, str(alarm.value)) == ("variance_max", str(odd))
    assert json.dumps(watch.bands[64]["variance_max"]) == before


def test_nothing_is_told_before_the_band_is_known():
    figures = calm(LEAST + 1, 4)
    for line in (figures[LEAST - 1], figures[LEAST]):
        line["variance_max"] *= 100
    assert [i for i, _ in alarms_of(figures, [64] * (LEAST + 1))] == [LEAST]


@given(st.integers(0, 200), LENGTHS_OF)
def test_the_watch_goes_on_from_its_saved_state(at, seqlens):
    figures = calm(200, 5, spread=0.3)
    figures[150]["variance_max"] *= 100
    whole, part, said = Watch(), Watch(), []
    for i, (line, seqlen) in enumerate(zip(figures, seqlens, strict=False)):
        if i == at:
            part = Watch.from_state(json.loads(json.dumps(part.state_dict(), allow_nan=False)))
        said.append((whole.update(seqlen, line), part.update(seqlen, line)))
    assert all(a == b for a, b in said)
    assert any(a for a, _ in said)
    assert len(part.bands) <= LENGTHS
    assert all(len(recent) <= RECENT for band in part.bands.values() for recent in band.values())


def test_a_run_tells_of_a_burst_its_step_its_tensor_and_its_documents(tmp_path, monkeypatch):
    store, folder, heard = tiny_store(tmp_path / "store"), tmp_path / "a run", []
    measure, calls = AdamVariance.measure, []

    def measured(self):
        calls.append(None)
        if len(calls) == 27:
            parameter = dict(zip(self.names, self.parameters, strict=True))["blocks.1.up.weight"]
            self.optimizer.state[parameter]["exp_avg_sq"][2, 3] = 1e4
        return measure(self)

    with monkeypatch.context() as patch:
        patch.setattr(AdamVariance, "measure", measured)
        loop.run(config_of(store, folder, run__log_every_steps=10), warn=heard.append)
    lines = {line["step"]: line for line in read_metrics(folder)}
    ((told,),) = [line["watch"] for line in lines.values() if "watch" in line]
    assert (told["since_step"], told["figure"], told["tensor"]) == (27, "variance_max", "blocks.1.up.weight")
    assert lines[27]["watch"] == [told]
    assert told["value"] == lines[27]["variance_max"] == pytest.approx(100)
    traced = trace_step(loader_of(folder), 26)
    assert told["trace"] == f"slw-train trace '{folder}' --step 26"
    served = {(piece.document, piece.start, piece.length) for piece in traced.pieces}
    listed = [(d["document"], d["start"], d["length"]) for d in told["documents"]]
    assert set(listed) <= served
    assert len(served) == told["pieces"]
    assert min(n for *_, n in listed) >= max([n for *_, n in served - set(listed)], default=0)
    assert len(heard) == 1
    assert all(
        text in heard[0] for text in ("since step 27,", "blocks.1.up.weight", f"{listed[0][0]:,} (", "--step 26")
    )
