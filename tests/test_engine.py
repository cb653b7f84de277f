"""Whoever runs the units, in any order, twice, or killed in between: the store's bytes are the same."""

import os
import signal
from pathlib import Path

import pytest
from corpora import bytes_of, options, tokenizer_of, write_jsonl

from pipeline import build as b
from pipeline import engine
from pipeline.documents import Unit
from pipeline.errors import ConfigError, StoreError
from pipeline.format import Manifest
from pipeline.job import Job

TEXTS = [f"tale {i}: " + "of ships, naïve cafés and 😀 " * (i % 11) for i in range(90)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "c.jsonl", TEXTS)
    return folder / "c.jsonl", tokenizer_of(folder)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "store"
    b.build(asked(corpus, out))
    assert len(Manifest.load(out).shards) > 6
    return bytes_of(out)


def asked(corpus, out, **more):
    return options(corpus[1], out, corpus[0], unit_bytes=3000, validation_fraction=0.2, **more)


def dies_once(task, unit_options):
    """Stands in for `build_one`: the process of unit 1 is killed the first time."""
    mark = unit_options.out / ".slw-build" / "died"
    if task[0] == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return real_build_one(task, unit_options)


real_build_one = engine.build_one


def test_one_process_and_four_make_the_same_bytes(corpus, whole, tmp_path):
    b.build(asked(corpus, tmp_path / "s", workers=4))
    assert bytes_of(tmp_path / "s") == whole


def test_ray_makes_the_same_bytes_and_retries_a_lost_task(corpus, whole, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(engine, "build_one", dies_once)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    seen = []
    b.build(
        asked(corpus, tmp_path / "s", engine="ray", workers=2),
        lambda result, units: seen.append((result.unit, units)),
    )
    assert bytes_of(tmp_path / "s") == whole
    assert sorted(seen) == [(unit, len(seen)) for unit in range(len(seen))]
    assert not ray.is_initialized()


def test_paths_do_not_depend_on_the_folder_of_a_worker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unit = Unit(
        kind="texts", paths=("a/b.txt", "s3://a/b.txt", "zip://b.txt::a.zip", "zip://b.txt::s3://a.zip", "a::b")
    )
    found = (f"{tmp_path}/a/b.txt", "s3://a/b.txt", f"zip://b.txt::{tmp_path}/a.zip", "zip://b.txt::s3://a.zip")
    assert engine._absolute(unit).paths == (*found, f"{tmp_path}/a::b")
    assert engine._absolute(unit).name == unit.name


def test_a_lost_local_process_is_named_and_the_rerun_goes_on(corpus, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "build_one", dies_once)
    with pytest.raises(StoreError, match="worker process was lost"):
        b.build(asked(corpus, tmp_path / "s", workers=2))
    b.build(asked(corpus, tmp_path / "s", workers=2))
    assert bytes_of(tmp_path / "s") == whole


@pytest.mark.parametrize("first", [0, 1])
def test_tasks_of_an_array_job_in_any_order_and_twice(corpus, whole, tmp_path, first):
    out = tmp_path / "s"
    for task in (first + 2, first, first + 2):
        result = b.build_task(asked(corpus, out), task, 3)
        with pytest.raises(StoreError, match=r"units are missing[\s\S]*are not done: \d[\s\S]*--task i/n"):
            b.finalize(out)
    assert result.built == 0 < result.units
    b.build_task(asked(corpus, out, workers=2), first + 1, 3)
    b.finalize(out)
    assert bytes_of(out) == whole
    assert b.finalize(out) == Manifest.load(out)
    assert b.build_task(asked(corpus, out), first, 3).built == 0
    assert bytes_of(out) == whole


def test_a_build_without_tasks_finishes_what_tasks_began(corpus, whole, tmp_path):
    b.build_task(asked(corpus, tmp_path / "s"), 0, 2)
    b.build(asked(corpus, tmp_path / "s"))
    assert bytes_of(tmp_path / "s") == whole


def test_tasks_that_do_not_belong_together_are_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match="3/2"):
        b.build_task(asked(corpus, tmp_path / "s"), 3, 2)
    with pytest.raises(StoreError, match="no build here"):
        b.finalize(tmp_path / "s")
    b.build_task(asked(corpus, tmp_path / "s"), 0, 2)
    with pytest.raises(StoreError, match="unit_bytes: 3000 there, 4000 asked"):
        b.build_task(options(corpus[1], tmp_path / "s", corpus[0], unit_bytes=4000, validation_fraction=0.2), 1, 2)


def test_who_is_at_work_keeps_others_out(corpus, whole, tmp_path):
    job = Job(asked(corpus, tmp_path / "s"))
    with job.draft.lock(shared=True):
        b.build_task(asked(corpus, tmp_path / "s"), 0, 2)
        for other in (lambda: b.build(asked(corpus, tmp_path / "s")), lambda: b.finalize(tmp_path / "s")):
            with pytest.raises(StoreError, match="another build of this store is running"):
                other()
    with job.draft.lock(), pytest.raises(StoreError, match="another build"):
        b.build_task(asked(corpus, tmp_path / "s"), 1, 2)
    b.build(asked(corpus, tmp_path / "s"))
    assert bytes_of(tmp_path / "s") == whole


def test_an_unknown_engine_is_named():
    with pytest.raises(ConfigError, match="inline, processes, ray"):
        engine.run_units("dask", [], None, engine.Crew())
