"""What is said of a store: lengths counted exactly, two ways, per source; one document with its origin."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import tiny_tokenizer
from stores import documents_of, write_store
from test_cli import call

from pipeline import lengths as lengths_module
from pipeline.cli import main as prep
from pipeline.errors import ConfigError
from pipeline.lengths import QUANTILES, count_lengths, facts_of, merge, powers
from pipeline.plot import draw_lengths
from pipeline.reader import Store
from pipeline.report import lengths_of_sources

PARTS = st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=30), min_size=1, max_size=4)


@given(parts=PARTS, counted=st.sampled_from([1, 50, 1000]))
def test_quantiles_and_shares_are_those_of_the_sorted_documents(parts, counted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths_module, "COUNTED", counted)  # some, all or none of the lengths are long ones
        found = count_lengths(np.array(part) for part in parts)
        assert_same(found, merge(count_lengths([np.array(part)]) for part in parts))
    every = sorted(n for part in parts for n in part)
    facts = facts_of(found)
    assert (facts["documents"], facts["tokens"], facts["longest"]) == (len(every), sum(every), every[-1])
    tokens = [n for n in every for _ in range(n)]  # each token, by the length of its document
    for name, values in (("by_documents", every), ("by_tokens", tokens)):
        at = [next(v for i, v in enumerate(values, 1) if i >= share * len(values)) for share in QUANTILES]
        assert facts["quantiles"][name] == at
    for row in facts["shorter_than"]:
        assert row["documents"] == pytest.approx(sum(n < row["length"] for n in every) / len(every))
        assert row["tokens"] == pytest.approx(sum(n < row["length"] for n in tokens) / len(tokens))
    assert facts["shorter_than"][-1]["tokens"] == 1
    edges = powers(every[-1])
    assert facts["length_histogram"] == np.histogram(every, edges)[0].tolist()
    assert sum(facts["token_histogram"]) == len(tokens)


def assert_same(one, other):
    assert one.length.tolist() == other.length.tolist()
    assert one.documents.tolist() == other.documents.tolist()


@pytest.fixture
def store(tmp_path):
    data = tiny_tokenizer().to_str().encode()
    path = tmp_path / "s"
    for source, seed, lengths in (("en", 1, [5, 1, 9]), ("code", 2, [300, 2])):
        ids = {"id": [f"{source}/{i}" for i in range(len(lengths))]}
        write_store(path, documents_of(lengths, seed=seed), source=source, tokenizer=data, extra=ids)
    return path


def test_info_knows_the_sources_and_draws_them(store, tmp_path):
    facts = json.loads(call(prep, "info", store, "--plot", tmp_path / "x.png", "--json").stdout)
    train = facts["splits"]["train"]
    assert (train["documents"], train["tokens"]) == (5, 317)
    assert {name: part["tokens"] for name, part in train["sources"].items()} == {"en": 15, "code": 302}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    said = call(prep, "info", store).stdout
    assert "en" in said and "code" in said and "% shorter" in said
    assert max(map(len, said.splitlines()[1:])) <= 100
    assert (
        "no document"
        in call(prep, "info", store, "--plot", tmp_path / "y.png", "--split", "validation", status=1).stderr
    )


def test_a_picture_of_one_document_and_of_one_that_cannot_be_written(tmp_path):
    write_store(tmp_path / "one", documents_of([1]))
    sources = lengths_of_sources(Store.open(tmp_path / "one"))
    draw_lengths(sources, tmp_path / "one.svg", "one")
    assert "<svg" in (tmp_path / "one.svg").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["one.svg"]
    with pytest.raises(ConfigError, match="kind of picture"):
        draw_lengths(sources, tmp_path / "one.xyz", "one")


def test_show_finds_by_number_and_by_id_and_says_where_from(store):
    by_id = json.loads(call(prep, "show", store, "--id", "code/1", "--json").stdout)
    by_number = json.loads(call(prep, "show", store, "--document", 4, "--json").stdout)
    assert by_id == by_number
    assert (by_id["document"], by_id["source"], by_id["id"], by_id["row"]) == (4, "code", "code/1", 1)
    ids = by_id["tokens"]
    result = call(prep, "show", store, "--document", 4, "--tokens")
    assert "code/1" in result.stderr
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [[str(i), str(t)] for i, t in enumerate(ids)]
    assert result.stdout.splitlines()[-1].endswith("'<|endoftext|>'")


def test_show_says_what_is_missing(store, tmp_path):
    write_store(tmp_path / "plain", documents_of([3]))
    for arguments, said in [
        ((store,), "which document?"),
        ((store, "--document", 0, "--id", "en/0"), "which document?"),
        ((store, "--id", "none"), "no document of this id"),
        ((tmp_path / "plain", "--id", "none"), "keeps no ids"),
    ]:
        assert said in call(prep, "show", *arguments, status=2).stderr
