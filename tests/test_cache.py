"""Object storage: built there, trained from there, through a bounded cache that processes share."""

import json
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from click.testing import CliRunner
from corpora import bytes_of, options, tokenizer_of, write_jsonl
from runs import as_toml, settings_of
from stores import documents_of, write_store

import pipeline.cache
from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline import build as b
from pipeline.cache import Cache, read_head
from pipeline.cli import main
from pipeline.errors import ConfigError, StoreError
from pipeline.format import Manifest
from pipeline.place import place, sizes
from pipeline.reader import Store
from pipeline.verify import verify

pytest.importorskip("s3fs")
cloud = pytest.importorskip("cloud", reason="moto is not installed")
TEXTS = [f"tale {i}: " + "of ships, naïve cafés and 😀 " * (i % 11) for i in range(60)]


@pytest.fixture(scope="module", autouse=True)
def s3():
    with pytest.MonkeyPatch.context() as environment, cloud.s3_server(environment):
        yield


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("SLW_CACHE_DIR", str(tmp_path / "cache"))
    return cloud.new_bucket()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder / "c.jsonl", tokenizer_of(folder)


def asked(corpus, out, **more):
    return options(corpus[1], out, corpus[0], unit_bytes=3000, validation_fraction=0.2, **more)


def upload(folder, url):
    remote = place(url)
    for file in sizes(folder):
        (remote / file).write_bytes((folder / file).read_bytes())
    return remote


def all_of(store):
    return [store.document(index).tolist() for index in range(store.documents)]


def test_a_store_built_to_s3_is_the_one_built_here(corpus, bucket, tmp_path):
    b.build(asked(corpus, tmp_path / "s"))
    url = place(f"{bucket}/a/s")
    b.build_task(asked(corpus, url), 0, 2)
    with pytest.raises(StoreError, match="units are missing"):
        b.finalize(url)
    with pytest.raises(StoreError, match="not a finished store"):
        Store.open(f"{bucket}/a/s")
    b.build(asked(corpus, url, workers=2))
    assert {file: (url / file).read_bytes() for file in sizes(url)} == {
        file: (tmp_path / "s" / file).read_bytes() for file in bytes_of(tmp_path / "s")
    }
    assert b.build(asked(corpus, url)).already_built
    with pytest.raises(StoreError, match="unit_bytes: 3000 there, 4000 asked"):
        b.build(options(corpus[1], url, corpus[0], unit_bytes=4000, validation_fraction=0.2))
    for split in ("train", "validation"):
        assert all_of(Store.open(f"{bucket}/a/s", split)) == all_of(Store.open(tmp_path / "s", split))
    b.remove(url)
    assert sizes(url) == {}


def test_damage_on_s3_is_named_refused_and_repaired(corpus, bucket):
    url = place(f"{bucket}/s")
    b.build(asked(corpus, url))
    whole = {file: (url / file).read_bytes() for file in sizes(url)}
    first, second = (url / shard.file for shard in Manifest.load(url).shards[:2])
    data = bytearray(whole["shards/00000.arrow"])
    data[-50] ^= 1
    first.write_bytes(bytes(data))
    second.unlink()
    with pytest.raises(StoreError, match=r"digest is not the one[\s\S]*00000\.arrow"):
        Store.open(url).document(0)
    assert len(verify(url)) == 2
    assert b.build(asked(corpus, url)).repaired == 2
    assert {file: (url / file).read_bytes() for file in sizes(url)} == whole


