"""The global batches of an order, every token once an epoch, from any step on.

Windows are dealt to their last token one after another, so where step t begins follows from the tokens before it:
only the window that holds it is dealt anew, and nothing has to be saved. A batch that a window cannot fill goes on
with the next: what is left of the first fills whole sequences and a part of one, the second the rest of that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from curriculum.dealer import Dealer
from curriculum.hashes import hashes, key_of
from curriculum.order import Order, Served
from curriculum.schedule import Schedule
from curriculum.window import Expect, Window, windows
from pipeline.packing import Packed

DEAL_SEQUENCES = 1 << 18
DEAL_TOKENS = 1 << 25
"""Most of one deal; it ends earlier where batches change their shape or the window ends."""
PASSED_STEPS = 1 << 16
"""Most steps skipped in one call on the way to the first step asked for."""
_NONE = np.empty(0, dtype=np.int64)
NOTHING = Packed(_NONE, _NONE, _NONE, np.zeros(1, dtype=np.int64))


def dealing(order: Order, first: int, expect: Expect) -> Iterator[tuple[int, Packed]]:
    """(step, global batch) from step `first` to the end of the order's schedule.

    A batch holds `schedule.sequences(step)` full sequences; only the last one of the data may hold less. Where
    sources are mixed each row is of one source, and the rows are in random order. `expect`: see `windows`.
    """
    streams = [
        _stream(order, key_of(order.seed, number), shards, served, first, expect)
        for number, (shards, served) in enumerate(order.shares)
    ]
    for step in range(first, order.schedule.total_steps):
        parts = [next(stream) for stream in streams]
        yield step, parts[0] if order.mixture is None else _mixed(parts, key_of(order.seed, len(parts), step))


class _Source:
    """The windows of one source, dealt one after another."""

    def __init__(self, supply: Iterator[Window]) -> None:
        self._supply = supply
        self.begin_window()

    @property
    def tokens(self) -> int:
        """Tokens left in the window."""
        return self.dealer.tokens

    def begin_window(self) -> None:
        """Go on with the next window."""
        self.window = next(self._supply)
        self.dealer = Dealer(self.window.lengths, key=self.window.key)
        self._end = self.window.first_token + self.dealer.tokens

    def ready(self, limit: int) -> bool:
        """Whether there are tokens to deal, of the next window if need be, before `limit` tokens of the source."""
        if not self.dealer.tokens and self._end < limit:
            self.begin_window()
        return self.dealer.tokens > 0

    def numbered(self, dealt: Packed) -> Packed:
        """With the corpus' numbers of documents for the window's."""
        return dealt._replace(document=self.window.documents[dealt.document])

    def cross(self, seqlen: int, sequences: int, filled: int, limit: int, *, from_beginning: bool) -> Packed:
        """One batch over as many windows as it takes; `filled` tokens of its first sequence were served before.

        Holds less than `sequences` where the data end at `limit` tokens.
        """
        parts: list[Packed] = []
        while sequences and self.ready(limit):
            if filled:
                gap = min(seqlen - filled, self.tokens)
                part = self.dealer.deal(gap, np.ones(1, dtype=np.int64), from_beginning=from_beginning)
            else:
                part = self.dealer.deal(seqlen, np.array([sequences]), from_beginning=from_beginning)
            full, filled = divmod(filled + int(part.length.sum()), seqlen)
            sequences -= full
            parts.append(self.numbered(part))
        return _joined(parts, seqlen)


def _stream(
    order: Order, key: int, shards: list[int], served: Served, first: int, expect: Expect
) -> Iterator[Packed]:
    """The rows of one source at each step from `first` on."""
    source = _Source(windows(order.corpus, shards, key, served.before(first), order.window_tokens, expect))
    step = served.step_of(source.window.first_token)
    lead = source.window.first_token - served.before(step)  # tokens of its batch that earlier windows served
    ends = [change for change, _ in order.history[1:]] + [order.schedule.total_steps]
    for (_, schedule), end in zip(order.history, ends, strict=True):
        limit, reading = served.limit(schedule), {"from_beginning": schedule.first_piece == "beginning"}
        while step < end:
            seqlen, sequences = schedule.seqlen(step), schedule.sequences(step)
            source.ready(limit)
            if (
                step < first
                and not lead
                and (passed := _whole_shapes(schedule, served, step, min(first, end), source.tokens))
            ):
                seqlens, rows, step = passed
                source.dealer.skip(seqlens, rows, **reading)
                continue
            most = min(DEAL_SEQUENCES, DEAL_TOKENS // seqlen, source.tokens // seqlen)
            steps = min(schedule.end_of_phase(step) - step, 1 + served.steps_of(most, sequences))
            rows = np.cumsum(served.rows(step, steps, sequences))
            if lead or int(rows[0]) * seqlen > source.tokens:
                batch = source.cross(seqlen, int(rows[0]) - lead // seqlen, lead % seqlen, limit, **reading)
                lead, step = 0, step + 1
                if step > first:
                    yield batch
                continue
            # As many batches as may be, without those at the end that hold nothing of this source.
            within = int(rows[max(int(np.searchsorted(rows, most, side="right")) - 1, 0)])
            count = 1 + int(np.searchsorted(rows, within))
            if step + count <= min(first, end):
                if within:
                    source.dealer.skip(np.array([seqlen]), np.array([within]), **reading)
                step += count
                continue
            dealt = source.dealer.deal(seqlen, rows[:count], **reading) if within else NOTHING
            if step + count > end:
                count = end - step
                source.dealer.take_back(dealt, int(rows[count - 1]))
            if step + count > first:
                dealt = source.numbered(dealt)
                for i in range(max(first - step, 0), count):
                    yield sequences_of(dealt, int(rows[i - 1]) if i else 0, int(rows[i]))
            step += count


def _whole_shapes(
    schedule: Schedule, served: Served, step: int, end: int, tokens: int
) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Deals from `step` on that each hold all steps of one shape, end by `end` and need no more than `tokens`.

    They are the deals that `_stream` makes: it looks for `most` rows no further than their share of the batches lets
    it expect, so a rare source's rows of a shape may take it two deals. Returns (seqlens, rows: int64 [deals]; the
    step after them), or None; at most PASSED_STEPS steps.
    """
    first, seqlen, sequences = schedule.phases.shapes(step, min(end, step + PASSED_STEPS))
    if not len(seqlen):
        return None
    steps = np.diff(first)
    rows = np.add.reduceat(served.rows(step, int(steps.sum()), np.repeat(sequences, steps)), first[:-1] - step)
    left = tokens - np.cumsum(rows * seqlen)
    most = np.minimum(DEAL_SEQUENCES, np.minimum(DEAL_TOKENS, left + rows * seqlen) // seqlen)
    whole = (rows <= most) & (steps <= 1 + served.steps_of(most, sequences))
    count = int(np.argmin(np.append(whole, False)))
    dealt = rows[:count] > 0
    return (seqlen[:count][dealt], rows[:count][dealt], int(first[count])) if count else None


def _pieces(parts: list[Packed]) -> list[np.ndarray]:
    """Document, start and length of the pieces of all parts."""
    return [np.concatenate([part[column] for part in (NOTHING, *parts)]) for column in range(3)]


def _joined(parts: list[Packed], seqlen: int) -> Packed:
    """Pieces of parts that end within sequences of `seqlen` tokens, as sequences."""
    document, start, length = _pieces(parts)
    ends = np.cumsum(length)
    closing = ends % seqlen == 0
    closing[-1:] = True
    return Packed(document, start, length, np.append(0, 1 + np.flatnonzero(closing)))


def _mixed(parts: list[Packed], key: int) -> Packed:
    """The rows of all parts in a random order."""
    document, start, length = _pieces(parts)
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    order = np.argsort(hashes(key, len(counts)), kind="stable")
    begins = (np.cumsum(counts) - counts)[order]
    offsets = np.append(0, np.cumsum(counts[order]))
    pieces = np.arange(len(document)) + np.repeat(begins - offsets[:-1], counts[order])
    return Packed(document[pieces], start[pieces], length[pieces], offsets)


def sequences_of(packed: Packed, first: int, last: int) -> Packed:
    """Sequences `first` to `last` - 1 of `packed`, or those of them that there are."""
    offsets = packed.offsets[min(first, packed.sequences) : last + 1]
    pieces = slice(int(offsets[0]), int(offsets[-1]))
    return Packed(packed.document[pieces], packed.start[pieces], packed.length[pieces], offsets - offsets[0])
