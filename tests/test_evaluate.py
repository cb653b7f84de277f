"""WikiText and LAMBADA: the numbers that a plain evaluation with transformers gives on the same weights."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from runs import tiny_tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from pipeline.errors import ConfigError, CorpusError
from train.cli import main
from train.evaluate import detokenize, lambada, wikitext, windows
from train.trained import load_hf

CONTEXT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 with strong opinions, made and saved by transformers."""
    path = tmp_path_factory.mktemp("hf")
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=50, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        parameter.data *= 4
    model.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(), eos_token="<|endoftext|>")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words with WikiText's marks, more than five contexts of them."""
    words = np.random.default_rng(2).integers(1, 50, 130)
    path = tmp_path_factory.mktemp("wikitext") / "wiki.test.raw"
    path.write_text(" \n".join(" ".join(f"w{i}" for i in line) for line in np.split(words, 10)))
    return path


@pytest.fixture(scope="module")
def passages(folder, tmp_path_factory):
    """Passages of all lengths, about half of which end as the model would have them end."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    random, lines = np.random.default_rng(3), []
    for number in range(40):
        ids = random.integers(1, 50, 3 + number % 30).tolist()
        if number % 2:
            with torch.no_grad():
                ids[-1] = int(model(torch.tensor([ids[-CONTEXT - 1 : -1]])).logits[0, -1].argmax()) or 1
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in ids)}))
    path = tmp_path_factory.mktemp("lambada") / "lambada.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@torch.no_grad()
def plain_wikitext(folder, path, stride):
    """One window at a time, with transformers alone."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    raw = path.read_text()
    ids = tokenizer(detokenize(raw), return_tensors="pt")["input_ids"]
    nats, scored, start = 0.0, 0, 0
    while scored < ids.shape[1] - 1:
        end = min(start + CONTEXT, ids.shape[1] - 1)
        logits = model(ids[:, start:end]).logits[0].log_softmax(1)
        for position in range(scored, end):
            nats -= float(logits[position - start, ids[0, position + 1]])
        start, scored = start + stride, end
    return math.exp(nats / scored), math.exp(nats / (len(raw.split(" ")) - 1))


@torch.no_grad()
def plain_lambada(folder, path, bos=False):
    """One passage at a time, its words being tokens."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right, nats = [], []
    for line in path.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"])["input_ids"]
        ids = ([0] if bos else []) + ids
        logits = model(torch.tensor([ids[-CONTEXT - 1 : -1]])).logits[0, -1].log_softmax(0)
        right.append(int(logits.argmax()) == ids[-1])
        nats.append(-float(logits[ids[-1]]))
    return sum(right) / len(right), math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize("stride", [1, 5, 8, CONTEXT])
def test_wikitext_gives_the_perplexities_of_a_plain_evaluation(folder, text, stride):
    found = wikitext(load_hf(folder), text, stride=stride)
    expected = plain_wikitext(folder, text, stride)
    assert (found.token_perplexity, found.word_perplexity) == pytest.approx(expected, rel=1e-5)
    assert found.tokens == 129


@pytest.mark.parametrize("bos", [False, True])
def test_lambada_gives_the_numbers_of_a_plain_evaluation(folder, passages, bos):
    found = lambada(load_hf(folder), passages, bos=bos)
    assert (found.accuracy, found.perplexity) == pytest.approx(plain_lambada(folder, passages, bos), rel=1e-5)
    assert bos or 0.2 < found.accuracy < 0.8
    assert found.passages == 40
    assert found.cut == sum(3 + n % 30 + bos - 1 > CONTEXT for n in range(40))


def test_a_last_word_of_several_tokens_counts_only_if_all_are_likeliest(folder, passages, tmp_path):
    """Here words are spelt: each letter is a token, the blank being what the model likes most to go on with."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        likeliest = model(torch.randint(1, 50, (200, 9), generator=torch.Generator().manual_seed(4))).logits.argmax(2)
    letters = likeliest.flatten().bincount(minlength=50).argsort(descending=True).tolist()[:12]
    data = json.loads(tiny_tokenizer().to_str())
    data["model"] = {"type": "WordLevel", "vocab": dict(zip(" abcdefghijk", letters, strict=True)), "unk_token": "a"}
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    random, right, nats, lines = np.random.default_rng(6), [], [], []
    for number in range(300):
        ids, target = random.choice(letters[1:], 6).tolist(), [letters[0]]
        with torch.no_grad():
            for _ in range(1 + number % 2):
                target.append(int(model(torch.tensor([[*ids, *target]])).logits[0, -1].argmax()))
            logits = model(torch.tensor([[*ids, *target[:-1]]])).logits[0, -len(target) :].log_softmax(1)
        if set(target[1:]) <= set(letters[1:]):
            right.append(logits.argmax(1).tolist() == target)
            nats.append(-sum(float(logits[n, token]) for n, token in enumerate(target)))
            text = "".join(" abcdefghijk"[letters.index(token)] for token in [*ids, *target])
            lines.append(json.dumps({"text": text}))
    assert 0 < sum(right) < len(right)
    trained = load_hf(tmp_path)
    (tmp_path / "passages.jsonl").write_text("\n".join(lines))
    found = lambada(trained, tmp_path / "passages.jsonl")
    expected = (sum(right) / len(right), math.exp(sum(nats) / len(nats)))
    assert (found.accuracy, found.perplexity) == pytest.approx(expected, rel=1e-4)


