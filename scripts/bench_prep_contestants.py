"""What `bench_prep.py` runs in a process of its own: `bench_prep_contestants.py NAME FOLDER TOKENIZER`.

FOLDER has corpus.jsonl, corpus.parquet and halves/{0,1}.jsonl. Prints RESULT and a JSON object: seconds, and a digest
of the ids it wrote that does not depend on the order of the documents.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

BATCH_BYTES = 4 << 20
PROCESSES = 2
EOD = "<|endoftext|>"
MASK = (1 << 64) - 1


def digest(documents: Iterator[np.ndarray]) -> dict[str, Any]:
    """Sum of the hashes of the documents' ids, each without its end-of-document token."""
    from hashlib import blake2b

    total = tokens = 0
    for ids in documents:
        data = np.ascontiguousarray(ids, dtype="<u4").tobytes()
        total += int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
        tokens += len(ids)
    return {"digest": f"{total & MASK:016x}", "tokens": tokens}


def read(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for line in stream:
            yield json.loads(line)["text"]


@lru_cache
def load(path: Path) -> Any:
    """The reference; text that spells a special token is text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def batches(texts: Iterator[str], most: int = BATCH_BYTES) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def split(flat: np.ndarray, end: int) -> Iterator[np.ndarray]:
    """The documents of a flat array in which each ends in `end`."""
    begin = 0
    for at in np.flatnonzero(flat == end).tolist():
        yield flat[begin:at]
        begin = at + 1


def reference(folder: Path, path: Path) -> dict[str, Any]:
    """Ids by `tokenizers`, and the bytes of text; not timed."""
    tokenizer, size = load(path), 0

    def documents() -> Iterator[np.ndarray]:
        nonlocal size
        for batch in batches(read(folder / "corpus.jsonl")):
            size += sum(len(text.encode()) for text in batch)
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                yield np.array(encoding.ids, dtype="<u4")

    return digest(documents()) | {"text": size, "seconds": 0.0}


def encoder(folder: Path, path: Path) -> dict[str, Any]:
    """Nothing but encoding, the tokenizer loaded and the texts in memory; `load_seconds` is that loading."""
    import fastokens

    started = time.perf_counter()
    tokenizer = fastokens.Tokenizer.from_json_str(path.read_text())
    load_seconds = time.perf_counter() - started
    work = list(batches(read(folder / "corpus.jsonl")))
    encode = partial(tokenizer.encode_batch_flat, add_special_tokens=False, split_special_tokens=True)
    seconds = 0.0

    def documents() -> Iterator[np.ndarray]:
        """Ids are let go batch by batch: to keep those of a large corpus would slow the encoder down."""
        nonlocal seconds
        for batch in work:
            started = time.perf_counter()
            ids, offsets = encode(batch)
            seconds += time.perf_counter() - started
            ends = np.frombuffer(offsets, "<u8").tolist()
            yield from (np.frombuffer(ids, "<u4")[a:b] for a, b in pairwise(ends))

    size = sum(len(text.encode()) for batch in work for text in batch)
    return digest(documents()) | {"text": size, "seconds": seconds, "load_seconds": load_seconds}


def ours(folder: Path, path: Path, name: str) -> dict[str, Any]:
    """The whole build: loading the tokenizer twice, the proof, the shards flushed to the disk, the manifest."""
    import pyarrow.parquet  # noqa: F401  (imports are not timed)

    from pipeline.build import build
    from pipeline.job import BuildOptions
    from pipeline.reader import Store

    out = folder / f"store-{time.time_ns()}"
    started = time.perf_counter()
    build(BuildOptions(inputs=(str(folder / name),), tokenizer=path, out=out))
    seconds = time.perf_counter() - started
    store = Store.open(out)
    return digest(store.document(i)[:-1] for i in range(store.documents)) | {"seconds": seconds}


def encode_rows(batch: dict[str, list[str]], path: str) -> dict[str, list[list[int]]]:
    encoded = load(Path(path)).encode_batch(batch["text"], add_special_tokens=False)
    return {"input_ids": [encoding.ids for encoding in encoded]}


def datasets_map(folder: Path, path: Path) -> dict[str, Any]:
    """What most people write."""
    import datasets

    datasets.disable_progress_bars()
    started = time.perf_counter()
    data = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), cache_dir=str(folder / "cache"), split="train"
    )
    columns, arguments = data.column_names, {"path": str(path)}
    data = data.map(
        encode_rows, batched=True, num_proc=PROCESSES, fn_kwargs=arguments, remove_columns=columns, batch_size=250
    )
    data.save_to_disk(str(folder / "datasets"))
    seconds = time.perf_counter() - started
    saved = datasets.load_from_disk(str(folder / "datasets")).with_format("numpy")
    return digest(ids for part in saved.iter(1000) for ids in part["input_ids"]) | {"seconds": seconds}


def datatrove(folder: Path, path: Path) -> dict[str, Any]:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    out = folder / "datatrove"
    steps = [
        JsonlReader(str(folder / "halves")),
        DocumentTokenizer(str(out), str(path), eos_token=EOD, shuffle_documents=False),
    ]
    started = time.perf_counter()
    LocalPipelineExecutor(steps, tasks=PROCESSES, workers=PROCESSES, logging_dir=str(folder / "logs")).run()
    seconds = time.perf_counter() - started
    end = load(path).token_to_id(EOD)
    flat = (np.fromfile(file, "<u2") for file in sorted(out.rglob("*.ds")))
    return digest(ids for one in flat for ids in split(one, end)) | {"seconds": seconds}


def encode_file(name: str, path: str) -> Iterator[Any]:
    import torch

    tokenizer = load(Path(path))
    for batch in batches(read(Path(name)), 1 << 20):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield torch.tensor(encoding.ids, dtype=torch.uint16)


def litdata(folder: Path, path: Path) -> dict[str, Any]:
    from litdata import StreamingDataset, optimize

    halves = [str(file) for file in sorted((folder / "halves").iterdir())]
    out = str(folder / "litdata")
    started = time.perf_counter()
    optimize(partial(encode_file, path=str(path)), halves, output_dir=out, num_workers=PROCESSES, chunk_bytes="64MB")
    seconds = time.perf_counter() - started
    saved = StreamingDataset(out)
    return digest(saved[i].numpy() for i in range(len(saved))) | {"seconds": seconds}


def write_half(name: str, path: str, out: str) -> None:
    from streaming import MDSWriter

    tokenizer = load(Path(path))
    with MDSWriter(columns={"tokens": "ndarray:uint16"}, out=out) as writer:
        for batch in batches(read(Path(name)), 1 << 20):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                writer.write({"tokens": np.array(encoding.ids, dtype=np.uint16)})


def streaming(folder: Path, path: Path) -> dict[str, Any]:
    """MosaicML Streaming: a writer a process, each into its folder."""
    from multiprocessing import get_context

    from streaming import LocalDataset

    halves = sorted((folder / "halves").iterdir())
    outs = [str(folder / f"mds{i}") for i in range(len(halves))]
    started = time.perf_counter()
    processes = [
        get_context("spawn").Process(target=write_half, args=(str(half), str(path), out))
        for half, out in zip(halves, outs, strict=True)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    seconds = time.perf_counter() - started
    return digest(row["tokens"] for out in outs for row in LocalDataset(local=out)) | {"seconds": seconds}


def grow(corpus: Path, out: Path, size: int) -> None:
    """The corpus again and again, each time its documents in another order and their lines rotated."""
    import random

    texts, shuffled = list(read(corpus)), random.Random(1)
    with out.open("w") as sink:
        turn = 0
        while True:
            shuffled.shuffle(texts)
            for text in texts:
                lines = text.split("\n")
                at = turn * len(lines) // 16 % max(len(lines), 1)
                sink.write(json.dumps({"text": "\n".join(lines[at:] + lines[:at])}) + "\n")
                if sink.tell() >= size:
                    return
            turn += 1


def one_document(corpus: Path, out: Path, size: int) -> None:
    texts = "\n".join(read(corpus))
    with out.open("w") as sink:
        json.dump({"text": (texts * (size // len(texts) + 1))[:size]}, sink)


def one_liners(out: Path, count: int) -> None:
    with out.open("w") as sink:
        for at in range(count):
            sink.write(f'{{"text": "Document number {at} has one line."}}\n')


CONTESTANTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "reference": reference,
    "encoder": encoder,
    "ours_jsonl": partial(ours, name="corpus.jsonl"),
    "ours_parquet": partial(ours, name="corpus.parquet"),
    "datasets": datasets_map,
    "datatrove": datatrove,
    "litdata": litdata,
    "streaming": streaming,
}


if __name__ == "__main__":
    here = str(Path(__file__).parent)
    sys.path[:] = [path for path in sys.path if path != here] + [str(Path(here).parent)]
    print("RESULT", json.dumps(CONTESTANTS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))))
