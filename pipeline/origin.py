"""Where a stored document comes from: source, file, row, and the id the input gave it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow.compute as pc

from pipeline.errors import ConfigError
from pipeline.reader import Store


@dataclass(frozen=True)
class Origin:
    """One document's way back to the input."""

    document: int
    tokens: int
    """Stored ones, the end-of-document token included."""
    source: str
    """"" where sources have no names."""
    unit: str
    """The part of the input its shard was made from."""
    row: int
    """Byte offset in a file of lines or text, row number of a table."""
    id: str | None
    """What the input calls it; None where the store does not keep that."""

    def __str__(self) -> str:
        """One phrase for a person."""
        named = [f"id {self.id}"] if self.id is not None else []
        return ", ".join([self.source] * bool(self.source) + named + [f"{self.unit} at {self.row:,}"])


def origin(store: Store, document: int) -> Origin:
    """The origin of `document`. Raises ConfigError for no such document, StoreError for a damaged shard."""
    shard, item = store.place(document)
    columns = store.columns(shard)
    extra = {name: columns.column(name)[item].as_py() for name in ("id", "source") if name in columns.schema.names}
    return Origin(
        document=document,
        tokens=int(next(store.shard_lengths([shard]))[item]),
        source=extra.get("source") or store.shards[shard].source,
        unit=store.shards[shard].unit,
        row=columns.column("row")[item].as_py(),
        id=extra.get("id"),
    )


def find_id(store: Store, name: str) -> int:
    """The first document that the input calls `name`. Reads the ids of every shard up to it, no token.

    Raises ConfigError where there is none, or the store keeps no ids.
    """
    first, kept = 0, False
    for index, shard in enumerate(store.shards):
        columns = store.columns(index)
        if "id" in columns.schema.names:
            kept = True
            if (found := pc.index(columns.column("id"), name).as_py()) >= 0:
                return first + int(found)
        first += shard.documents
    raise ConfigError(
        "no document of this id" if kept else "the store keeps no ids",
        where=f"{store.path} ({store.split})",
        found=name,
        remedy="ids are compared to the letter; `show --document 0` prints one"
        if kept
        else "build it with the field that has them: --id-field NAME",
    )
