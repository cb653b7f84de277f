"""Planning and serving batches: the dealer, the packer and the loader beside numpy's fancy indexing.

    .venv/bin/python scripts/bench_dealing.py [STORE]

Prints one JSON line a length. `plan`: dealing an epoch without reading a token. `serve`: the loader's batches of 64
sequences, int64, one thread ahead. The reference, numpy indexing of one flat memory-mapped array at random offsets,
needs no document boundaries, loses the tails and repeats tokens: a floor for time, no alternative.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from curriculum.dealer import DEAL_SEQUENCES, Dealer
from curriculum.loader import CurriculumLoader
from curriculum.schedule import Schedule
from pipeline.packing import least_cuts, pack
from pipeline.reader import Store

SEQUENCES = 64
MOST_BATCHES = 3000


def plan_rate(lengths: np.ndarray, seqlen: int) -> tuple[float, float]:
    """Tokens a second, and excess cuts a document, of dealing one epoch."""
    started, pieces = time.perf_counter(), 0
    dealer = Dealer(lengths, seed=1)
    while dealer.tokens_left:
        pieces += len(dealer.deal(seqlen, DEAL_SEQUENCES).document)
    took = time.perf_counter() - started
    return float(lengths.sum() / took), (pieces - len(lengths) - least_cuts(lengths, seqlen)) / len(lengths)


def serve_rate(store: Store, seqlen: int) -> float:
    batches = min(MOST_BATCHES, store.tokens // (SEQUENCES * seqlen))
    schedule = Schedule.constant(
        seqlen=seqlen, global_batch_sequences=SEQUENCES, total_tokens=batches * SEQUENCES * seqlen
    )
    with CurriculumLoader(store, schedule, seed=1) as loader:
        next(loader)
        started = time.perf_counter()
        served = sum(batch.targets for batch in loader)
        return served / (time.perf_counter() - started)


def numpy_rate(store: Store, seqlen: int) -> float:
    flat = np.memmap(store.path / store.shards[0].file, dtype=store.manifest.token_dtype, mode="r")
    batches = min(MOST_BATCHES, store.tokens // (SEQUENCES * seqlen))
    random = np.random.default_rng(1)
    window = np.arange(seqlen + 1)
    started = time.perf_counter()
    for _ in range(batches):
        rows = flat[random.integers(0, len(flat) - seqlen - 1, SEQUENCES)[:, None] + window].astype(np.int64)
        inputs, labels = rows[:, :-1], rows[:, 1:]
        assert inputs.shape == labels.shape
    return batches * SEQUENCES * seqlen / (time.perf_counter() - started)


def main() -> None:
    store = Store.open(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("demo/store"))
    plan_rate(store.lengths[:100], 64)  # compiles
    serve_rate(store, 64)
    for seqlen in (64, 256, 1024):
        started = time.perf_counter()
        packed = pack(store.lengths, seqlen)
        pack_s = time.perf_counter() - started
        planned, excess = plan_rate(store.lengths, seqlen)
        served, reference = serve_rate(store, seqlen), numpy_rate(store, seqlen)
        facts = {
            "subject": "dealing",
            "seqlen": seqlen,
            "documents": store.documents,
            "tokens": store.tokens,
            "plan_m_tokens_per_s": round(planned / 1e6),
            "dealt_excess_cuts_per_document": round(excess, 4),
            "packed_excess_cuts_per_document": round(
                (len(packed.document) - store.documents - least_cuts(store.lengths, seqlen)) / store.documents, 4
            ),
            "packed_m_pieces_per_s": round(len(packed.document) / pack_s / 1e6, 1),
            "serve_m_tokens_per_s": round(served / 1e6, 1),
            "numpy_m_tokens_per_s": round(reference / 1e6, 1),
            "ratio": round(served / reference, 2),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