@given(st.integers(2, 200), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(count, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for inputs, targets in windows(torch.arange(count), context, stride):
        assert inputs.shape[1] <= context
        for row, ends in zip(inputs.tolist(), targets.tolist(), strict=True):
            assert row[-len(ends) :] == [end - 1 for end in ends]
            assert row == list(range(row[0], row[0] + len(row)))
            assert ends[0] == 1 or ends[0] - row[0] >= min(context - stride, ends[0]) + 1
            scored += ends
    assert scored == list(range(1, count))


def test_detokenize_undoes_the_marks_of_wikitext():
    spaced = ' \n = Title = \n \n The " big " dog \'s 1 @,@ 000 @.@ 5 co @-@ ops ( or 3 ) : yes ; no . \n'
    assert detokenize(spaced) == '\n= Title =\n\nThe "big" dog\'s 1,000.5 co-ops (or 3): yes; no.\n'


def test_the_command_reports_both_and_takes_a_folder_of_others(folder, text, passages):
    arguments = ["eval", "--hf", str(folder), "--wikitext", str(text), "--lambada", str(passages), "--stride", "8"]
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["wikitext"]["word_perplexity"] == pytest.approx(plain_wikitext(folder, text, 8)[1], rel=1e-5)
    assert found["lambada"]["accuracy"] == pytest.approx(plain_lambada(folder, passages)[0])
    assert "perplexity" in CliRunner().invoke(main, arguments).stdout


def test_odd_files_and_numbers_are_told(folder, text, tmp_path):
    trained = load_hf(folder)
    for stride, context in ((0, None), (25, None), (8, 48)):
        with pytest.raises(ConfigError, match="1 <= stride <= context <= 24"):
            wikitext(trained, text, stride=stride, context=context)
    with pytest.raises(CorpusError, match="cannot read"):
        wikitext(trained, tmp_path / "none")
    (tmp_path / "short").write_text("w1")
    with pytest.raises(CorpusError, match="too short"):
        wikitext(trained, tmp_path / "short")
    for line in ("w1 w2", '{"text": "w1"}', '{"words": 1}', "[]"):
        (tmp_path / "odd").write_text('{"text": "w1 w2"}\n' + line)
        with pytest.raises(CorpusError, match="odd, line 2"):
            lambada(trained, tmp_path / "odd")
    for arguments in (["eval"], ["eval", "run", "--hf", "x", "--lambada", "y"], ["eval", "run"]):
        assert CliRunner().invoke(main, arguments).exit_code == 2
