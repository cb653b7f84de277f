"""fastokens stands in for `tokenizers` only while their ids are equal: on odd strings, on a sample, and later on."""

import dataclasses
import itertools
import json
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from pipeline import encoding
from pipeline.corpus import Reading
from pipeline.encoding import FastEncoder, ReferenceEncoder, lightened
from pipeline.errors import TokenizerError
from pipeline.parts import can_cut, cut, encode_documents, put_documents
from pipeline.proof import PROBES, SPOT_CHARACTERS, SPOT_EVERY_CHARACTERS, Choice, Spot, choose_encoder
from pipeline.train_tokenizer import train_tokenizer
from pipeline.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "c.txt").write_text("".join(PROBES) + "the quick brown fox, naïve café 😀 don't stop " * 50)
    out = folder / "tokenizer.json"
    train_tokenizer((str(folder / "c.txt"),), out, vocab_size=500, reading=Reading())
    return out


@pytest.fixture(scope="module")
def data(tokenizer):
    return tokenizer.read_bytes()


@pytest.fixture(scope="module")
def vocabulary(data):
    return Vocabulary(data, 500, 0, 0)


@pytest.fixture(scope="module")
def encoders(data):
    return FastEncoder(data), ReferenceEncoder(data)


ODD = st.one_of(
    st.text(st.characters(blacklist_categories=("Cs",)), max_size=60),
    st.sampled_from(PROBES),
    st.sampled_from(
        ["<|endoftext|>", "<|endoftext", "|>", "\0", "\r\n", " ", "\t", "\u0301", "\u200d", "😀", "'s", "’s"]
    ),
    st.builds(
        str.__mul__,
        st.sampled_from([" ", "\n", "a", "1", "é", "\u00a0", "\u0300", "<|endoftext|>"]),
        st.integers(1, 300),
    ),
)


@given(
    merges=st.lists(st.tuples(*[st.sampled_from(["a", "b", "\u0120", '"', "\\", ",", "é", "😀"])] * 2), unique=True),
    as_strings=st.booleans(),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
)
def test_a_lightened_tokenizer_is_the_same(merges, as_strings, indent, ascii_only):
    names = dict.fromkeys(["a", "b", "\u0120", '"', "\\", ",", "é", "😀", *map("".join, merges)])
    model = {
        "type": "BPE",
        "vocab": {name: at for at, name in enumerate(names)},
        "merges": [" ".join(merge) for merge in merges] if as_strings else merges,
    }
    data = json.dumps({"version": "1.0", "added_tokens": [], "model": model}, indent=indent, ensure_ascii=ascii_only)
    light, size = lightened(data.encode())
    assert size == len(names)
    assert len(light) <= len(data)
    assert Tokenizer.from_str(light).to_str() == Tokenizer.from_str(data).to_str()


@pytest.mark.parametrize(
    "data", ['{"model": {"type": "WordLevel", "vocab": {"a b": 0}}}', "[1]", "nothing", '{"model": {"merges": 3}}']
)
def test_what_has_no_merges_is_left_as_it_is(data):
    assert lightened(data.encode())[0] == data


