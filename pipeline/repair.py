"""Mend a finished store: build the units of damaged shards again, beside it, and put just those shards in place.

A shard built again must have the digest in the manifest. So a store is the same after a repair, or untouched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.documents import Unit
from pipeline.errors import StoreError
from pipeline.format import TOKENIZER_NAME, Manifest, ShardInfo
from pipeline.place import move, remove_tree
from pipeline.unit import Task, UnitOptions, UnitResult
from pipeline.writer import write_bytes

Run = Callable[[list[Task], UnitOptions], Iterator[UnitResult]]


def repair(
    manifest: Manifest, damaged: set[str], units: list[Unit], options: UnitOptions, run: Run
) -> Iterator[UnitResult]:
    """Mend the files `damaged` of the store `options.out`; yields each unit once its shards are in place.

    Raises StoreError where a unit now gives other shards: its input has changed.
    """
    if TOKENIZER_NAME in damaged:
        write_bytes(options.out / TOKENIZER_NAME, options.vocabulary.data)
    lost: dict[int, list[ShardInfo]] = {}
    for shard in manifest.shards:
        if shard.file in damaged:
            lost.setdefault(_unit_of(shard), []).append(shard)
    aside = options.sidecars / "repair"
    remove_tree(aside)
    for result in run(
        [(number, units[number]) for number in lost], dataclasses.replace(options, out=aside, sidecars=aside)
    ):
        for shard in lost[result.unit]:
            _same(shard, result)
        for shard in lost[result.unit]:
            move(aside / shard.file, options.out / shard.file)
        yield result


def _unit_of(shard: ShardInfo) -> int:
    """shards/00007.001.arrow -> 7."""
    return int(Path(shard.file).name.split(".")[0])


def _same(shard: ShardInfo, result: UnitResult) -> None:
    found = next((made for made in result.shards if made.file == shard.file), None)
    if found != shard:
        raise StoreError(
            "cannot be repaired: its input has changed since the store was built",
            where=f"{shard.file}, made from {shard.unit}",
            found="no such shard" if found is None else f"digest {found.digest}, {found.documents:,} documents",
            allowed=f"digest {shard.digest}, {shard.documents:,} documents",
            remedy="bring the input back as it was, or build the store anew: --force",
        )
