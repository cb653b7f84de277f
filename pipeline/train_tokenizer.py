"""Train a byte-level BPE tokenizer on a corpus, as GPT-2's was, with Hugging Face `tokenizers`."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.corpus import documents, split_units
from pipeline.documents import Reading
from pipeline.errors import ConfigError, CorpusError, StoreError
from pipeline.inputs import find_files
from pipeline.shell import pasted
from pipeline.writer import write_bytes

END_OF_DOCUMENT = "<|endoftext|>"
LEAST_SIZE = 257
"""256 bytes and the end-of-document token."""


def train_tokenizer(
    inputs: tuple[str, ...],
    out: Path,
    *,
    vocab_size: int,
    reading: Reading,
    sources: tuple[tuple[str, str], ...] = (),
    force: bool = False,
    on_document: Callable[[int], None] = lambda text_bytes: None,
) -> Tokenizer:
    """Train on all documents of `inputs`, or of `sources` (name, path), and save OUT, a tokenizer.json.

    Raises ConfigError for a vocabulary under 257, StoreError where OUT exists, CorpusError for the corpus.
    """
    if vocab_size < LEAST_SIZE:
        raise ConfigError(
            "vocabulary too small", found=vocab_size, allowed=f"{LEAST_SIZE} or more: bytes and the end"
        )
    _check_output(out, force)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def texts() -> Iterator[str]:
        nonlocal seen
        for unit in split_units(find_files(inputs, reading, sources), 1 << 30, reading):
            for text in (text for batch in documents(unit, reading, _raise) for text in batch.texts):
                seen += len(text)
                on_document(len(text))
                yield text

    with _ended_by_ctrl_c():
        tokenizer.train_from_iterator(texts(), trainer)
    if not seen:
        raise CorpusError(
            "the corpus is empty",
            where=", ".join([*inputs, *(path for _, path in sources)][:3]),
            remedy="check the input and --text-field",
        )
    write_bytes(out, tokenizer.to_str(pretty=True).encode())
    return tokenizer


def _check_output(out: Path, force: bool) -> None:
    if out.is_dir():
        raise StoreError(
            "the output is a folder", where=out, allowed="a file", remedy=f"--out {pasted(out / 'tokenizer.json')}"
        )
    if out.exists() and not force:
        raise StoreError("the output exists", where=out, remedy="choose another --out, or replace it: --force")


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """SIGINT ends the process at once: Python would hear of it when the trainer is done, after minutes.

    Nothing is half-written meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may ask for signals
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _raise(error: CorpusError) -> None:
    raise error
