"""Small sets of numbers as bits of uint64 words, for numba kernels: number n is bit n % 64 of word n // 64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_WORD = np.uint64(63)


@njit(nogil=True, cache=True)
def flip(bits: np.ndarray, at: int) -> None:
    """Put `at` into the set, or take it out."""
    bits[at >> 6] ^= _ONE << (np.uint64(at) & _WORD)


@njit(nogil=True, cache=True)
def has(bits: np.ndarray, at: int) -> Any:
    """Whether `at` is in the set."""
    return (bits[at >> 6] >> (np.uint64(at) & _WORD)) & _ONE != _ZERO


@njit(nogil=True, cache=True)
def window(bits: np.ndarray, at: int) -> Any:
    """64 bits from bit `at` on, as a word."""
    low, shift = bits[at >> 6], np.uint64(at) & _WORD
    if shift == _ZERO:
        return low
    return (low >> shift) | (bits[(at >> 6) + 1] << (np.uint64(64) - shift))


@njit(nogil=True, cache=True)
def lowest(word: Any) -> Any:
    """Number of the lowest bit that is set in `word`, uint64 and not 0."""
    at, width = 0, 32
    while width > 0:
        if word & ((_ONE << np.uint64(width)) - _ONE) == _ZERO:
            word >>= np.uint64(width)
            at += width
        width >>= 1
    return at


@njit(nogil=True, cache=True)
def lowest_from(bits: np.ndarray, at: int) -> Any:
    """The first bit from `at` on that is set; -1 where there is none."""
    word = at >> 6
    if word >= len(bits):
        return -1
    masked = bits[word] >> (np.uint64(at) & _WORD)
    if masked != _ZERO:
        return at + lowest(masked)
    for following in range(word + 1, len(bits)):
        if bits[following] != _ZERO:
            return 64 * following + lowest(bits[following])
    return -1


@njit(nogil=True, cache=True)
def highest_up_to(bits: np.ndarray, at: int) -> Any:
    """The last bit up to `at` that is set; 0 where there is none. Bit 0 never is."""
    word = at >> 6
    masked = bits[word] << (_WORD - (np.uint64(at) & _WORD))
    if masked != _ZERO:
        return at - _leading(masked)
    for before in range(word - 1, -1, -1):
        if bits[before] != _ZERO:
            return 64 * before + 63 - _leading(bits[before])
    return 0


@njit(nogil=True, cache=True)
def _leading(word: Any) -> Any:
    """How many bits above the highest that is set in `word`, uint64 and not 0."""
    at, width = 0, 32
    while width > 0:
        if word >> np.uint64(64 - width) == _ZERO:
            word <<= np.uint64(width)
            at += width
        width >>= 1
    return at
