"""The examples of docs/integrate.md, run as they stand with the real libraries: every token once, exact resume."""

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import launch
from runs import tiny_store

from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline.reader import Store
from train.data import document_mask

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

ROOT = Path(__file__).parents[1]
_, COMMON, *EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs/integrate.md").read_text(), re.S)
NAMES = ("bare", "accelerate", "trainer")
SMALLER = {
    "seqlen_end=1024": "seqlen_end=64",
    "60_000": "6",
    "512": "4",
    "3000": "5",
    "GPT2Config(": "GPT2Config(n_layer=2, n_embd=32, n_head=2, ",
}
SAVE_EVERY = {"1000": "5"}
KILLED_AT = 8
KILLED_SAVING = 10


class Killed(BaseException):
    """Nothing in a trainer catches it."""


def code_of(name):
    """An example with its common part, for a tiny store; every number that is made smaller is there."""
    code = COMMON
    for large, small in SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    example = EXAMPLES[NAMES.index(name)]
    for often, seldom in SAVE_EVERY.items():
        assert often in example
        example = example.replace(often, seldom)
    return code + example


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("shards") / "books")


@pytest.fixture
def run(books, tmp_path, monkeypatch):
    """run(name, folder, kill="reading" or "saving") -> (weights, batches handed out, what the model saw)."""

    def run(name, folder, *, kill=None):
        folder = tmp_path / folder
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        if not (folder / "shards" / "books").exists():
            (folder / "shards" / "books").symlink_to(books)
        batches, seen = [], []
        following, forward = CurriculumLoader.__next__, transformers.GPT2LMHeadModel.forward
        state_dict = CurriculumLoader.state_dict

        def next_or_die(loader):
            if kill == "reading" and loader.step == KILLED_AT:
                raise Killed
            batches.append(following(loader))
            return batches[-1]

        def state_or_die(loader):
            if kill == "saving" and loader.step == KILLED_SAVING:
                raise Killed
            return state_dict(loader)

        @functools.wraps(forward)
        def watched(model, *args, **kwargs):
            seen.append((kwargs["input_ids"].clone(), kwargs["position_ids"].clone()))
            return forward(model, *args, **kwargs)

        names = {"__name__": "example"}
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(CurriculumLoader, "__next__", next_or_die)
            patch.setattr(CurriculumLoader, "state_dict", state_or_die)
            patch.setattr(transformers.GPT2LMHeadModel, "forward", watched)
            try:
                exec(compile(code_of(name), name, "exec"), names)
            except Killed:
                assert kill
                names["loader"].close()
            else:
                assert not kill
        weights = {key: value.clone() for key, value in names["model"].state_dict().items()}
        return weights, batches, seen

    return run


