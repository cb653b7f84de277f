"""What a run's metrics come to, against slow plain recomputation; damaged and unfinished ones."""

import json
import math
import random
import statistics
from dataclasses import asdict

import pytest
from curves import lines_of, write_run
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import RunError
from train.figures import SPIKE_RATIOS, Curves, figures, reached, read_curves


@given(st.integers(0, 10**6), st.integers(1, 60), st.booleans())
def test_figures_are_those_of_a_plain_recomputation(tmp_path_factory, seed, steps, growing):
    lines = lines_of(random.Random(seed), steps, growing=growing)
    run = write_run(tmp_path_factory.mktemp("x") / "run", lines, run__seed=3, run__total_tokens=4000)
    found = figures(read_curves(run))
    done = lines[1:]
    assert (found.steps, found.tokens, found.seed) == (steps, done[-1]["tokens_seen"], 3)
    assert found.share == min(1, found.tokens / 4000)
    for bound in SPIKE_RATIOS:
        over = 0
        for i, line in enumerate(done):
            before = [other["loss"] for other in done[:i] if other["seqlen"] == line["seqlen"]]
            over += bool(before) and line["loss"] > bound * min(before) * (1 + 1e-12)
        assert found.spikes[f"{bound:g}"] == over
    assert found.loss_ratio_max == max(line["loss_ratio"] for line in done)
    overall = [line["loss"] / min(other["loss"] for other in done[: max(i, 1)]) for i, line in enumerate(done)]
    assert math.isclose(found.loss_ratio_overall_max, max(overall), rel_tol=1e-12)
    assert found.variance_max == max(line["variance_max"] for line in done)
    assert found.variance_l1_max == max(line["variance_l1"] for line in done)
    assert found.clipped == sum(line["clipped"] > 0 for line in done) / steps
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert (found.validation_loss, found.validation_loss_best) == (validations[-1], min(validations))
    ratios = [line["loss_ratio"] for line in done]
    for name in ("variance_l1", "variance_max"):
        r = getattr(found, f"ratio_with_{name}")
        if len(set(ratios)) > 1 and steps > 2:
            assert math.isclose(r.r, statistics.correlation(ratios, [line[name] for line in done]), abs_tol=1e-9)
            assert r.n == steps
        else:
            assert r is None


@given(st.integers(0, 10**6), st.floats(0.5, 1.1))
def test_a_target_is_reached_where_the_line_between_validations_crosses_it(seed, share):
    lines = lines_of(random.Random(seed), 60)
    validated = [line for line in lines if "validation_loss" in line]
    curves = Curves(None, lines[1:], validated, {})
    target = 7 * share
    first = next((line for line in validated if line["validation_loss"] <= target), None)
    for of in ("tokens_seen", "elapsed_s"):
        at = reached(curves, target, of)
        if first is None:
            assert at is None
            continue
        index = validated.index(first)
        if index == 0:
            assert at == first[of]
            continue
        before = validated[index - 1]
        assert before[of] <= at <= first[of]
        part = (at - before[of]) / (first[of] - before[of])
        on_line = before["validation_loss"] * (1 - part) + first["validation_loss"] * part
        assert math.isclose(on_line, target, rel_tol=1e-9)


def test_a_run_of_one_step_and_one_without_validation(tmp_path):
    one = figures(read_curves(write_run(tmp_path / "one", lines_of(random.Random(1), 1)[1:])))
    assert (one.steps, one.ratio_with_variance_max, one.seed, one.share) == (1, None, None, None)
    bare = [{k: v for k, v in line.items() if k != "validation_loss"} for line in lines_of(random.Random(1), 9)[1:]]
    none = figures(read_curves(write_run(tmp_path / "none", bare)))
    assert (none.validation_loss, none.validation_loss_best) == (None, None)
    assert reached(read_curves(tmp_path / "none"), 5.0) is None


def test_losses_that_are_not_finite_are_spikes_and_no_numbers(tmp_path):
    lines = lines_of(random.Random(1), 10)
    lines[4] |= {"loss": math.nan, "loss_ratio": math.nan, "loss_ratio_overall": math.nan, "variance_max": math.inf}
    lines[-1]["validation_loss"] = math.nan
    found = figures(read_curves(write_run(tmp_path / "run", lines)))
    sound = figures(Curves(None, [line for i, line in enumerate(lines) if i not in (0, 4)], [], {}))
    assert {bound: count - 1 for bound, count in found.spikes.items()} == sound.spikes
    assert (found.loss_ratio_max, found.variance_max) == (sound.loss_ratio_max, sound.variance_max)
    assert found.validation_loss is None
    json.dumps(asdict(found), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not a run"),
        ("", "no step yet"),
        ('{"step": 0, "tokens_seen": 0, "elapsed_s": 0, "validation_loss": 7.0}\n', "no step yet"),
        ("garbage\n", "no step yet"),
        ('{"step": 1}\n', r"not a line of metrics[\s\S]*metrics.jsonl:1[\s\S]*tokens_seen"),
        ("[3]\n", "not a line of metrics"),
        ('{"step": 1, "tokens_seen": 4, "elapsed_s": 1, "loss": "x"}\n', "not a line of metrics"),
        ('{"step": 1, "tokens_seen": 4, "elapsed_s": 1, "loss": 1.0}\n', "seqlen, loss_ratio, loss_ratio_overall, "),
    ],
)
def test_no_metrics_to_read_is_said(tmp_path, text, message):
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run/metrics.jsonl").write_text(text)
    with pytest.raises(RunError, match=message) as refused:
        read_curves(tmp_path / "run")
    assert "run" in str(refused.value)


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", lines_of(random.Random(1), 10))
    (run / "config.json").write_text("{")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-20])
    assert figures(read_curves(run)).steps == 9
