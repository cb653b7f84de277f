"""Text to tokens on disk: `slw-prep build` beside `datasets.map` on the same text, in the same run.

    .venv/bin/python scripts/bench_prep.py CORPUS.jsonl TOKENIZER.json [MEGABYTES]

Prints one JSON line. The peer is datasets.load_dataset + map(batched, two processes) with Hugging Face tokenizers,
what most people write; both start from JSONL and end with token files. Without a corpus one is made from the
sources of the standard library, with the demo's tokenizer (run scripts/demo first).
"""

import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from pipeline.build import BuildOptions, build

PEER_PROCESSES = 2


def standard_library(path: Path) -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    every = sorted(folder.rglob("*.py"))
    files = [file for file in every if "site-packages" not in file.parts and file.stat().st_size]
    with path.open("w") as stream:
        for file in files:
            stream.write(json.dumps({"text": file.read_text(errors="replace")}) + "\n")


def cut(corpus: Path, out: Path, most: int) -> None:
    with corpus.open("rb") as source, out.open("wb") as sink:
        for line in source:
            if sink.tell() + len(line) > most:
                break
            sink.write(line)


def ours(corpus: Path, tokenizer: Path, out: Path) -> tuple[int, float]:
    started = time.perf_counter()
    result = build(BuildOptions(inputs=(str(corpus),), tokenizer=tokenizer, out=out))
    return result.manifest.tokens(), time.perf_counter() - started


def encode(batch: dict[str, list[str]], path: str) -> dict[str, list[list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    return {"input_ids": [e.ids for e in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}


def peer(corpus: Path, tokenizer: Path, folder: Path) -> tuple[int, float]:
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    data = datasets.load_dataset("json", data_files=str(corpus), cache_dir=str(folder), split="train")
    arguments = {"path": str(tokenizer)}
    columns = data.column_names
    encoded = data.map(encode, batched=True, num_proc=PEER_PROCESSES, fn_kwargs=arguments, remove_columns=columns)
    took = time.perf_counter() - started
    # one end-of-document token more a document, as ours has
    return sum(len(ids) for batch in encoded.iter(1000) for ids in batch["input_ids"]) + len(encoded), took


def main() -> None:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        if arguments:
            cut(Path(arguments[0]), corpus, int(float(arguments[2]) * 1e6) if len(arguments) > 2 else 1 << 62)
        else:
            standard_library(corpus)
        tokenizer = Path(arguments[1]) if len(arguments) > 1 else Path("demo/tokenizer.json")
        tokens, seconds = ours(corpus, tokenizer, folder / "store")
        peer_tokens, peer_seconds = peer(corpus, tokenizer, folder / "peer")
        assert tokens == peer_tokens, f"{tokens} tokens, the peer has {peer_tokens}"
        facts = {
            "subject": "prep",
            "peer": f"datasets.map, {PEER_PROCESSES} processes",
            "corpus_mb": round(corpus.stat().st_size / 1e6, 1),
            "tokens": tokens,
            "ours_tokens_per_s": round(tokens / seconds),
            "peer_tokens_per_s": round(peer_tokens / peer_seconds),
            "ours_mb_per_s": round(corpus.stat().st_size / 1e6 / seconds, 1),
            "peer_mb_per_s": round(corpus.stat().st_size / 1e6 / peer_seconds, 1),
            "ratio": round(peer_seconds / seconds, 2),
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
