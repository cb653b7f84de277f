"""Full batches on one core: `CurriculumLoader` beside other loaders, and beside bare numpy indexing.

    taskset -c 0 python scripts/bench_loader.py STORE [--peer-python PYTHON] [--folder FOLDER]
    taskset -c 0 python scripts/bench_loader.py STORE --cold      # the store on disk, not in the page cache

Prints one JSON line: M tokens a second at 64 sequences of 64, 256, 1024 tokens, the fastest of some rounds. Ours is
an epoch from its beginning, dealing included: documents, each token once, int64 input_ids, labels, position_ids and
cu_seqlens. The peers get the same tokens as one flat array and give input_ids and labels as int64 tensors, without
documents, positions or a promise that each token is served. `numpy` is fancy indexing of input_ids alone (uint16).

`--cold` drops the files from the page cache (Linux), then serves an epoch at 1024; `read` is reading them once
sequentially, `warm` the epoch after it. `longest_wait_ms` is of a consumer of 100 M tokens/s, for any batch but
the first, from a cold store whose shards are dealt 2^27 tokens together: what is left to read where a group ends.

Peers that are not installed for PYTHON are reported as absent: pip install torch litdata datasets.
FOLDER keeps what they make of the store; without it that is made anew.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCES = 64
SEQLENS = (64, 256, 1024)
MEASURED_S = 1.0
PEERS = {"litdata": "litdata", "nanogpt": "torch", "datasets": "datasets"}
"""Name here -> distribution."""


def serve(store_path: Path, seqlen: int) -> tuple[int, float]:
    """Tokens and seconds of an epoch: making the loader, dealing and batches."""
    from curriculum.loader import CurriculumLoader
    from curriculum.schedule import Schedule
    from pipeline.reader import Store

    store = Store.open(store_path)
    steps = store.tokens // (SEQUENCES * seqlen)
    tokens = steps * SEQUENCES * seqlen
    schedule = Schedule.constant(seqlen=seqlen, global_batch_sequences=SEQUENCES, total_tokens=tokens)
    started = time.perf_counter()
    with CurriculumLoader(store, schedule, seed=1) as loader:
        served = sum(batch.labels.size for batch in loader)
    return served, time.perf_counter() - started


def longest_wait(store_path: Path, tokens_per_second: float = 100e6, group_tokens: int = 1 << 27) -> float:
    """Seconds that the second or a later batch of an epoch was waited for, at most."""
    from curriculum.loader import CurriculumLoader
    from curriculum.schedule import Schedule
    from curriculum.window import GROUP_WINDOWS
    from pipeline.reader import Store

    schedule = Schedule.constant(seqlen=1024, global_batch_sequences=SEQUENCES, epochs=1)
    window_tokens = group_tokens // GROUP_WINDOWS
    longest = 0.0
    with CurriculumLoader(Store.open(store_path), schedule, seed=1, window_tokens=window_tokens) as loader:
        next(loader)
        for _ in range(loader.schedule.total_steps - 1):
            time.sleep(SEQUENCES * 1024 / tokens_per_second)
            started = time.perf_counter()
            next(loader)
            longest = max(longest, time.perf_counter() - started)
    return longest


def timed(batches: Iterator[Any]) -> float:
    """M tokens a second over MEASURED_S, after some batches to warm up."""
    for _ in range(5):
        next(batches)
    tokens, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < MEASURED_S:
        inputs, labels = next(batches)
        assert inputs.shape == labels.shape
        tokens += inputs.shape[0] * inputs.shape[1]
    return tokens / took / 1e6


def numpy_indexing(flat: Path, seqlen: int) -> float:
    data = np.memmap(flat, dtype=np.uint16, mode="r")
    random, window = np.random.default_rng(1), np.arange(seqlen)

    def batches() -> Iterator[Any]:
        while True:
            rows = data[random.integers(0, len(data) - seqlen, SEQUENCES)[:, None] + window]
            yield rows, rows

    return timed(batches())


def nanogpt(flat: Path, seqlen: int, folder: Path) -> float:
    """The memory-mapped loop: https://github.com/karpathy/nanoGPT, train.py, get_batch."""
    import torch

    def batches() -> Iterator[Any]:
        while True:
            data = np.memmap(flat, dtype=np.uint16, mode="r")
            at = torch.randint(len(data) - seqlen, (SEQUENCES,))
            x = torch.stack([torch.from_numpy(data[i : i + seqlen].astype(np.int64)) for i in at])
            y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seqlen].astype(np.int64)) for i in at])
            yield x, y

    return timed(batches())


def _blocks(bounds: tuple[str, int, int]) -> Iterator[Any]:
    import torch

    yield torch.from_numpy(np.fromfile(bounds[0], np.uint16, bounds[2], offset=2 * bounds[1]).astype(np.int32))


