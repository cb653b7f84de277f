"""Where a schedule ends on given data: epochs into tokens, buckets into an order, and whether there is enough."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np

from curriculum.phases import MOST_TOKENS
from curriculum.schedule import Schedule
from curriculum.settings import BUCKET_SEQUENCES
from curriculum.window import Corpus
from pipeline.amount import amount
from pipeline.errors import ConfigError


def resolved(schedule: Schedule, store_tokens: int, bucket_sequences: list[int] | None = None) -> Schedule:
    """See `Schedule.resolve`."""
    if store_tokens < 1:
        raise ConfigError("the store has no tokens to serve", found=store_tokens)
    if schedule.decomposition:
        return _decomposed(schedule, store_tokens, bucket_sequences)
    if schedule.epochs is not None:
        tokens = schedule.epochs * store_tokens
        if tokens >= MOST_TOKENS:
            raise ConfigError(
                "more epochs than can be counted",
                found=f"{schedule.epochs:,} of {store_tokens:,} tokens",
                allowed=f"below {MOST_TOKENS:,} tokens",
            )
        if schedule.planner == "truncate":
            tokens = _tokens_after_cutting(schedule, tokens)
        return dataclasses.replace(schedule, total_tokens=tokens, epochs=None, max_epochs=schedule.epochs)
    truncates = schedule.planner == "truncate"
    _check(schedule, store_tokens, schedule.uncut.tokens_before(schedule.total_steps) if truncates else 0)
    return schedule


def resolved_for(schedule: Schedule, corpus: Corpus) -> Schedule:
    """`schedule` with its end on the documents of `corpus`, and its order where that follows from them.

    Raises ConfigError as `Schedule.resolve` does. Reads lengths only for a schedule of buckets.
    """
    buckets, sequences = schedule.decomposition, None
    if buckets:
        counts = [buckets.count(lengths) for lengths in corpus.shard_lengths(range(len(corpus.shards)))]
        sequences = np.sum(counts, axis=0).tolist()
    return resolved(schedule, sum(shard.tokens for shard in corpus.shards), sequences)


def _check(schedule: Schedule, store_tokens: int, read: int = 0) -> None:
    """Raise ConfigError where it serves, or reads, more than there is."""
    assert schedule.total_tokens is not None
    tokens = max(read, schedule.total_tokens)
    if tokens > schedule.max_epochs * store_tokens:
        needed = -(-tokens // store_tokens)
        reading = f", for which it reads {read:,}" if read else ""
        raise ConfigError(
            "the schedule is longer than the data",
            found=(
                f"total_tokens = {schedule.total_tokens:,}{reading}, {store_tokens:,} tokens in the store: "
                f"{tokens / store_tokens:.2f} epochs"
            ),
            allowed=f"{schedule.max_epochs * store_tokens:,} tokens (max_epochs = {schedule.max_epochs})",
            remedy=(
                f"lower total_tokens, add {tokens - schedule.max_epochs * store_tokens:,} tokens of data, "
                f"or allow repeated data: max_epochs = {needed}"
            ),
        )


def check_first_batch(schedule: Schedule, store_tokens: int) -> None:
    """Raise ConfigError where the first batch of a resolved schedule holds more than all that the data serve.

    Dealing does serve it, once and with padding; as a run it is a mistake.
    """
    first, most = schedule.phase(0), schedule.max_epochs * store_tokens
    if first.batch_tokens > most:
        raise ConfigError(
            "the first batch holds more than all the data: the run would be one step, and partly padding",
            found=f"{amount(first.sequences, 'sequence')} of {first.seqlen:,}: {first.batch_tokens:,} tokens",
            allowed=f"{most:,} tokens ({store_tokens:,} stored, in {amount(schedule.max_epochs, 'epoch')} at most)",
            remedy="make the batch smaller, bring more data, or serve them more often (run.epochs)",
        )


def _tokens_after_cutting(schedule: Schedule, tokens: int) -> int:
    """Tokens of the steps for which truncation reads at most `tokens`."""
    steps = bisect.bisect_right(range(tokens), tokens, key=schedule.uncut.tokens_before) - 1
    if steps < 1:
        raise ConfigError(
            "the store has less than one batch of full-length rows",
            found=f"{tokens:,} tokens",
            allowed=f"{schedule.uncut.phases[0].batch_tokens:,} or more",
        )
    return schedule.tokens_before(steps)


def _decomposed(schedule: Schedule, store_tokens: int, sequences: list[int] | None) -> Schedule:
    """With the order of its batches."""
    buckets, settings = schedule.decomposition, schedule.settings
    assert buckets is not None
    assert settings is not None
    sequences = sequences or settings["curriculum"].get(BUCKET_SEQUENCES)
    if sequences is None:
        raise ConfigError(
            "buckets are counted in the store, which these tokens do not tell",
            remedy="CurriculumLoader(store, schedule, ...).schedule, or schedule.resolve(tokens, bucket_sequences)",
        )
    if schedule.total_tokens is not None:
        _check(schedule, store_tokens)
    epochs = schedule.epochs or schedule.max_epochs
    most = sum(buckets.batches(sequences, epochs)[0]) * buckets.batch_tokens
    wanted = schedule.total_tokens or most
    if most < max(wanted, 1):
        raise ConfigError(
            "the buckets hold less than that in full batches",
            found=f"total_tokens = {wanted:,}",
            allowed=f"{most:,} in {epochs} epochs",
            remedy="lower total_tokens or seqlen_start, carry = true, or raise max_epochs",
        )
    curriculum = {**settings["curriculum"], BUCKET_SEQUENCES: [int(n) for n in sequences]}
    return Schedule.from_settings(curriculum, settings["batch"], total_tokens=wanted, max_epochs=epochs)
