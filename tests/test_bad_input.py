"""Odd input has a defined outcome each: docs/inputs.md, "What becomes of odd input", row by row."""

import gzip
import io
import json
import re
import shlex
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner
from corpora import tokenizer_of
from forms import into_memory, read, texts_in

from pipeline.cli import main
from pipeline.documents import Reading
from pipeline.errors import CorpusError, StoreError
from pipeline.reader import Store
from pipeline.train_tokenizer import train_tokenizer

GOOD = b'{"text": "a"}\n'
MORE = b'{"text": "b"}\n'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def build(tokenizer, tmp_path, monkeypatch):
    """`slw-prep build` of files given by name and bytes; returns the status, the facts, the message, the texts."""
    monkeypatch.chdir(tmp_path)

    def run(files, *arguments, status=0):
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        given = [*(files if "-" not in arguments else ()), *arguments]
        result = CliRunner().invoke(main, ["build", *given, "--tokenizer", str(tokenizer), "--out", "s", "--json"])
        assert result.exit_code == status, (result.output, result.exception)
        assert "Traceback" not in result.output
        if status:
            assert not (tmp_path / "s" / "manifest.json").exists()
            assert not list(tmp_path.rglob("*.partial"))
            if (tmp_path / "s").exists():
                with pytest.raises(StoreError, match="not a finished store"):
                    Store.open(tmp_path / "s")
            return result.stderr
        from tokenizers import Tokenizer

        store, decoder = Store.open(tmp_path / "s"), Tokenizer.from_file(str(tokenizer))
        texts = [
            decoder.decode(store.document(i)[:-1].tolist(), skip_special_tokens=False) for i in range(store.documents)
        ]
        return json.loads(result.stdout), result.stderr, texts

    return run


