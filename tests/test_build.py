"""Building: whatever the format, compression or unit size, the store holds each document's tokens once."""

import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from corpora import bytes_of, options, texts_of, tokenizer_of, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipeline.build import build
from pipeline.corpus import documents, split_units
from pipeline.documents import Reading
from pipeline.errors import StoreError
from pipeline.format import BUILD_FOLDER, Manifest
from pipeline.held_out import is_held_out
from pipeline.inputs import find_files
from pipeline.reader import Store
from pipeline.verify import verify

TEXTS = [f"document {i}: " + "the quick brown fox, naïve café 😀 " * (i % 13) + "end" for i in range(120)]
TEXTS[7] = "text that spells <|endoftext|> stays text"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def as_input(folder, kind):
    """TEXTS in one of the forms; returns (inputs, reading)."""
    path = folder / f"corpus{kind}"
    if kind.startswith(".jsonl"):
        write_jsonl(path, TEXTS)
    elif kind.startswith(".parquet"):
        pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=16)
    elif kind == "folder":
        path.mkdir()
        for i, text in enumerate(TEXTS):
            (path / f"{i:05d}.txt").write_text(text)
    else:
        path.write_text("\n===\n".join(TEXTS))
    if kind.endswith((".gz", ".zst")):
        data = path.read_bytes()
        path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else zstandard.compress(data))
    return path, Reading(separator="\n===\n" if kind.startswith(".txt") else None)


@pytest.mark.parametrize(
    "kind", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "folder", ".txt", ".txt.gz", ".txt.zst"]
)
@pytest.mark.parametrize("unit_bytes", [300, 1 << 20])
def test_every_form_of_the_same_documents_makes_the_same_tokens(tokenizer, tmp_path, kind, unit_bytes):
    path, reading = as_input(tmp_path, kind)
    result = build(options(tokenizer, tmp_path / "store", path, reading=reading, unit_bytes=unit_bytes))
    assert texts_of(tmp_path / "store", tokenizer) == TEXTS
    assert verify(tmp_path / "store") == []
    if unit_bytes == 300:
        assert len(result.manifest.shards) > 5
    reference = Tokenizer.from_file(str(tokenizer))
    reference.encode_special_tokens = True
    store = Store.open(tmp_path / "store")
    assert [store.document(i)[:-1].tolist() for i in range(len(TEXTS))] == [
        reference.encode(text, add_special_tokens=False).ids for text in TEXTS
    ]


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(st.characters(blacklist_categories=("Cs",)), max_size=30), min_size=1, max_size=30),
    unit_bytes=st.integers(1, 400),
    blank=st.booleans(),
)
def test_no_line_is_lost_or_read_twice_at_any_unit_size(tmp_path_factory, texts, unit_bytes, blank):
    path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
    lines = [orjson.dumps({"text": text}) for text in texts]
    path.write_bytes((b"\n\n" if blank else b"\n").join(lines))
    units = split_units(find_files((str(path),), Reading()), unit_bytes, Reading())
    batches = [batch for unit in units for batch in documents(unit, Reading(), lambda error: None)]
    found = [record for batch in batches for record in zip(batch.texts, batch.rows, strict=True)]
    assert [text for text, _ in found] == texts
    data = path.read_bytes()
    assert all(data[row:].startswith(line) for (_, row), line in zip(found, lines, strict=True))