def rows(seen):
    """What a model saw, row by row, whatever the micro-batches."""
    return [(ids.tolist(), positions.tolist()) for part in seen for ids, positions in zip(*part, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_learns_every_token_once_and_a_killed_run_ends_the_same(run, books, name):
    weights, batches, seen = run(name, "undisturbed")
    store = Store.open(books)
    count = [np.zeros(n, int) for n in store.lengths]
    for batch in batches:
        for document, start, length in zip(
            batch.pieces.document, batch.pieces.start, batch.pieces.length, strict=True
        ):
            count[document][start : start + length] += 1
    assert all((each == 1).all() for each in count)
    served = [(torch.from_numpy(b.input_ids), torch.from_numpy(b.position_ids)) for b in batches]
    assert rows(seen) == rows(served)
    assert len({batch.seqlen for batch in batches}) > 4

    for kill, died in {"reading": KILLED_AT, "saving": KILLED_SAVING}.items():
        _, before, _ = run(name, kill, kill=kill)
        resumed, after, _ = run(name, kill)
        assert [batch.step for batch in before] == list(range(died))
        assert [batch.step for batch in after] == list(range(5, len(batches)))
        for batch in after:
            assert np.array_equal(batch.labels, batches[batch.step].labels)
        assert weights.keys() == resumed.keys()
        assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_the_three_examples_end_with_the_same_weights(run):
    first, *others = [run(name, name)[0] for name in NAMES]
    begun = run("bare", "begun", kill="reading")[0]
    for other in others:
        for key in first:
            torch.testing.assert_close(other[key], first[key], rtol=0, atol=2e-6)
    assert any((first[key] - begun[key]).abs().max() > 1e-4 for key in first), "the run moves the weights by more"


def pretrain(folder, script="pretrain.py"):
    """On each of two ranks."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    os.chdir(folder)
    runpy.run_path(str(script), run_name="__main__")
    os._exit(0)  # gloo's threads sometimes abort Python's own end


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_end_with_the_weights_of_one(run, books, tmp_path, name):
    alone, _, _ = run(name, "alone")
    folder = tmp_path / "pair"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "books").symlink_to(books)
    end = "assert loader.world_size == 2\n"
    end += "if loader.rank == 0:\n    torch.save(getattr(model, 'module', model).state_dict(), 'end.pt')\n"
    (folder / "pretrain.py").write_text(code_of(name).replace("PARTS = 4", "PARTS = 2") + end)
    codes, output = launch(2, pretrain, folder, folder=tmp_path / "output")
    assert codes == [0, 0], output
    together = torch.load(folder / "end.pt", weights_only=True)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("name", "by_torchrun"), [("accelerate", False), ("trainer", True)])
def test_two_ranks_serve_every_target_once_and_end_with_one_model(books, tmp_path, name, by_torchrun):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "books").symlink_to(books)
    (tmp_path / "pretrain.py").write_text(code_of(name).replace("PARTS = 4", "PARTS = 2"))
    script = ROOT / "tests/watched.py"
    if by_torchrun:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run([*torchrun, script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    else:
        codes, output = launch(2, pretrain, tmp_path, script, folder=tmp_path / "output")
        assert codes == [0, 0], output
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    store = Store.open(books)
    count = [np.zeros(n, int) for n in store.lengths]
    for rank in ranks:
        assert rank["learnt"], "the model saw other rows than those that were served"
        for batch, targets in zip(rank["pieces"], rank["targets"], strict=True):
            assert targets == sum(batch[2])
            for document, start, length in zip(*batch, strict=True):
                count[document][start : start + length] += 1
    assert all((each == 1).all() for each in count)
    assert ranks[0]["losses"] == ranks[1]["losses"] != []


@pytest.fixture(scope="module")
def first(books):
    """A batch whose rows hold several pieces, and a model for it."""
    store = Store.open(books)
    schedule = Schedule.constant(seqlen=128, global_batch_sequences=6, epochs=1)
    with CurriculumLoader(store, schedule, seed=1) as loader:
        batch = next(loader)
    assert len(batch.cu_seqlens) - 1 >= 2 * len(batch.labels)
    torch.manual_seed(1)
    config = transformers.GPT2Config(vocab_size=50, n_positions=128, n_layer=2, n_embd=32, n_head=2)
    return batch, transformers.GPT2LMHeadModel(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_token_sees_is_what_the_table_says(first, attention):
    batch, model = first
    model.set_attn_implementation(attention)
    ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
    pieces = zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False)
    alone = torch.cat([model(input_ids=ids.view(1, -1)[:, a:b], use_cache=False).logits[0] for a, b in pieces])
    masked, row = document_mask(batch), torch.ones(128, 128, dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
    if attention == "eager":  # which adds its mask
        masked, row = (torch.zeros(m.shape).masked_fill(~m, -torch.inf) for m in (masked, row))

    def logits(**how):
        return model(input_ids=ids, position_ids=positions, **how).logits.flatten(0, 1)

    torch.testing.assert_close(logits(use_cache=False), alone)
    torch.testing.assert_close(logits(attention_mask=masked), alone)
    assert not torch.allclose(logits(use_cache=True), alone)
    torch.testing.assert_close(logits(use_cache=True), logits(attention_mask=row))
    ones = torch.ones_like(ids)
    torch.testing.assert_close(logits(attention_mask=ones, use_cache=False), logits(use_cache=True))


@torch.no_grad()
def test_labels_are_shifted_once(first):
    batch, model = first
    ids, positions, labels = (torch.from_numpy(a) for a in (batch.input_ids, batch.position_ids, batch.labels))
    out = model(input_ids=ids, position_ids=positions, labels=labels, shift_labels=labels, use_cache=False)
    ours = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, ours)
    twice = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
    assert not torch.allclose(twice, ours)


def test_a_prepared_data_loader_reads_a_batch_ahead(books):
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (torch.from_numpy(batch.labels) for batch in loader)

    schedule = Schedule.constant(seqlen=16, global_batch_sequences=4, epochs=1)
    with CurriculumLoader(Store.open(books), schedule, seed=1) as loader:
        prepared = accelerate.Accelerator().prepare(torch.utils.data.DataLoader(Batches(), batch_size=None))
        next(iter(prepared))
        assert loader.step == 2