def test_every_command_takes_a_url(corpus, bucket, tmp_path):
    from train.cli import main as train

    url = f"{bucket}/s"
    build = ["build", corpus[0], "--tokenizer", corpus[1], "--validation-fraction", 0.2, "--unit-bytes", 3000]

    def ask(script, *arguments):
        result = CliRunner().invoke(script, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, (result.output, result.exception)
        return json.loads(result.stdout)

    built = ask(main, *build, "--out", url)
    assert ask(main, "info", url)["splits"]["train"]["tokens"] == built["tokens"]
    assert ask(main, "verify", url)["sound"]
    assert ask(main, "show", url, "--document", 3)["text"].endswith("<|endoftext|>")
    assert ask(main, "finalize", url)["tokens"] == built["tokens"]
    b.build(asked(corpus, tmp_path / "s"))
    for command in (("pack", "--seqlen", 16), ("export", "--format", "hf"), ("export", "--format", "megatron")):
        for name, store in (("here", tmp_path / "s"), ("s3", url)):
            ask(
                main, command[0], store, *command[1:], "--out", tmp_path / f"out-{name}" / "-".join(map(str, command))
            )
    assert bytes_of(tmp_path / "out-s3") == bytes_of(tmp_path / "out-here")
    losses = []
    for name, store in (("here", tmp_path / "s"), ("s3", url)):
        toml = tmp_path / f"{name}.toml"
        toml.write_text(as_toml(settings_of(store, tmp_path / f"run-{name}")))
        assert ask(train, "plan", toml)["ledger"]["targets"] == built["tokens"]
        losses.append(ask(train, "run", toml)["validation_loss"])
    assert losses[0] == losses[1]
    assert ask(train, "sample", tmp_path / "run-s3", "--prompt", "a", "--tokens", 3)["text"].startswith("a")


def test_lengths_are_read_without_the_tokens(bucket, tmp_path):
    documents = documents_of([9000, 1, 70_000, 5])
    write_store(tmp_path / "s", documents, shards=2)
    upload(tmp_path / "s", f"{bucket}/s")
    store = Store.open(f"{bucket}/s", cache_dir=tmp_path / "c")
    assert store.lengths.tolist() == [len(document) for document in documents]
    assert not (tmp_path / "c").exists()
    assert store.document(2).tolist() == documents[2].tolist()
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_lengths_of_a_shard_that_was_fetched_are_not_asked_for_again(bucket, tmp_path, monkeypatch):
    write_store(tmp_path / "local", documents_of([5, 9, 2, 7]), shards=2)
    upload(tmp_path / "local", f"{bucket}/store")
    store = Store.open(place(f"{bucket}/store"))
    store.read_ahead(1)
    monkeypatch.setattr("pipeline.reader.read_head", None)
    assert next(store.shard_lengths([1])).tolist() == [2, 7]
    with pytest.raises(TypeError):
        next(store.shard_lengths([0]))
    monkeypatch.undo()
    next(store._cache.folder.glob("*.arrow")).unlink()
    assert next(store.shard_lengths([1])).tolist() == [2, 7]


def test_heads_of_shards_are_asked_for_at_once(bucket, tmp_path, monkeypatch):
    write_store(tmp_path / "local", documents_of([5, 9, 2, 7]), shards=4)
    upload(tmp_path / "local", f"{bucket}/store")
    store = Store.open(place(f"{bucket}/store"))
    others, read = threading.Barrier(4, timeout=30), read_head

    def wait_for_others(*asked):
        others.wait()
        return read(*asked)

    monkeypatch.setattr("pipeline.reader.read_head", wait_for_others)
    schedule = Schedule.constant(seqlen=1, global_batch_sequences=1, epochs=1)
    with CurriculumLoader(store, schedule, seed=1) as loader:
        assert next(loader).targets == 1


def test_the_cache_is_bounded_and_keeps_what_was_used_last(bucket, tmp_path):
    documents = documents_of([1000] * 6)
    manifest = write_store(tmp_path / "s", documents, shards=6)
    upload(tmp_path / "s", f"{bucket}/s")
    shard = manifest.shards[0].bytes
    store = Store.open(f"{bucket}/s", cache_dir=tmp_path / "c", cache_bytes=3 * shard)
    for index in (0, 1, 2, 0, 3, 0, 4, 5, 0, 1):
        assert store.document(index).tolist() == documents[index].tolist()
        assert sum(sizes(tmp_path / "c").values()) <= 3 * shard
        assert len(store._maps) <= 3
    kept = {file.removesuffix(".arrow") for file in sizes(tmp_path / "c")}
    assert kept == {manifest.shards[index].digest for index in (5, 0, 1)}
    with pytest.raises(StoreError, match=r"cache is smaller[\s\S]*6 shards[\s\S]*SLW_CACHE_BYTES"):
        ones = np.ones(6, dtype=np.int64)
        store.gather(np.arange(6), ones - 1, ones, np.empty(6, dtype=np.int64), np.empty(6, dtype=np.int64))


def test_threads_that_share_a_small_store_cache_read_what_was_stored(bucket, tmp_path):
    documents = documents_of([500] * 8)
    manifest = write_store(tmp_path / "s", documents, shards=8)
    upload(tmp_path / "s", f"{bucket}/s")
    store = Store.open(f"{bucket}/s", cache_dir=tmp_path / "c", cache_bytes=2 * manifest.shards[0].bytes)
    order = np.random.default_rng(0).integers(0, 8, 60).tolist()
    with ThreadPoolExecutor(4) as pool:
        for index, tokens in zip(order, pool.map(store.document, order), strict=True):
            assert tokens.tolist() == documents[index].tolist()


def read_all(url, folder, limit, results):
    results.put([len(Store.open(url, cache_dir=folder, cache_bytes=limit).document(i)) for i in (0, 1, 2, 3, 0)])


def test_shards_that_a_batch_needs_are_fetched_at_the_same_time_within_the_limit(bucket, tmp_path, monkeypatch):
    documents = documents_of([50] * 30)
    write_store(tmp_path / "local", documents, shards=3)
    upload(tmp_path / "local", f"{bucket}/store")
    sizes_of = [shard.bytes for shard in Manifest.load(tmp_path / "local").shards]
    together, needed = threading.Barrier(3, timeout=20), []
    make_room, checked = Cache._make_room, pipeline.cache.digest_of

    def compared(path):
        if path.name.endswith(".partial"):
            together.wait()  # three were downloaded: none was compared before
        return checked(path)

    monkeypatch.setattr(Cache, "_make_room", lambda self, size: needed.append(size) or make_room(self, size))
    monkeypatch.setattr(pipeline.cache, "digest_of", compared)
    store = Store.open(place(f"{bucket}/store"), cache_dir=tmp_path / "cache", cache_bytes=sum(sizes_of))
    labels = np.empty((2, 60), dtype=np.int64)
    which = np.array([0, 10, 20])
    store.gather(which, np.zeros(3, dtype=np.int64), np.full(3, 20), *labels)
    assert labels[1].tolist() == [token for index in which for token in documents[index][:20].tolist()]
    assert max(needed) > max(sizes_of), "room for what others download"
    assert store._cache._coming == 0


def test_processes_share_a_cache(bucket, tmp_path):
    documents = documents_of([400, 300, 200, 100])
    manifest = write_store(tmp_path / "s", documents, shards=4)
    upload(tmp_path / "s", f"{bucket}/s")
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    limit = 2 * manifest.shards[0].bytes
    work = [context.Process(target=read_all, args=(f"{bucket}/s", tmp_path / "c", limit, results)) for _ in range(2)]
    for process in work:
        process.start()
    assert [results.get(timeout=300) for _ in work] == [[400, 300, 200, 100, 400]] * 2
    for process in work:
        process.join()
    assert not [file for file in sizes(tmp_path / "c") if "partial" in file]


def test_a_cached_file_that_was_damaged_or_half_fetched_is_fetched_again(bucket, tmp_path):
    documents = documents_of([1000])
    manifest = write_store(tmp_path / "s", documents)
    upload(tmp_path / "s", f"{bucket}/s")
    name = f"{manifest.shards[0].digest}.arrow"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f".{name}.partial").write_bytes(b"half of it")
    assert Store.open(f"{bucket}/s", cache_dir=tmp_path / "c").document(0).tolist() == documents[0].tolist()
    (tmp_path / "c" / name).write_bytes(bytes(manifest.shards[0].bytes))
    assert Store.open(f"{bucket}/s", cache_dir=tmp_path / "c").document(0).tolist() == documents[0].tolist()
    assert list(sizes(tmp_path / "c")) == [name]


