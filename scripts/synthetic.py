"""A store of made-up documents, the same on every machine: for benches, which must not depend on a corpus."""

import json
from pathlib import Path

import numpy as np

from pipeline.format import FORMAT_VERSION, Manifest, digest_bytes, token_dtype
from pipeline.writer import Columns, write_shard

EOD = 0


def write_synthetic_store(path: Path, tokens: int, vocab_size: int = 50_257, seed: int = 1) -> None:
    """About `tokens` tokens in documents of lognormal length (median 350, mean 640, as web text), and 1 % held out.

    Ids follow a power law; the tokenizer is a stub.
    """
    random = np.random.default_rng(seed)
    infos = []
    for split, size, folder in (("train", tokens, "shards"), ("validation", max(tokens // 100, 4096), "validation")):
        lengths = np.clip(random.lognormal(np.log(350), 1.1, 2 + size // 300), 2, 100_000).astype(np.int64)
        lengths = lengths[: np.searchsorted(lengths.cumsum(), size) + 1]
        ids = (random.random(lengths.sum()) ** 3 * (vocab_size - 1) + 1).astype(token_dtype(vocab_size))
        ids[lengths.cumsum() - 1] = EOD
        rows = np.arange(len(lengths))
        infos.append(
            write_shard(path, f"{folder}/00000.arrow", Columns(ids, lengths, rows), split=split, unit=f"{split} 0")
        )
    tokenizer = b"{}"
    (path / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer_digest=digest_bytes(tokenizer),
        vocab_size=vocab_size,
        token_dtype=str(token_dtype(vocab_size)),
        eod_id=EOD,
        bos_id=EOD,
        shards=infos,
        parameters={},
    )
    (path / "manifest.json").write_text(json.dumps(manifest.to_json()))
