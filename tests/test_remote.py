"""hf:// and gs:// through the clients that users have, against fakes on loopback (tests/hub.py): read and written."""

import fsspec
import pytest
from corpora import bytes_of, options, tokenizer_of, write_jsonl
from forms import texts_in, write_form
from hub import fake_gcs, fake_hub

from pipeline import build as b
from pipeline import files
from pipeline.corpus import split_units
from pipeline.documents import Reading
from pipeline.errors import CorpusError
from pipeline.inputs import find_files
from pipeline.place import place
from pipeline.reader import Store
from pipeline.verify import verify

TEXTS = [f"document {i} of naïve cafés 😀 " * 5 for i in range(100)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder in/ with the texts as JSON lines, plain and compressed, and as Parquet."""
    monkeypatch.setattr(files, "REMOTE_BLOCK_BYTES", 1000)
    folder = tmp_path / "corpus" / "in"
    folder.mkdir(parents=True)
    for form in ("jsonl", "jsonl.gz", "parquet"):
        write_form(folder, form, TEXTS)
    return folder


def check(url, reading=Reading()):  # noqa: B008
    """Files are found, read whole and by ranges, under a URL of a folder with `corpus` in it."""
    assert [file.path for file in find_files((f"{url}/*.jsonl*",), reading)] == [
        f"{url}/corpus.jsonl",
        f"{url}/corpus.jsonl.gz",
    ]
    units = split_units(find_files((f"{url}/corpus.jsonl",), reading), 4000, reading)
    assert len(units) > 3
    assert texts_in(reading, f"{url}/corpus.jsonl", unit_bytes=4000, batch_bytes=500) == TEXTS
    assert texts_in(reading, f"{url}/", unit_bytes=4000) == TEXTS * 3
    for none in (f"{url}/none.jsonl", f"{url}/none/", f"{url}/*.arrow"):
        with pytest.raises(CorpusError, match="nothing of that name"):
            find_files((none,), reading)


def test_a_dataset_of_the_hub_is_found_and_read_by_ranges(corpus, monkeypatch):
    with fake_hub(corpus.parent, monkeypatch) as asked:
        check("hf://datasets/me/corpus/in")
        with pytest.raises(CorpusError, match="hf://datasets/me/other"):
            find_files(("hf://datasets/me/other/*.jsonl",), Reading())
    assert sum(last - first < 1000 for first, last in asked) > 20


def test_google_cloud_storage_is_found_read_and_built_to(corpus, tmp_path, monkeypatch):
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    monkeypatch.setenv("SLW_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = tokenizer_of(tmp_path)
    with fake_gcs(monkeypatch):
        bucket = fsspec.filesystem("gs")
        for path in corpus.iterdir():
            bucket.pipe_file(f"corpus/in/{path.name}", path.read_bytes())
        check("gs://corpus/in")
        with pytest.raises(CorpusError, match="gs://nobucket"):
            find_files(("gs://nobucket/*.jsonl",), Reading())
        write_jsonl(tmp_path / "c.jsonl", TEXTS)
        for out in (tmp_path / "s", place("gs://corpus/a/s")):
            b.build(options(tokenizer, out, tmp_path / "c.jsonl", unit_bytes=3000, validation_fraction=0.2))
        there = {name: (place("gs://corpus/a/s") / name).read_bytes() for name in bytes_of(tmp_path / "s")}
        assert there == {name: (tmp_path / "s" / name).read_bytes() for name in there}
        assert len(bucket.find("corpus/a/s")) == len(there)
        assert verify(place("gs://corpus/a/s")) == []
        stores = Store.open("gs://corpus/a/s"), Store.open(tmp_path / "s")
        remote, local = ([store.document(i).tolist() for i in range(store.documents)] for store in stores)
        assert remote == local
