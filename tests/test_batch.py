"""Rows to arrays: equal to a slow and obvious twin, in whatever memory they are asked to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import documents_of, write_store

from curriculum.batch import make_batches
from pipeline.errors import ConfigError
from pipeline.packing import NO_TARGET, Packed
from pipeline.reader import Store

BOS, EOD = 49, 48
LENGTHS = [1, 40, 3, 77, 5, 2, 64, 9]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of(LENGTHS), shards=3, bos_id=BOS, eod_id=EOD)
    return Store.open(path)


@st.composite
def runs(draw):
    """(rows of some batches, seqlen, sequences): all full, but the last may end early."""
    seqlen, sequences, batches = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows, missing = [], draw(st.integers(0, seqlen * sequences))
    for batch in range(batches):
        left = seqlen * sequences - (missing if batch == batches - 1 else 0)
        pieces, offsets = [], [0]
        while left:
            document = draw(st.integers(0, len(LENGTHS) - 1))
            start = draw(st.integers(0, LENGTHS[document] - 1))
            room = min(LENGTHS[document] - start, left, seqlen - (seqlen * sequences - left) % seqlen)
            if batch == batches - 1 and missing:
                room = min(room, seqlen - (sum(n for _, _, n in pieces) % seqlen))
            pieces.append((document, start, draw(st.integers(1, room))))
            left -= pieces[-1][2]
            if left == 0 or sum(n for _, _, n in pieces) % seqlen == 0:
                offsets.append(len(pieces))
        rows.append(Packed(*np.array(pieces, dtype=np.int64).reshape(-1, 3).T.copy(), np.array(offsets)))
    return rows, seqlen, sequences


def slow_batch(store, packed, seqlen, sequences):
    """input_ids, labels, position_ids, cu_seqlens by walking over positions."""
    inputs, labels, positions, cu_seqlens = [], [], [], [0]
    for d, s, n in zip(packed.document, packed.start, packed.length, strict=True):
        tokens = [BOS, *store.document(d).tolist()]
        inputs += tokens[s : s + n]
        labels += tokens[s + 1 : s + 1 + n]
        positions += range(n)
        cu_seqlens.append(len(labels))
    while len(labels) < seqlen * sequences:
        row_left = seqlen - len(labels) % seqlen
        inputs += [EOD] * row_left
        labels += [NO_TARGET] * row_left
        positions += range(row_left)
        cu_seqlens.append(len(labels))
    return [np.reshape(flat, (sequences, seqlen)).tolist() for flat in (inputs, labels, positions)] + [cu_seqlens]


@settings(max_examples=150)
@given(run=runs(), dtype=st.sampled_from([np.int32, np.int64]))
def test_batches_equal_their_slow_twin(store, run, dtype):
    rows, seqlen, sequences = run
    batches = make_batches(
        store,
        rows,
        seqlen=seqlen,
        sequences=sequences,
        first_step=7,
        targets=list(range(len(rows))),
        allocate=lambda shape: np.full(shape, -5, dtype=dtype),
    )
    for number, (batch, packed) in enumerate(zip(batches, rows, strict=True)):
        found = [batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens]
        assert [array.tolist() for array in found] == slow_batch(store, packed, seqlen, sequences)
        assert [array.dtype for array in found] == [dtype, dtype, dtype, np.int32]
        assert batch.max_seqlen == np.diff(batch.cu_seqlens).max()
        assert (batch.step, batch.seqlen, batch.targets, batch.pieces) == (7 + number, seqlen, number, packed)
        assert all(array.flags.c_contiguous for array in found)


def test_a_batch_is_in_the_memory_its_user_gave_and_otherwise_in_its_own(store):
    rows = [Packed(np.array([1]), np.array([first]), np.array([8]), np.array([0, 1])) for first in (0, 8)]
    shape = {"seqlen": 8, "sequences": 1, "first_step": 0, "targets": [8, 8]}
    memory = np.zeros(2 * 3 * 8, dtype=np.int64)
    for batch in make_batches(store, rows, **shape, allocate=memory.reshape):
        assert np.shares_memory(batch.input_ids, memory) and np.shares_memory(batch.labels, memory)
    first, second = (make_batches(store, rows, **shape) for _ in range(2))
    assert not any(np.shares_memory(a.labels, b.labels) for a in first for b in second)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda shape: np.empty(shape, dtype=np.uint16),
        lambda shape: np.empty(shape[1:], dtype=np.int64),
        lambda shape: np.empty(shape[::-1], dtype=np.int64).T,
        lambda shape: torch.empty(shape, dtype=torch.int64),
        lambda shape: None,
    ],
)
def test_memory_of_another_kind_is_refused(store, allocate):
    rows = [Packed(np.array([1]), np.array([0]), np.array([8]), np.array([0, 1]))]
    with pytest.raises(ConfigError, match="int64 or int32"):
        make_batches(store, rows, seqlen=4, sequences=2, first_step=0, targets=[8], allocate=allocate)