def test_bytes_do_not_depend_on_workers_or_encoder(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    stores = []
    for name, more in {"a": {}, "b": {"workers": 2}, "c": {"encoder": "tokenizers"}}.items():
        build(
            options(
                tokenizer, tmp_path / name, tmp_path / "c.jsonl", unit_bytes=6000, validation_fraction=0.2, **more
            )
        )
        stores.append((bytes_of(tmp_path / name), (tmp_path / name / "manifest.json").read_bytes()))
    assert len(stores[0][0]) > 4
    assert stores[0] == stores[1] == stores[2]


def test_validation_is_split_by_content_and_nothing_is_in_both(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS + TEXTS[:50])
    build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl", validation_fraction=0.3))
    train, held_out = (texts_of(tmp_path / "s", tokenizer, split) for split in ("train", "validation"))
    assert sorted(train + held_out) == sorted(TEXTS + TEXTS[:50])
    assert not set(train) & set(held_out)
    assert all(is_held_out(text, 0.3) for text in held_out)
    assert 0.15 < len(held_out) / len(train + held_out) < 0.45


def test_killed_at_any_unit_and_run_again_gives_the_same_bytes(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    build(options(tokenizer, tmp_path / "whole", tmp_path / "c.jsonl", unit_bytes=6000))
    code = f"""
import os, signal
from pathlib import Path
from pipeline import build as b, job, writer as w
write, left = w.write_atomically, [int(os.environ["WRITES"])]
def counted(path, action):
    left[0] -= 1
    if left[0] < 0:
        path.with_name("." + path.name + ".1.partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, action)
w.write_atomically = counted
b.build(job.BuildOptions(inputs=({str(tmp_path / "c.jsonl")!r},), tokenizer=Path({str(tokenizer)!r}),
    out=Path({str(tmp_path / "killed")!r}), unit_bytes=6000))
"""
    killed = 0
    for writes in (1, 3, 4, 3, 10**6):
        environment = {**os.environ, "WRITES": str(writes)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        killed += done.returncode == -signal.SIGKILL
        if (tmp_path / "killed" / "manifest.json").exists():
            break
        with pytest.raises(StoreError, match="not a finished store"):
            Store.open(tmp_path / "killed")
    assert killed >= 3
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert not (tmp_path / "killed" / BUILD_FOLDER).exists()


def test_a_full_disk_leaves_nothing_half_written(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS * 30)
    out = tmp_path / "s"
    code = f"""
import resource, signal, sys
from pathlib import Path
from pipeline.build import build
from pipeline.job import BuildOptions
from pipeline.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    build(BuildOptions(inputs=({str(tmp_path / "c.jsonl")!r},), tokenizer=Path({str(tokenizer)!r}),
        out=Path({str(out)!r})))
except StoreError as error:
    print(error)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout
    assert "then the same command again" in done.stdout
    assert not [p for p in out.rglob("*") if p.suffix in (".arrow", ".partial")]
    build(options(tokenizer, out, tmp_path / "c.jsonl"))
    assert verify(out) == []


def test_a_store_that_a_link_leads_to_is_built_anew_where_it_lies(tokenizer, tmp_path):
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    build(options(tokenizer, tmp_path / "disk", tmp_path / "c.jsonl"))
    (tmp_path / "s").symlink_to(tmp_path / "disk")
    write_jsonl(tmp_path / "c.jsonl", TEXTS[:3])
    build(options(tokenizer, tmp_path / "s", tmp_path / "c.jsonl"), force=True)
    assert (tmp_path / "s").is_symlink() and Store.open(tmp_path / "disk").documents == 3


def test_each_source_may_have_its_text_in_a_field_of_its_own(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a", "text": "not this"}\n')
    pq.write_table(pa.table({"content": ["b"]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text('{"text": "c"}\n')
    sources = tuple(
        (name, str(tmp_path / file)) for name, file in zip("abc", ("a.jsonl", "b.parquet", "c.jsonl"), strict=True)
    )
    asked = options(
        tokenizer, tmp_path / "s", sources=sources, reading=Reading(text_fields=(("a", "body"), ("b", "content")))
    )
    build(asked)
    assert texts_of(tmp_path / "s", tokenizer) == ["a", "b", "c"]
    assert build(asked).already_built
    with pytest.raises(StoreError, match=r"text_field: [\s\S]*body"):
        build(options(tokenizer, tmp_path / "s", sources=sources))


def test_verify_names_every_damaged_shard_and_a_lost_tokenizer(tokenizer, tmp_path):
    out = tmp_path / "s"
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    build(options(tokenizer, out, tmp_path / "c.jsonl", unit_bytes=6000))
    files = [Path(shard.file) for shard in Manifest.load(out).shards]
    for name, change in ((files[0], 300), (files[2], -100)):
        data = bytearray((out / name).read_bytes())
        data[change] ^= 1
        (out / name).write_bytes(data)
    (out / files[1]).unlink()
    (out / "tokenizer.json").write_text("{}")
    assert [d.file for d in verify(out)] == ["tokenizer.json", *(str(f) for f in files[:3])]
