"""Documents that are token ids already: what readers of other formats yield, and how it is checked and ended.

Every id must be of the vocabulary. A document that ends in the end-of-document token stays as it is, any other is
given one; a document without a token is left out. So what was stored by us comes back unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import CorpusError
from pipeline.vocabulary import Vocabulary

BATCH_TOKENS = 4 << 20
"""Tokens that a reader yields at once, where a single document has no more."""


@dataclass(frozen=True)
class Tokenised:
    """Some documents of a source, one after another."""

    tokens: np.ndarray
    """[tokens], of any integer or floating type."""
    lengths: np.ndarray
    """int64 [documents], 0 or more."""
    first: int
    """Number of the first document within its source."""
    ids: np.ndarray | None = None
    """object (str) [documents]: what the source calls them, where that is asked for."""


def runs(ends: np.ndarray, most: int, most_documents: int | None = None) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of consecutive documents that hold at most `most` tokens together, or are a single one.

    There are at most `most_documents` of them. `ends` is int64 [documents + 1]: where the first begins, then where
    each ends.
    """
    at = 0
    while at < len(ends) - 1:
        last = max(int(np.searchsorted(ends, ends[at] + most, side="right")) - 1, at + 1)
        if most_documents is not None:
            last = min(last, at + most_documents)
        yield at, last
        at = last


def checked(batch: Tokenised, vocabulary: Vocabulary, where: str) -> None:
    """Raise CorpusError, naming document and position, for the first id that is none of the vocabulary."""
    tokens = batch.tokens
    if not len(tokens):
        return
    bad = (tokens < 0) | (tokens >= vocabulary.size)
    if tokens.dtype.kind == "f":
        bad |= tokens != np.floor(tokens)  # not a number is none either: it differs from itself
    if not bad.any():
        return
    at = int(np.argmax(bad))
    ends = np.cumsum(batch.lengths)
    document = int(np.searchsorted(ends, at, side="right"))
    position = at - int(ends[document] - batch.lengths[document])
    raise CorpusError(
        "an id that is not of the tokenizer",
        where=f"{where}, document {batch.first + document}, position {position}",
        found=tokens[at].item(),
        allowed=f"0 to {vocabulary.size - 1}",
        remedy="give the tokenizer that made these ids: --tokenizer",
    )


@dataclass(frozen=True)
class Ended:
    """Documents as a store holds them."""

    tokens: np.ndarray
    """[tokens] of the vocabulary's dtype."""
    lengths: np.ndarray
    """int64 [documents], at least 1, the end-of-document token included."""
    rows: np.ndarray
    """int64 [documents]: number within the source."""
    ids: np.ndarray | None
    """object (str) [documents]"""
    added: int
    """Documents that were given an end-of-document token."""
    empty: int
    """Documents left out: they had no token."""


def ended(batch: Tokenised, vocabulary: Vocabulary) -> Ended:
    """`batch` with an end-of-document token after every document that has none, empty documents left out."""
    kept = batch.lengths > 0
    lengths = batch.lengths[kept]
    rows = batch.first + np.flatnonzero(kept)
    ids = batch.ids[kept] if batch.ids is not None else None
    missing = batch.tokens[np.cumsum(lengths) - 1] != vocabulary.eod_id
    empty = len(batch.lengths) - len(lengths)
    if not missing.any():
        return Ended(batch.tokens.astype(vocabulary.dtype), lengths, rows, ids, 0, empty)
    lengths = lengths + missing
    tokens = np.full(int(lengths.sum()), vocabulary.eod_id, dtype=vocabulary.dtype)
    given = np.ones(len(tokens), dtype=np.bool_)
    given[(np.cumsum(lengths) - 1)[missing]] = False
    tokens[given] = batch.tokens
    return Ended(tokens, lengths, rows, ids, int(missing.sum()), empty)


def documents_where(batch: Ended, chosen: np.ndarray) -> Ended:
    """The documents of `batch` for which `chosen`, bool [documents]."""
    if chosen.all():
        return batch
    ids = batch.ids[chosen] if batch.ids is not None else None
    tokens = batch.tokens[np.repeat(chosen, batch.lengths)]
    return replace(batch, tokens=tokens, lengths=batch.lengths[chosen], rows=batch.rows[chosen], ids=ids)


def without_last(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths of documents of at least one token, each without its last one."""
    kept = np.ones(len(tokens), dtype=np.bool_)
    kept[np.cumsum(lengths) - 1] = False
    return tokens[kept], lengths - 1