BAD_LINES = {
    "not UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
    "a lone surrogate": (rb'{"text": "\ud800"}', "surrogate"),
    "a lone low surrogate": (rb'{"text": "x\udc00y"}', "surrogate"),
    "a zero byte": (b'{"text": "a\x00b"}', "not JSON"),
    "too long": (b'{"text": "' + b"x" * 2000 + b'"}', "too long"),
    "no text field": (b'{"body": "x"}', "fields body"),
    "null": (b'{"text": null}', "NoneType"),
    "a number": (b'{"text": 5}', "int"),
    "nested": (b'{"text": {"text": "x"}}', "dict"),
    "a list": (b'{"text": ["x"]}', "list"),
    "no object": (b'"text"', "no object but a str"),
    "an array": (b'[{"text": "x"}]', r"jq -c"),
    "half an array": (b"[", r"jq -c"),
    "not JSON": (b'{"text": "x"', "not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_bad_line_is_named_by_file_and_line_or_left_out_and_counted(tmp_path, name, suffix):
    line, message = BAD_LINES[name]
    pack = {"jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}.get(suffix, bytes)
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(pack(GOOD + b"\n" + line.replace(b"\n", b"") + b"\r\n" + MORE))
    reading = Reading(max_record_bytes=1000)
    for place, unit_bytes in ((path, 1 << 20), (path, 10), (into_memory(path, f"memory://c.{suffix}"), 10)):
        bad = []
        found = read(reading, place, unit_bytes=unit_bytes, bad=bad.append)
        assert [text for text, _, _ in found] == ["a", "b"]
        assert len(bad) == 1
        assert f"c.{suffix}:3" in str(bad[0]) and "--skip-bad" in str(bad[0])
        with pytest.raises(CorpusError, match=message):
            read(reading, place, unit_bytes=unit_bytes)


def test_a_bad_line_ends_the_build_with_status_1_and_can_be_skipped(build):
    message = build({"c.jsonl": GOOD + b"{}\n" + MORE}, status=1)
    assert "c.jsonl:2" in message and "to do:" in message and "allowed:" in message
    facts, said, texts = build({}, "c.jsonl", "--skip-bad")
    assert (facts["bad"], facts["skipped"], texts) == (1, 1, ["a", "b"])
    assert "left out" in said and "c.jsonl:2" in said


@pytest.mark.parametrize(
    ("files", "arguments", "texts", "skipped"),
    [
        ({"c.jsonl": b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b\\u0000\\r\\n"}'}, (), ["a", "b\x00\r\n"], 0),
        ({"c.jsonl": b'{"text": ""}\n{"text": " \\n"}\n\n \n{"text": "x"}\n'}, (), [" \n", "x"], 1),
        ({"c.jsonl": b'{"text": "first", "text": "last"}\n'}, (), ["last"], 0),
        ({"c.jsonl": b'{"text": "\\ud83d\\ude00"}\n'}, (), ["😀"], 0),
        ({"a.txt": b"\xef\xbb\xbfx\r\ny\x00\r\n", "b.txt": b"", "c.txt": b" \n"}, (), ["x\r\ny\x00\r\n", " \n"], 1),
        ({"a.txt": b"\xef\xbb\xbfx\r\n==\r\ny"}, ("--separator", "\r\n==\r\n"), ["x", "y"], 0),
        ({"a.jsonl": b"", "b.jsonl": GOOD, "c.txt.gz": gzip.compress(b"x\xc3\xa9")}, (), ["a", "xé"], 0),
        ({"a.jsonl": GOOD}, ("./a.jsonl",), ["a"], 0),
        ({"a.log": GOOD}, ("--format", "jsonl"), ["a"], 0),
    ],
)
def test_odd_but_sound_input_is_kept_as_it_is(build, files, arguments, texts, skipped):
    facts, _, found = build(files, *arguments)
    assert (found, facts["skipped"], facts["bad"]) == (texts, skipped, 0)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"c.jsonl.gz": gzip.compress(GOOD * 99)[:-9]}, (), "c.jsonl.gz"),
        ({"c.jsonl.gz": gzip.compress(GOOD * 99)[:-9]}, ("--skip-bad",), "cannot be read to its end"),
        ({"c.jsonl.zst": zstandard.compress(GOOD * 99)[:-3]}, ("--skip-bad",), "cannot be read to its end"),
        ({"c.txt.gz": b"not compressed"}, (), "c.txt.gz"),
        ({"c.parquet": b""}, (), "not a readable Parquet file"),
        ({"c.arrow": b""}, (), "not a readable Arrow file"),
        ({"c.txt": b"caf\xe9"}, (), "iconv"),
        ({"c.txt": b"x" * 2000}, ("--max-record-bytes", "1K"), "--max-record-bytes"),
        ({"c.txt": b"y==" + b"x" * 2000}, ("--max-record-bytes", "1K", "--separator", "=="), "c.txt, byte 3"),
        ({"c.txt": b"a==caf\xe9"}, ("--separator", "=="), "c.txt, byte 3"),
        ({"c.jsonl": b"\n\n"}, (), "the corpus is empty"),
        ({"c.txt": b"x"}, ("--id-field", "id"), "a text file has no ids"),
        ({"c.jsonl": b'{"text": "x", "id": null}\n'}, ("--id-field", "id"), "c.jsonl:1"),
        ({"c.jsonl": b'{"text": "x", "id": true}\n'}, ("--id-field", "id"), "'id'"),
        ({"c.jsonl": b'{"text": "x"}\n'}, ("--id-field", "id"), "--id-field"),
    ],
)
def test_what_cannot_be_used_ends_the_build_with_a_message(build, files, arguments, message):
    status = 2 if "ids" in message else 1
    said = build(files, *arguments, status=status)
    assert message in said
    assert "where:" in said


def test_too_long_records_are_passed_over_without_losing_their_neighbours(tmp_path):
    reading = Reading(max_record_bytes=300, separator="==")
    for size in (10, 100, 1000, 100_000):
        long = b'{"text": "' + b"x" * size + b'"}\n'
        (tmp_path / "c.jsonl").write_bytes(GOOD + long + MORE + long)
        (tmp_path / "c.txt").write_bytes(b"==".join([b"a", b"x" * size, b"b", b"x" * size]))
        for name in ("c.jsonl", "c.txt"):
            for unit_bytes in (max(7, size // 20), 1 << 20):
                bad = []
                found = read(reading, tmp_path / name, unit_bytes=unit_bytes, bad=bad.append, batch_bytes=64)
                texts = [text for text, _, _ in found]
                assert texts == (["a", "b"] if size >= 1000 else ["a", "x" * size, "b", "x" * size])
                assert len(bad) == (2 if size >= 1000 else 0)
                assert all("300 bytes" in str(error) for error in bad)


def test_ids_and_sources_are_columns_that_readers_and_verify_accept(build, tmp_path):
    lines = b"".join(b'{"text": "t%d", "id": %s}\n' % (i, b'"x"' if i % 2 else b"%d" % i) for i in range(6))
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["p0", "p1"], "id": [2**60, 7]}), table)
    for name, data in (("c.jsonl", lines), ("c.parquet", table.getvalue())):
        (tmp_path / name).write_bytes(data)
    named = ("--source", "web=c.parquet", "--source", "books=c.jsonl", "--id-field", "id", "--unit-bytes", "60")
    _, _, texts = build({}, *named)
    store = Store.open(tmp_path / "s")
    assert texts == ["p0", "p1", "t0", "t1", "t2", "t3", "t4", "t5"]
    assert store.sources == {"web": range(2), "books": range(2, 8)}
    columns = [pa.ipc.open_stream(tmp_path / "s" / shard.file).read_all() for shard in store.shards]
    assert all(table.schema.names == ["tokens", "row", "id", "source"] for table in columns)
    assert pa.concat_tables(columns)["id"].to_pylist() == [str(2**60), "7", "0", "x", "2", "x", "4", "x"]
    assert pa.concat_tables(columns)["source"].to_pylist() == ["web"] * 2 + ["books"] * 6
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "s")]).exit_code == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--id-field", "id"), "id_field: None there, id asked"),
        (("--format", "jsonl"), "format: None there, jsonl asked"),
        (("--max-record-bytes", "1M"), "max_record_bytes"),
    ],
)
def test_a_changed_parameter_is_refused_by_name(build, tokenizer, change, message):
    build({"c.jsonl": b'{"text": "a", "id": 1}\n'})
    result = CliRunner().invoke(main, ["build", "c.jsonl", *change, "--tokenizer", str(tokenizer), "--out", "s"])
    assert result.exit_code == 1 and message in result.stderr
    result = CliRunner().invoke(main, ["build", "--source", "x=c.jsonl", "--tokenizer", str(tokenizer), "--out", "s"])
    assert result.exit_code == 1 and "sources" in result.stderr


