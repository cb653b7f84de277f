"""Zero-shot WikiText perplexity and LAMBADA accuracy, as GPT-2's are usually reproduced, from local files.

WikiText, as Megatron-LM does it: the whole file is one text, its spaces undone (`detokenize`), cut into windows of
`context` tokens that begin `stride` tokens apart. The first window scores all its tokens, each other one its last
`stride`: so every token but the very first is scored once, with at least context - stride tokens before it. Two
perplexities: exp(nats / tokens), which depends on the tokenizer, and exp(nats / words), words being those between
single spaces of the file as it is (245,566 in WikiText-103's test), which does not; papers report the latter.

LAMBADA: a passage counts where every token of its last word is the likeliest one after the true ones before it. This
is lm-eval's `lambada_openai`; no filter of stop words. Nothing is put before a passage unless `bos` is given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.errors import ConfigError, CorpusError
from pipeline.progress import ProgressLine
from train.attention import Sight
from train.model import GPT2
from train.trained import Trained

STRIDE = 32
"""The stride of GPT-2's authors and of Megatron-LM."""
FORWARD_TOKENS = 4096
"""Most tokens of one forward; logits are made only for those that are scored."""
LOGIT_ROWS = 512
"""Most rows of logits that exist at a time."""


@dataclass(frozen=True)
class WikiText:
    """How well a model foretells a long text."""

    tokens: int
    """Scored: all but the first."""
    words: int
    context: int
    stride: int
    loss: float
    """Nats a token."""
    token_perplexity: float
    word_perplexity: float


@dataclass(frozen=True)
class Lambada:
    """How often a model knows how a passage ends."""

    passages: int
    accuracy: float
    perplexity: float
    """exp of the mean nats of a last word."""
    cut: int
    """Passages longer than the context, whose beginnings were left out."""


def wikitext(trained: Trained, path: Path, *, stride: int | None = None, context: int | None = None) -> WikiText:
    """Perplexity of the text at `path`; by default `context` is the model's own and `stride` 32, or that if less.

    Raises ConfigError for a stride or context that is not allowed, CorpusError where there is no text.
    """
    context = trained.shape.positions if context is None else context
    stride = min(STRIDE, context) if stride is None else stride
    longest = trained.shape.positions if trained.shape.model.positions == "learned" else context
    if not 1 <= stride <= context <= longest:
        raise ConfigError(
            "windows do not fit the model",
            found=f"context {context}, stride {stride}",
            allowed=f"1 <= stride <= context <= {longest}",
        )
    raw = _read(path)
    ids = trained.tokenizer().encode(detokenize(raw), add_special_tokens=False).ids
    words = len(raw.strip().split(" "))
    if len(ids) < 2 or words < 2:
        raise CorpusError("too short to evaluate", where=path, found=f"{len(ids)} tokens, {words} words")
    tokens, model = torch.tensor(ids), _placed(trained)
    nats, done = 0.0, 0
    with ProgressLine("wikitext", len(ids) - 1) as progress:
        for inputs, targets in windows(tokens, context, stride):
            hidden = _hidden(model, inputs)[:, -targets.shape[1] :]
            likelihoods, _ = score(model, hidden.flatten(0, 1), targets.flatten())
            nats -= float(likelihoods.double().sum())
            done += targets.numel()
            progress.update(done, f"perplexity {math.exp(min(nats / done, 700)):,.1f} a token")
    assert done == len(ids) - 1, "every token but the first is scored once"
    per_token, per_word = nats / done, nats / (words - 1)
    return WikiText(done, words, context, stride, per_token, _exp(per_token), _exp(per_word))