def litdata(flat: Path, seqlen: int, folder: Path) -> float:
    """Shuffled blocks of seqlen + 1 tokens, cut into inputs and targets as litgpt does."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    made = folder / "litdata"
    if not made.is_dir():
        part, total = 1_000_000, flat.stat().st_size // 2
        bounds = [(str(flat), first, min(part, total - first)) for first in range(0, total, part)]
        optimize(_blocks, bounds, str(made), chunk_bytes="64MB", item_loader=TokensLoader(), num_workers=1)

    def batches() -> Iterator[Any]:
        loader = TokensLoader(block_size=seqlen + 1)
        dataset = StreamingDataset(str(made), item_loader=loader, shuffle=True, drop_last=True)
        while True:
            for block in StreamingDataLoader(dataset, batch_size=SEQUENCES, num_workers=0):
                yield block[:, :-1].contiguous().long(), block[:, 1:].contiguous().long()

    return timed(batches())


def datasets(flat: Path, seqlen: int, folder: Path) -> float:
    """A dataset of rows of seqlen tokens on disk, labels equal to input_ids, torch's DataLoader."""
    import pyarrow as pa
    from datasets import Dataset, load_from_disk
    from torch.utils.data import DataLoader

    made = folder / f"datasets-{seqlen}"
    if not made.is_dir():
        data = np.fromfile(flat, np.uint16).astype(np.int32)
        rows = pa.FixedSizeListArray.from_arrays(data[: len(data) // seqlen * seqlen], seqlen).cast(
            pa.list_(pa.int32())
        )
        Dataset(pa.table({"input_ids": rows})).save_to_disk(str(made))

    def batches() -> Iterator[Any]:
        dataset = load_from_disk(str(made)).with_format("torch")
        while True:
            for batch in DataLoader(dataset, batch_size=SEQUENCES, shuffle=True, drop_last=True):
                yield batch["input_ids"], batch["input_ids"]

    return timed(batches())


RUN: dict[str, Callable[[Path, int, Path], float]] = {"nanogpt": nanogpt, "litdata": litdata, "datasets": datasets}


def peer(python: str, name: str, flat: Path, folder: Path) -> dict[str, Any] | str:
    """{"version", seqlen: M tokens a second} under the peers' own Python, or "absent"."""
    command = [python, __file__, "--only", name, "--folder", str(folder), str(flat)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return "absent"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def only(name: str, flat: Path, folder: Path) -> None:
    import torch

    torch.set_num_threads(1)
    rates = {str(seqlen): round(RUN[name](flat, seqlen, folder), 2) for seqlen in SEQLENS}
    print(json.dumps({"version": metadata.version(PEERS[name]), **rates}))


def flatten(store_path: Path, flat: Path) -> None:
    """All tokens of the store, one after another: what the peers read."""
    from pipeline.reader import Store

    store = Store.open(store_path)
    assert store.manifest.token_dtype == "uint16", "the peers are measured on uint16"
    with flat.open("wb") as sink:
        for shard in range(len(store.shards)):
            store.columns(shard).column("tokens").flatten().to_numpy().tofile(sink)


def warm(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    flat = folder / "tokens.bin"
    if not flat.exists():
        flatten(asked.store, flat)
    serve(asked.store, 64)  # compiles, verifies
    line: dict[str, Any] = {"slw": {}, "numpy": {}, **{name: {} for name in PEERS}}
    for _ in range(asked.rounds):
        for seqlen in SEQLENS:
            tokens, took = min((serve(asked.store, seqlen) for _ in range(3)), key=lambda run: run[1])
            _keep_best(line["slw"], {str(seqlen): round(tokens / took / 1e6, 1)})
            _keep_best(line["numpy"], {str(seqlen): round(numpy_indexing(flat, seqlen), 1)})
        for name in PEERS:
            found = peer(asked.peer_python, name, flat, folder)
            if isinstance(found, str):
                line[name] = found
            else:
                _keep_best(line[name], found)
    ratios = {
        name: {length: round(line["slw"][length] / rates[length], 2) for length in line["slw"]}
        for name, rates in line.items()
        if rates != "absent" and name != "slw"
    }
    return {**line, "slw_times": ratios}


def _keep_best(rates: dict[str, Any], found: dict[str, Any]) -> None:
    for key, value in found.items():
        rates[key] = max(value, rates.get(key, value))


def cold(asked: argparse.Namespace) -> dict[str, Any]:
    files = sorted(asked.store.glob("shards/*.arrow"))
    size = sum(file.stat().st_size for file in files)
    serve(asked.store, 64)  # compiles, verifies
    line: dict[str, Any] = {"mb": round(size / 1e6)}
    best = {"read_s": float("inf"), "slw_s": float("inf"), "warm_s": float("inf")}
    for _ in range(asked.rounds):
        _drop(files)
        started = time.perf_counter()
        for file in files:
            with file.open("rb", buffering=0) as source:
                while source.read(1 << 20):
                    pass
        best["read_s"] = min(best["read_s"], time.perf_counter() - started)
        _drop(files)
        best["slw_s"] = min(best["slw_s"], serve(asked.store, 1024)[1])
        best["warm_s"] = min(best["warm_s"], serve(asked.store, 1024)[1])
    line |= {name: round(seconds, 3) for name, seconds in best.items()}
    _drop(files)
    line["longest_wait_ms"] = round(1000 * longest_wait(asked.store), 1)
    return {**line, "ratio": round(best["slw_s"] / best["read_s"], 2)}


def _drop(files: list[Path]) -> None:
    gc.collect()  # what is mapped stays in memory
    for file in files:
        with file.open("rb") as source:
            os.fsync(source.fileno())
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--peer-python", default=sys.executable, help="Python of an environment with the peers.")
    parser.add_argument("--folder", type=Path, help="Where the peers' data are kept.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.only:
        only(asked.only, asked.store, asked.folder)
        return
    line = {"subject": "loader", "sequences": SEQUENCES, "cores": len(os.sched_getaffinity(0)), "cold": asked.cold}
    if asked.cold:
        print(json.dumps(line | cold(asked)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(line | warm(asked, folder)))


if __name__ == "__main__":
    main()
