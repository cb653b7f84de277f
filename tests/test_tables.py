"""Columns of any string type are read; others are refused by name; a row that holds no text is bad."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forms import read

from pipeline.documents import Reading
from pipeline.errors import CorpusError

STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
KINDS = ["parquet", "stream", "file"]


def write_table(path, table, kind, rows=2):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=rows)
        return path
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def suffix(kind):
    return ".parquet" if kind == "parquet" else ".arrow"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", STRINGS, ids=str)
def test_every_kind_of_string_is_read_and_nulls_are_bad_rows(tmp_path, kind, type_):
    texts = ["a", "naïve 😀", None, "", "a", " \n", "nul\x00"]
    column = pa.array(texts, type=pa.string()).cast(type_)
    ids = pa.array(range(10, 17), type=pa.uint8())
    path = write_table(tmp_path / f"t{suffix(kind)}", pa.table({"n": ids, "text": column}), kind)
    bad = []
    found = read(Reading(id_field="n"), path, unit_bytes=1, bad=bad.append)
    assert found == [(text, row, str(row + 10)) for row, text in enumerate(texts) if text is not None]
    assert len(bad) == 1
    assert f"t{suffix(kind)}, row 2" in str(bad[0]) and "null" in str(bad[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([["a"], ["b"]]),
        pa.array([b"a", b"b"]),
        pa.array([{"a": 1}, {"a": 2}]),
        pa.array([None, None]),
        pa.array([1, 2]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type),
)
def test_a_column_that_is_no_text_is_refused_with_its_type_and_those_that_would_do(tmp_path, kind, column):
    table = pa.table({"text": column, "body": ["x", "y"]})
    path = write_table(tmp_path / f"t{suffix(kind)}", table, kind)
    with pytest.raises(CorpusError, match=r"holds no text[\s\S]*such are body") as caught:
        read(Reading(), path)
    assert str(column.type).split("<")[0] in str(caught.value)
    with pytest.raises(CorpusError, match=r"'none'[\s\S]*columns text, body[\s\S]*--id-field"):
        read(Reading(text_field="body", id_field="none"), path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("type_", STRINGS, ids=str)
def test_bytes_that_are_not_utf8_are_a_bad_row(tmp_path, kind, type_):
    data = pa.array([b"good", b"\xff\xfe", b"also"])
    if pa.types.is_dictionary(type_):
        column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2], pa.int32()), data.view(pa.string()))
    elif type_ == pa.string_view():
        column = data.cast(pa.binary_view()).view(pa.string_view())
    else:
        column = data.cast(pa.large_binary() if type_ == pa.large_string() else pa.binary()).view(type_)
    path = write_table(tmp_path / f"t{suffix(kind)}", pa.table({"text": column}), kind, rows=3)
    bad = []
    assert [text for text, _, _ in read(Reading(), path, bad=bad.append)] == ["good", "also"]
    assert len(bad) == 1 and "row 1" in str(bad[0]) and "not UTF-8" in str(bad[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_is_cut_or_is_none_is_an_error_of_the_file(tmp_path, kind):
    whole = write_table(
        tmp_path / f"w{suffix(kind)}", pa.table({"text": [f"text {i}" * 20 for i in range(50)]}), kind
    )
    data = whole.read_bytes()
    path = tmp_path / f"t{suffix(kind)}"
    for cut in (b"", data[: len(data) // 2], b"not a table at all" * 10):
        path.write_bytes(cut)
        with pytest.raises(CorpusError, match=path.name):
            read(Reading(), path)


def test_offsets_that_point_outside_are_an_error_not_a_crash(tmp_path):
    sink = io.BytesIO()
    table = pa.table({"text": ["first", "second", "third"]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = bytearray(sink.getvalue())
    offsets = np.array([0, 5, 11, 16], dtype=np.int32).tobytes()
    at = data.index(offsets)
    data[at : at + 16] = np.array([0, 5, 1 << 30, 16], dtype=np.int32).tobytes()
    (tmp_path / "t.arrow").write_bytes(data)
    with pytest.raises(CorpusError, match=r"t\.arrow"):
        read(Reading(), tmp_path / "t.arrow")


def test_large_row_groups_are_read_in_batches(tmp_path):
    texts = [f"document {i} " * 20 for i in range(2000)]
    path = write_table(tmp_path / "t.parquet", pa.table({"text": texts}), "parquet", rows=2000)
    from pipeline.corpus import documents, split_units
    from pipeline.inputs import find_files

    units = split_units(find_files((str(path),), Reading()), 1000, Reading())
    batches = [batch for unit in units for batch in documents(unit, Reading(), None, 10_000)]
    assert [text for batch in batches for text in batch.texts] == texts
    assert max(sum(map(len, batch.texts)) for batch in batches) < 30_000
