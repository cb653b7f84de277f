"""Small sets of numbers as bits of uint64 words, for numba kernels: number n is bit n % 64 of word n // 64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

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
def word_from(bits: np.ndarray, at: int) -> Any:
    """64 bits from bit `at` on, as a word."""
    low, shift = bits[at >> 6], np.uint64(at) & _WORD
    if shift == _ZERO:
        return low
    return (low >> shift) | (bits[(at >> 6) + 1] << (np.uint64(64) - shift))


@intrinsic
def lowest(typingctx: Any, word: Any) -> Any:
    """Number of the lowest bit that is set in `word`, uint64 and not 0; one instruction."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], context.get_constant(types.boolean, True))

    return types.int64(types.uint64), codegen


@intrinsic
def _leading(typingctx: Any, word: Any) -> Any:
    """How many bits above the highest that is set in `word`, uint64 and not 0; one instruction."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], context.get_constant(types.boolean, True))

    return types.int64(types.uint64), codegen


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
