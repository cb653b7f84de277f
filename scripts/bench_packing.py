"""Packing a million lengths: `pipeline.packing.pack` beside other packers, on one core.

    taskset -c 0 python scripts/bench_packing.py [--peer-python PYTHON]

Prints one JSON line. First ours over whole documents, longer ones than a row among them as in a store
(`documents_m_pieces_per_s`), then beside the peers. There the lengths are lognormal(6.0, 1.1) tokens, cut off at
`seqlen`, so that packers without cuts can place them all; every packer gets the same ones. Rates are lengths a
second, the fastest of some runs.

Peers do less: they leave gaps (`unfilled`, the share of padding in rows), where ours fills every row but the last one
by cutting pieces, and they return lists of items, not arrays of pieces. Peers that are not installed for
PYTHON are reported as absent: pip install lightbinpack ai2-olmo-core trl pyarrow (in an environment of its own).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

LENGTHS = 1_000_000
SEQLENS = (512, 1024, 2048, 8192)
DOCUMENT_SEQLENS = (64, 256, 1024, 2048)
PEERS = {"lightbinpack": "lightbinpack", "olmo-core": "ai2-olmo-core", "trl": "trl"}
"""Name here -> distribution."""


def documents_of(count: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(6.0, 1.1, count).astype(np.int64) + 1


def lengths_of(seqlen: int, count: int) -> np.ndarray:
    return np.minimum(documents_of(count), seqlen)


def fastest(call: Callable[[], Any], runs: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(runs):
        result = None
        started = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - started)
    return best, result


def ours(seqlen: int, runs: int) -> dict[str, Any]:
    from pipeline.packing import pack

    pack(lengths_of(seqlen, 1000), seqlen)  # compiles
    lengths = lengths_of(seqlen, LENGTHS)
    seconds, packed = fastest(lambda: pack(lengths, seqlen), runs)
    unfilled = packed.padding(seqlen) / (packed.sequences * seqlen)
    return rated(seconds, LENGTHS, unfilled, len(packed.document) - LENGTHS)


def ours_of_documents(seqlen: int, runs: int) -> float:
    """Million pieces a second."""
    from pipeline.packing import pack

    lengths = documents_of(LENGTHS)
    seconds, packed = fastest(lambda: pack(lengths, seqlen), runs)
    return round(len(packed.document) / seconds / 1e6, 1)


def lightbinpack(seqlen: int, runs: int) -> dict[str, Any]:
    """Best-fit decreasing over a list, as it wants it."""
    from lightbinpack import obfd

    lengths = lengths_of(seqlen, LENGTHS)
    as_list = lengths.tolist()
    seconds, rows = fastest(lambda: obfd(as_list, seqlen), runs)
    return rated(seconds, LENGTHS, 1 - lengths.sum() / (len(rows) * seqlen), 0)


def olmo_core(seqlen: int, runs: int) -> dict[str, Any]:
    from olmo_core.data.utils import InstancePacker

    lengths = lengths_of(seqlen, LENGTHS // 10)  # a tenth: it needs seconds
    ends = np.cumsum(lengths)
    bounds = np.stack([ends - lengths, ends], axis=1).astype(np.uint64)
    seconds, (rows, _, _) = fastest(lambda: InstancePacker(seqlen).pack_documents(bounds), min(runs, 2))
    return rated(seconds, len(lengths), 1 - lengths.sum() / (len(rows) * seqlen), 0)


def trl(seqlen: int, runs: int) -> dict[str, Any]:
    """Copies the tokens too, as bytes here; it knows no packing without."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd

    lengths = lengths_of(seqlen, LENGTHS // 10)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = pa.LargeListArray.from_arrays(offsets, np.zeros(offsets[-1], dtype=np.uint8))
    table = pa.table({"input_ids": tokens})
    seconds, packed = fastest(lambda: _pack_bfd(table, seqlen), 1)
    return rated(seconds, len(lengths), 1 - lengths.sum() / (len(packed) * seqlen), 0)


def rated(seconds: float, lengths: int, unfilled: float, cuts: int) -> dict[str, Any]:
    return {
        "m_lengths_per_s": round(lengths / seconds / 1e6, 3),
        "unfilled": float(f"{unfilled:.2g}"),
        "cuts_per_length": round(cuts / lengths, 5),
    }


RUN = {"slw": ours, "lightbinpack": lightbinpack, "olmo-core": olmo_core, "trl": trl}


def peer(python: str, name: str, seqlen: int, runs: int) -> dict[str, Any] | str:
    """The figures of a peer under its own Python, or "absent"."""
    command = [python, __file__, "--only", name, "--seqlens", str(seqlen), "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return "absent"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with the peers.")
    parser.add_argument("--seqlens", type=int, nargs="+", default=SEQLENS)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        found = RUN[asked.only](asked.seqlens[0], asked.runs)
        print(json.dumps({"version": metadata.version(PEERS[asked.only]), **found}))
        return
    line: dict[str, Any] = {"subject": "packing", "lengths": LENGTHS, "cores": len(os.sched_getaffinity(0))}
    ours(512, 1)  # compiles
    line["documents_m_pieces_per_s"] = {n: ours_of_documents(n, asked.runs) for n in DOCUMENT_SEQLENS}
    for seqlen in asked.seqlens:
        results: dict[str, Any] = {"slw": ours(seqlen, asked.runs)}
        for name in PEERS:
            results[name] = peer(asked.peer_python, name, seqlen, asked.runs)
        rate = results["slw"]["m_lengths_per_s"]
        times = {
            name: round(rate / found["m_lengths_per_s"], 1) for name, found in results.items() if found != "absent"
        }
        line[f"seqlen_{seqlen}"] = {**results, "slw_times": times}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
