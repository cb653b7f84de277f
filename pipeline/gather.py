"""Pieces of documents out of mapped shards, in one nogil call: the only code that reads tokens for training.

A kernel gets addresses instead of arrays, so that a batch over a thousand shards is still one call:

    document 7  --starts-->  shard 1, its document 2  --list offsets-->  token 310 of the shard  --tokens-->  ids

The list offsets are read where they are mapped: nothing is held per document. Pieces lie all over the shards, so
their cache lines are prefetched: waiting for them would take as long as copying. Tokens are put together in the
first-level cache and written with non-temporal stores: 24 bytes a token would evict all else, and each line would be
read before it is written. Price: 2 ns a token, 3 at pieces of 64; writing is most of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, njit, types
from numba.extending import intrinsic

AHEAD_TOKENS = 2048
"""How far ahead of the copying cache lines are prefetched: a small part of the first-level cache."""
LINE_BYTES = 64
NOT_READY = -1
BLOCK_TOKENS = 2048
"""Tokens put together in the first-level cache before they are written to the batch: 16 or 24 KB."""


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """int64 address -> pointer to items of the type of `like`."""
    signature = types.CPointer(like)(types.int64, like)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, codegen


@intrinsic
def _prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an int64 address; no harm where nothing is mapped."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function)
        read, every_cache, data = word(0), word(3), word(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], pointer), read, every_cache, data])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _write_line(typingctx: Any, line: Any, source: Any, wide: Any, narrow: Any) -> Any:
    """Write the cache line at address `line`, non-temporally: unsigned items at `source`, of the type of `narrow`,
    widened to that of `wide`.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, item = (context.get_value_type(kind) for kind in signature.args[2:])
        count = LINE_BYTES * 8 // to.width
        source = builder.inttoptr(arguments[1], ir.VectorType(item, count).as_pointer())
        items = builder.load(source, align=item.width // 8)
        if item.width < to.width:
            items = builder.zext(items, ir.VectorType(to, count))
        line = builder.inttoptr(arguments[0], ir.VectorType(to, count).as_pointer())
        store = builder.store(items, line, align=LINE_BYTES)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, wide, narrow), codegen


@intrinsic
def _written(typingctx: Any) -> Any:
    """A fence: non-temporal stores are not ordered with the writes by which threads tell each other."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@njit(nogil=True, cache=True)
def _widen(block: np.ndarray, out: np.ndarray) -> None:
    """Copy unsigned integers to as many of `out`, whole cache lines with non-temporal stores."""
    at, address, line = 0, out.ctypes.data, LINE_BYTES // out.itemsize
    while at < len(out) and (address + at * out.itemsize) % LINE_BYTES:
        out[at] = block[at]
        at += 1
    while at + line <= len(out):
        _write_line(address + at * out.itemsize, block.ctypes.data + at * block.itemsize, out[0], block[0])
        at += line
    while at < len(out):
        out[at] = block[at]
        at += 1


def _gather_kernel(token: Any) -> Any:
    size = np.dtype(token).itemsize

    @njit(nogil=True, cache=True)
    def gather(
        starts: np.ndarray,
        offsets: np.ndarray,
        tokens: np.ndarray,
        ready: np.ndarray,
        document: np.ndarray,
        start: np.ndarray,
        length: np.ndarray,
        bos_id: int,
        inputs: np.ndarray,
        labels: np.ndarray,
        positions: np.ndarray,
    ) -> int:
        """Copy pieces one after another; returns how many: none after one outside its document, which is the result.

        Per shard, int64 [shards (+ 1)]: `starts` its first document, `offsets` and `tokens` the addresses of its list
        offsets and of its tokens; bool `ready`, whether they may be read. Copies nothing and returns NOT_READY where
        those of a shard of `document` may not.
        """
        address = np.empty(len(document), dtype=np.int64)  # of the token before each piece
        for piece in range(len(document)):
            first, count = start[piece], length[piece]
            if not 0 <= document[piece] < starts[-1]:
                return piece
            shard = np.searchsorted(starts, document[piece], side="right") - 1
            if not ready[shard]:
                return NOT_READY
            item = document[piece] - starts[shard]
            bounds = carray(_pointer(offsets[shard], np.int64(0)), (item + 2,))
            begin = bounds[item]
            if first < 0 or count < 1 or first + count > bounds[item + 1] - begin:
                return piece
            address[piece] = tokens[shard] + (begin + first - 1) * size
        before, after = np.empty(BLOCK_TOKENS, dtype=token), np.empty(BLOCK_TOKENS, dtype=token)
        place = np.empty(BLOCK_TOKENS, dtype=np.uint32)
        piece = done = ahead = asked = 0  # `done` tokens of `piece` are laid out
        for begin in range(0, len(labels), BLOCK_TOKENS):
            block, at = min(BLOCK_TOKENS, len(labels) - begin), 0
            while at < block:
                while ahead < len(document) and asked < begin + at + AHEAD_TOKENS:
                    end = address[ahead] + (min(length[ahead], AHEAD_TOKENS) + 1) * size
                    for line in range(address[ahead] & -LINE_BYTES, end, LINE_BYTES):
                        _prefetch(line)
                    asked += length[ahead]
                    ahead += 1
                count = min(length[piece] - done, block - at)
                source = carray(_pointer(address[piece] + done * size, token(0)), (count + 1,))
                # Slices that start at 0, so that the compiler sees no negative index and makes vector instructions.
                token_before, label, position = (
                    before[at : at + count],
                    after[at : at + count],
                    place[at : at + count],
                )
                following, first = source[1:], np.uint32(done)
                for i in range(count):
                    token_before[i] = source[i]
                    label[i] = following[i]
                    position[i] = first + np.uint32(i)
                if done == start[piece] == 0:
                    token_before[0] = bos_id  # for what lies there: another document, or the file before its tokens
                at, done = at + count, done + count
                if done == length[piece]:
                    piece, done = piece + 1, 0
            _widen(before[:block], inputs[begin : begin + block])
            _widen(after[:block], labels[begin : begin + block])
            _widen(place[:block], positions[begin : begin + block])
        _written()
        return len(document)

    return gather


gather_uint16 = _gather_kernel(np.uint16)
gather_uint32 = _gather_kernel(np.uint32)
