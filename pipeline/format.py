"""The contract between whoever writes shards and whoever reads them: file names, schema, manifest.

    STORE/manifest.json            written last: its presence is the commit; holds its own digest
    STORE/tokenizer.json           the tokenizer, byte for byte
    STORE/shards/00000.arrow       training documents, one Arrow IPC stream of one record batch per file
    STORE/validation/00000.arrow   held-out documents, same schema; only where a fraction was split off

A shard's columns: `tokens` large_list<uint16|uint32> (one document, end-of-document token last, never null),
`row` int64 (where the document stood in its source file: byte offset for lines and text, row number for tables);
where they were asked for `id` string (what the corpus calls the document) and `source` string (the named source).
The lengths are the differences of the list offsets, so they are readable without touching a token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import xxhash

from pipeline.errors import StoreError
from pipeline.place import reaching

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
BUILD_FOLDER = ".slw-build"
"""In a store in the making."""
SPLIT_FOLDERS = {"train": "shards", "validation": "validation"}
ANEW = "build the store again: --force"
"""What is to do about a manifest that is none."""
LENGTH_BINS = 40
"""Histogram bin b counts documents of 2**b to 2**(b+1)-1 tokens."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id of a vocabulary of `vocab_size` fits, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_schema(dtype: np.dtype[Any], *, ids: bool = False, source: bool = False) -> pa.Schema:
    """The Arrow schema of a shard whose tokens are of `dtype`, with a column `id` and `source` where asked for."""
    fields = [
        pa.field("tokens", pa.large_list(pa.from_numpy_dtype(dtype)), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
    extra = [name for name, wanted in (("id", ids), ("source", source)) if wanted]
    return pa.schema(fields + [pa.field(name, pa.string(), nullable=False) for name in extra])


def length_histogram(lengths: np.ndarray) -> list[int]:
    """Documents per power of two of their length: bin b counts lengths in [2**b, 2**(b+1)); trailing zeros cut."""
    exponents = np.frexp(np.asarray(lengths, dtype=np.float64))[1] - 1
    counts = np.bincount(exponents)[:LENGTH_BINS]
    return [int(count) for count in counts]


def digest_bytes(data: bytes | memoryview) -> str:
    """The digest used for shards, tokenizer and manifest: XXH3-128 in hex (detects damage; not cryptographic)."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_json(value: Any) -> str:
    """`digest_bytes` of a JSON value, however it is indented and its keys are ordered."""
    return digest_bytes(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """What the manifest knows of one shard."""

    file: str
    """Path relative to the store, with forward slashes."""
    split: str
    """"train" or "validation"."""
    digest: str
    bytes: int
    documents: int
    tokens: int
    """End-of-document tokens included."""
    length_histogram: list[int]
    unit: str
    """The part of the input it was made from, readable by a person: `books.jsonl [0:67108864]`."""
    source: str = ""
    """The named source of its documents, "" where none was named. Shards of one source stand together."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The store's table of contents; see `Store` for what to do with it."""

    format_version: int
    tokenizer_digest: str
    vocab_size: int
    token_dtype: str
    """"uint16" or "uint32"."""
    eod_id: int
    """Last token of every stored document."""
    bos_id: int
    """Token before a document's first one when it is served; equals `eod_id` where the tokenizer has no BOS."""
    shards: list[ShardInfo]
    parameters: dict[str, Any]
    """What the build was asked for; a resumed build must be asked for the same."""
    skipped: int = 0
    """Records left out as bad (`--skip-bad`) or empty."""

    def of_split(self, split: str) -> list[ShardInfo]:
        """The shards of "train" or "validation", in serving order."""
        return [shard for shard in self.shards if shard.split == split]

    def documents(self, split: str = "train") -> int:
        """Number of documents of a split."""
        return sum(shard.documents for shard in self.of_split(split))

    def tokens(self, split: str = "train") -> int:
        """Number of stored tokens of a split, end-of-document tokens included."""
        return sum(shard.tokens for shard in self.of_split(split))

    def to_json(self) -> dict[str, Any]:
        """As written to manifest.json: with totals for whoever reads it by eye, and a digest of all of it."""
        totals = {
            split: {
                "shards": len(self.of_split(split)),
                "documents": self.documents(split),
                "tokens": self.tokens(split),
            }
            for split in SPLIT_FOLDERS
        }
        data = {**dataclasses.asdict(self), "totals": totals}
        return {**data, "digest": digest_json(data)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Manifest:
        """Inverse of `to_json`; raises KeyError or TypeError where a field is missing or of the wrong kind."""
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls)}
        fields["shards"] = [ShardInfo(**shard) for shard in fields["shards"]]
        return cls(**fields)

    @classmethod
    def load(cls, store: Path) -> Manifest:
        """Read STORE/manifest.json; raises StoreError where it is missing, unreadable or of another version."""
        path = store / MANIFEST_NAME
        with reaching(store):
            is_there, is_finished = store.is_dir(), path.is_file()
        if not is_there:
            remedy = (
                "build one: slw-prep build INPUT... --out STORE; of token ids, such as Megatron's: slw-prep import"
            )
            found = None if store.is_absolute() else f"no such folder in {Path.cwd()}, where this was started"
            raise StoreError("no store here", where=store, found=found, remedy=remedy)
        if not is_finished:
            begun = (store / BUILD_FOLDER).is_dir()
            raise StoreError(
                "not a finished store: it has no manifest.json",
                where=store,
                remedy="the same `slw-prep build` again goes on"
                if begun
                else "is it the right folder? a store whose manifest is lost is built anew, in an empty folder",
            )
        try:
            data = orjson.loads(path.read_bytes())
            version = data["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError("manifest.json cannot be read", where=path, found=error, remedy=ANEW) from error
        if version != FORMAT_VERSION:
            raise StoreError(
                "store of another format version",
                where=path,
                found=version,
                allowed=FORMAT_VERSION,
                remedy=ANEW,
            )
        if digest_json({name: value for name, value in data.items() if name != "digest"}) != data.get("digest"):
            raise StoreError(
                "manifest.json was changed after it was written: its digest is not that of its contents",
                where=path,
                found=data.get("digest"),
                remedy=f"take back the change, or {ANEW}",
            )
        try:
            return cls.from_json(data)
        except (KeyError, TypeError) as error:
            raise StoreError("manifest.json cannot be read", where=path, found=repr(error), remedy=ANEW) from error
