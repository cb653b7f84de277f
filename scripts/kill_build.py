#!/usr/bin/env python3
"""Kill a build at random moments, over and over, and compare what the reruns end in with an undisturbed build.

    scripts/kill_build.py --kills 50 --workers 1 2

The moment is drawn from the course of an undisturbed build: from its folder to its commit. Every other kill hits the
workers too, not only the process that was started. One JSON line on standard output; exit status 1 where a store
differs, by a byte or by a file too many.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from pipeline.corpus import Reading
from pipeline.format import BUILD_FOLDER, MANIFEST_NAME, digest_bytes
from pipeline.train_tokenizer import train_tokenizer

WORDS = ["ship", "naïve", "café", "storm", "😀", "harbour", "<|endoftext|>", "night"]
COURSES = 3
"""Undisturbed builds; the one in the middle says when to kill."""


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


@dataclass(frozen=True)
class Course:
    """Seconds since its start at which an undisturbed build makes its folder, its first unit, and the commit."""

    folder: float
    unit: float
    commit: float


def course(command: list[str], out: Path, workers: int) -> Course:
    """Build `out` and watch."""
    began = time.monotonic()
    process = start(command, out, workers)
    seen: list[float] = []
    for there in (out.exists, lambda: any((out / BUILD_FOLDER).glob("0*.json")), (out / MANIFEST_NAME).exists):
        while not there() and process.poll() is None:
            time.sleep(0.002)
        seen.append(time.monotonic() - began)
    message = process.communicate()[1].decode()
    assert process.returncode == 0, message
    return Course(*seen)


def moment(chance: random.Random, usual: Course, out: Path, units: int) -> float:
    """Seconds after which to kill: any moment from the folder to the commit, of what is left to do, is as likely."""
    left = 1 - len(list((out / BUILD_FOLDER).glob("[0-9]*.json"))) / units
    return chance.uniform(usual.folder, usual.unit + left * (usual.commit - usual.unit))


def kill_and_rerun(command: list[str], folder: Path, workers: int, kills: int, seed: int) -> dict[str, object]:
    """Builds that are killed and rerun until they end, until there were `kills` kills before the commit.

    One in two reruns is killed as well.
    """
    runs = [course(command, folder / f"whole-{n}", workers) for n in range(COURSES)]
    usual = sorted(runs, key=lambda run: run.commit)[COURSES // 2]
    whole, chance = digests(folder / "whole-0"), random.Random(seed)
    units = len({path.split("/")[1].split(".")[0] for path in whole if path.startswith("shards/")})
    before = after = missed = builds = different = 0
    while before < kills:
        out = folder / f"store-{builds}"
        killing = True
        while True:
            process = start(command, out, workers)
            if killing:
                try:
                    process.wait(moment(chance, usual, out, units))
                    missed += 1
                except subprocess.TimeoutExpired:
                    (os.killpg if chance.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
                    process.communicate()
                    committed = (out / MANIFEST_NAME).exists()
                    before, after = before + (not committed), after + committed
                    killing = before < kills and chance.random() < 0.5
                    continue
            message = process.communicate()[1].decode()
            assert process.returncode == 0, message
            break
        builds += 1
        different += digests(out) != whole
        shutil.rmtree(out)
    return {
        "workers": workers,
        "kills_before_commit": before,
        "kills_after_commit": after,
        "ended_before_their_kill": missed,
        "stores": builds,
        "different": different,
        "undisturbed_s": {name: round(value, 2) for name, value in asdict(usual).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="before the commit, for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=15000)
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
