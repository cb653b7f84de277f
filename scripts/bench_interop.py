#!/usr/bin/env python
"""Import, export, pack and info on synthetic tokens: seconds, tokens a second and anonymous memory at its peak.

    scripts/bench_interop.py --tokens 20 200 --documents 10

One JSON line for each number of tokens (millions): a Megatron dataset of that size is imported, exported both ways
and packed at 1024, each by its command in a process of its own. Beside them the same bytes copied to that disk and
flushed, what a disk allows, and `datasets`' own `save_to_disk` of the shards. Then a line with `slw-prep info`
of so many (millions of) documents of a sentence. Anonymous memory is sampled every 5 ms; mapped files are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from pipeline.megatron import write_indexed_dataset
from pipeline.tokenised import Tokenised

VOCABULARY = 50_257
SLW_PREP = [sys.executable, "-c", "from pipeline.cli import main; main()"]
SAVE_TO_DISK = """
import datasets, glob, sys
shards = sorted(glob.glob(sys.argv[1] + "/shards/*"))
datasets.concatenate_datasets([datasets.Dataset.from_file(shard) for shard in shards]).save_to_disk(sys.argv[2])
"""


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=float, nargs="*", default=[20, 200], help="millions")
    parser.add_argument("--documents", type=float, default=10, help="millions, for info; 0 leaves it out")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder without it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
        Tokenizer(models.WordLevel(vocabulary, unk_token="w1")).save(str(folder / "tokenizer.json"))
        for millions in arguments.tokens:
            print(json.dumps(transfers(folder / "work", int(millions * 1e6))), flush=True)
        if arguments.documents:
            print(json.dumps(look(folder / "work", int(arguments.documents * 1e6))), flush=True)


def transfers(folder: Path, tokens: int) -> dict[str, Any]:
    """Import, export and pack `tokens` tokens in documents of 1,000 on average, most of them shorter."""
    folder.mkdir()
    write_indexed_dataset(folder / "in", batches(tokens, 1000), VOCABULARY)
    size = (folder / "in.bin").stat().st_size
    started = time.perf_counter()
    shutil.copyfile(folder / "in.bin", folder / "copy")
    flush(folder / "copy")
    copied = time.perf_counter() - started
    facts: dict[str, Any] = {"bench": "interop", "tokens": tokens, "copy_s": round(copied, 3), "bytes": size}
    facts["import"] = run("import", folder / "in", *tokenizer(folder), "--out", folder / "store", tokens=tokens)
    for form in ("megatron", "hf"):
        facts[f"export_{form}"] = run(
            "export", folder / "store", "--format", form, "--out", folder / f"out_{form}", tokens=tokens
        )
    facts["pack"] = run("pack", folder / "store", "--seqlen", 1024, "--out", folder / "packed", tokens=tokens)
    facts["datasets_save_to_disk"] = watch(
        [sys.executable, "-c", SAVE_TO_DISK, str(folder / "store"), str(folder / "saved")], tokens
    )
    assert (folder / "in.bin").read_bytes() == (folder / "out_megatron.bin").read_bytes(), "tokens differ"
    shutil.rmtree(folder)
    return facts


def look(folder: Path, documents: int) -> dict[str, Any]:
    """`slw-prep info` of a store of short documents."""
    folder.mkdir()
    write_indexed_dataset(folder / "in", batches(documents * 20, 20), VOCABULARY)
    run("import", folder / "in", *tokenizer(folder), "--out", folder / "store", tokens=0)
    found = json.loads(
        subprocess.run([*SLW_PREP, "info", str(folder / "store"), "--json"], capture_output=True, check=True).stdout
    )
    facts = run("info", folder / "store", tokens=0)
    shutil.rmtree(folder)
    return {"bench": "info", "documents": found["splits"]["train"]["documents"], **facts}


def batches(tokens: int, mean: int) -> Any:
    """Documents of random ids, log-normal lengths of `mean` on average, each ending in 0."""
    random = np.random.default_rng(0)
    done = 0
    while done < tokens:
        lengths = np.clip(random.lognormal(np.log(mean) - 0.5, 1, 20_000_000 // mean).astype(np.int64), 1, 100 * mean)
        lengths = lengths[: max(int(np.searchsorted(np.cumsum(lengths), tokens - done)), 1)]
        ids = random.integers(1, VOCABULARY, int(lengths.sum()), dtype=np.uint16)
        ids[np.cumsum(lengths) - 1] = 0
        yield Tokenised(ids, lengths, 0)
        done += len(ids)


def tokenizer(folder: Path) -> tuple[Any, ...]:
    """The option that names it."""
    return ("--tokenizer", folder.parent / "tokenizer.json")


def run(*arguments: Any, tokens: int) -> dict[str, Any]:
    """One command of slw-prep, watched."""
    return watch([*SLW_PREP, *map(str, arguments), "--json"], tokens)


def watch(command: list[str], tokens: int) -> dict[str, Any]:
    """Seconds from start to end, and the most anonymous memory seen."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_kib(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - started
    assert process.returncode == 0, command
    rate = {"tokens_per_s": round(tokens / seconds)} if tokens else {}
    return {"seconds": round(seconds, 3), **rate, "peak_anonymous_mib": peak // 1024}


def anonymous_kib(pid: int) -> int:
    """RssAnon of a process, 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def flush(path: Path) -> None:
    """fsync."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


if __name__ == "__main__":
    main()
