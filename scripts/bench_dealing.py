"""Dealing measured: cuts, diversity, speed of planning, and the time to go on from a checkpoint. Reads no token.

    .venv/bin/python scripts/bench_dealing.py [STORE]
    .venv/bin/python scripts/bench_dealing.py --draws 25
    .venv/bin/python scripts/bench_dealing.py --resume
    .venv/bin/python scripts/bench_dealing.py --trillion 100_000_000_000

Prints one JSON line a measurement, over 100,000 documents of lognormal(6.0, 1.1) tokens and, with STORE, over its
documents, or over 100,000 lengths drawn with replacement from them where they are fewer (which makes packing harder:
some lengths come often, others never). What is measured is defined in docs/dealing.md, section "Figures".

--draws N measures cuts alone, over N draws of such lengths; --resume only the time to go on.

--trillion N plans N tokens of an SLW ramp (8 to 1024) over a corpus that is made up shard by shard and never held:
lengths of 16 M tokens a shard come from the shard's number. Peak memory is the process's.
"""

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from curriculum.hashes import key_of
from curriculum.order import Order
from curriculum.phases import FIRST_STEP, SEQLEN, SEQUENCES, Phases
from curriculum.planner import plan_steps
from curriculum.saved import schedules_of, state_of
from curriculum.schedule import Schedule
from curriculum.window import Lengths, windows
from pipeline.packing import least_cuts, least_excess_cuts, pack
from pipeline.reader import Store

DOCUMENTS = 100_000
SEQLENS = (64, 128, 256, 512, 1024, 2048)
BATCH_TOKENS = 1 << 18
SHARD_DOCUMENTS = 22_000


def lognormal(documents: int, seed: int = 3) -> np.ndarray:
    return np.maximum(np.random.default_rng(seed).lognormal(6.0, 1.1, documents).astype(np.int64), 1)


