"""How long documents are, counted exactly: what one needs to choose where a length schedule starts and ends.

Asked two ways: by documents (each counts once) and by tokens (each counts as often as it is long). Lengths are stored
tokens, the end-of-document token included. Price: the list offsets of every shard, no token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
COUNTED = 1 << 20
"""LengthCounts below are counted in an array, those from here on sorted: there are few."""


@dataclass(frozen=True)
class LengthCounts:
    """Documents by length."""

    length: np.ndarray
    """int64 [distinct], ascending, at least 1."""
    documents: np.ndarray
    """int64 [distinct]: documents of that length."""

    @property
    def tokens(self) -> np.ndarray:
        """int64 [distinct]: tokens in documents of that length."""
        tokens: np.ndarray = self.length * self.documents
        return tokens

    def quantile(self, share: float, *, by_tokens: bool) -> int:
        """The least length such that documents up to it are at least `share` of all, or of all tokens."""
        weights = np.cumsum(self.tokens if by_tokens else self.documents)
        return int(self.length[min(np.searchsorted(weights, share * weights[-1]), len(weights) - 1)])

    def shorter(self, than: np.ndarray, *, by_tokens: bool) -> np.ndarray:
        """float64 [lengths]: the share of documents shorter than each of `than`, or of the tokens in them."""
        shares: np.ndarray = self._below(than, by_tokens) / (self.tokens if by_tokens else self.documents).sum()
        return shares

    def histogram(self, edges: np.ndarray, *, by_tokens: bool) -> np.ndarray:
        """int64 [len(edges) - 1]: documents, or tokens, of lengths in [edges[i], edges[i + 1])."""
        return np.diff(self._below(edges, by_tokens))

    def _below(self, than: np.ndarray, by_tokens: bool) -> np.ndarray:
        """int64 [lengths]: documents shorter than each of `than`, or the tokens in them."""
        weights = np.concatenate([[0], np.cumsum(self.tokens if by_tokens else self.documents)])
        below: np.ndarray = weights[np.searchsorted(self.length, than)]
        return below


def count_lengths(parts: Iterable[np.ndarray]) -> LengthCounts:
    """Count `parts`, int64 [documents] each, at least 1 and together at least one document."""
    short = np.zeros(COUNTED, dtype=np.int64)
    long = []
    for part in parts:
        is_short = part < COUNTED
        if is_short.all():
            counts = np.bincount(part)
        else:
            counts = np.bincount(part[is_short])
            long.append(part[~is_short])
        short[: len(counts)] += counts
    length, documents = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *long]), return_counts=True)
    known = np.flatnonzero(short)
    return LengthCounts(np.concatenate([known, length]), np.concatenate([short[known], documents.astype(np.int64)]))


def merge(parts: Iterable[LengthCounts]) -> LengthCounts:
    """All of `parts` together."""
    kept = list(parts)
    length, index = np.unique(np.concatenate([part.length for part in kept]), return_inverse=True)
    documents = np.zeros(len(length), dtype=np.int64)
    np.add.at(documents, index, np.concatenate([part.documents for part in kept]))
    return LengthCounts(length, documents)


def powers(longest: int) -> np.ndarray:
    """int64: 1, 2, 4, ... up to the first power of two above `longest`."""
    return 2 ** np.arange(int(longest).bit_length() + 1, dtype=np.int64)


def facts_of(lengths: LengthCounts) -> dict[str, Any]:
    """Plain JSON values: totals, quantiles, histograms over powers of two, and what is shorter than each power."""
    edges = powers(int(lengths.length[-1]))
    documents, tokens = int(lengths.documents.sum()), int(lengths.tokens.sum())
    shorter = [lengths.shorter(edges, by_tokens=by_tokens) for by_tokens in (False, True)]
    return {
        "documents": documents,
        "tokens": tokens,
        "shortest": int(lengths.length[0]),
        "mean": tokens / documents,
        "longest": int(lengths.length[-1]),
        "quantiles": {
            "share": list(QUANTILES),
            "by_documents": [lengths.quantile(share, by_tokens=False) for share in QUANTILES],
            "by_tokens": [lengths.quantile(share, by_tokens=True) for share in QUANTILES],
        },
        "length_histogram": lengths.histogram(edges, by_tokens=False).tolist(),
        "token_histogram": lengths.histogram(edges, by_tokens=True).tolist(),
        "shorter_than": [
            {"length": length, "documents": of_documents, "tokens": of_tokens}
            for length, of_documents, of_tokens in zip(edges.tolist(), *(s.tolist() for s in shorter), strict=True)
        ],
    }
