"""A generator run ahead in a thread yields the same, fails the same, and ends when nobody wants more."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ahead import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ahead"]


@given(items=st.lists(st.integers()), depth=st.integers(1, 5), stages=st.integers(1, 3))
def test_order_and_items_are_kept_through_any_number_of_stages(items, depth, stages):
    source = (item for item in items)
    for _ in range(stages):
        source = ahead(source, depth)
    assert list(source) == items
    assert not threads()


@given(count=st.integers(0, 6), depth=st.integers(1, 3))
def test_an_error_comes_after_the_items_before_it(count, depth):
    def source():
        yield from range(count)
        raise ValueError("here")

    got = []
    with pytest.raises(ValueError, match="here"):
        for item in ahead(source(), depth):
            got.append(item)
    assert got == list(range(count))
    assert not threads()


def test_it_is_not_further_ahead_than_asked_and_closing_closes_the_source():
    made, closed = [], []

    def source():
        try:
            for item in range(1000):
                made.append(item)
                yield item
        finally:
            closed.append(threading.current_thread().name)

    stage = ahead(source(), 3)
    assert next(stage) == 0
    stage.close()
    assert len(made) <= 6
    assert closed == ["ahead"]
    assert not threads()


@given(weights=st.lists(st.integers(0, 9), max_size=30), most=st.integers(1, 12))
def test_what_waits_weighs_no_more_than_asked_or_is_one_item(weights, most):
    made = []

    def source():
        for at, weight in enumerate(weights):
            made.append(weight)
            yield at

    got = 0
    for at in ahead(source(), most, weights.__getitem__):
        assert at == got
        got += 1
        waiting = made[at:-1]  # the last may be held back
        assert sum(waiting) <= most or sum(waiting) == max(waiting)
    assert got == len(weights)
    assert not threads()