def columns(order: Order, steps: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """(document, start, length) of all pieces, and how many distinct documents each batch has."""
    parts, distinct = [], []
    for step, packed in plan_steps(order):
        parts.append((packed.document, packed.start, packed.length))
        if steps is not None:
            distinct.append(len(np.unique(packed.document)))
        if step + 1 == steps:
            break
    document, start, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    return document, start, length, distinct


def cuts(corpus: str, lengths: np.ndarray, seqlen: int) -> dict[str, object]:
    least, fit = least_cuts(lengths, seqlen), lengths <= seqlen
    facts: dict[str, object] = {"subject": "cuts", "corpus": corpus, "seqlen": seqlen, "documents": len(lengths)}
    schedule = Schedule.constant(seqlen=seqlen, global_batch_sequences=BATCH_TOKENS // seqlen, epochs=1)
    for name, document in (
        ("pack", pack(lengths, seqlen).document),
        ("dealer", columns(Order.begin(Lengths(lengths), schedule, seed=1))[0]),
    ):
        pieces = np.bincount(document, minlength=len(lengths))
        facts[f"{name}_excess_cuts_per_document"] = round(
            float(pieces.sum() - len(lengths) - least) / len(lengths), 4
        )
        facts[f"{name}_fitting_documents_cut"] = round(float((pieces[fit] > 1).mean()), 4)
    facts["least_excess_cuts_per_document"] = round(least_excess_cuts(lengths, seqlen) / len(lengths), 4)
    order = Order.begin(Lengths(lengths), schedule, seed=1)
    started = time.perf_counter()
    for _ in plan_steps(order):
        pass
    facts["plan_m_tokens_per_s"] = round(float(lengths.sum()) / (time.perf_counter() - started) / 1e6)
    return facts


def draws(seqlen: int, count: int) -> dict[str, object]:
    """The mean and the most of `cuts` over so many draws of lognormal lengths."""
    found = [cuts("", lognormal(DOCUMENTS, seed), seqlen) for seed in range(count)]
    names = ("pack_excess_cuts_per_document", "dealer_excess_cuts_per_document")
    figures = {name: [float(str(facts[name])) for facts in found] for name in names}
    return {
        "subject": "draws",
        "corpus": "lognormal(6.0, 1.1)",
        "seqlen": seqlen,
        "documents": DOCUMENTS,
        "draws": count,
        **{name: {"mean": round(sum(all_) / count, 4), "most": max(all_)} for name, all_ in figures.items()},
    }


def diversity(corpus: str, lengths: np.ndarray, seqlen: int, sequences: int, steps: int) -> dict[str, object]:
    schedule = Schedule.constant(
        seqlen=seqlen, global_batch_sequences=sequences, total_tokens=seqlen * sequences * steps
    )
    document, start, length, distinct = columns(Order.begin(Lengths(lengths), schedule, seed=1), steps)
    window = next(windows(Lengths(lengths), [0], key_of(1, 0), 0)).lengths
    at_random = {
        name: round(float(np.mean([len(np.unique(draw)) for draw in draws])), 1)
        for name, among in (("window", window), ("store", lengths))
        for draws in [np.random.default_rng(1).choice(len(among), (20, sequences), p=among / among.sum())]
    }
    long = lengths[document] >= 2 * seqlen
    fair = float((1 / np.ceil(lengths[document[long]] / seqlen)).mean())
    place = np.sort((start[long] + 0.5) / (lengths[document[long]] - length[long] + 1))
    return {
        "subject": "diversity",
        "corpus": corpus,
        "seqlen": seqlen,
        "sequences": sequences,
        "steps": steps,
        "distinct_documents": round(float(np.mean(distinct)), 1),
        "distinct_if_drawn_from_the_window": at_random["window"],
        "distinct_if_drawn_from_the_store": at_random["store"],
        "openings": round(float((start[long] == 0).mean()), 4),
        "openings_over_an_epoch": round(fair, 4),
        "starts_from_uniform_ks": round(float(np.abs(place - (np.arange(len(place)) + 0.5) / len(place)).max()), 4),
    }


def to_and_fro(seqlens: tuple[int, int], sequences: int, **end: int) -> Schedule:
    """Of two lengths in turn, to the end of 1e9 tokens and beyond: another shape at every step."""
    columns = np.zeros((4, 2 * 1_010_000_000 // (sequences * sum(seqlens))), dtype=np.int64)
    columns[FIRST_STEP], columns[SEQUENCES] = np.arange(columns.shape[1]), sequences
    columns[SEQLEN, ::2], columns[SEQLEN, 1::2] = seqlens
    return Schedule(Phases(columns), **end)


def resume(tokens: int) -> Iterator[dict[str, object]]:
    """Worst of 12 steps of each schedule, with nothing known but its phases: to begin; to load and plan a batch."""
    lengths = lognormal(int(tokens / 739))
    held = int(lengths.sum())
    ramp = {"seqlen_end": 1024, "epochs": 1}
    for name, schedule in {
        "8 to 1024 in 6,000 steps, 256 sequences": Schedule.linear(
            seqlen_start=8, duration_steps=6000, global_batch_sequences=256, **ramp
        ),
        "8, 512 sequences": Schedule.constant(seqlen=8, global_batch_sequences=512, epochs=1),
        "1024, 64 sequences": Schedule.constant(seqlen=1024, global_batch_sequences=64, epochs=1),
        "1 to 8 sequences of 1024, batch_warmup in 400,000 steps": Schedule.linear(
            seqlen_start=128, duration_steps=400_000, global_batch_sequences=8, control="batch_warmup", **ramp
        ),
        "64 and 72 in turn, 8 sequences": to_and_fro((64, 72), 8, total_tokens=held),
        "64 and 72 in turn, 8 sequences, in epochs": to_and_fro((64, 72), 8, epochs=1),
        "64 and 128 in turn, 8 sequences": to_and_fro((64, 128), 8, total_tokens=held),
        "64 and 72 in turn, 1 sequence": to_and_fro((64, 72), 1, epochs=1),
        "8 and 10 in turn, 8 sequences": to_and_fro((8, 10), 8, epochs=1),
    }.items():
        begin, load = [], []
        for i in range(1, 13):
            new = replace(schedule, phases=Phases(schedule.phases.columns))
            started = time.perf_counter()
            order = Order.begin(Lengths(lengths), new, seed=1)
            begin.append(time.perf_counter() - started)
            steps, state = order.schedule.total_steps, state_of(order.asked)
            order = replace(order, asked=((0, replace(new, phases=Phases(schedule.phases.columns))),))
            started = time.perf_counter()
            schedules_of(state, order.asked[0][1])
            next(plan_steps(order, steps * i // 12 - 1))
            load.append(time.perf_counter() - started)
        yield {
            "subject": "resume",
            "schedule": name,
            "tokens": held,
            "documents": len(lengths),
            "steps": steps,
            "shapes": len(schedule.phases),
            "window_tokens": order.window_tokens,
            "worst_begin_s": round(max(begin), 3),
            "worst_load_and_plan_s": round(max(load), 3),
            "state_bytes": len(json.dumps(state)),
        }


@dataclass(frozen=True)
class MadeUpShard:
    """A shard of lognormal(6.0, 1.1) lengths that are made when they are asked for."""

    number: int
    documents: int = SHARD_DOCUMENTS
    source: str = ""

    def lengths(self) -> np.ndarray:
        return lognormal(self.documents, self.number % 50)

    @property
    def tokens(self) -> int:
        return SUMS[self.number % 50]


SUMS: list[int] = []


class MadeUp:
    """A corpus of any size without memory: `Corpus` of made-up shards."""

    def __init__(self, tokens: int) -> None:
        SUMS.extend(int(lognormal(SHARD_DOCUMENTS, seed).sum()) for seed in range(50))
        self.count = -(-tokens * 50 // sum(SUMS))

    @cached_property
    def shards(self) -> list[MadeUpShard]:
        return [MadeUpShard(number) for number in range(self.count)]

    def shard_lengths(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        return (self.shards[index].lengths() for index in indices)


def trillion(tokens: int) -> dict[str, object]:
    corpus = MadeUp(tokens)
    held = sum(shard.tokens for shard in corpus.shards)
    schedule = Schedule.linear(
        seqlen_start=8, seqlen_end=1024, duration_steps=20_000, global_batch_sequences=4096, epochs=1
    )
    order = Order.begin(corpus, schedule, seed=1)
    started, targets, pieces = time.perf_counter(), 0, 0
    for step, packed in plan_steps(order):
        targets += int(packed.length.sum())
        pieces += len(packed.document)
        if step % 5000 == 0:
            print(f"step {step:,} of {order.schedule.total_steps:,}", file=sys.stderr)
    took = time.perf_counter() - started
    assert targets == held
    started = time.perf_counter()
    next(plan_steps(order, order.schedule.total_steps // 2))
    return {
        "subject": "windows",
        "tokens": targets,
        "documents": corpus.count * SHARD_DOCUMENTS,
        "pieces": pieces,
        "steps": order.schedule.total_steps,
        "took_s": round(took, 1),
        "plan_m_tokens_per_s": round(targets / took / 1e6),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "resume_in_the_middle_s": round(time.perf_counter() - started, 2),
    }


def main() -> None:
    arguments = sys.argv[1:]
    compiled = Schedule.constant(seqlen=9, global_batch_sequences=2, epochs=1)
    for first in (0, 99):  # to the end, and on the way to a step
        deque(plan_steps(Order.begin(Lengths(lognormal(99)), compiled, seed=1), first), maxlen=0)
    if arguments[:1] == ["--trillion"]:
        print(json.dumps(trillion(int(arguments[1]))), flush=True)
        return
    if arguments[:1] == ["--draws"]:
        for seqlen in SEQLENS:
            print(json.dumps(draws(seqlen, int(arguments[1]))), flush=True)
        return
    corpora = {"lognormal(6.0, 1.1)": lognormal(DOCUMENTS)} if arguments != ["--resume"] else {}
    if arguments and corpora:
        found = Store.open(Path(arguments[0])).lengths
        if len(found) < DOCUMENTS:
            corpora[f"{len(found)} documents, drawn with replacement"] = np.random.default_rng(1).choice(
                found, DOCUMENTS
            )
        else:
            corpora["the store"] = found
    for name, lengths in corpora.items():
        for seqlen in SEQLENS:
            print(json.dumps(cuts(name, lengths, seqlen)), flush=True)
        print(json.dumps(diversity(name, lengths, 8, 512, 50)), flush=True)
    for seqlen, sequences in ((8, 500), (64, 250)) if corpora else ():
        print(json.dumps(diversity("500 documents of 3000 tokens", np.full(500, 3000), seqlen, sequences, 20)))
    for line in resume(1_000_000_000):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
