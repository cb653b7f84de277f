"""The progress line: every part, what fits, and a time left that follows tokens."""

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curriculum.schedule import Schedule
from train.report import RECENT_S, Report, TimeLeft, detail, duration, quantity

LINE = {"step": 1200, "seqlen": 256, "tokens_seen": 4_560_000, "loss": 3.2149, "loss_ratio": 1.018}
LINE |= {"tokens_per_s": 123_456.0, "mfu": 0.412}


def test_all_parts_are_there_where_there_is_room():
    expected = (
        "1,200/40,000  seqlen 256  4.56M tokens  loss 3.215  ratio 1.02  val 3.300  123k/s  MFU 41 %  2h05m left"
    )
    assert detail(LINE, 40_000, 3.3, 7500.0) == expected
    unknown = {key: value for key, value in LINE.items() if key != "mfu"}
    assert detail(unknown, 40_000, None, None) == expected.replace("  val 3.300", "").replace(
        "  MFU 41 %  2h05m left", ""
    )


@given(st.integers(45, 200))
def test_a_narrow_terminal_loses_what_matters_least(width):
    shown = detail(LINE, 40_000, 3.3, 7500.0, width)
    assert len(shown) <= width
    assert shown.startswith("1,200/40,000")
    assert "loss 3.215" in shown
    assert shown.endswith("2h05m left")


def test_time_left_is_that_of_the_remaining_tokens_at_the_recent_rate():
    now = 0.0
    left = TimeLeft(lambda: now)
    assert left.update(1000, 100_000) is None
    now = 10.0
    assert left.update(2000, 100_000) == pytest.approx(980)
    for _ in range(40):  # ten times as fast from here on: after the window nothing else counts
        now += 10
        found = left.update(2000 + int(now - 10) * 1000, 1_000_000)
    assert found == pytest.approx((1_000_000 - 402_000) / 1000)
    assert now - 10 > RECENT_S
    assert left.update(1_000_001, 1_000_000) == 0


def test_a_run_whose_last_step_goes_beyond_total_tokens_ends_at_100_percent():
    schedule = Schedule.constant(seqlen=100, global_batch_sequences=10, total_tokens=2100)
    report = Report(mock.Mock(), 0, silent=True)
    report._progress = mock.Mock(width=100)
    for tokens in (1000, 2000, 3000):
        report.show({**LINE, "tokens_seen": tokens}, schedule, None)
    assert [call.args[0] for call in report._progress.update.call_args_list] == [1000 / 3000, 2000 / 3000, 1.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (60, "1m00s"), (3599.6, "1h00m"), (7500, "2h05m"), (360_000, "4d04h")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (4.56e6, "4.56M"),
        (1.57e11, "157B"),
        (3e12, "3000B"),
    ],
)
def test_quantities_have_three_digits(number, text):
    assert quantity(number) == text
