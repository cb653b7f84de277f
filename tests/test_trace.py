"""Tracing: what it says was in a step is what the loader served, whatever happened to the run in between."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import as_toml, config_of, settings_of, tiny_store
from stores import documents_of, write_store

from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from curriculum.trace import trace_document, trace_step
from pipeline.errors import ConfigError, RunError
from pipeline.origin import origin
from pipeline.reader import Store
from train.cli import main
from train.loop import run
from train.replay import loader_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("store")
    write_store(path, documents_of([1 + (i * 37) % 90 for i in range(60)]), shards=3)
    return Store.open(path)


def schedule_of(low, high, duration, sequences, epochs=1):
    return Schedule.linear(
        seqlen_start=low,
        seqlen_end=high,
        duration_steps=duration,
        seqlen_multiple=1,
        global_batch_sequences=sequences,
        epochs=epochs,
    )


def labels_of(traced, store):
    """The labels a trace speaks of, int64 [rows, seqlen]; -100 where it names no piece."""
    labels = np.full((traced.last_row - traced.first_row + 1, traced.seqlen), -100)
    for piece in traced.pieces:
        tokens = store.document(piece.document)[piece.start : piece.start + piece.length]
        assert len(tokens) == piece.length
        labels[piece.row - traced.first_row, piece.column : piece.column + piece.length] = tokens
    return labels


@settings(max_examples=20)
@given(
    before=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30), st.integers(3, 6)),
    after=st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 30), st.integers(3, 6)),
    epochs=st.integers(1, 2),
    changed_at=st.integers(1, 20),
    worlds=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)
def test_a_trace_is_what_every_rank_was_served(store, before, after, epochs, changed_at, worlds, data):
    batches, pieces, state = {}, [], None
    for schedule, world_size in zip((before, after), worlds, strict=True):
        ranks = [
            CurriculumLoader(store, schedule_of(*schedule, epochs=epochs), seed=3, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        for loader in ranks:
            if state:
                loader.load_state_dict(state, change_schedule=True)
        for loader in ranks:
            with loader:
                for batch in loader:
                    batches[batch.step, loader.rank] = batch
                    pieces += zip(*(c.tolist() for c in (batch.pieces.document, batch.pieces.start)), strict=True)
                    if state is None and loader.step == min(changed_at, loader.schedule.total_steps - 1):
                        break
        state = ranks[0].state_dict() if state is None else state
    last_step = loader.schedule.total_steps - 1
    for step in {0, state["step"] - 1, state["step"], last_step, data.draw(st.integers(0, last_step))}:
        world_size = worlds[step >= state["step"]] if state["step"] else worlds[1]
        for rank in range(world_size):
            if step < 0 or (step, rank) not in batches:
                continue
            # The state of a later moment, in a world of another size: what it says of the past stays true.
            tracer = CurriculumLoader(store, loader.order.asked[-1][1], seed=3, rank=rank, world_size=world_size)
            tracer.load_state_dict(loader.state_dict())
            traced = trace_step(tracer, step)
            assert np.array_equal(labels_of(traced, store), batches[step, rank].labels)
            assert traced.padding == int((batches[step, rank].labels < 0).sum())
    document = data.draw(st.integers(0, store.documents - 1))
    traced = trace_document(tracer_of_all(store, loader), document)
    assert sorted(piece.start for piece in traced.pieces) == sorted(start for d, start in pieces if d == document)
    assert (traced.served_least, traced.served_most) == (epochs, epochs)


def tracer_of_all(store, loader):
    tracer = CurriculumLoader(store, loader.order.asked[-1][1], seed=3)
    tracer.load_state_dict(loader.state_dict())
    return tracer


@pytest.mark.parametrize(
    "curriculum",
    [
        {"pacing": "linear", "seqlen_start": 8, "seqlen_end": 32, "duration_steps": 6, "dealing": "truncate"},
        {"pacing": "buckets", "seqlen_start": 8, "seqlen_end": 32, "cycles": 1},
        {"pacing": "skyladder", "seqlen": 32, "attention_window_start": 8, "duration_steps": 6},
    ],
    ids=["truncate", "buckets", "skyladder"],
)
def test_a_trace_is_what_was_served_by_every_planner(store, curriculum):
    schedule = Schedule.from_settings(curriculum, {"global_batch_tokens": 128}, epochs=1)
    with CurriculumLoader(store, schedule, seed=1, rank=1, world_size=2) as loader:
        batches = list(loader)
    assert len(batches) > 5
    for batch in batches:
        assert np.array_equal(labels_of(trace_step(loader, batch.step), store), batch.labels)
    found = trace_document(loader, 7).pieces
    served = [(b.step, s) for b in batches for d, s in zip(b.pieces.document, b.pieces.start, strict=True) if d == 7]
    assert [(piece.step, piece.start) for piece in found] == served


def test_a_document_is_found_where_the_steps_say(store):
    loader = CurriculumLoader(store, schedule_of(4, 20, 12, 4), seed=1)
    everywhere = [piece for step in range(loader.schedule.total_steps) for piece in trace_step(loader, step).pieces]
    for document in (0, 17, 59):
        assert trace_document(loader, document).pieces == [p for p in everywhere if p.document == document]


def test_steps_documents_and_ranks_that_are_not_there_are_refused(store, tmp_path):
    loader = CurriculumLoader(store, schedule_of(8, 8, 0, 4), seed=1)
    total = loader.schedule.total_steps
    for step in (-1, total):
        with pytest.raises(ConfigError, match=rf"(?s)no such step.*{step}.*0 to {total - 1}"):
            trace_step(loader, step)
    for document in (-1, 60):
        with pytest.raises(ConfigError, match=rf"(?s)no such document.*{document}.*0 to 59"):
            trace_document(loader, document)
    with pytest.raises(ConfigError, match="outside the world"):
        loader_of(write_config(tmp_path, tiny_store(tmp_path / "store")), rank=2, world_size=2)
    with pytest.raises(RunError, match="not a run"):
        loader_of(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"no such run and no such config[\s\S]*CONFIG.toml"):
        loader_of(tmp_path / "nothing.toml")


def test_a_document_knows_where_it_comes_from(store, tmp_path):
    for document in (0, 19, 20, 59):
        found = origin(store, document)
        assert (found.unit, found.row, found.id) == (f"test {document // 20}", document % 20, None)
        assert found.tokens == store.lengths[document]
    write_store(tmp_path, documents_of([5, 6]), source="books")
    assert str(origin(Store.open(tmp_path), 1)) == "books, test 0 at 1"


def write_config(folder, store, **changes):
    path = folder / "run.toml"
    path.write_text(as_toml(settings_of(store, folder / "run", **changes)))
    return path


def command(*arguments):
    done = CliRunner().invoke(main, ["trace", *map(str, arguments)])
    return done.exit_code, done.output


def test_a_run_is_traced_under_the_schedules_it_had(tmp_path):
    store = tiny_store(tmp_path / "store")
    served, follow = [], CurriculumLoader.__next__

    def stop_at(step):
        def following(loader):
            if loader.store.split == "train" and loader.step == step:
                raise RuntimeError("stopped")
            batch = follow(loader)
            served[batch.step :] = [batch]
            return batch

        return following

    short = config_of(store, tmp_path / "run", run__epochs=1, run__validate_every_steps=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CurriculumLoader, "__next__", stop_at(16))
        with pytest.raises(RuntimeError, match="stopped"):
            run(short, warn=lambda text: None)
    before = list(served)
    config = config_of(
        store, tmp_path / "run", curriculum__seqlen_start=32, run__epochs=1, run__validate_every_steps=1000
    )
    outcome = run(config, change_schedule=True, warn=lambda text: None)
    loader = loader_of(tmp_path / "run")
    assert loader.step == outcome.step == loader.schedule.total_steps
    for step in range(14):  # the checkpoint it went on from
        assert np.array_equal(labels_of(trace_step(loader, step), loader.store), before[step].labels)
    assert loader.schedule.seqlen(14) == 32 > before[13].seqlen
    for document in range(60):
        traced = trace_document(loader, document)
        assert (traced.served_least, traced.served_most) == (1, 1)
    with pytest.raises(ConfigError, match="no key can be overridden"):
        loader_of(tmp_path / "run", ("optimizer.lr=1",))


def test_the_command_traces_a_config_before_it_runs(tmp_path):
    store = Store.open(tiny_store(tmp_path / "store"))
    path = write_config(tmp_path, store.path)
    status, output = command(path, "--step", 3, "--text", "--json")
    assert status == 0
    pieces = json.loads(output)["pieces"]
    for piece in pieces:
        tokens = store.document(piece["document"])[piece["start"] : piece["start"] + piece["length"]]
        assert piece["text"].split() == [f"w{token}" if token else "<|endoftext|>" for token in tokens]
        assert piece["origin"]["unit"].startswith("test ")
    halves = [command(path, "--step", 3, "--rank", r, "--world-size", 2, "--json")[1] for r in (0, 1)]
    assert [p["document"] for half in halves for p in json.loads(half)["pieces"]] == [p["document"] for p in pieces]

    status, output = command(path, "--step", 3, "--text")
    assert status == 0
    assert output.count("\n    | ") == len(pieces)
    status, output = command(path, "--document", pieces[0]["document"])
    assert status == 0
    told = json.loads(command(path, "--document", pieces[0]["document"], "--json")[1])
    assert "each token served 1 times here" in output
    rows = [[int(n) for n in line.replace(",", "").split()] for line in output.splitlines()[2:]]
    assert rows == [
        [p["step"], p["row"], p["column"], p["document"], p["start"], p["start"] + p["length"] - 1]
        for p in told["pieces"]
    ]
    assert any(row[0] == 3 for row in rows)
    assert not any("origin" in piece for piece in told["pieces"]), "it is the document's own"
    half = write_config(tmp_path, store.path, run__epochs=None, run__total_tokens=store.tokens // 2)
    longest = int(store.lengths.argmax())
    begun = sum(piece.length for piece in trace_document(loader_of(half), longest).pieces)
    assert 0 < begun < store.lengths[longest]
    assert "each token served 0 to 1 times here" in command(half, "--document", longest)[1]
    unread = int(np.flatnonzero([not trace_document(loader_of(half), n).pieces for n in range(store.documents)])[0])
    assert command(half, "--document", unread)[1].splitlines()[-1].endswith("each token served 0 times here")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "give one of --step and --document"),
        (("--step", 1, "--document", 1), "give one of --step and --document"),
        (("--step", 1, "--rank", 1), "give --rank and --world-size together"),
        (("--step", 10_000), "no such step"),
        (("--document", 60), "no such document"),
        (("--step", 0, "--rank", 2, "--world-size", 2), "outside the world"),
    ],
)
def test_the_command_says_what_is_impossible(tmp_path, arguments, says):
    path = write_config(tmp_path, tiny_store(tmp_path / "store"))
    status, output = command(path, *arguments)
    assert status == 2
    assert says in output
