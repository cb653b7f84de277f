"""Which tokens end and begin documents is told by name and id: by build, import's and info's text and JSON."""

import json

import pytest
from runs import tiny_tokenizer
from test_cli import call
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel

from pipeline.boundaries import render_boundaries, token_name
from pipeline.cli import main as prep


def test_build_and_info_name_the_end_and_the_beginning(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "w1 w2"}) + "\n")
    tokenizer, store = tiny_tokenizer(), tmp_path / "store"
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(tmp_path / "t.json"))
    build = ("build", tmp_path / "c.jsonl", "--tokenizer", tmp_path / "t.json", "--out", store)
    line = "documents end in '<|endoftext|>' (0) and begin with '<s>' (50) when served"
    for command in (build, build, ("info", store)):  # the second finds it built
        assert line in call(prep, *command).stdout.splitlines()
        told = json.loads(call(prep, *command, "--json").stdout)
        assert (told["eod_id"], told["eod"], told["bos_id"], told["bos"]) == (0, "<|endoftext|>", 50, "<s>")
    (store / "tokenizer.json").unlink()
    assert "documents end in token 0 and begin with token 50 when served" in call(prep, "info", store).stdout


def test_a_store_whose_beginning_is_its_end_says_so():
    facts = {"eod": "</s>", "eod_id": 2, "bos": "</s>", "bos_id": 2}
    assert render_boundaries(facts) == "documents end in '</s>' (2) and begin with the same when served"


@pytest.mark.parametrize(
    "model",
    [
        WordLevel({"a": 0, "b": 1}, unk_token="a"),
        BPE({"a": 0, "b": 1}, []),
        Unigram([("a", 0.0), ("b", -1.0)], unk_id=0),
    ],
)
def test_a_token_has_its_name_in_every_kind_of_model(model):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["</s>"])
    data = tokenizer.to_str().encode()
    assert [token_name(data, token) for token in range(4)] == ["a", "b", "</s>", None]
