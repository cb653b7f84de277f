"""Documents to tokens, each with its end-of-document token; a huge one in parts, where words provably end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pipeline.encoding import Encoder
from pipeline.vocabulary import Vocabulary

LONG_CHARACTERS = 4 << 20
CHUNK_CHARACTERS = 1 << 20
_BETWEEN_WORDS = re.compile("[A-Za-z] [A-Za-z]")


def put_documents(out: np.ndarray, ids: np.ndarray, offsets: np.ndarray, eod_id: int) -> None:
    """Fill `out` [ids + texts] with the ids of each text and `eod_id` after it."""
    ends = offsets[1:] + np.arange(len(offsets) - 1)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends] = False
    out[is_text] = ids
    out[ends] = eod_id


def encode_documents(encoder: Encoder, texts: list[str], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all texts in a row, each with its end-of-document token, and how many those are: int64 [texts].

    A text of more than `LONG_CHARACTERS` is encoded in parts where the tokenizer allows it: in one go it would take
    ten bytes of memory a character. The tokens are the same.
    """
    if max(map(len, texts), default=0) <= LONG_CHARACTERS or not can_cut(vocabulary.data):
        ids, offsets = encoder.encode(texts)
        tokens = np.empty(len(ids) + len(texts), dtype=vocabulary.dtype)
        put_documents(tokens, ids, offsets, vocabulary.eod_id)
        return tokens, np.diff(offsets) + 1
    tokens = np.empty(sum(map(utf8_bytes, texts)) + len(texts), dtype=vocabulary.dtype)  # enough for bytes
    lengths = np.empty(len(texts), dtype=np.int64)
    used = 0
    for index, text in enumerate(texts):
        begin = used
        for part in cut(text, LONG_CHARACTERS):
            ids, _ = encoder.encode([part])
            tokens[used : used + len(ids)] = ids
            used += len(ids)
        tokens[used] = vocabulary.eod_id
        used += 1
        lengths[index] = used - begin
    return tokens[:used], lengths


@lru_cache(maxsize=2)
def can_cut(data: bytes) -> bool:
    """Whether a text may be cut before a single space between two letters: so it is with GPT-2's words.

    There a word ends at the letter and another begins with the space, whatever is around them; merges stay in words.
    Nothing may be put before a text or change it, and no added token sought but special ones, which are text to us.
    """
    tokenizer = json.loads(data)
    words = tokenizer.get("pre_tokenizer") or {}
    return (
        tokenizer.get("normalizer") is None
        and words.get("type") == "ByteLevel"
        and words.get("use_regex", True) is True
        and words.get("add_prefix_space") is False
        and all(token["special"] for token in tokenizer.get("added_tokens") or [])
    )


def cut(text: str, least: int) -> Iterator[str]:
    """The parts of a text, each of at least `least` characters, up to the first place where it may be cut."""
    begin = 0
    while place := _BETWEEN_WORDS.search(text, begin + least):
        yield text[begin : place.start() + 1]
        begin = place.start() + 1
    yield text[begin:]


def utf8_bytes(text: str) -> int:
    """Length in UTF-8, without a copy of a long text."""
    if text.isascii():
        return len(text)
    return sum(len(text[at : at + CHUNK_CHARACTERS].encode()) for at in range(0, len(text), CHUNK_CHARACTERS))
