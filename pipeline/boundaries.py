"""The tokens that end and begin the documents of a store, by id and name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.format import TOKENIZER_NAME, Manifest
from pipeline.place import is_there, reaching


def boundaries(store: Path, manifest: Manifest) -> dict[str, Any]:
    """`eod_id`, `eod`, `bos_id`, `bos`: ids, and names in the store's tokenizer.json, None where it has none."""
    path, data = store / TOKENIZER_NAME, b"{}"
    if is_there(path):
        with reaching(path):
            data = path.read_bytes()
    names = [token_name(data, token) for token in (manifest.eod_id, manifest.bos_id)]
    return {"eod_id": manifest.eod_id, "eod": names[0], "bos_id": manifest.bos_id, "bos": names[1]}


def render_boundaries(facts: dict[str, Any]) -> str:
    """`boundaries` as text: documents end in '</s>' (2) and begin with '<s>' (1) when served."""
    eod, bos = (
        f"{facts[which]!r} ({facts[f'{which}_id']})" if facts[which] is not None else f"token {facts[f'{which}_id']}"
        for which in ("eod", "bos")
    )
    return f"documents end in {eod} and begin with {'the same' if eod == bos else bos} when served"


def token_name(data: bytes, token: int) -> str | None:
    """What a tokenizer.json calls `token`; None where it does not say."""
    from pipeline.encoding import parsed  # tokenizers

    try:
        return parsed(data).id_to_token(token)
    except Exception:  # what tokenizers raises of a file that is none
        return None
