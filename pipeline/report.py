"""What a store holds, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.amount import amount
from pipeline.boundaries import boundaries, render_boundaries
from pipeline.format import SPLIT_FOLDERS, Manifest
from pipeline.lengths import LengthCounts, count_lengths, facts_of, merge
from pipeline.reader import Store

BAR_WIDTH = 10


def summary(store: Path) -> dict[str, Any]:
    """The manifest in short and the lengths of the documents, plain JSON values.

    Raises StoreError where there is no store, or a shard is missing or its offsets are damaged; digests are not read.
    """
    manifest = Manifest.load(store)
    splits = {split: _split(store, manifest, split) for split in SPLIT_FOLDERS if manifest.of_split(split)}
    return {
        "store": str(store),
        "format_version": manifest.format_version,
        "tokenizer_digest": manifest.tokenizer_digest,
        "vocab_size": manifest.vocab_size,
        "token_dtype": manifest.token_dtype,
        **boundaries(store, manifest),
        "skipped": manifest.skipped,
        "splits": splits,
    }


def lengths_of_sources(store: Store) -> dict[str, LengthCounts]:
    """The document lengths of each source, in store order; "" is the one without a name."""
    indices: dict[str, list[int]] = {}
    for index, shard in enumerate(store.shards):
        indices.setdefault(shard.source, []).append(index)
    return {source: count_lengths(store.shard_lengths(some)) for source, some in indices.items()}


def render(facts: dict[str, Any]) -> str:
    """`summary` as text: for each split a histogram by documents and by tokens, quantiles, and the sources."""
    lines = [
        f"{facts['store']}: vocabulary {facts['vocab_size']:,} as {facts['token_dtype']}, "
        f"{amount(facts['skipped'], 'record')} skipped",
        render_boundaries(facts),
    ]
    for name, split in facts["splits"].items():
        lines.append(
            f"\n{name}: {amount(split['documents'], 'document')}, {amount(split['tokens'], 'token')}, "
            f"{split['bytes_per_token']:.2f} bytes a token on disk, {amount(split['shards'], 'shard')}"
        )
        lines += [*_histogram(split), "", *_quantiles(split)]
        if set(split["sources"]) != {""}:
            lines += ["", *_sources(split)]
    return "\n".join(lines)


def _split(store: Path, manifest: Manifest, split: str) -> dict[str, Any]:
    shards = manifest.of_split(split)
    sources = lengths_of_sources(Store.open(store, split, verify=False))
    return {
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "bytes_per_token": sum(shard.bytes for shard in shards) / manifest.tokens(split),
        **facts_of(merge(sources.values())),
        "sources": {source: facts_of(lengths) for source, lengths in sources.items()},
    }


def _histogram(split: dict[str, Any]) -> list[str]:
    """A line a power of two; its last column is what a schedule that starts there finds in shorter documents."""
    documents, tokens = split["length_histogram"], split["token_histogram"]
    lines = [f"  {'length':>19}  {'documents':>11} {'':{BAR_WIDTH}} {'tokens':>15} {'':{BAR_WIDTH}} % shorter"]
    first = next(power for power, count in enumerate(documents) if count)
    for power in range(first, len(documents)):
        bars = [_bar(counts[power], max(counts)) for counts in (documents, tokens)]
        lines.append(
            f"  {2**power:>8,} - {2 ** (power + 1) - 1:>8,}  {documents[power]:>11,} {bars[0]} "
            f"{tokens[power]:>15,} {bars[1]} {100 * split['shorter_than'][power]['tokens']:>9.1f}"
        )
    return [*lines, "  % shorter: of the tokens, how many are in documents shorter than the line's first length"]


def _bar(count: int, most: int) -> str:
    return ("█" * -(-BAR_WIDTH * count // most)).ljust(BAR_WIDTH)


def _quantiles(split: dict[str, Any]) -> list[str]:
    table = split["quantiles"]
    shown = [i for i, share in enumerate(table["share"]) if 0.05 <= share <= 0.95]
    heads = "".join(f"{100 * table['share'][i]:>8.0f} %" for i in shown)
    lines = ["  length up to".ljust(19) + heads + f"{'longest':>10}"]
    for name in ("documents", "tokens"):
        cells = "".join(f"{table[f'by_{name}'][i]:>10,}" for i in shown)
        lines.append(f"  of the {name}".ljust(19) + cells + f"{split['longest']:>10,}")
    return lines


def _sources(split: dict[str, Any]) -> list[str]:
    """`half up to`: half of the source's tokens are in documents no longer than this."""
    lines = [f"  {'source':<17}{'documents':>11}{'tokens':>16}{'share':>9}{'mean':>9}{'half up to':>12}"]
    for source, facts in split["sources"].items():
        middle = facts["quantiles"]["by_tokens"][facts["quantiles"]["share"].index(0.5)]
        lines.append(
            f"  {source or '(no name)':<17}{facts['documents']:>11,}{facts['tokens']:>16,}"
            f"{100 * facts['tokens'] / split['tokens']:>7.1f} %{facts['mean']:>9,.0f}{middle:>12,}"
        )
    return lines
