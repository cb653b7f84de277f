"""A store packed once, as files: every token a target once, and trained on through plain `datasets`."""

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import EOD, documents_of, write_store
from test_cli import call

from pipeline.cli import main as prep
from pipeline.errors import ConfigError, StoreError
from pipeline.packed import shuffled_rows, write_packed
from pipeline.packing import NO_TARGET, pack
from pipeline.reader import Store

COLUMNS = ["input_ids", "labels", "position_ids", "seq_lengths"]


def told_apart(lengths):
    """Documents in which no two tokens are alike, but their ends."""
    ids = iter(range(1, 1 + sum(lengths)))
    return [np.array([next(ids) for _ in range(n - 1)] + [EOD], dtype=np.uint32) for n in lengths]


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    seqlen=st.integers(1, 33),
    file_rows=st.integers(1, 9),
    seed=st.integers(-3, 3),
)
def test_every_stored_token_is_a_target_once_in_the_files(tmp_path_factory, lengths, seqlen, file_rows, seed):
    folder = tmp_path_factory.mktemp("packed")
    documents = told_apart(lengths)
    write_store(folder / "a", documents, shards=2, vocab_size=70_000)
    write_packed(Store.open(folder / "a"), folder / "p", seqlen=seqlen, seed=seed, file_bytes=12 * seqlen * file_rows)
    rows = datasets.load_from_disk(folder / "p").with_format("numpy")[:]
    labels, inputs = np.stack(rows["labels"]), np.stack(rows["input_ids"])
    assert labels.shape[1] == seqlen
    targets = labels[labels != NO_TARGET]
    assert sorted(targets.tolist()) == sorted(np.concatenate(documents).tolist())
    assert (labels[:-1] != NO_TARGET).all()
    assert (np.diff(labels[-1] == NO_TARGET) >= 0).all()
    before = {int(b): int(a) for d in documents for a, b in zip([EOD, *d], d, strict=False) if b != EOD}
    known = (labels != NO_TARGET) & (labels != EOD)
    assert inputs[known].tolist() == [before[token] for token in labels[known].tolist()]
    for spans, positions in zip(rows["seq_lengths"], rows["position_ids"], strict=True):
        assert np.concatenate([np.arange(n) for n in spans]).tolist() == positions.tolist()
    assert len(list((folder / "p").glob("data-*.arrow"))) == -(-len(labels) // file_rows)


def test_the_order_of_the_rows_depends_on_the_seed_alone(tmp_path):
    write_store(tmp_path / "a", documents_of([1 + i * 7 % 50 for i in range(200)]), shards=3)
    store = Store.open(tmp_path / "a")
    for name, seed, file_bytes in [("a0", 0, 1 << 20), ("b0", 0, 2000), ("a1", 1, 1 << 20)]:
        write_packed(store, tmp_path / name, seqlen=16, seed=seed, file_bytes=file_bytes)
    a0, b0, a1 = (datasets.load_from_disk(tmp_path / name)["input_ids"][:] for name in ("a0", "b0", "a1"))
    assert a0 == b0 != a1
    assert sorted(a0[:-1]) == sorted(a1[:-1])


def test_the_order_is_the_same_on_every_machine():
    packed = pack(np.array([16] * 9 + [5]), 16)
    assert shuffled_rows(packed, 16, seed=7).tolist() == [4, 1, 8, 6, 7, 0, 5, 2, 3, 9]


def test_a_model_trains_on_it_through_plain_datasets(tmp_path):
    documents = [np.array([1 + (i + k) % 20 for k in range(30)] + [EOD], dtype=np.uint16) for i in range(40)]
    write_store(tmp_path / "a", documents)
    arguments = ("pack", tmp_path / "a", "--seqlen", 32, "--out", tmp_path / "p", "--json")
    facts = json.loads(call(prep, *arguments).stdout)
    rows = datasets.load_from_disk(tmp_path / "p").with_format("torch")
    assert (len(rows), rows.column_names) == (facts["sequences"], COLUMNS)
    assert rows[0]["labels"].dtype == torch.int64
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        for batch in rows.select_columns(COLUMNS[:3]).iter(batch_size=8):
            logits = model(batch["input_ids"])  # [rows, seqlen, vocabulary]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2  # the token after each is known from it: the labels are the right ones


def test_models_of_transformers_take_the_shifted_labels(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_store(tmp_path / "a", documents_of([30, 9, 41, 3]))
    write_packed(Store.open(tmp_path / "a"), tmp_path / "p", seqlen=16)
    rows = datasets.load_from_disk(tmp_path / "p").with_format("torch")[:]
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    inputs = {name: rows[name] for name in ("input_ids", "position_ids", "labels")}
    with torch.no_grad():
        found = model(**inputs, shift_labels=rows["labels"])
    expected = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1), rows["labels"].flatten())
    assert found.loss.item() == pytest.approx(expected.item())


def test_the_output_is_replaced_only_when_asked_for(tmp_path):
    write_store(tmp_path / "a", documents_of([5, 9, 30]))
    store = Store.open(tmp_path / "a")
    write_packed(store, tmp_path / "p", seqlen=8)
    with pytest.raises(StoreError, match="--force"):
        write_packed(store, tmp_path / "p", seqlen=4)
    write_packed(store, tmp_path / "p", seqlen=4, force=True)
    assert len(datasets.load_from_disk(tmp_path / "p")[0]["input_ids"]) == 4
    with pytest.raises(ConfigError):
        write_packed(store, tmp_path / "q", seqlen=4, file_bytes=0)
    with pytest.raises(ConfigError):
        write_packed(store, tmp_path / "q", seqlen=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "p"]
