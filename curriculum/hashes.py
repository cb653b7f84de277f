"""Counted hashes: random numbers that follow from a key alone, in integers, the same on every machine."""

from __future__ import annotations

import numpy as np
from numba import njit


def key_of(*numbers: int) -> int:
    """One 63-bit number from several."""
    key = 0
    for number in numbers:
        key = int(hash_at((key + number) & (2**63 - 1), 0))
    return key


def hashes(key: int, count: int) -> np.ndarray:
    """uint64 [count]: SplitMix64 at `key` + 1, `key` + 2, ... (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


@njit(nogil=True, cache=True)
def hash_at(key: int, index: int) -> int:
    """`hashes(key, index + 1)[index]` without its top bit."""
    z = np.uint64(key) + np.uint64(index + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((z ^ (z >> np.uint64(31))) >> np.uint64(1))
