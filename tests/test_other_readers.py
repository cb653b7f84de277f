"""A store's shards are plain Arrow: other libraries open them as they are and see the tokens that Store serves."""

import datasets
import numpy as np
import pyarrow as pa
import pytest
from stores import documents_of, write_store

from pipeline.reader import Store

LENGTHS = [5, 1, 9, 300, 2, 2, 17]
EXTRA = {"id": [f"book {i}" for i in range(7)], "source": ["en"] * 7}


@pytest.fixture(params=["plain", "id and source", "uint32"])
def store(tmp_path, request):
    """(Store, its one shard's file, columns expected)."""
    extra = EXTRA if request.param == "id and source" else {}
    vocab_size = 70_000 if request.param == "uint32" else 50
    write_store(tmp_path / "s", documents_of(LENGTHS, vocab_size), vocab_size=vocab_size, extra=extra)
    opened = Store.open(tmp_path / "s")
    return opened, str(tmp_path / "s" / opened.shards[0].file), {"row": list(range(7)), **extra}


def same(store, tokens, columns, expected):
    assert [list(row) for row in tokens] == [store.document(i).tolist() for i in range(store.documents)]
    assert {name: list(columns[name]) for name in expected} == expected


def test_datasets_from_file(store):
    rows = datasets.Dataset.from_file(store[1])
    same(store[0], rows["tokens"][:], rows[:], store[2])
    assert rows.features["tokens"].feature.dtype == store[0].manifest.token_dtype


def test_load_dataset_arrow(store, tmp_path, capfd):
    rows = datasets.load_dataset("arrow", data_files=[store[1]], split="train", cache_dir=str(tmp_path / "cache"))
    same(store[0], rows["tokens"][:], rows[:], store[2])


def test_polars(store):
    polars = pytest.importorskip("polars")
    rows = polars.read_ipc_stream(store[1])
    same(store[0], rows["tokens"].to_list(), rows, store[2])
    assert rows.select(polars.col("tokens").list.len().sum()).item() == sum(LENGTHS)


def test_duckdb(store):
    duckdb = pytest.importorskip("duckdb")
    with pa.memory_map(store[1]) as source, duckdb.connect() as connection:
        connection.register("shard", pa.ipc.open_stream(source).read_all())
        names = ["tokens", *store[2]]
        rows = connection.execute(f"select {', '.join(names)} from shard order by row").fetchall()
        longest = connection.execute("select row, len(tokens) from shard order by len(tokens) desc").fetchall()[0]
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    same(store[0], columns["tokens"], columns, store[2])
    assert longest == (3, 300)


def test_pyarrow_without_a_copy(store):
    with pa.memory_map(store[1]) as source:
        table = pa.ipc.open_stream(source).read_all()
        same(store[0], table["tokens"].to_pylist(), table.to_pydict(), store[2])
        values = table["tokens"].chunk(0).values.to_numpy(zero_copy_only=True)
        assert values.dtype == np.dtype(store[0].manifest.token_dtype)
