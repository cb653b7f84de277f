"""Text to tokens on disk, beside the encoder alone and beside what others use, on the same documents in the same run.

    scripts/bench_prep.py CORPUS.jsonl TOKENIZER.json [--megabytes 140] [--peer-python PATH ...] [--repeat 3]
    scripts/bench_prep.py CORPUS.jsonl TOKENIZER.json --grow 1400 [--repeat 3]
    scripts/bench_prep.py CORPUS.jsonl TOKENIZER.json --memory

Prints one JSON line. Each contestant runs in a fresh process and times itself from its first look at the input to its
last file, imports left out. Ours and the encoder alone (`fastokens.encode_batch_flat`, both cores, batches of 4 MB,
texts in memory) take turns, the best of --repeat counts; a peer runs once, with two processes. Every output is read
back and its ids compared with those of `tokenizers`, document by document, in any order.

Peers are looked for in this environment and in each --peer-python; one that is nowhere is reported as absent:

    python -m venv peers
    peers/bin/pip install datasets datatrove[io,processing] litdata mosaicml-streaming tokenizers

--grow takes the corpus again and again, lines rotated, up to so many megabytes, and runs ours and the encoder alone:
no peers and no `tokenizers`; ids are compared with the encoder's. fastokens keeps words it has met, so a grown corpus
is easier for it than new text of the same size.

--memory instead builds corpora of 150 MB and 1.5 GB (the corpus again and again, lines rotated), one document of
200 MB, and ten million documents of one line, and prints the peak resident memory of the process tree of each,
sampled every 20 ms, with the seconds `slw-prep info` and opening the store of ten million documents take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_prep_contestants as contestants

OURS = ("encoder", "ours_jsonl", "ours_parquet")
PEERS = ("datasets", "datatrove", "litdata", "streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=1e6, help="take so much of the corpus")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer-python", type=Path, action="append", default=[])
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder without it")
    parser.add_argument("--grow", type=float, metavar="MEGABYTES", help="ours and the encoder on a larger corpus")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure = memory if arguments.memory else speed
        print(json.dumps(measure(Path(name), arguments)), flush=True)


def speed(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    corpus, peers = arguments.corpus, arguments.peers
    if arguments.grow:
        corpus, peers = folder / "grown.jsonl", []
        contestants.grow(arguments.corpus, corpus, int(arguments.grow * 1e6))
    size = prepare(folder, corpus, int(arguments.megabytes * 1e6), halves=bool(peers))
    expected = run(Path(sys.executable), "encoder" if arguments.grow else "reference", folder, arguments.tokenizer)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(arguments.repeat):
        for name in OURS:
            found = run(Path(sys.executable), name, folder, arguments.tokenizer)
            if name not in best or found["seconds"] < best[name]["seconds"]:
                best[name] = found
    for name in peers:
        pythons = [Path(sys.executable), *arguments.peer_python]
        able = [python for python in pythons if can(python, name)]
        best[name] = run(able[0], name, folder, arguments.tokenizer) if able else {"absent": True}
    facts: dict[str, Any] = {"subject": "prep grown" if arguments.grow else "prep", "cores": os.cpu_count()}
    facts["text_mb"] = round(expected["text"] / 1e6, 1)
    facts |= {"jsonl_mb": round(size / 1e6, 1), "tokens": expected["tokens"]}
    for name, found in best.items():
        if "seconds" not in found:
            facts[name] = found
            continue
        rate = expected["text"] / 1e6 / found["seconds"]
        same = found["digest"] == expected["digest"]
        facts[name] = {"seconds": round(found["seconds"], 3), "mb_per_s": round(rate, 1), "same_ids": same}
        if "load_seconds" in found:
            facts[name]["load_seconds"] = round(found["load_seconds"], 3)
    facts |= ratios(facts)
    return facts


def ratios(facts: dict[str, Any]) -> dict[str, float]:
    """How many times as fast as each, ours from JSONL; and each of ours as a share of the encoder alone.

    `of_encoder`: the loading of the tokenizer is charged to ours only. `of_encoder_with_its_loading`: to both.
    """
    ours, encoder = facts["ours_jsonl"]["seconds"], facts["encoder"]["seconds"]
    loaded = encoder + facts["encoder"]["load_seconds"]
    found = {f"{name}_of_encoder": encoder / facts[name]["seconds"] for name in OURS[1:]}
    found |= {f"{name}_of_encoder_with_its_loading": loaded / facts[name]["seconds"] for name in OURS[1:]}
    found |= {f"times_{name}": facts[name]["seconds"] / ours for name in PEERS if "seconds" in facts.get(name, {})}
    return {name: round(value, 2) for name, value in found.items()}


def prepare(folder: Path, corpus: Path, most: int, *, halves: bool) -> int:
    """The corpus as one JSONL file, as Parquet, and as `halves` for peers that share out files."""
    import orjson
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines, size = [], 0
    with corpus.open("rb") as source:
        for line in source:
            if size + len(line) > most:
                break
            lines.append(line)
            size += len(line)
    (folder / "corpus.jsonl").write_bytes(b"".join(lines))
    if halves:
        (folder / "halves").mkdir()
        for part in (0, 1):
            (folder / f"halves/{part}.jsonl").write_bytes(b"".join(lines[part::2]))
    table = pa.table({"text": [orjson.loads(line)["text"] for line in lines]})
    pq.write_table(table, folder / "corpus.parquet", row_group_size=1000)
    os.sync()  # the disk is idle when the first is timed
    return size


def can(python: Path, name: str) -> bool:
    module = "datatrove.pipeline.tokens" if name == "datatrove" else name
    done = subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False, cwd="/")
    return done.returncode == 0


def run(python: Path, name: str, folder: Path, tokenizer: Path) -> dict[str, Any]:
    command = [python, contestants.__file__, name, folder, tokenizer.absolute()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def memory(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    facts: dict[str, Any] = {"subject": "prep memory", "cores": os.cpu_count()}
    corpus, store = folder / "corpus.jsonl", folder / "store"
    makers = {
        "150_mb": lambda: contestants.grow(arguments.corpus, corpus, 150_000_000),
        "1500_mb": lambda: contestants.grow(arguments.corpus, corpus, 1_500_000_000),
        "document_of_200_mb": lambda: contestants.one_document(arguments.corpus, corpus, 200_000_000),
        "ten_million_documents": lambda: contestants.one_liners(corpus, 10_000_000),
    }
    for name, make in makers.items():
        make()
        code = "from pipeline.cli import main; main()"
        command = [sys.executable, "-c", code, "build", corpus, "--tokenizer", arguments.tokenizer, "--out", store]
        started = time.perf_counter()
        peak, status = peak_memory([*command, "--force", "--json"])
        seconds = time.perf_counter() - started
        assert status == 0, f"{name}: exit status {status}"
        facts[name] = {"peak_mb": round(peak / 1e6), "seconds": round(seconds, 1)}
        facts[name]["input_mb"] = round(corpus.stat().st_size / 1e6)
    facts["growth_150_to_1500"] = round(facts["1500_mb"]["peak_mb"] / facts["150_mb"]["peak_mb"], 3)
    for name, code in {
        "info_s": f"from pipeline.cli import main; main(['info', {str(store)!r}, '--json'])",
        "open_s": f"from pipeline.reader import Store; print(Store.open({str(store)!r}).documents)",
    }.items():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        facts[name] = round(time.perf_counter() - started, 3)
    return facts


def peak_memory(command: list[Any]) -> tuple[int, int]:
    """Largest sum of resident bytes of a command and its children, pages that they share counted once for each."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, sum(map(resident, [process.pid, *children(process.pid)])))
        time.sleep(0.02)
    return most, process.returncode


def children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children(child)]
    except OSError:
        pass  # it ended meanwhile
    return found


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
