"""Megatron's indexed datasets: any index is read as its documents, an unsound one is refused, Megatron reads ours."""

import itertools
import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import documents_of, write_store

from pipeline import megatron
from pipeline.errors import CorpusError
from pipeline.interop import export_megatron
from pipeline.megatron import DTYPES, HEADER, MAGIC, IndexedDataset
from pipeline.reader import Store


def write_megatron(prefix, sequences, code=8, documents=None, order=None):
    """By hand: .bin with the sequences in `order`, documents as numbers of sequences."""
    dtype = DTYPES[code]
    order = range(len(sequences)) if order is None else order
    at, pointers, data = 0, [0] * len(sequences), b""
    for i in order:
        pointers[i] = at
        data += np.array(sequences[i]).astype(dtype).tobytes()
        at = len(data)
    index = np.cumsum([0, *(documents if documents is not None else [1] * len(sequences))])
    parts = [("<i4", [len(s) for s in sequences]), ("<i8", pointers), ("<i8", index)]
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    prefix.with_name(prefix.name + ".idx").write_bytes(
        HEADER.pack(MAGIC, 1, code, len(sequences), len(index))
        + b"".join(np.array(values, dtype=kind).tobytes() for kind, values in parts)
    )
    return prefix


@settings(max_examples=20)
@given(
    data=st.data(),
    code=st.sampled_from(sorted(DTYPES)),
    sequences=st.lists(st.lists(st.integers(0, 49), max_size=9), min_size=1, max_size=12),
    most=st.integers(1, 30),
    block=st.integers(1, 5),
)
def test_documents_of_any_index_are_its_sequences_put_together(tmp_path_factory, data, code, sequences, most, block):
    cuts = data.draw(st.lists(st.integers(0, len(sequences)), max_size=4))
    documents = np.diff([0, *sorted(cuts), len(sequences)]).tolist()
    order = data.draw(st.permutations(range(len(sequences))))
    prefix = write_megatron(tmp_path_factory.mktemp("m") / "x_document", sequences, code, documents, order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron, "BLOCK", block)
        batches = list(IndexedDataset(prefix).batches(most))
    flat = [token for batch in batches for token in batch.tokens.tolist()]
    assert flat == [token for sequence in sequences for token in sequence]
    ends = np.cumsum([0, *documents])
    lengths = [sum(map(len, sequences[a:b])) for a, b in itertools.pairwise(ends)]
    assert [n for batch in batches for n in batch.lengths.tolist()] == lengths
    assert all(batch.lengths.sum() <= most or len(batch.lengths) == 1 for batch in batches)


@pytest.mark.parametrize(
    ("at", "data", "said"),
    [
        (0, b"NOINDEX", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x09", "dtype code 9"),
        (18, struct.pack("<Q", 4), "size"),
        (34, struct.pack("<i", 100), "sequence 0 is outside"),
        (34, struct.pack("<i", -1), "sequence 0 is outside"),
        (34 + 12 + 16, struct.pack("<q", 1 << 40), "sequence 2 is outside"),
        (34 + 36 + 24, struct.pack("<q", 2), "do not cover"),
    ],
)
def test_an_unsound_index_is_refused_before_a_token_is_read(tmp_path, at, data, said):
    prefix = write_megatron(tmp_path / "x", [[1, 2, 3], [4], [5]])
    path = tmp_path / "x.idx"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    with pytest.raises(CorpusError, match=rf"{said}[\s\S]*to do: .*copy"):
        IndexedDataset(prefix)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(CorpusError, match="half of an indexed dataset"):
        IndexedDataset(prefix)


MEGATRON = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
for data in map(IndexedDataset, sys.argv[1:]):
    documents = [data[i].tolist() for i in range(len(data))]
    print(json.dumps([data.index.dtype.__name__, data.document_indices.tolist(), documents]))
"""


def test_megatrons_own_reader_reads_the_same_documents(tmp_path):
    pytest.importorskip("megatron.core.package_info", reason="megatron-core is not installed")
    expected = []
    for dtype, vocab_size in (("uint16", 50), ("int32", 70_000)):
        documents = documents_of([5, 1, 9, 300, 2], vocab_size)
        write_store(tmp_path / dtype, documents, shards=2, vocab_size=vocab_size)
        export_megatron(Store.open(tmp_path / dtype), tmp_path / f"{dtype}_document", progress=lambda tokens: None)
        expected.append([dtype, [0, 1, 2, 3, 4, 5], [d.tolist() for d in documents]])
    # In a process of its own: importing it warns of the GPU libraries that are not there.
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEGATRON,
        *(str(tmp_path / f"{e[0]}_document") for e in expected),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()[-2:]] == expected
