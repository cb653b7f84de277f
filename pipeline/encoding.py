"""Text to token ids: fastokens where it is proved equal on a sample, Hugging Face `tokenizers` otherwise.

The sample is odd strings (`PROBES`) and the beginnings of documents; later `Spot` compares one document of every
16 MB. Together they cost about a percent. A document becomes its tokens and the end-of-document token. Text that
spells a special token stays text; truncation, padding and templates that a tokenizer.json may ask for are left out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from pipeline.errors import TokenizerError
from pipeline.format import digest_bytes, token_dtype

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")
PROBES = (
    "<|endoftext|>",
    "a<|endoftext|>b <s></s> [EOS]<eos>",
    " ",
    "   \n\n \t\r\n  x  \n y\n",
    "\u00a0\u2003 \u3000a\u200b\ufeffb\u2028c",
    "nul \0 bell \a escape \x1b[0m delete \x7f",
    "don't I'LL we've they\u2019re 'tis '' ''s",
    "1234567890 3.14159 1,000,000 0x1F \u0664\u0662 \u00b2\u2155",
    "e\u0301 n\u0303o\u0308 \u1112\u1161\u11ab A\u030a\ufb01 \u212b",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e6\U0001f1fa \u270c\U0001f3fd",
    "\u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31",
    "x" * 3000,
    "ab" * 1000 + " " * 1000 + "\n" * 500,
    "\ufffd\ud7ff\ue000\U0010ffff",
    "snake_case camelCase __init__(self, *args) -> None: return {k: v[0] != 1 for k in d}",
)
"""Strings on which encoders are prone to differ."""
SPOT_EVERY_CHARACTERS = 16 << 20
SPOT_CHARACTERS = 4096


class Encoder(Protocol):
    """Encodes whole batches of texts."""

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [tokens] of all texts in a row, and where each begins: int64 [texts + 1]."""


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says about ids, and its bytes."""

    data: bytes
    size: int
    eod_id: int
    bos_id: int

    @property
    def digest(self) -> str:
        """Digest of the file."""
        return digest_bytes(self.data)

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint16 or uint32."""
        return token_dtype(self.size)


def load_vocabulary(
    path: Path, *, eod: str | None = None, bos: str | None = None, encoder: str = "tokenizers"
) -> Vocabulary:
    """Read a tokenizer.json. `eod` and `bos` name tokens where the usual names do not do.

    Where `encoder` may become fastokens, that is loaded meanwhile: it takes three times as long, but not the GIL.

    Raises TokenizerError where it is none, or has no end-of-document token.
    """
    if not path.is_file():
        raise TokenizerError(
            "no tokenizer here",
            where=path,
            remedy="give a tokenizer.json, or make one: slw-prep tokenizer INPUT... --out tokenizer.json",
        )
    data = path.read_bytes()
    with _loading(data) if encoder != "tokenizers" else contextlib.nullcontext():
        try:
            tokenizer = _parse(data)
        except Exception as error:  # tokenizers raises plain Exception
            raise TokenizerError(
                "not a tokenizer.json",
                where=path,
                found=str(error)[:200],
                allowed="the file that Hugging Face tokenizers saves",
            ) from error
        eod_id = _special_id(tokenizer, eod, EOD_NAMES, path, "--eod")
        bos_id = _special_id(tokenizer, bos, BOS_NAMES, path, "--bos", default=eod_id)
        size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Vocabulary(data, size, eod_id, bos_id)


@contextlib.contextmanager
def _loading(data: bytes) -> Iterator[None]:
    """Load fastokens meanwhile."""
    begun = threading.Event()

    def load() -> None:
        begun.set()
        with contextlib.suppress(Exception):  # choose_encoder meets it again, and says what it means
            make_encoder("fastokens", data)

    thread = threading.Thread(target=load)
    thread.start()
    begun.wait()  # else the other loading, which keeps the GIL, may come first
    try:
        yield
    finally:
        thread.join()


