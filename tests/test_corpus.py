"""Whatever the form, the unit size and the place, the same documents are read, each once and in order."""

import dataclasses
from codecs import BOM_UTF8

import fsspec
import pytest
from corpora import options, tokenizer_of
from forms import FORMS, SEPARATOR, into_memory, json_lines, read, texts_in, write_form
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.build import build
from pipeline.documents import Reading

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(
    lambda text: "=" not in text and not text.startswith("\ufeff")
)
TEXTS = st.lists(TEXT, min_size=1, max_size=12)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(texts=TEXTS, unit_bytes=st.integers(1, 300), batch_bytes=st.integers(1, 60), rows=st.integers(1, 5))
def test_every_form_at_any_unit_size_gives_the_same_documents_in_order(
    tmp_path_factory, form, texts, unit_bytes, batch_bytes, rows
):
    path, reading = write_form(tmp_path_factory.mktemp("corpus"), form, texts, rows)
    found = texts_in(reading, path, unit_bytes=unit_bytes, batch_bytes=batch_bytes)
    assert found == texts


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None)
@given(texts=TEXTS, unit_bytes=st.integers(1, 300))
def test_remote_files_give_what_local_ones_give(tmp_path_factory, form, texts, unit_bytes):
    path, reading = write_form(tmp_path_factory.mktemp("corpus"), form, texts)
    url = into_memory(path, f"memory://{path.name}")
    try:
        assert read(reading, url, unit_bytes=unit_bytes) == read(reading, path, unit_bytes=unit_bytes)
        assert texts_in(reading, f"file://{path}") == texts
    finally:
        fsspec.filesystem("memory").store.clear()


def test_a_build_of_remote_files_makes_the_bytes_of_a_local_one(tmp_path):
    texts = [f"document {i} " * 9 for i in range(60)]
    tokenizer = tokenizer_of(tmp_path)
    path, _ = write_form(tmp_path, "jsonl", texts)
    table, _ = write_form(tmp_path, "parquet", texts)
    places = [(path, table), [into_memory(file, f"memory://{file.name}") for file in (path, table)]]
    digests = []
    for at, inputs in enumerate(places):
        built = build(options(tokenizer, tmp_path / f"s{at}", *inputs, unit_bytes=500))
        digests.append([(shard.file, shard.digest, shard.unit) for shard in built.manifest.shards])
    assert len(digests[0]) > 10 and digests[0] == digests[1]
    fsspec.filesystem("memory").store.clear()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab\n\r", max_size=6), max_size=10),
    ending=st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r\n \r\n"]),
    last=st.booleans(),
    mark=st.booleans(),
    unit_bytes=st.integers(1, 80),
    batch_bytes=st.integers(1, 80),
)
def test_no_line_is_lost_or_doubled_at_any_byte_boundary(
    tmp_path_factory, texts, ending, last, mark, unit_bytes, batch_bytes
):
    path = tmp_path_factory.mktemp("lines") / "c.jsonl"
    data = BOM_UTF8 * mark + json_lines(texts, ending, last)
    path.write_bytes(data)
    found = read(Reading(), path, unit_bytes=unit_bytes, batch_bytes=batch_bytes)
    assert [text for text, _, _ in found] == texts
    for (_, row, _), line in zip(found, json_lines(texts).split(b"\n"), strict=False):
        assert data[row:].removeprefix(BOM_UTF8).startswith(line)


@settings(max_examples=300, deadline=None)
@given(
    data=st.text("ab\n", max_size=60),
    separator=st.text("ab\n", min_size=1, max_size=4),
    unit_bytes=st.integers(1, 30),
    mark=st.booleans(),
)
def test_separated_text_is_cut_as_by_one_reader_even_where_separators_overlap(
    tmp_path_factory, data, separator, unit_bytes, mark
):
    path = tmp_path_factory.mktemp("text") / "c.txt"
    path.write_bytes(BOM_UTF8 * mark + data.encode())
    expected = data.split(separator)
    if not expected[-1] and (data or not mark):  # a file that is only a byte order mark is an empty document
        expected.pop()
    found = read(Reading(separator=separator), path, unit_bytes=unit_bytes)
    assert [text for text, _, _ in found] == expected
    assert all(data.encode()[max(0, row - 3 * mark) :].startswith(text.encode()) for text, row, _ in found)


def test_separators_are_found_across_chunks_and_long_documents_are_read_once(tmp_path, monkeypatch):
    from pipeline import texts as module

    monkeypatch.setattr(module, "_CHUNK_BYTES", 7)
    texts = ["x" * n for n in (1, 3, 40, 7, 6, 0, 12, 100)]
    path = tmp_path / "c.txt"
    path.write_text(SEPARATOR.join(texts))
    for unit_bytes in (1, 5, 33, 1000):
        assert texts_in(Reading(separator=SEPARATOR), path, unit_bytes=unit_bytes) == texts
    (tmp_path / "n.txt").write_text("a" + "\n" * 50 + "b")
    whole = texts_in(Reading(separator="\n\n\n"), tmp_path / "n.txt")
    assert texts_in(Reading(separator="\n\n\n"), tmp_path / "n.txt", unit_bytes=4) == whole


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "arrow", "arrow file", "hugging face"])
def test_ids_are_kept_and_integers_become_strings(tmp_path, form):
    path, reading = write_form(tmp_path, form, ["a", "b", "c", "d"])
    found = read(dataclasses.replace(reading, id_field="id"), path, unit_bytes=10)
    assert [(text, name) for text, _, name in found] == [("a", "0"), ("b", "1"), ("c", "2"), ("d", "3")]
