"""Small stores written by hand, for tests of whatever reads them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.format import (
    FORMAT_VERSION,
    Manifest,
    ShardInfo,
    digest_bytes,
    length_histogram,
    shard_schema,
    token_dtype,
)

EOD = 0


def documents_of(lengths, vocab_size=50, seed=0):
    """Documents of given stored lengths, random ids, EOD last."""
    random = np.random.default_rng(seed)
    return [np.append(random.integers(1, vocab_size, n - 1), EOD).astype(token_dtype(vocab_size)) for n in lengths]


def write_store(
    path,
    documents,
    *,
    shards=1,
    vocab_size=50,
    bos_id=EOD,
    eod_id=EOD,
    split="train",
    tokenizer=b"{}",
    source="",
    extra=None,
):
    """Write `documents` as a store of `shards` shards; call again with another split or source to add it.

    `extra`: more columns, name -> one string a document.
    """
    extra = extra or {}
    path = Path(path)
    folder = {"train": "shards", "validation": "validation"}[split]
    (path / folder).mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_bytes(tokenizer)
    infos = []
    manifest_path = path / "manifest.json"
    earlier = Manifest.load(path).shards if manifest_path.exists() else []
    kept = [s for s in earlier if (s.split, s.source) != (split, source)]
    before = sum(s.split == split for s in kept)
    for number, part in enumerate(np.array_split(np.arange(len(documents)), shards), start=before):
        chosen = [documents[i] for i in part]
        file = path / folder / f"{number:05d}.arrow"
        dtype = token_dtype(vocab_size)
        offsets = pa.array(np.cumsum([0] + [len(d) for d in chosen]), type=pa.int64())
        values = pa.array(np.concatenate([np.empty(0, dtype), *chosen]))
        schema = shard_schema(dtype)
        tokens = pa.LargeListArray.from_arrays(offsets, values).cast(schema.field("tokens").type)
        columns = [tokens, pa.array(range(len(chosen)), type=pa.int64())]
        for name, values in extra.items():
            schema = schema.append(pa.field(name, pa.string(), nullable=False))
            columns.append(pa.array([values[i] for i in part], pa.string()))
        batch = pa.RecordBatch.from_arrays(columns, schema=schema)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(batch)
        lengths = np.array([len(d) for d in chosen])
        infos.append(
            ShardInfo(
                file=f"{folder}/{file.name}",
                split=split,
                digest=digest_bytes(file.read_bytes()),
                bytes=file.stat().st_size,
                documents=len(chosen),
                tokens=int(lengths.sum()),
                length_histogram=length_histogram(lengths),
                unit=f"test {number}",
                source=source,
            )
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_digest=digest_bytes(tokenizer),
        vocab_size=vocab_size,
        token_dtype=str(token_dtype(vocab_size)),
        eod_id=eod_id,
        bos_id=bos_id,
        shards=kept + infos,
        parameters={},
    )
    manifest_path.write_text(json.dumps(manifest.to_json()))
    return dataclasses.replace(manifest)