def test_standard_input_becomes_a_row_of_shards_and_is_never_gone_on_with(build, tokenizer, tmp_path):
    texts = [f"document {i} " * 3 for i in range(100)]
    data = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)

    def pipe(data, *more):
        command = ["build", "-", "--tokenizer", str(tokenizer), "--out", "p", *more]
        return CliRunner().invoke(main, command, input=data)

    assert "standard input has no suffix" in pipe(data).stderr
    bad = pipe(data + b"{}\n" + data, "--format", "jsonl", "--unit-bytes", "500")
    assert bad.exit_code == 1 and "standard input:101" in bad.stderr
    done = pipe(data, "--format", "jsonl", "--unit-bytes", "500", "--json", "--workers", "2")
    assert done.exit_code == 0, done.output
    assert "cannot be read again" in done.stderr
    store = Store.open(tmp_path / "p")
    assert store.documents == 100 and len(store.shards) > 2
    assert len(list((tmp_path / "p").rglob("*.arrow"))) == len(store.shards)
    again = pipe(data, "--format", "jsonl", "--unit-bytes", "500")
    assert again.exit_code == 1 and "--force" in again.stderr
    text = pipe(b"one==two", "--format", "text", "--separator", "==", "--force", "--json")
    assert json.loads(text.stdout)["documents"] == 2
    assert pipe(data, "--format", "jsonl", "--force", "--task", "1/2").exit_code == 2


def test_a_tokenizer_is_trained_on_standard_input_and_sources(build, tmp_path):
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    for given in (("-", "--format", "jsonl"), ("--source", "x=c.jsonl")):
        command = ["tokenizer", *given, "--vocab-size", "260", "--out", "t.json", "--force", "--json"]
        result = CliRunner().invoke(main, command, input=GOOD * 3)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["documents"] == (3 if "-" in given else 1)


