"""Import and export: whatever the format, the same tokens come back, each document ending once."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import tiny_tokenizer
from stores import EOD, documents_of, write_store
from test_cli import call
from test_megatron import write_megatron

from pipeline.cli import main as prep
from pipeline.errors import ConfigError, CorpusError, SlwError, StoreError
from pipeline.held_out import are_held_out
from pipeline.interop import ImportOptions, export_huggingface, export_megatron, import_tokens
from pipeline.megatron import IndexedDataset
from pipeline.reader import Store
from pipeline.verify import verify

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tiny_tokenizer().save(str(path))
    return path


def stored(path, split="train"):
    store = Store.open(path, split)
    return [store.document(i).tolist() for i in range(store.documents)]


def bring(tokenizer, out, *inputs, **more):
    return import_tokens(ImportOptions(inputs=tuple(map(str, inputs)), tokenizer=tokenizer, out=out, **more))


def nothing(tokens):
    pass


@settings(max_examples=15)
@given(lengths=LENGTHS, shards=st.integers(1, 3), eod=st.booleans(), form=st.sampled_from(["megatron", "hf"]))
def test_a_store_exported_and_imported_has_the_same_tokens(tokenizer, tmp_path_factory, lengths, shards, eod, form):
    folder = tmp_path_factory.mktemp("round")
    documents = documents_of([n + 1 for n in lengths])  # one more: without its end a document is not empty
    write_store(folder / "a", documents, shards=shards, tokenizer=tokenizer.read_bytes())
    export = {"megatron": export_megatron, "hf": export_huggingface}[form]
    counted = export(Store.open(folder / "a"), folder / "out", eod=eod, progress=nothing)
    assert counted == (len(documents), sum(lengths) + eod * len(lengths))
    result = bring(tokenizer, folder / "b", folder / "out", unit_bytes=64)
    assert stored(folder / "b") == [d.tolist() for d in documents]
    assert result.added == (0 if eod else len(documents))
    assert verify(folder / "b") == []


def test_a_document_ends_once_and_an_empty_one_is_left_out(tokenizer, tmp_path):
    prefix = write_megatron(tmp_path / "x", [[5, 6, EOD], [], [7], [EOD], [8, EOD, EOD]])
    result = bring(tokenizer, tmp_path / "store", f"{prefix}.bin")
    assert stored(tmp_path / "store") == [[5, 6, EOD], [7, EOD], [EOD], [8, EOD, EOD]]
    assert (result.added, result.empty) == (1, 1)
    rows = Store.open(tmp_path / "store").columns(0).column("row").to_pylist()
    assert rows == [0, 2, 3, 4]


def as_dataset(folder, kind, rows, column="input_ids"):
    plain = datasets.Dataset.from_dict({"n": range(len(rows)), column: rows})
    if kind == "saved":
        plain.save_to_disk(folder, num_shards=3)
    elif kind == "parquet":
        folder.mkdir()
        pq.write_table(
            pa.table({column: pa.array(rows, pa.list_(pa.uint16()))}), folder / "a.parquet", row_group_size=2
        )
    elif kind == "arrow file":
        folder.mkdir()
        table = pa.table({column: pa.array(rows, pa.large_list(pa.int64()))})
        with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    return folder


@pytest.mark.parametrize("kind", ["saved", "parquet", "arrow file"])
@pytest.mark.parametrize("unit_bytes", [8, 1 << 20])
def test_a_token_column_comes_in_from_every_kind_of_dataset(tokenizer, tmp_path, capfd, kind, unit_bytes):
    rows = [d.tolist() for d in documents_of([5, 1, 9, 30, 2, 2, 17])]
    folder = as_dataset(tmp_path / "data", kind, rows, "ids")
    result = bring(tokenizer, tmp_path / "store", folder, token_column="ids", unit_bytes=unit_bytes)
    assert stored(tmp_path / "store") == rows
    assert len(result.manifest.shards) == (1 if unit_bytes > 8 else 5)


def test_copies_are_held_out_together_whatever_format_they_come_in(tokenizer, tmp_path):
    documents = [d.tolist() for d in documents_of([9] * 60)] * 2
    write_megatron(tmp_path / "x", documents, code=5)
    as_dataset(tmp_path / "y", "parquet", [d[:-1] for d in documents])
    for name in "xy":
        bring(tokenizer, tmp_path / f"store-{name}", tmp_path / name, validation_fraction=0.3, unit_bytes=200)
    train, held = ([stored(tmp_path / f"store-{name}", split) for name in "xy"] for split in ("train", "validation"))
    assert train[0] == train[1] and held[0] == held[1]
    assert 15 < len(held[0]) < 60
    assert not {tuple(d) for d in train[0]} & {tuple(d) for d in held[0]}
    tokens = np.concatenate(documents)
    chosen = are_held_out(tokens, np.array([9] * 120), 0.3)
    assert [d for d, held in zip(documents, chosen, strict=True) if held] == held[0]


@pytest.mark.parametrize(("code", "bad"), [(8, 50), (5, -1), (6, 3.5), (7, np.nan), (6, 2**33)])
def test_an_id_outside_the_vocabulary_names_document_and_position(tokenizer, tmp_path, code, bad):
    write_megatron(tmp_path / "x", [[1, 2, 3], [4], [5, 6, bad, 49]], code)
    with pytest.raises(CorpusError, match=r"document 2, position 2"):
        bring(tokenizer, tmp_path / "store", tmp_path / "x", unit_bytes=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_odd_columns_are_named(tokenizer, tmp_path, capfd):
    table = {
        "words": pa.array([["a"], ["b"]]),
        "holes": pa.array([[1, 2], [3, None]]),
        "gone": pa.array([[1], None]),
        "fixed": pa.array([[1, 2], [3, 0]], pa.list_(pa.int8(), 2)),
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    for column, said in [
        ("words", "not a column of token ids"),
        ("holes", "document 1"),
        ("gone", "document 1"),
        ("none", "columns words, holes, gone, fixed"),
    ]:
        with pytest.raises(CorpusError, match=said):
            bring(tokenizer, tmp_path / "store", tmp_path / "x.parquet", token_column=column)
    bring(tokenizer, tmp_path / "store", tmp_path / "x.parquet", token_column="fixed")
    assert stored(tmp_path / "store") == [[1, 2, 0], [3, 0]]
    part = datasets.Dataset.from_dict({"input_ids": [[1]]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "dict")
    with pytest.raises(CorpusError, match="several splits"):
        bring(tokenizer, tmp_path / "other", tmp_path / "dict")
    (tmp_path / "empty").mkdir()
    for nothing_there in ("nowhere", "empty"):
        with pytest.raises(CorpusError, match=r"no input file[\s\S]*PREFIX\.idx") as refused:
            bring(tokenizer, tmp_path / "other", tmp_path / nothing_there)
        assert ".jsonl" not in str(refused.value)
        assert "--suffix" not in str(refused.value), "an option of build"
    (tmp_path / "x.txt").write_text("words")
    with pytest.raises(CorpusError, match="not tokenised data"):
        bring(tokenizer, tmp_path / "other", tmp_path / "x.txt")
    (tmp_path / "y.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-40])
    with pytest.raises(CorpusError, match="readable"):
        bring(tokenizer, tmp_path / "other", tmp_path / "y.parquet")


def test_nothing_is_replaced_unasked_and_nothing_else_even_then(tokenizer, tmp_path, capfd):
    source = Store.open(write_once(tmp_path / "a", tokenizer))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    for _ in range(2):
        export_huggingface(source, tmp_path / "hf", progress=nothing, force=True)
        export_megatron(source, tmp_path / "m", progress=nothing, force=True)
        bring(tokenizer, tmp_path / "b", tmp_path / "m", force=True)
    with pytest.raises(StoreError, match="--force"):
        export_huggingface(source, tmp_path / "hf", progress=nothing)
    with pytest.raises(StoreError, match="--force"):
        export_megatron(source, tmp_path / "m", progress=nothing)
    with pytest.raises(StoreError, match="--force"):
        bring(tokenizer, tmp_path / "b", tmp_path / "m")
    for replace in (False, True):
        with pytest.raises(StoreError):
            export_huggingface(source, tmp_path / "mine", progress=nothing, force=replace)
        with pytest.raises(StoreError):
            bring(tokenizer, tmp_path / "mine", tmp_path / "m", force=replace)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "words"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "hf", "m.bin", "m.idx", "mine"]


def write_once(path, tokenizer):
    write_store(path, documents_of([5, 9, 2]), shards=2, tokenizer=tokenizer.read_bytes())
    return path


def test_a_failed_export_leaves_what_was_there(tokenizer, tmp_path, capfd):
    export_huggingface(Store.open(write_once(tmp_path / "a", tokenizer)), tmp_path / "hf", progress=nothing)
    shard = tmp_path / "a" / "shards" / "00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    (tmp_path / "a" / ".verified").unlink()
    with pytest.raises(StoreError, match="digest"):
        export_huggingface(Store.open(tmp_path / "a"), tmp_path / "hf", progress=nothing, force=True)
    assert len(datasets.load_from_disk(tmp_path / "hf")) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "hf"]


def test_sources_keep_their_names_in_and_out(tokenizer, tmp_path):
    write_megatron(tmp_path / "en", [[1, 2, 0], [3, 0]])
    write_megatron(tmp_path / "code", [[4, 0]])
    call(
        prep,
        "import",
        *("--source", f"en={tmp_path / 'en'}", "--source", f"code={tmp_path / 'code'}"),
        *("--tokenizer", tokenizer, "--out", tmp_path / "store"),
    )
    assert Store.open(tmp_path / "store").sources == {"en": range(2), "code": range(2, 3)}
    arguments = ("export", tmp_path / "store", "--format", "megatron", "--out", tmp_path / "out")
    assert json.loads(call(prep, *arguments, "--source", "code", "--no-eod", "--json").stdout)["tokens"] == 1
    assert [b.tokens.tolist() for b in IndexedDataset(tmp_path / "out").batches()] == [[4]]
    assert "sources 'en', 'code'" in call(prep, *arguments, "--source", "de", "--force", status=2).stderr
    assert (
        "nothing to read" in call(prep, "import", "--tokenizer", tokenizer, "--out", tmp_path / "x", status=2).stderr
    )
    assert (
        "NAME=PATH"
        in call(prep, "import", "--source", "x", "--tokenizer", tokenizer, "--out", tmp_path / "x", status=2).stderr
    )


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int64()])
def test_ids_come_along(tokenizer, tmp_path, kind):
    rows, names = [[1, 0], [], [2], [3, 4]], pa.array(["10", "11", "12", "13"]).cast(kind)
    pq.write_table(pa.table({"input_ids": rows, "name": names}), tmp_path / "x.parquet")
    bring(tokenizer, tmp_path / "a", tmp_path / "x.parquet", id_column="name", validation_fraction=0.5, unit_bytes=2)
    found = {}
    for split in ("train", "validation"):
        export_huggingface(Store.open(tmp_path / "a", split), tmp_path / split, progress=nothing)
        opened = datasets.load_from_disk(tmp_path / split)
        found |= dict(zip(opened["id"][:], opened["input_ids"][:], strict=True))
    assert found == {"10": [1, 0], "12": [2, 0], "13": [3, 4, 0]}
    assert verify(tmp_path / "a") == []


def test_ids_that_cannot_come_along_are_named(tokenizer, tmp_path):
    pq.write_table(pa.table({"input_ids": [[1], [2]], "x": [1.5, 2.5], "y": ["a", None]}), tmp_path / "x.parquet")
    write_megatron(tmp_path / "m", [[1]])
    for name, column, said in [
        ("x.parquet", "x", "not a column of ids"),
        ("x.parquet", "y", "document 1"),
        ("x.parquet", "z", "--id-column"),
        ("m", "z", "has no ids"),
    ]:
        with pytest.raises(SlwError, match=said):
            bring(tokenizer, tmp_path / "a", tmp_path / name, id_column=column)


def test_a_url_to_write_to_is_refused_and_not_taken_for_a_folder(tokenizer, tmp_path, monkeypatch):
    store = write_once(tmp_path / "a", tokenizer)
    monkeypatch.chdir(tmp_path)
    url = ("--out", "s3://bucket/x")
    for arguments in (
        ("import", store / "shards", "--token-column", "tokens", "--tokenizer", tokenizer),
        ("export", store, "--format", "hf"),
        ("pack", store, "--seqlen", 8),
    ):
        assert "is a URL" in call(prep, *arguments, *url, status=2).stderr
    with pytest.raises(CorpusError, match="local disk"):
        bring(tokenizer, tmp_path / "b", "s3://bucket/x.idx")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    call(prep, "import", store / "shards", "--token-column", "tokens", "--tokenizer", tokenizer, "--out", "b")
    assert stored(tmp_path / "b") == stored(store)


def test_a_folder_of_indexed_datasets_says_how_to_name_them(tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("en", "de.v1"):
        write_megatron(tmp_path / "in" / name, [[1, 2]])
    (tmp_path / "in" / "vocab.json").write_text("{}")
    for form, name in ((None, "in"), ("megatron", "in"), (None, "in/*"), (None, "*/*.idx"), ("megatron", "in/*.idx")):
        with pytest.raises(CorpusError, match="each is an input of its own") as refused:
            bring(tokenizer, tmp_path / "out", tmp_path / name, format=form)
    pasted = str(refused.value).rpartition("slw-prep import ")[2].split()
    bring(tokenizer, tmp_path / "out", *pasted)
    assert stored(tmp_path / "out") == [[1, 2, 0]] * 2
    (tmp_path / "in" / "vocab.json").unlink()  # is no table
    pq.write_table(pa.table({"input_ids": [[3, 4]]}), tmp_path / "in" / "x.parquet")
    with pytest.raises(CorpusError, match="--format hf for the tables"):
        bring(tokenizer, tmp_path / "tables", tmp_path / "in")
    bring(tokenizer, tmp_path / "tables", tmp_path / "in", format="hf")
    assert stored(tmp_path / "tables") == [[3, 4, 0]]


def test_an_input_that_is_named_twice_is_read_once(tokenizer, tmp_path):
    for name in ("x", "y"):
        write_megatron(tmp_path / name, [[1, 2]])
    bring(tokenizer, tmp_path / "out", *(tmp_path / name for name in ("x.bin", "x.idx", "y.bin", "y.idx", "x")))
    assert stored(tmp_path / "out") == [[1, 2, 0]] * 2
    sources = (("a", str(tmp_path / "x.bin")), ("b", str(tmp_path / "x.idx")))
    with pytest.raises(ConfigError, match=r"a file in two sources\s+where: .*x\s+found:   a and b"):
        bring(tokenizer, tmp_path / "two", sources=sources)


def test_a_table_in_a_folder_that_is_named_too_is_read_once(tokenizer, tmp_path):
    for number in (1, 2):
        table = tmp_path / "in" / f"{number}.parquet"
        table.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"input_ids": [[number, 4]]}), table)
    (tmp_path / "link.parquet").symlink_to(table)
    bring(tokenizer, tmp_path / "out", table, tmp_path / "in", tmp_path / "link.parquet")
    assert stored(tmp_path / "out") == [[2, 4, 0], [1, 4, 0]]
    sources = (("a", str(tmp_path / "in")), ("b", str(table)))
    with pytest.raises(ConfigError, match=r"a file in two sources\s+where: .*2\.parquet\s+found:   a and b"):
        bring(tokenizer, tmp_path / "two", sources=sources)
    assert not (tmp_path / "two").exists()


def test_a_dataset_exported_opens_in_datasets_with_the_same_ids(tokenizer, tmp_path, capfd):
    documents = documents_of([5, 1, 9, 1500, 2, 2, 17] * 200)
    write_store(tmp_path / "a", documents, shards=3, tokenizer=tokenizer.read_bytes())
    call(prep, "export", tmp_path / "a", "--format", "hf", "--out", tmp_path / "hf")
    opened = datasets.load_from_disk(tmp_path / "hf")
    assert opened["input_ids"][:] == [d.tolist() for d in documents]
    assert opened.split == "train" and set(opened.column_names) == {"input_ids", "row"}
