"""The golden order: digests of the first thousand batches. To change one is to change
the order of every run: raise `curriculum.loader.STATE_VERSION`, and CHANGELOG it."""

import hashlib
from itertools import islice

import numpy as np
import pytest

from curriculum.mixture import Mixture
from curriculum.order import Order
from curriculum.planner import plan_steps
from curriculum.schedule import Schedule
from curriculum.window import Lengths

LENGTHS = np.array([(i * 7919) % 300 + 1 for i in range(2000)])
SOURCES = {"a": LENGTHS, "b": (LENGTHS * LENGTHS) % 5000 + 1, "c": np.full(77, 64)}
SHARES = {"a": {"weight": 0.6, "max_epochs": 2}, "b": {"weight": 0.3}, "c": {"weight": 0.1, "max_epochs": 9}}


def digest_of(order):
    digest, count = hashlib.sha256(), 0
    for _, packed in islice(plan_steps(order), 1000):
        for part in (packed.document, packed.start, packed.length, packed.offsets):
            digest.update(part.astype("<i8").tobytes())
        count += 1
    return f"{count} {digest.hexdigest()[:16]}"


ORDERS = {
    "constant": lambda: Order.begin(
        Lengths(LENGTHS), Schedule.constant(seqlen=64, global_batch_sequences=16, epochs=4), seed=7
    ),
    "linear": lambda: Order.begin(
        Lengths(LENGTHS, shards=5),
        Schedule.linear(seqlen_start=8, seqlen_end=128, duration_steps=500, global_batch_sequences=8, epochs=3),
        seed=7,
    ),
    "tokens, in windows": lambda: Order.begin(
        Lengths(LENGTHS, shards=5),
        Schedule.staged(seqlens=[100, 7, 300], boundaries=[100, 400], global_batch_tokens=900, epochs=3),
        seed=8,
        window_tokens=20_000,
    ),
    "mixture": lambda: Order.begin(
        Lengths(SOURCES, shards=2),
        Schedule.linear(
            seqlen_start=8, seqlen_end=64, duration_steps=700, global_batch_sequences=10, total_tokens=420_000
        ),
        seed=9,
        mixture=Mixture.from_settings(SHARES),
        window_tokens=1 << 20,
    ),
    "changed twice": lambda: (
        Order.begin(Lengths(LENGTHS), Schedule.constant(seqlen=50, global_batch_sequences=6, epochs=2), seed=1)
        .changed_at(101, Schedule.constant(seqlen=20, global_batch_sequences=20, epochs=2))
        .changed_at(333, Schedule.constant(seqlen=111, global_batch_sequences=4, epochs=2))
    ),
}
GOLDEN = {
    "constant": "1000 3eba16a74743e8c8",
    "linear": "1000 4c5565ab217dff50",
    "tokens, in windows": "1000 32dd1341f4094af7",
    "mixture": "1000 6ea04d5e944945fe",
    "changed twice": "1000 ecf655ba87a35780",
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_is_the_same_on_every_machine(name):
    assert digest_of(ORDERS[name]()) == GOLDEN[name]
