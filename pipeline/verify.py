"""Read a whole store and compare it with its manifest; changes nothing."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from pipeline.format import TOKENIZER_NAME, Manifest, ShardInfo, digest_bytes, length_histogram, shard_schema
from pipeline.place import is_local, reaching

SHARDS_AT_ONCE = 4


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong."""

    file: str
    what: str


def verify(store: Path, on_shard: Callable[[ShardInfo], None] = lambda shard: None) -> list[Damage]:
    """Everything wrong with STORE, in shard order; empty for a sound one.

    Raises StoreError where there is no readable manifest.
    """
    manifest = Manifest.load(store)
    damage = []
    tokenizer = store / TOKENIZER_NAME
    if not tokenizer.is_file():
        damage.append(Damage(TOKENIZER_NAME, "missing"))
    elif digest_bytes(tokenizer.read_bytes()) != manifest.tokenizer_digest:
        damage.append(Damage(TOKENIZER_NAME, "digest differs from the manifest"))

    def check(shard: ShardInfo) -> str | None:
        with _on_disk(store / shard.file) as path:
            return _damage_of(path, shard, manifest)

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:  # one is read while another is compared
        for shard, what in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            if what:
                damage.append(Damage(shard.file, what))
            on_shard(shard)
    return damage


@contextlib.contextmanager
def _on_disk(path: Path) -> Iterator[Path]:
    """`path`, or a copy of a remote one that is gone afterwards; of a missing one nothing."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="slw-") as folder:
        copy, remote = Path(folder) / path.name, cast(Any, path)
        with reaching(path), contextlib.suppress(FileNotFoundError):
            remote.fs.get_file(remote.path, str(copy))
        yield copy


def _damage_of(path: Path, shard: ShardInfo, manifest: Manifest) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != shard.bytes:
        return f"{path.stat().st_size} bytes, {shard.bytes} in the manifest"
    with pa.memory_map(str(path)) as source:
        if digest_bytes(source.read_buffer()) != shard.digest:
            return "digest differs from the manifest"
        source.seek(0)
        try:
            batch = pa.ipc.open_stream(source).read_next_batch()
            batch.validate(full=True)
        except (pa.ArrowException, ValueError, StopIteration) as error:
            return f"not a readable Arrow stream: {error}"
        return _damage_of_batch(batch, shard, manifest)


def _damage_of_batch(batch: pa.RecordBatch, shard: ShardInfo, manifest: Manifest) -> str | None:  # noqa: PLR0911
    names = batch.schema.names
    if batch.schema != shard_schema(np.dtype(manifest.token_dtype), ids="id" in names, source="source" in names):
        return f"unexpected columns: {batch.schema}"
    column = batch.column("tokens")
    offsets = column.offsets.to_numpy()
    tokens = column.values.to_numpy()
    if len(column) != shard.documents or len(tokens) != shard.tokens:
        return f"{len(column)} documents of {len(tokens)} tokens, not {shard.documents} of {shard.tokens}"
    lengths = np.diff(offsets)
    if offsets[0] != 0 or len(lengths) == 0 or lengths.min() < 1:
        return "an empty document"
    if length_histogram(lengths) != shard.length_histogram:
        return "lengths differ from the manifest's histogram"
    if int(tokens.max()) >= manifest.vocab_size:
        return f"token {int(tokens.max())} in a vocabulary of {manifest.vocab_size}"
    if not (tokens[offsets[1:] - 1] == manifest.eod_id).all():
        return "a document without its end-of-document token"
    return None