def test_ctrl_c_does_not_wait_for_a_tokenizer_in_training(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(GOOD * 3)
    before, during = signal.getsignal(signal.SIGINT), []

    def look(text_bytes):
        during.append(signal.getsignal(signal.SIGINT))

    inputs = (str(tmp_path / "c.jsonl"),)
    train_tokenizer(inputs, tmp_path / "t.json", vocab_size=260, reading=Reading(), on_document=look)
    assert during == [signal.SIG_DFL] * 3 and signal.getsignal(signal.SIGINT) == before


def test_line_numbers_beyond_the_counted_part_are_bytes(tmp_path, monkeypatch):
    from pipeline import files

    monkeypatch.setattr(files, "COUNT_LINES_BYTES", 20)
    (tmp_path / "c.jsonl").write_bytes(GOOD * 5 + b"{}\n")
    with pytest.raises(CorpusError, match=r"c\.jsonl, byte 70"):
        texts_in(Reading(), tmp_path / "c.jsonl", unit_bytes=30)


def test_lines_are_counted_once_for_all_units_with_bad_ones(tmp_path, monkeypatch):
    from pipeline import files

    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(GOOD if i % 3 else b"{}\n" for i in range(90)))
    seen = [0]

    class Counting(io.FileIO):
        def readinto(self, buffer):
            size = super().readinto(buffer)
            seen[0] += size
            return size

    monkeypatch.setattr(files, "open_raw", lambda path: io.BufferedReader(Counting(path), 16))
    monkeypatch.setattr(files, "_CHUNK_BYTES", 16)
    bad = []
    read(Reading(), path, unit_bytes=50, bad=bad.append, batch_bytes=16)
    assert [str(error).partition(".jsonl:")[2].split()[0] for error in bad] == [str(i + 1) for i in range(0, 90, 3)]
    assert seen[0] < 4 * path.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("build", "c.jsonl", "--out", "c.jsonl"), 1, "the output is a file"),
        (("build", "c.jsonl", "--out", "c.jsonl", "--force"), 1, "the output is a file"),
        (("build", "c.jsonl", "--out", "s", "--max-record-bytes", "0"), 2, "--max-record-bytes 0"),
        (("build", "e.jsonl", "--out", "s"), 1, "where:   e.jsonl (0 bytes)"),
        (("build", "u.jsonl", "--out", "s"), 1, "iconv -f UTF-16 -t UTF-8"),
        (
            ("build", "c.jsonl", "--out", "s", "--engine", "ray", "--ray-address", "127.0.0.1:1"),
            2,
            "ray start --head",
        ),
        (("build", "t.csv", "--out", "s"), 1, """duckdb -c 'copy "t.csv" to "table.parquet"';"""),
        (("build", "c.jsonl", "--out", "s", "--validation-fraction", "0.999999999"), 1, "0 empty and 1 held-out"),
        (("build", "c.jsonl", "--out", "ftp://127.0.0.1:1/s"), 2, "this URL cannot be opened"),
        (("import", "-", "--out", "s"), 2, "tokens are not read from standard input"),
    ],
)
def test_what_goes_wrong_is_said_with_a_remedy(tmp_path, monkeypatch, tokenizer, arguments, status, message):
    if "ray" in arguments:
        pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    (tmp_path / "e.jsonl").write_bytes(b"")
    (tmp_path / "t.csv").write_bytes(b"id,text\n1,a\n")
    (tmp_path / "u.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-16"))
    result = CliRunner().invoke(main, [*arguments, "--tokenizer", str(tokenizer)])
    assert result.exit_code == status and message in result.stderr
    assert not (tmp_path / "s/manifest.json").exists()


def test_a_table_of_any_name_is_converted_by_the_command_that_is_told(tmp_path, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a 'b\".csv").write_text("text\ntold\n")
    with pytest.raises(CorpusError) as refused:
        texts_in(Reading(), tmp_path / "a 'b\".csv")
    (command,) = re.findall("to do: +(.*); --format", str(refused.value))
    program, option, sql = shlex.split(command)
    assert (program, option) == ("duckdb", "-c")
    with duckdb.connect() as connection:
        connection.execute(sql)
    assert texts_in(Reading(), tmp_path / "table.parquet") == ["told"]


def test_a_tokenizer_is_no_folder(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(GOOD)
    (tmp_path / "a t").mkdir()
    with pytest.raises(StoreError, match=r"the output is a folder[\s\S]*--out '.*/a t/tokenizer\.json'"):
        train_tokenizer([str(tmp_path / "c.jsonl")], out=tmp_path / "a t", vocab_size=257, reading=Reading())