def test_what_is_not_there_or_cannot_be_reached_is_named(corpus, bucket, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="no store here"):
        Store.open(f"{bucket}/none")
    for use in (
        lambda url: b.build(asked(corpus, url)),
        lambda url: b.build_task(asked(corpus, url), 0, 2),
        b.finalize,
    ):
        with pytest.raises(StoreError, match="object storage cannot be reached"):
            use(place("s3://No Bucket/s"))
    with pytest.raises(ConfigError, match="check the protocol"):
        place("nosuchprotocol://x/y")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "gcsfs", None)
        without.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
        with pytest.raises(ConfigError, match=r"pip install 'slw\[gs\]'"):
            place("gs://x/y")
    with pytest.raises(StoreError, match="object storage cannot be reached"):
        Store.open("s3://No Bucket/s")
    write_store(tmp_path / "s", documents_of([5]))
    url = upload(tmp_path / "s", f"{bucket}/s")
    (url / "shards/00000.arrow").unlink()
    for use in (lambda: Store.open(url).lengths, lambda: Store.open(url).document(0)):
        with pytest.raises(StoreError, match=r"missing[\s\S]*s3://[\s\S]*slw-prep build"):
            use()
    monkeypatch.setenv("SLW_CACHE_BYTES", "lots")
    with pytest.raises(ConfigError, match="SLW_CACHE_BYTES"):
        Cache()
