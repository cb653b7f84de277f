"""Memory of batches: never in use twice, and used again."""

import gc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from curriculum.memory import MOST_FREE, Pool

VIEWS = [
    lambda a: a,
    lambda a: a[1:],
    lambda a: a.reshape(-1)[::2],
    lambda a: memoryview(a.reshape(-1)),
    lambda a: a.T,
]


@given(
    least=st.integers(0, 40),
    steps=st.lists(st.tuples(st.integers(2, 9), st.sampled_from(VIEWS), st.integers(0, 4)), max_size=60),
)
def test_no_memory_is_given_out_while_a_view_of_it_is_alive(least, steps):
    make, held = Pool(least), {}
    for number, (rows, view, drop) in enumerate(steps):
        array = make((rows, 3))
        assert (
            array.shape == (rows, 3)
            and array.dtype == np.int64
            and array.flags.c_contiguous
            and array.flags.writeable
        )
        array[:] = number
        held[number] = view(array)
        del array
        assert all(np.all(np.asarray(kept) == known) for known, kept in held.items())
        held.pop(number - drop, None)


def test_memory_is_used_again_and_little_of_it_is_kept():
    make = Pool(100)
    first = make((4, 5))
    place = first.ctypes.data
    second = make((4, 5))
    assert second.ctypes.data != place
    del first
    assert make((3, 30)).ctypes.data == place
    many = [make((2, 2)) for _ in range(3 * MOST_FREE)]
    del many
    gc.collect()
    assert len(make._free) == MOST_FREE
