"""Text to token ids: by fastokens, or by Hugging Face `tokenizers`, which is the reference (see `proof`).

Text that spells a special token stays text; truncation, padding and templates that a tokenizer.json may ask for are
left out.
"""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from functools import lru_cache
from itertools import chain
from typing import Protocol

import numpy as np
import orjson
from tokenizers import Tokenizer

from pipeline.ahead import in_thread


class Encoder(Protocol):
    """Encodes whole batches of texts."""

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids uint32 [tokens] of all texts in a row, and where each begins: int64 [texts + 1]."""


class FastEncoder:
    """fastokens: Rust, flat buffers. A call stays in its thread; callers bring several.

    Its own threads wait for one another in each call: on two cores 135 MB of English take 0.67 s of processor time
    with them, 0.57 without.
    """

    def __init__(self, data: bytes) -> None:
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # read when it first encodes
        import fastokens

        self._tokenizer = fastokens.Tokenizer.from_json_str(lightened(data)[0])

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        ids, offsets = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)


class ReferenceEncoder:
    """Hugging Face `tokenizers`: the reference."""

    def __init__(self, data: bytes) -> None:
        self._tokenizer = parsed(data)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]
        return np.concatenate([np.empty(0, np.uint32), *ids]), np.cumsum([0] + [len(i) for i in ids], dtype=np.int64)


@lru_cache(maxsize=2)
def start_encoder(name: str, data: bytes) -> Future[Encoder]:
    """Load the encoder called "fastokens" or "tokenizers" in a thread, one a process."""
    if name == "tokenizers":
        return in_thread(lambda: ReferenceEncoder(data))
    with contextlib.suppress(ImportError):
        import fastokens  # noqa: F401  (here, lest the thread loses the GIL on its way to where it needs none)
    return in_thread(lambda: FastEncoder(data))


def make_encoder(name: str, data: bytes) -> Encoder:
    """The encoder that `start_encoder` loads, once it is loaded. Raises what loading it raised."""
    return start_encoder(name, data).result()


@lru_cache(maxsize=2)
def lightened(data: bytes) -> tuple[str, int]:
    """The same tokenizer.json without white space, a merge as "a b" in place of ["a", "b"], and its model's ids.

    Both libraries read either; this loads in two thirds of the time. Where it cannot be said so it stays as it is.
    The ids are those below the number returned, 0 where none are found; `get_vocab` would take 20 times as long.
    Raises UnicodeDecodeError.
    """
    size = 0
    try:
        tokenizer = orjson.loads(data)
        vocabulary = tokenizer["model"]["vocab"]
        size = max(vocabulary.values()) + 1 if isinstance(vocabulary, dict) else len(vocabulary)  # a list: Unigram's
        merges = tokenizer["model"]["merges"]
        if " " not in "".join(chain.from_iterable(merges)):
            tokenizer["model"]["merges"] = [" ".join(merge) for merge in merges]
        return orjson.dumps(tokenizer).decode(), size
    except (ValueError, KeyError, TypeError):
        return data.decode(), size


@lru_cache(maxsize=2)
def parsed(data: bytes) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without what is left out. Raises plain Exception where it is none."""
    tokenizer = Tokenizer.from_str(lightened(data)[0])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