def windows(tokens: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (inputs [B, up to context], targets [B, scored]) of int64 [n] tokens, scored at the end."""
    targets = len(tokens) - 1
    first = min(context, targets)
    yield tokens[None, :first], tokens[None, 1 : first + 1]
    starts = range(stride, targets - context + 1, stride)  # of the whole windows after it
    rows = max(1, FORWARD_TOKENS // context)
    for at in range(0, len(starts), rows):
        part = torch.stack([tokens[start : start + context + 1] for start in starts[at : at + rows]])
        yield part[:, :-1], part[:, -stride:]
    begun = context + len(starts) * stride
    if begun < targets:
        start = (len(starts) + 1) * stride
        yield tokens[None, start:targets], tokens[None, begun + 1 :]


def lambada(trained: Trained, path: Path, *, bos: bool = False) -> Lambada:
    """Accuracy of the last word of every passage of the JSON lines at `path`; `bos`: begin as a document does.

    Raises CorpusError where there is no passage, or a line is no {"text": ...} of two words or more.
    """
    tokenizer, context, model = trained.tokenizer(), trained.shape.positions, _placed(trained)
    passages = [_passage(tokenizer, text, path, number) for number, text in enumerate(_read(path).splitlines(), 1)]
    if not passages:
        raise CorpusError("no passages", where=path)
    if bos:
        passages = [([trained.shape.bos_id, *ids], scored) for ids, scored in passages]
    cut = sum(len(ids) - 1 > context for ids, _ in passages)
    passages = sorted(
        ((ids[-context - 1 :], scored) for ids, scored in passages), key=lambda passage: len(passage[0])
    )
    right, nats, done = 0, 0.0, 0
    with ProgressLine("lambada", len(passages)) as progress:
        for batch in _batches(passages):
            longest = max(len(ids) for ids, _ in batch) - 1
            inputs = torch.zeros(len(batch), longest, dtype=torch.int64)  # padding is after what is scored
            places, targets = [], []
            for row, (ids, scored) in enumerate(batch):
                inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                places += [(row, column) for column in range(len(ids) - 1 - scored, len(ids) - 1)]
                targets += ids[-scored:]
            rows, columns = torch.tensor(places).T
            hidden = _hidden(model, inputs)[rows, columns]
            likelihoods, hits = score(model, hidden, torch.tensor(targets))
            nats -= float(likelihoods.double().sum())
            missed = torch.zeros(len(batch), dtype=torch.bool).index_put_((rows,), ~hits, accumulate=True)
            right += int((~missed).sum())
            done += len(batch)
            progress.update(done, f"accuracy {right / done:.4f}")
    return Lambada(done, right / done, _exp(nats / done), cut)


@torch.no_grad()
def score(model: GPT2, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-likelihood float32 [N], is it the likeliest? bool [N]) of `targets` int64 [N], on the CPU.

    `hidden` [N, C]: what the output layer is multiplied with at their places.
    """
    weight = model.tokens.weight[: model.vocab_size]
    targets = targets.to(weight.device)
    likelihoods, hits = [], []
    for at in range(0, len(hidden), LOGIT_ROWS):
        part = slice(at, at + LOGIT_ROWS)
        logits = (hidden[part] @ weight.T).float()
        likelihoods.append(logits.log_softmax(1).gather(1, targets[part, None])[:, 0])
        hits.append(logits.argmax(1) == targets[part])
    return torch.cat(likelihoods).cpu(), torch.cat(hits).cpu()


def _placed(trained: Trained) -> GPT2:
    """The model on a GPU, where there is one."""
    return trained.model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _hidden(model: GPT2, inputs: Tensor) -> Tensor:
    """[B, L, C] of rows that are one span each, positions from 0."""
    inputs = inputs.to(model.tokens.weight.device)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    return model.hidden(inputs, positions, Sight())


def _batches(passages: list[tuple[list[int], int]]) -> Iterator[list[tuple[list[int], int]]]:
    """Passages by rising length, in batches of at most FORWARD_TOKENS tokens with padding, or of one."""
    batch: list[tuple[list[int], int]] = []
    for passage in passages:
        if batch and (len(batch) + 1) * len(passage[0]) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(passage)
    if batch:
        yield batch


def _passage(tokenizer: Tokenizer, line: str, path: Path, number: int) -> tuple[list[int], int]:
    """(token ids, how many of the last ones are the last word): the word with the space before it."""
    try:
        text = json.loads(line)["text"].rstrip()
        before, _, word = text.rpartition(" ")
    except (ValueError, KeyError, TypeError, AttributeError):
        before = word = ""
    if not before or not word:
        raise CorpusError(
            "not a passage",
            where=f"{path}, line {number}",
            found=line[:80],
            allowed='JSON lines: {"text": "two words or more"}',
        )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    scored = len(ids) - len(tokenizer.encode(before, add_special_tokens=False).ids)
    return ids, max(scored, 1)


def detokenize(text: str) -> str:
    """WikiText's spaces undone: `wikitext_detokenizer` of Megatron-LM, which lm-eval uses too."""
    text = text.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)  # never found; kept, for the numbers are compared with theirs
    for spaced, mark in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(spaced, mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    text = re.sub(r"\(\s*([^\)]*?)\s*\)", r"(\1)", text)
    text = re.sub(r"\[\s*([^\]]*?)\s*\]", r"[\1]", text)
    text = re.sub(r"{\s*([^}]*?)\s*}", r"{\1}", text)
    text = re.sub(r"\"\s*([^\"]*?)\s*\"", r'"\1"', text)
    text = re.sub(r"'\s*([^']*?)\s*'", r"'\1'", text)
    for spaced, heading in (("= = = =", "===="), ("= = =", "==="), ("= =", "==")):
        text = text.replace(spaced, heading)
    text = text.replace(" " + chr(176) + " ", chr(176))
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError("cannot read the text", where=path, found=error) from error


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