def choose_encoder(vocabulary: Vocabulary, sample: list[str], wanted: str = "auto") -> tuple[str, str]:
    """The encoder to use, and why: fastokens if its ids of `sample` equal those of `tokenizers`.

    Raises TokenizerError where `wanted` is "fastokens" and it cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers", "as asked"
    try:
        fast, slow = (make_encoder(name, vocabulary.data) for name in ("fastokens", "tokenizers"))
        texts = [*PROBES, *sample]
        pairs = zip(fast.encode(texts), slow.encode(texts), strict=True)
        if all(np.array_equal(a, b) for a, b in pairs):
            return (
                "fastokens",
                f"equal to tokenizers on {len(PROBES)} odd strings and {len(sample)} sampled documents",
            )
        reason = "fastokens differs from tokenizers on the sample"
    except Exception as error:  # whatever it raises, the reference still works
        reason = f"fastokens cannot load this tokenizer ({error})"
    if wanted == "fastokens":
        raise TokenizerError(reason, remedy="use --encoder auto")
    return "tokenizers", reason


class FastEncoder:
    """fastokens: Rust, several threads, flat buffers."""

    def __init__(self, data: bytes) -> None:
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(data.decode())

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


class ReferenceEncoder:
    """Hugging Face `tokenizers`: the reference."""

    def __init__(self, data: bytes) -> None:
        self._tokenizer = _parse(data)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]
        return np.concatenate([np.empty(0, np.uint32), *ids]), np.cumsum([0] + [len(i) for i in ids], dtype=np.int64)


@lru_cache(maxsize=2)
def make_encoder(name: str, data: bytes) -> Encoder:
    """The encoder called "fastokens" or "tokenizers", one a process: loading takes longer than 20 MB of text."""
    return FastEncoder(data) if name == "fastokens" else ReferenceEncoder(data)


class Spot:
    """Compares, now and then, what fastokens made of a document with what `tokenizers` makes of it."""

    def __init__(self, encoder: Encoder, data: bytes) -> None:
        self._encoder = encoder
        self._reference = make_encoder("tokenizers", data)
        self._due = 0

    def check(self, texts: list[str], ids: np.ndarray, offsets: np.ndarray, where: str) -> None:
        """Take note of a batch and its encoding; where it is time to, compare one of its documents.

        It is a whole one where one of at most `SPOT_CHARACTERS` is there, else the beginning of one.
        Raises TokenizerError where they differ.
        """
        if self._due > 0:
            self._due -= sum(map(len, texts))
            return
        self._due = SPOT_EVERY_CHARACTERS
        if short := [index for index, text in enumerate(texts) if len(text) <= SPOT_CHARACTERS]:
            index = short[len(short) // 2]
            text, found = texts[index], ids[offsets[index] : offsets[index + 1]]
        else:
            text = texts[0][:SPOT_CHARACTERS]
            found, _ = self._encoder.encode([text])
        expected, _ = self._reference.encode([text])
        if not np.array_equal(found, expected):
            raise TokenizerError(
                "fastokens differs from tokenizers on a document, though not on the sample",
                where=f"{where}: {text[:60]!r}",
                found=found.tolist()[:20],
                allowed=expected.tolist()[:20],
                remedy="build the store anew with the reference: --encoder tokenizers --force",
            )


def put_documents(out: np.ndarray, ids: np.ndarray, offsets: np.ndarray, eod_id: int) -> None:
    """Fill `out` [ids + texts] with the ids of each text and `eod_id` after it."""
    ends = offsets[1:] + np.arange(len(offsets) - 1)
    is_text = np.ones(len(out), dtype=bool)
    is_text[ends] = False
    out[is_text] = ids
    out[ends] = eod_id


@lru_cache(maxsize=2)
def _parse(data: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _special_id(
    tokenizer: Tokenizer,
    asked: str | None,
    names: tuple[str, ...],
    path: Path,
    option: str,
    default: int | None = None,
) -> int:
    for name in (asked,) if asked is not None else names:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    if asked is None and default is not None:
        return default
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    raise TokenizerError(
        f"the tokenizer has no token {asked!r}"
        if asked
        else "the tokenizer has no end-of-document token of a known name",
        where=path,
        found=f"added tokens {', '.join(special[:20]) or 'none'}",
        allowed=", ".join(names),
        remedy=f"name one of its tokens: {option} TOKEN",
    )
