"""fastokens where it is proved equal to Hugging Face `tokenizers` on a sample; `tokenizers` otherwise.

The sample is odd strings (`PROBES`) and the beginnings of documents; later `Spot` compares one document of every
16 MB. Together they cost about a percent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pipeline.ahead import in_thread
from pipeline.encoding import Encoder, make_encoder
from pipeline.errors import TokenizerError
from pipeline.vocabulary import Vocabulary

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
