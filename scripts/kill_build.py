#!/usr/bin/env python3
"""Kill a build at random moments, over and over, and compare what the reruns end in with an undisturbed build.

    scripts/kill_build.py --kills 50 --workers 1 2

Every other kill hits the workers too, not only the process that was started. One JSON line on standard output; exit
status 1 where a store differs, by a byte or by a file too many.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson

from pipeline.corpus import Reading
from pipeline.format import digest_bytes
from pipeline.vocabulary import train_tokenizer

WORDS = ["ship", "naïve", "café", "storm", "😀", "harbour", "<|endoftext|>", "night"]


def make_corpus(folder: Path, documents: int) -> list[str]:
    """A corpus and a tokenizer; returns the command that builds a store from them, but for --out and --workers."""
    chance = random.Random(1)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(1, 400))) for _ in range(documents)]
    corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer.json"
    corpus.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    train_tokenizer((str(corpus),), tokenizer, vocab_size=300, reading=Reading())
    code = "from pipeline.cli import main; main()"
    arguments = [corpus, "--tokenizer", tokenizer, "--validation-fraction", "0.1", "--unit-bytes", "100K"]
    return [sys.executable, "-c", code, "build", *map(str, arguments)]


def start(command: list[str], out: Path, workers: int) -> subprocess.Popen[bytes]:
    more = ["--out", str(out), "--workers", str(workers)]
    return subprocess.Popen(
        [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): digest_bytes(path.read_bytes()) for path in files}


def kill_and_rerun(command: list[str], folder: Path, workers: int, kills: int, seed: int) -> dict[str, object]:
    """Builds that are killed and rerun until they end, until there were `kills` kills."""
    began = time.monotonic()
    process = start(command, folder / "whole", workers)
    while not (folder / "whole").exists():
        time.sleep(0.01)
    first = time.monotonic() - began  # before this there is nothing to break
    process.communicate()
    assert process.returncode == 0
    last = time.monotonic() - began
    whole, chance = digests(folder / "whole"), random.Random(seed)
    killed = unfinished = builds = different = 0
    while killed < kills:
        out = folder / f"store-{builds}"
        while True:
            process = start(command, out, workers)
            if killed < kills:
                time.sleep(chance.uniform(first, last))
                if process.poll() is None:
                    (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
                    process.communicate()
                    killed += 1
                    unfinished += not (out / "manifest.json").exists()
                    continue
            message = process.communicate()[1].decode()
            assert process.returncode == 0, message
            break
        builds += 1
        different += digests(out) != whole
    return {
        "workers": workers,
        "kills": killed,
        "before_commit": unfinished,
        "stores": builds,
        "different": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    runs = []
    for workers in arguments.workers:
        with tempfile.TemporaryDirectory() as name:
            command = make_corpus(Path(name), arguments.documents)
            runs.append(kill_and_rerun(command, Path(name), workers, arguments.kills, arguments.seed))
            print(runs[-1], file=sys.stderr, flush=True)
    print(json.dumps({"script": "kill_build", "runs": runs}))
    sys.exit(any(run["different"] for run in runs))


if __name__ == "__main__":
    main()
