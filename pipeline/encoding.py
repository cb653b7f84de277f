"""Text to token ids: fastokens where it is proved equal on a sample, Hugging Face `tokenizers` otherwise.

The sample is odd strings (`PROBES`) and the beginnings of documents; later `Spot` compares one document of every
16 MB. Together they cost about a percent. A document becomes its tokens and the end-of-document token. Text that
spells a special token stays text; truncation, padding and templates that a tokenizer.json may ask for are left out.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import orjson
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

    Where `encoder` may become fastokens, its loading begins here: it takes three times as long, but not the GIL.
    Raises TokenizerError where it is none, or has no end-of-document token.
    """
    if not path.is_file():
        raise TokenizerError(
            "no tokenizer here",
            where=path,
            found="a folder" if path.is_dir() else None,
            allowed="a file: names of a model hub are not looked up",
            remedy="give a tokenizer.json, or make one: slw-prep tokenizer INPUT... --out tokenizer.json",
        )
    data = path.read_bytes()
    try:
        lightened(data)
        if encoder != "tokenizers":
            start_encoder("fastokens", data)
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
    added = tokenizer.get_added_tokens_decoder()
    return Vocabulary(data, max([lightened(data)[1], *(number + 1 for number in added)]), eod_id, bos_id)


def is_special(vocabulary: Vocabulary, token: int) -> bool:
    """Whether no text is ever encoded as `token`."""
    added = _parse(vocabulary.data).get_added_tokens_decoder().get(token)
    return added is not None and bool(added.special)


class Choice:
    """The encoder of a build, chosen in a thread while the input is read already; nothing is encoded before.

    Sent to another process it is what was chosen.
    """

    def __init__(self, chosen: Callable[[], tuple[str, str]]) -> None:
        self._chosen = in_thread(chosen)

    @property
    def name(self) -> str:
        """A name for `make_encoder`; waits for it. Raises TokenizerError as `choose_encoder` does."""
        return self._chosen.result()[0]

    @property
    def reason(self) -> str:
        """Why it is this one."""
        return self._chosen.result()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, (partial(tuple, self._chosen.result()),)


def choose_encoder(vocabulary: Vocabulary, sample: list[str], wanted: str = "auto") -> tuple[str, str]:
    """The encoder to use, and why: fastokens if its ids of `sample` equal those of `tokenizers`.

    Raises TokenizerError where `wanted` is "fastokens" and it cannot be used.
    """
    if wanted == "tokenizers":
        return "tokenizers", "as asked"
    try:
        texts = [*PROBES, *sample]
        expected = make_encoder("tokenizers", vocabulary.data).encode(texts)
        found = make_encoder("fastokens", vocabulary.data).encode(texts)
        if all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
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


def unknown_share(vocabulary: Vocabulary, texts: list[str]) -> float:
    """Share of the tokens of `texts` that are the unknown token: the text that they stand for is lost."""
    model = orjson.loads(vocabulary.data)["model"]
    name, number = model.get("unk_token"), model.get("unk_id")  # Unigram has the number
    if (name, number) == (None, None):
        return 0.0
    reference = make_encoder("tokenizers", vocabulary.data)
    unknown = number if name is None else _parse(vocabulary.data).token_to_id(name)
    ids, _ = reference.encode(texts)
    return np.count_nonzero(ids == unknown) / max(len(ids), 1) if unknown is not None else 0.0


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
        self._tokenizer = _parse(data)

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


T = TypeVar("T")


def in_thread(call: Callable[[], T]) -> Future[T]:
    """Run `call` in a new thread; the future gets what it returns or raises."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed over, whatever it is
            future.set_exception(error)

    threading.Thread(target=run, name="in_thread").start()
    return future


class Spot:
    """Compares, now and then, what fastokens made of a document with what `tokenizers` makes of it."""

    def __init__(self, encoder: Encoder, data: bytes) -> None:
        self._encoder = encoder
        self._reference = make_encoder("tokenizers", data)
        self._due = 0
        self._lock = threading.Lock()

    def check(self, texts: list[str], tokens: np.ndarray, lengths: np.ndarray, where: str) -> None:
        """Take note of what `encode_documents` made, in any thread; where it is time to, compare one document of it.

        It is a whole one where one of at most `SPOT_CHARACTERS` is there, else the beginning of one.
        Raises TokenizerError where they differ.
        """
        with self._lock:
            if self._due > 0:
                self._due -= sum(map(len, texts))
                return
            self._due = SPOT_EVERY_CHARACTERS
        if short := [index for index, text in enumerate(texts) if len(text) <= SPOT_CHARACTERS]:
            index = short[len(short) // 2]
            end = int(lengths[: index + 1].sum()) - 1
            text, found = texts[index], tokens[end + 1 - lengths[index] : end]
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
def _parse(data: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_str(lightened(data)[0])
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
        allowed=None if asked else ", ".join(names),
        remedy=f"name one of its tokens, one that no text has: {option} TOKEN",
    )
