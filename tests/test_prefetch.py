"""Jobs done ahead by several threads: their results in order, no more than asked for, errors in their place."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curriculum.prefetch import Prefetch


def job(item, seconds=0.0):
    def run():
        time.sleep(seconds)
        if isinstance(item, Exception):
            raise item
        return item

    return run


@settings(max_examples=30, deadline=None)
@given(
    milliseconds=st.lists(st.integers(0, 3), max_size=12),
    failing=st.none() | st.integers(0, 11),
    ahead=st.integers(1, 3),
    threads=st.integers(1, 3),
)
def test_results_come_in_order_and_an_error_after_those_before_it(milliseconds, failing, ahead, threads):
    items = list(range(len(milliseconds)))
    error = ValueError("here")
    jobs = [job(error if item == failing else item, ms / 1000) for item, ms in zip(items, milliseconds, strict=True)]
    made, got = Prefetch(iter(jobs), ahead, threads), []
    fails = failing in items
    for _ in range(2):  # the end is the end, however often one asks
        with pytest.raises(ValueError if fails else StopIteration):
            while True:
                got.append(next(made))
    assert got == items[:failing] if fails else got == items
    made.close()


def test_an_error_of_the_jobs_comes_after_the_items_before_it():
    def jobs():
        yield job(1, 0.01)
        raise ValueError("no more jobs")

    made = Prefetch(jobs(), 2, 2)
    assert next(made) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="no more jobs"):
            next(made)
    made.close()


def test_two_threads_make_two_items_at_a_time():
    both = threading.Barrier(2)
    made = Prefetch((lambda: both.wait(10) < 2 for _ in range(6)), 1, 2)
    assert list(made) == [True] * 6
    made.close()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_no_more_is_asked_for_than_may_wait_and_closing_ends_it_all(threads):
    before, asked = threading.active_count(), []

    def jobs():
        for item in range(1000):
            asked.append(item)
            yield job(item)

    made = Prefetch(jobs(), 3, threads)
    for taken in range(1, 20):
        assert next(made) == taken - 1
        assert len(asked) <= taken + 4
    end = time.monotonic() + 10
    while len(asked) < taken + 4 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.02)
    made.close()
    assert len(asked) == taken + 4
    assert threading.active_count() == before
