"""Text to token ids: fastokens where it is proved equal on a sample, Hugging Face `tokenizers` otherwise.

A document becomes its tokens and the end-of-document token. Text that spells a special token stays text; truncation,
padding and templates that a tokenizer.json may ask for are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from pipeline.errors import TokenizerError
from pipeline.format import digest_bytes, token_dtype

EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]")
ENCODERS = ("auto", "fastokens", "tokenizers")


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


def load_vocabulary(path: Path, *, eod: str | None = None, bos: str | None = None) -> Vocabulary:
    """Read a tokenizer.json. `eod` and `bos` name tokens where the usual names do not do.

    Raises TokenizerError where it is none, or has no end-of-document token.
    """
    if not path.is_file():
        raise TokenizerError(
            "no tokenizer here",
            where=path,
            remedy="give a tokenizer.json, or make one: slw-prep tokenizer INPUT... --out tokenizer.json",
        )
    data = path.read_bytes()
    tokenizer = _parse(data, path)
    eod_id = _special_id(tokenizer, eod, EOD_NAMES, path, "--eod")
    bos_id = _special_id(tokenizer, bos, BOS_NAMES, path, "--bos", default=eod_id)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return Vocabulary(data, size, eod_id, bos_id)


def choose_encoder(vocabulary: Vocabulary, sample: list[str], wanted: str = "auto") -> tuple[str, str]:
    """The encoder to use, and why: fastokens if its ids of `sample` equal those of `tokenizers`.

    Raises TokenizerError where `wanted` is "fastokens" and it cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers", "as asked"
    try:
        fast, slow = FastEncoder(vocabulary.data), ReferenceEncoder(vocabulary.data)
        pairs = zip(fast.encode(sample), slow.encode(sample), strict=True)
        if all(np.array_equal(a, b) for a, b in pairs):
            return "fastokens", f"equal to tokenizers on {len(sample)} sampled documents"
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
        self._tokenizer = _parse(data, Path("tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]
        return np.concatenate([np.empty(0, np.uint32), *ids]), np.cumsum([0] + [len(i) for i in ids], dtype=np.int64)


def make_encoder(name: str, data: bytes) -> Encoder:
    """The encoder called "fastokens" or "tokenizers"."""
    return FastEncoder(data) if name == "fastokens" else ReferenceEncoder(data)


def append_eod(
    ids: np.ndarray, offsets: np.ndarray, eod_id: int, dtype: np.dtype[Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [tokens + texts] of `dtype` with `eod_id` after each text, and the lengths, int64 [texts]."""
    lengths = np.diff(offsets) + 1
    tokens = np.full(len(ids) + len(lengths), eod_id, dtype=dtype)
    is_text = np.ones(len(tokens), dtype=bool)
    is_text[np.cumsum(lengths) - 1] = False
    tokens[is_text] = ids
    return tokens, lengths


def _parse(data: bytes, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # tokenizers raises plain Exception
        raise TokenizerError(
            "not a tokenizer.json",
            where=path,
            found=str(error)[:200],
            allowed="the file that Hugging Face tokenizers saves",
        ) from error


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