def test_merges_that_cannot_be_said_as_strings_stay_pairs():
    model = {"type": "BPE", "vocab": {" ": 0, "a": 1, " a": 2}, "merges": [[" ", "a"]]}
    light, _ = lightened(json.dumps({"model": model}).encode())
    assert json.loads(light)["model"]["merges"] == [[" ", "a"]]


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 3, "[EOS]": 9}, unk_token="a"),
        models.WordPiece({"a": 0, "##b": 1}, unk_token="a"),
        models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0),
        models.BPE({"a": 0, "b": 7, "ab": 4}, [("a", "b")]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_vocabulary_reaches_beyond_the_largest_id(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["[EOS]"])
    path = tmp_path / "tokenizer.json"
    for _ in range(2):  # the second time with an added token that no model has
        tokenizer.save(str(path))
        ids = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()
        assert load_vocabulary(path).size == max(ids) + 1
        tokenizer.add_tokens(["another"])


@settings(max_examples=150)
@given(texts=st.lists(st.lists(ODD, max_size=5).map("".join), max_size=8))
def test_fastokens_equals_tokenizers_on_adversarial_strings(encoders, texts):
    for found, expected in zip(*(encoder.encode(texts) for encoder in encoders), strict=True):
        assert np.array_equal(found, expected)


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_documents_are_their_ids_each_with_its_end(lengths, dtype):
    offsets = np.cumsum([0, *lengths])
    ids = np.arange(offsets[-1], dtype=np.uint32) + 1
    out = np.full(len(ids) + len(lengths), 60_000, dtype=dtype)
    put_documents(out, ids, offsets, 0)
    expected = [t for a, b in itertools.pairwise(offsets) for t in (*ids[a:b].tolist(), 0)]
    assert out.tolist() == expected


class Wrong:
    """Right on short texts only."""

    def __init__(self, encoder, longest):
        self.encoder, self.longest = encoder, longest

    def encode(self, texts):
        ids, offsets = self.encoder.encode(texts)
        for i, text in enumerate(texts):
            if len(text) > self.longest:
                ids = ids.copy()
                ids[offsets[i]] ^= 1
        return ids, offsets


@pytest.mark.parametrize("length", [200, 3 * SPOT_CHARACTERS])
def test_a_difference_that_the_sample_did_not_show_stops_the_build(data, vocabulary, encoders, length):
    wrong = Wrong(encoders[0], 100)
    spot = Spot(wrong, data)
    spot.check(["right"], *encode_documents(wrong, ["right"], vocabulary), "c.jsonl")
    texts = ["word " * (length // 5)] * (SPOT_EVERY_CHARACTERS // length + 3)
    with pytest.raises(TokenizerError, match=r"c\.jsonl: 'word[\s\S]*--encoder tokenizers --force"):
        for text in texts:
            spot.check([text], *encode_documents(wrong, [text], vocabulary), "c.jsonl")


def test_a_tokenizer_is_loaded_with_fastokens_or_without_to_the_same(data, tmp_path):
    (tmp_path / "t.json").write_bytes(data)
    found = [load_vocabulary(tmp_path / "t.json", encoder=name) for name in ("auto", "tokenizers")]
    assert dataclasses.astuple(found[0]) == dataclasses.astuple(found[1])


def test_a_choice_is_waited_for_and_sent_on_as_what_was_chosen():
    allowed = threading.Event()

    def choose():
        allowed.wait()
        return "fastokens", "equal"

    choice = Choice(choose)
    allowed.set()
    there = pickle.loads(pickle.dumps(choice))
    assert (there.name, there.reason) == (choice.name, choice.reason) == ("fastokens", "equal")

    def refuse():
        raise TokenizerError("differs")

    with pytest.raises(TokenizerError, match="differs"):
        Choice(refuse).name  # noqa: B018


WORDS = st.lists(st.one_of(ODD, st.sampled_from(["don't", "a b", " ", "x ", "they're", " it's s"])), max_size=40)


@settings(max_examples=150)
@given(text=WORDS.map("".join), other=WORDS.map(" ".join), least=st.integers(0, 30))
def test_a_text_may_be_cut_between_words_as_gpt2_has_them(data, vocabulary, encoders, text, other, least):
    assert can_cut(data)
    parts = list(cut(text + other, least))
    assert "".join(parts) == text + other
    assert all(len(part) > least for part in parts[:-1])
    for encoder in encoders:
        ids = [encoder.encode([part])[0] for part in parts]
        assert np.array_equal(np.concatenate(ids), encoder.encode([text + other])[0])


def test_long_documents_are_encoded_in_parts_to_the_same(vocabulary, encoders, monkeypatch):
    texts = ["short", "the quick brown fox " * 40, "", "don't stop 😀 " * 30]
    whole = encode_documents(encoders[0], texts, vocabulary)
    monkeypatch.setattr("pipeline.parts.LONG_CHARACTERS", 50)
    calls = []
    parts = encode_documents(Counting(encoders[0], calls), texts, vocabulary)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(whole, parts, strict=True))
    assert len(calls) > len(texts)


class Counting:
    def __init__(self, encoder, calls):
        self.encoder, self.calls = encoder, calls

    def encode(self, texts):
        self.calls.append(texts)
        return self.encoder.encode(texts)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"content": "a b", "special": False}]},
    ],
)
def test_with_other_words_no_text_is_cut(data, change):
    assert not can_cut(json.dumps(json.loads(data) | change).encode())


def test_a_folder_as_save_pretrained_makes_it_is_as_good_as_its_tokenizer_json(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    assert load_vocabulary(tmp_path) == load_vocabulary(tokenizer)


def test_the_end_and_beginning_that_a_folder_names_are_taken(tokenizer, tmp_path):
    made = Tokenizer.from_file(str(tokenizer))
    made.add_special_tokens(["</s>", "<s>", "<end>", "<begin>"])
    made.save(str(tmp_path / "tokenizer.json"))
    ids = {name: made.token_to_id(name) for name in ("<|endoftext|>", "</s>", "<s>", "<end>", "<begin>")}

    def found(**asked):
        vocabulary = load_vocabulary(tmp_path, **asked)
        return vocabulary.eod_id, vocabulary.bos_id

    assert found() == (ids["<|endoftext|>"], ids["<s>"])
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}, "bos_token": "<begin>"}')
    assert found() == (ids["<end>"], ids["<begin>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": null}')
    assert found() == (ids["</s>"], ids["<begin>"])
    assert found(eod="<|endoftext|>", bos="<s>") == (ids["<|endoftext|>"], ids["<s>"])
    assert load_vocabulary(tmp_path / "tokenizer.json").eod_id == ids["<|endoftext|>"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(TokenizerError, match=r"no token '<none>'[\s\S]*--eod"):
        load_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match=r"save_pretrained[\s\S]*tokenizer_config.json"):
        load_vocabulary(tmp_path)


def test_tokenizers_that_do_not_do_are_refused(tokenizer, tmp_path):
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        load_vocabulary(tmp_path / "t.json")
    with pytest.raises(TokenizerError, match="no tokenizer here"):
        load_vocabulary(tmp_path / "none.json")
    with pytest.raises(TokenizerError, match="save_pretrained"):
        load_vocabulary(tmp_path)
    with pytest.raises(TokenizerError, match=r"'<stop>'[\s\S]*<\|endoftext\|>[\s\S]*--eod"):
        load_vocabulary(tokenizer, eod="<stop>")
    without = json.loads(tokenizer.read_text())
    without["added_tokens"] = []
    del without["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "w.json").write_text(json.dumps(without))
    with pytest.raises(TokenizerError, match="no end-of-document token"):
        load_vocabulary(tmp_path / "w.json")


def test_fastokens_is_used_only_where_it_agrees(tokenizer, monkeypatch):
    vocabulary = load_vocabulary(tokenizer)
    assert choose_encoder(vocabulary, PROBES)[0] == "fastokens"

    def differs(self, texts):
        ids, offsets = real(self, texts)
        return ids[::-1], offsets

    real = encoding.FastEncoder.encode
    monkeypatch.setattr(encoding.FastEncoder, "encode", differs)
    assert choose_encoder(vocabulary, PROBES) == ("tokenizers", "fastokens differs from tokenizers on the sample")
    with pytest.raises(TokenizerError, match="differs"):
        choose_encoder(vocabulary, PROBES, "fastokens")
