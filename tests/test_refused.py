"""Builds that cannot be: what they say, and that they leave what was there."""

import gzip
import os

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import bytes_of, options, texts_of, tokenizer_of, write_jsonl

from pipeline.build import build, build_task, remove
from pipeline.documents import Reading
from pipeline.errors import CorpusError, SlwError, StoreError
from pipeline.inputs import find_files

TEXTS = [f"document {i}" for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def test_other_parameters_are_refused_by_name_and_the_same_ones_do_nothing(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl"))
    before = (tmp_path / "s" / "manifest.json").stat().st_mtime_ns
    assert build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl")).already_built
    assert (tmp_path / "s" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(StoreError, match=r"validation_fraction: 0\.0 there, 0\.5 asked"):
        build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl", validation_fraction=0.5))
    write_jsonl(tmp_path / "d.jsonl", TEXTS)
    with pytest.raises(
        StoreError, match=r"1 only there, such as \S*c\.jsonl[\s\S]*1 only asked, such as \S*d\.jsonl"
    ):
        build(options(tokenizer, tmp_path / "s", tmp_path / "d.jsonl"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is no store"):
        build(options(tokenizer, tmp_path / "mine", tmp_path / "c.jsonl"))
    with pytest.raises(StoreError, match="leaves it alone"):
        remove(tmp_path / "mine")
    remove(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_force_deletes_nothing_before_the_inputs_and_the_tokenizer_are_found(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl"))
    before = bytes_of(tmp_path / "s")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for there, name in ((tmp_path / "t.json", "c.jsonl"), (tokenizer, "d.jsonl"), (tokenizer, "cut.parquet")):
        with pytest.raises(SlwError):
            build(options(there, tmp_path / "s", tmp_path / name), force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="is no store"):
        build(options(tokenizer, tmp_path / "mine", tmp_path / "c.jsonl"), force=True)
    assert bytes_of(tmp_path / "s") == before
    write_jsonl(tmp_path / "d.jsonl", TEXTS[:3])
    assert build(options(tokenizer, tmp_path / "s", tmp_path / "d.jsonl"), force=True).manifest.documents() == 3


@pytest.mark.parametrize("array_job", [False, True])
def test_a_build_that_is_refused_before_it_begins_leaves_nothing(tokenizer, tmp_path, array_job):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    (tmp_path / "t.json").write_text("no tokenizer")
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "whole.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-5])
    out = tmp_path / "s"
    for asked in (
        options(tmp_path / "nowhere.json", out, tmp_path / "c.jsonl"),
        options(tmp_path / "t.json", out, tmp_path / "c.jsonl"),
        options(tokenizer, out, tmp_path / "c.jsonl", eod="<no such token>"),
        options(tokenizer, out, tmp_path / "d.jsonl"),
        options(tokenizer, out, tmp_path / "cut.parquet"),
        options(tokenizer, out, tmp_path / "c.jsonl", workers=0),
    ):
        with pytest.raises(SlwError):
            build_task(asked, 1, 2) if array_job else build(asked)
        assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"c\.jsonl:3[\s\S]*one JSON object a line"),
        (b'{"body": "x", "id": 1}', r"c\.jsonl:3[\s\S]*fields body, id[\s\S]*--text-field"),
        (b'{"text": 5}', r"c\.jsonl:3[\s\S]*int"),
        (b'["text"]', r"c\.jsonl:3[\s\S]*list"),
        (b'{"text": "\xff"}', r"c\.jsonl:3"),
    ],
)
def test_bad_lines_are_named_by_file_and_line_and_can_be_left_out(tokenizer, tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": ""}\n{"text": "b"}\n')
    with pytest.raises(CorpusError, match=message):
        build(options(tokenizer, tmp_path / "s", path))
    result = build(options(tokenizer, tmp_path / "s", path, skip_bad=True))
    assert texts_of(tmp_path / "s", tokenizer) == ["a", "b"]
    assert (result.bad, result.manifest.skipped) == (1, 2)
    assert "c.jsonl:3" in result.bad_examples[0]


def test_the_remedy_of_a_first_error_can_be_followed_at_once(tokenizer, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"body": "a"}\n')
    with pytest.raises(CorpusError, match="--text-field"):
        build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl"))
    build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl", reading=Reading(text_field="body")))
    assert texts_of(tmp_path / "s", tokenizer) == ["a"]


def test_inputs_that_cannot_be_read_are_named(tokenizer, tmp_path):
    out = tmp_path / "s"
    with pytest.raises(CorpusError, match="nowhere"):
        find_files((str(tmp_path / "nowhere.jsonl"),), Reading())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="no input file"):
        find_files((str(tmp_path / "empty"),), Reading())
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="corpus is empty"):
        build(options(tokenizer, out, tmp_path / "e.jsonl"))
    assert not out.exists()
    write_jsonl(tmp_path / "v.jsonl", TEXTS[:3])
    with pytest.raises(CorpusError, match="--validation-fraction"):
        build(options(tokenizer, out, tmp_path / "v.jsonl", validation_fraction=0.999999))
    assert not out.exists()
    whole = gzip.compress(orjson.dumps({"text": os.urandom(5000).hex()}) + b"\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"cut\.jsonl\.gz"):
        build(options(tokenizer, tmp_path / "s2", tmp_path / "cut.jsonl.gz"))
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(CorpusError, match=r"t\.parquet[\s\S]*columns body"):
        build(options(tokenizer, tmp_path / "s3", tmp_path / "t.parquet"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="not UTF-8"):
        build(options(tokenizer, tmp_path / "s4", tmp_path / "b.txt"))
