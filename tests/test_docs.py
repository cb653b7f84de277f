"""The Python of docs/ that no other test runs, as it stands (smaller); the links of all texts lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from runs import config_of, tiny_store

from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline.packed import write_packed
from pipeline.reader import Store
from train import loop
from train.export import export_hf
from train.trained import load_run

ROOT = Path(__file__).parents[1]
TEXTS = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + [ROOT / "benchmarks/README.md"]
RAMP = {"seqlen_start": 8, "seqlen_end": 32, "global_batch_sequences": 4, "epochs": 1}


def code_of(text, word, smaller):
    """The one block of Python in `text` that says `word`, with numbers made smaller."""
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", (ROOT / text).read_text(), re.S) if word in c)
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    return code


@pytest.fixture
def books(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    monkeypatch.chdir(tmp_path)
    return Store.open(tiny_store(tmp_path / "shards" / "books"))


def test_the_length_rises_in_a_trainer_of_ones_own(books):
    schedule = Schedule.adaptive(**RAMP)
    with CurriculumLoader(books, schedule, seed=1) as loader:
        names = {"loader": loader, "schedule": schedule, "validation_loss": lambda: 3.0}
        exec(code_of("docs/schedules.md", "Calm()", {"100": "2"}), names)
        assert [loader.schedule.seqlen(step) for step in (5, 6, 11, 12, 18)] == [8, 16, 16, 24, 32]
        assert loader.step == loader.schedule.total_steps


def test_batches_are_made_in_memory_of_ones_own(books):
    code = code_of("docs/serving.md", "def pinned", {", pin_memory=True": ""})
    schedule = Schedule.constant(seqlen=16, global_batch_sequences=4, epochs=1)
    names = {"CurriculumLoader": CurriculumLoader, "store": books, "schedule": schedule}
    exec(code, names)
    with names["loader"] as loader:
        assert sum(int((torch.from_numpy(batch.labels) >= 0).sum()) for batch in loader) == books.tokens


def test_held_out_documents_are_read_and_a_run_goes_on_with_another_schedule(books):
    with CurriculumLoader(books, Schedule.linear(**RAMP, duration_steps=20), seed=1) as begun:
        served = sum(next(begun).targets for _ in range(5))
        names = {"state": begun.state_dict()}
    exec(code_of("docs/integrate.md", "held_out", {"sequences=1024": "sequences=4", "1024": "64"}), names)
    assert names["validation"].step == names["validation"].schedule.total_steps
    with names["loader"] as loader:
        rest = list(loader)
    assert (rest[0].step, rest[0].seqlen) == (5, 64)
    assert served + sum(batch.targets for batch in rest) == books.tokens


def test_a_packed_set_is_learnt_from_in_a_loop_of_ones_own(books):
    write_packed(books, Path("packed/books-1024"), seqlen=16, seed=1)
    table, rows = torch.nn.Embedding(50, 50), []

    def model(ids, position_ids):
        assert ids.shape == position_ids.shape and ids.shape[1] == 16
        rows.append(len(ids))
        return table(ids)

    names = {"torch": torch, "model": model}
    exec(code_of("docs/interop.md", "rows.iter", {}), names)
    assert sum(rows) == -(-books.tokens // 16) and max(rows) == 8
    names["loss"].backward()
    assert table.weight.grad.abs().sum() > 0


def test_shards_are_opened_by_other_libraries(books, tmp_path, monkeypatch, capfd):
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("duckdb")
    pytest.importorskip("polars")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = {}
    exec(code_of("docs/interop.md", "polars.read", {}), names)
    assert [len(tokens) for tokens in names["table"]["tokens"]] == books.lengths[: len(names["table"])].tolist()


def test_an_export_is_opened_by_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    short = {"run__epochs": None, "run__total_tokens": 200}
    loop.run(config_of(tiny_store(tmp_path / "store"), tmp_path / "run", **short), warn=print)
    export_hf(tmp_path / "run", Path("exported/slw"))
    names = {}
    exec(code_of("docs/evaluate.md", "AutoTokenizer", {}), names)
    ids = names["tokenizer"]("w3 w4 w3", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 4, 3]]
    with torch.no_grad():
        ours = load_run(tmp_path / "run").model(ids, torch.arange(3)[None])[..., :50]
        torch.testing.assert_close(names["model"](ids).logits, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_every_link_to_a_file_leads_to_one(text):
    for link in re.findall(r"\]\((?!http)([^)#]+)", text.read_text()):
        assert (text.parent / link).exists(), link
