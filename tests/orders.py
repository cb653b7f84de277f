"""Random corpora, schedules and orders for properties of dealing; and what a list of batches served."""

import numpy as np
from hypothesis import strategies as st

from curriculum.order import Order
from curriculum.planner import plan_steps
from curriculum.schedule import Schedule
from curriculum.window import Lengths

CORPORA = st.one_of(
    st.lists(st.integers(1, 400), min_size=1, max_size=40),
    st.lists(st.integers(1, 5), min_size=1, max_size=60),
    st.builds(lambda length, count: [length] * count, st.integers(1, 300), st.integers(1, 30)),
    st.builds(
        lambda giant, rest: [*rest, giant], st.integers(2000, 200_000), st.lists(st.integers(1, 90), max_size=9)
    ),
)
"""Mixed; all shorter than any sequence; all equal; one giant of up to 200,000 tokens."""


@st.composite
def schedules(draw, tokens, steps=200):
    """Growing, shrinking or cyclic, in sequences or tokens a batch; of some `steps` steps over `tokens` tokens."""
    size = max(-(-draw(st.integers(1, 3)) * tokens // steps), 1)  # of a batch, about
    shortest = draw(st.integers(6, 12)) if size < 2000 else 8 * draw(st.integers(1, 16))
    sequences = max(size // (4 * shortest), 1) + draw(st.integers(0, 3))
    lengths = draw(st.lists(st.integers(shortest, 10 * shortest), min_size=1, max_size=5))
    ends = (
        {"total_tokens": draw(st.integers(1, 2 * tokens)), "max_epochs": 2} if draw(st.booleans()) else {"epochs": 2}
    )
    ends["first_piece"] = draw(st.sampled_from(["random", "beginning"]))
    kind = draw(st.sampled_from(["grow", "shrink", "cycle", "tokens"]))
    if kind in ("grow", "shrink"):
        low, high = min(lengths), max(lengths)
        return Schedule.linear(
            seqlen_start=low if kind == "grow" else high,
            seqlen_end=high if kind == "grow" else low,
            duration_steps=draw(st.integers(0, 40)),
            seqlen_multiple=1,
            global_batch_sequences=sequences,
            **ends,
        )
    every = draw(st.integers(1, 7))
    cycle = (lengths * 10)[:10]
    batch = (
        {"global_batch_sequences": sequences}
        if kind == "cycle"
        else {"global_batch_tokens": 4 * max(size, 12 * shortest)}
    )
    return Schedule.staged(seqlens=cycle, boundaries=[every * i for i in range(1, 10)], **batch, **ends)


@st.composite
def orders(draw, steps=200):
    """An order over a random corpus of one source, in windows of random size."""
    lengths = np.array(draw(CORPORA))
    tokens = int(lengths.sum())
    corpus = Lengths(lengths, shards=draw(st.integers(1, 4)))
    window_tokens = draw(st.sampled_from([1 << 26, max(tokens // 2, 1), max(tokens // 7, 1), max(tokens // 90, 1)]))
    schedule = draw(schedules(tokens, steps))
    return Order.begin(corpus, schedule, seed=draw(st.integers(0, 2**40)), window_tokens=window_tokens)


def lengths_of(corpus):
    return np.concatenate(list(corpus.shard_lengths(range(len(corpus.shards)))))


def planned(order, first=0):
    return [packed for _, packed in plan_steps(order, first)]


def columns(batches):
    """(document, start, length) of all pieces in the order they are served."""
    parts = [[getattr(batch, name) for batch in batches] for name in ("document", "start", "length")]
    return tuple(np.concatenate([np.empty(0, dtype=np.int64), *part]) for part in parts)


def times_served(lengths, document, start, length):
    """int64 [tokens of all documents]: how often each token was served."""
    begins = np.cumsum(lengths) - lengths
    assert (start >= 0).all() and (length > 0).all() and (start + length <= lengths[document]).all()
    steps = np.zeros(int(lengths.sum()) + 1, dtype=np.int64)
    np.add.at(steps, begins[document] + start, 1)
    np.add.at(steps, begins[document] + start + length, -1)
    return np.cumsum(steps)[:-1]


def same(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("document", "start", "length", "offsets")
    )
