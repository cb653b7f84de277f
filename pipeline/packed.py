"""A whole store packed once at a fixed length, as a Hugging Face dataset, for trainers that want a static set.

A row is a sequence: `input_ids`, `labels` (already shifted: the target of each position), `position_ids` (from 0 in
each piece of a document) and `seq_lengths` (tokens of the pieces, as TRL calls it; they add up to the row's length).
Rows are in a seeded random order, but the one that is not full comes last; its padding, a piece of its own, is the
only place with labels of -100. Price: 12 bytes a token on disk; in memory the packing, 24 bytes a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError, StoreError
from pipeline.huggingface import STATE_NAME, int32_lists, write_dataset
from pipeline.packing import NO_TARGET, Packed, pack
from pipeline.reader import Store
from pipeline.staging import new_folder

BYTES_PER_TOKEN = 12
CHUNK_TOKENS = 1 << 20


def write_packed(
    store: Store,
    out: Path,
    *,
    seqlen: int,
    seed: int = 0,
    file_bytes: int = 500 << 20,
    force: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Packed:
    """Pack all documents of `store` into rows of `seqlen` and write them to the folder `out`; returns the packing.

    The rows and their order depend on (store, seqlen, seed) alone. Raises ConfigError for a seqlen or `file_bytes`
    under 1, StoreError where `out` is in the way or the store is damaged.
    """
    if file_bytes < 1:
        raise ConfigError("a file needs room", found=f"--file-bytes {file_bytes}", allowed="1 or more")
    if not store.documents:
        raise StoreError("nothing to pack: the split has no document", where=f"{store.path} ({store.split})")
    packed = pack(store.lengths, seqlen)
    order = shuffled_rows(packed, seqlen, seed)
    rows_of_file = max(file_bytes // (BYTES_PER_TOKEN * seqlen), 1)
    rows_of_chunk = max(CHUNK_TOKENS // seqlen, 1)
    files = range(0, len(order), rows_of_file)
    fixed = pa.list_(pa.int32(), seqlen)
    names = ("input_ids", "labels", "position_ids")
    schema = pa.schema([*((name, fixed) for name in names), ("seq_lengths", pa.list_(pa.int32()))])

    def batches(first: int) -> Iterator[list[Any]]:
        last = min(first + rows_of_file, len(order))
        for at in range(first, last, rows_of_chunk):
            chosen = order[at : min(at + rows_of_chunk, last)]
            *arrays, spans, counts = rows_as_arrays(store, packed, chosen, seqlen)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(array.astype(np.int32)), seqlen) for array in arrays
            ]
            yield [*columns, int32_lists(spans, counts)]
            progress(at + len(chosen))

    with new_folder(out, marker=STATE_NAME, force=force) as folder:
        write_dataset(folder, schema, store.split, (batches(first) for first in files), len(files))
    return packed


def shuffled_rows(packed: Packed, seqlen: int, seed: int) -> np.ndarray:
    """int64 [sequences]: the full rows ordered by a hash of (seed, row), the one that is not full last."""
    full = packed.sequences - (packed.padding(seqlen) > 0)
    with np.errstate(over="ignore"):
        keys = _mix(np.arange(full, dtype=np.uint64) + _mix(np.array([seed], dtype=np.int64).astype(np.uint64)))
    return np.append(np.argsort(keys, kind="stable"), np.arange(full, packed.sequences))


def rows_as_arrays(store: Store, packed: Packed, rows: np.ndarray, seqlen: int) -> tuple[np.ndarray, ...]:
    """The sequences `rows` of `packed` as five int64 arrays.

    They are input_ids, labels and position_ids, [rows * seqlen]; tokens of each span; spans of each row.
    Only the last of `rows` may be short; what it lacks is a span of end-of-document tokens without targets.
    """
    counts = packed.offsets[rows + 1] - packed.offsets[rows]
    pieces = np.repeat(packed.offsets[rows] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    length = packed.length[pieces]
    filled, size = int(length.sum()), len(rows) * seqlen
    inputs, labels = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    store.gather(packed.document[pieces], packed.start[pieces], length, inputs[:filled], labels[:filled])
    inputs[filled:], labels[filled:] = store.manifest.eod_id, NO_TARGET
    if filled < size:
        length = np.append(length, size - filled)
        counts[-1] += 1
    ends = np.cumsum(length)
    return inputs, labels, np.arange(size) - np.repeat(ends - length, length), length, counts


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014), uint64: the same whatever numpy's generators become."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
