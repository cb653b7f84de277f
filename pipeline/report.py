"""What a store holds, for people and for programs."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.format import SPLIT_FOLDERS, Manifest

BAR_WIDTH = 40


def summary(store: Path) -> dict[str, Any]:
    """The manifest in short, plain JSON values. Raises StoreError where there is none."""
    manifest = Manifest.load(store)
    splits = {split: _split(manifest, split) for split in SPLIT_FOLDERS if manifest.of_split(split)}
    return {
        "store": str(store),
        "format_version": manifest.format_version,
        "tokenizer_digest": manifest.tokenizer_digest,
        "vocab_size": manifest.vocab_size,
        "token_dtype": manifest.token_dtype,
        "eod_id": manifest.eod_id,
        "bos_id": manifest.bos_id,
        "skipped": manifest.skipped,
        "splits": splits,
    }


def render(facts: dict[str, Any]) -> str:
    """`summary` as text, with a histogram of document lengths."""
    lines = [
        f"{facts['store']}: vocabulary {facts['vocab_size']:,} as {facts['token_dtype']}, "
        f"end of document {facts['eod_id']}, beginning {facts['bos_id']}, {facts['skipped']:,} records skipped"
    ]
    for name, split in facts["splits"].items():
        lines.append(
            f"\n{name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
            f"{split['bytes_per_token']:.2f} bytes a token on disk, {split['shards']} shards"
        )
        lines.append(f"  {'tokens':>15}  documents")
        most = max(split["length_histogram"])
        for power, count in enumerate(split["length_histogram"]):
            bar = "█" * -(-BAR_WIDTH * count // most)
            lines.append(f"  {2**power:>6,} - {2 ** (power + 1) - 1:>6,}  {count:>8,} {bar}".rstrip())
    return "\n".join(lines)


def _split(manifest: Manifest, split: str) -> dict[str, Any]:
    shards = manifest.of_split(split)
    tokens = manifest.tokens(split)
    bins = zip_longest(*(shard.length_histogram for shard in shards), fillvalue=0)
    return {
        "shards": len(shards),
        "documents": manifest.documents(split),
        "tokens": tokens,
        "bytes": sum(shard.bytes for shard in shards),
        "bytes_per_token": sum(shard.bytes for shard in shards) / tokens,
        "length_histogram": [sum(counts) for counts in bins],
    }
