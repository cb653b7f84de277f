"""Which documents are held out for validation: a share of them by a hash of what they hold. Copies go together."""

from __future__ import annotations

import numpy as np
import xxhash

from pipeline.errors import ConfigError


def check_fraction(fraction: float) -> None:
    """Raise ConfigError for a share that leaves nothing to train on, or is none."""
    if not 0 <= fraction < 1:
        raise ConfigError("the validation fraction is out of range", found=fraction, allowed="0 up to, not with, 1")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a text is held out: XXH3-64 of its UTF-8 bytes is below fraction * 2**64."""
    return fraction > 0 and xxhash.xxh3_64_intdigest(text.encode()) < int(fraction * 2**64)


def are_held_out(tokens: np.ndarray, lengths: np.ndarray, fraction: float) -> np.ndarray:
    """bool [documents]: XXH3-64 of the ids as little-endian uint32, without the last, is below fraction * 2**64.

    For documents whose text is not there; the format or dtype they come in makes no difference.
    """
    if fraction <= 0:
        return np.zeros(len(lengths), dtype=np.bool_)
    data = tokens.astype("<u4").data.cast("B")
    ends = (4 * np.cumsum(lengths)).tolist()
    below = int(fraction * 2**64)
    starts = [0, *ends[:-1]]
    found = (xxhash.xxh3_64_intdigest(data[a : b - 4]) < below for a, b in zip(starts, ends, strict=True))
    return np.fromiter(found, dtype=np.bool_, count=len(lengths))
