"""Which documents are dealt together, and in which order windows of them come up: pure arithmetic.

    source    shard shard shard ...          a seeded order of shards, new in each epoch
    groups    [shard shard] [shard] ...      neighbours in it, GROUP_WINDOWS windows of tokens; lengths are read here
    windows   {documents} {documents} ...    each a random share of a group's documents, dealt to its last token

A store smaller than a window is one window, one smaller than a group is dealt in fair samples of all of it. The
windows of a source are read to the end one after another, so the number of tokens served tells where a run is, and
no state is needed. Price: the lengths of one group in memory (0.7 M documents, 6 MB) and one window to deal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from curriculum.hashes import hashes, key_of

WINDOW_TOKENS = 1 << 25
"""Tokens of a window, about: what planning anew at a resume costs at most (half a second at seqlen 8, less above)."""
WINDOW_SHAPES = 1 << 16
"""Most shapes in a window, for the same reason: each is a deal of 3 to 6 us. See `order.default_window_tokens`."""
GROUP_WINDOWS = 16

Expect = Callable[[list[int]], None]
"""Told the shards that come up after those now dealt, so that they can be read meanwhile."""


def expect_nothing(shards: list[int]) -> None:
    """For who reads no tokens."""


class Shard(Protocol):
    """What planning needs to know of a shard before it is read."""

    @property
    def documents(self) -> int:
        """Number of documents."""

    @property
    def tokens(self) -> int:
        """Sum of their lengths."""

    @property
    def source(self) -> str:
        """Name of their source; the shards of one stand together."""


class Corpus(Protocol):
    """What can be planned: a `Store`, or `Lengths` without any text behind them."""

    @property
    def shards(self) -> Sequence[Shard]:
        """Documents are numbered in this order, from 0."""

    def shard_lengths(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Of each of these shards int64 [its documents]: tokens of each, at least 1."""


@dataclass(frozen=True)
class LengthsShard:
    """A part of `Lengths`."""

    lengths: np.ndarray
    source: str = ""

    @property
    def documents(self) -> int:
        """See `Shard`."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """See `Shard`."""
        return int(self.lengths.sum())


class Lengths:
    """A corpus of document lengths alone: to plan, measure and test without a store."""

    def __init__(self, lengths: np.ndarray | dict[str, np.ndarray], *, shards: int = 1) -> None:
        sources = lengths if isinstance(lengths, dict) else {"": lengths}
        self.shards = [
            LengthsShard(part.astype(np.int64), name)
            for name, all_of_it in sources.items()
            for part in np.array_split(all_of_it, shards)
        ]

    def shard_lengths(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """See `Corpus`."""
        return (self.shards[index].lengths for index in indices)


@dataclass(frozen=True)
class Window:
    """Documents that are dealt together."""

    first_token: int
    """Tokens of the source before it, over all epochs."""
    documents: np.ndarray
    """int64 [documents]: their numbers in the corpus."""
    lengths: np.ndarray
    """int64 [documents]"""
    key: int
    """Decides the order of dealing it."""


def shards_of(corpus: Corpus) -> dict[str, list[int]]:
    """The shards of each source, in the corpus' order."""
    sources: dict[str, list[int]] = {}
    for index, shard in enumerate(corpus.shards):
        sources.setdefault(shard.source, []).append(index)
    return sources


def windows(
    corpus: Corpus,
    shards: list[int],
    key: int,
    token: int,
    window_tokens: int = WINDOW_TOKENS,
    expect: Expect = expect_nothing,
) -> Iterator[Window]:
    """The windows of `shards`, epoch after epoch without end, from the one that holds token number `token`.

    They follow from the arguments alone; `token` counts what they serve from 0 over all epochs. When a group begins
    `expect` is told the shards of the next one of its epoch.
    """
    first_documents = np.cumsum([0] + [shard.documents for shard in corpus.shards])
    tokens = np.array([corpus.shards[index].tokens for index in shards], dtype=np.int64)
    total = int(tokens.sum())
    epoch = token // total
    while True:
        before, epoch_key = epoch * total, key_of(key, epoch)
        groups = _groups(tokens, epoch_key, GROUP_WINDOWS * window_tokens)
        for number, members in enumerate(groups):
            size = int(tokens[members].sum())
            if before + size > token:
                if number + 1 < len(groups):
                    expect([shards[member] for member in groups[number + 1].tolist()])
                chosen = [shards[member] for member in members.tolist()]
                lengths = list(corpus.shard_lengths(chosen))
                documents = [
                    np.arange(first_documents[index], first_documents[index] + len(part), dtype=np.int64)
                    for index, part in zip(chosen, lengths, strict=True)
                ]
                group = Window(before, np.concatenate(documents), np.concatenate(lengths), key_of(epoch_key, number))
                for window in _split(group, -(-size // window_tokens)):
                    if window.first_token + int(window.lengths.sum()) > token:
                        yield window
            before += size
        epoch += 1


def _groups(tokens: np.ndarray, key: int, group_tokens: int) -> list[np.ndarray]:
    """Shards of `tokens` tokens in a random order, parted where another `group_tokens` begin."""
    order = np.argsort(hashes(key, len(tokens)), kind="stable")
    ordered = tokens[order]
    total = int(ordered.sum())
    number = (np.cumsum(ordered) - ordered) * -(-total // group_tokens) // total
    return np.split(order, np.flatnonzero(np.diff(number)) + 1)


def _split(group: Window, count: int) -> Iterator[Window]:
    """`count` windows of about equal tokens, each document in one of them at random; empty ones are left out."""
    if count == 1:
        yield group
        return
    chosen = (hashes(group.key, len(group.lengths)) % np.uint64(count)).astype(np.int64)
    order = np.argsort(chosen, kind="stable")
    first_token = group.first_token
    for number, members in enumerate(np.split(order, np.searchsorted(chosen[order], np.arange(1, count)))):
        if len(members):
            lengths = group.lengths[members]
            yield Window(first_token, group.documents[members], lengths, key_of(group.key, 1 + number))
            first_token += int(lengths.sum())
