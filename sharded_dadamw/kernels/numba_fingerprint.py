"""``sharded_dadamw.kernels.fingerprint`` on the CPU as one compiled loop, on torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit, uint32, uint64
from torch import Tensor

from sharded_dadamw.kernels.fingerprint import BLOCK, FIRST, SECOND, STEP, Span, keys
from sharded_dadamw.kernels.numba_language import (
    BF16,
    FP16,
    FP32,
    INT16,
    claim,
    compile_kernel,
    join,
    load,
    pattern_of,
    pointer_at,
    run_on_threads,
)

_TILE = 1 << 16
"""Elements that a thread takes at a time."""
_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_WITH_REMAINDER = 4
_KEYS = keys(torch.arange(BLOCK)).numpy().view(np.uint64)


class _Call(ctypes.Structure):
    """All that the kernel is told: how many rows of the table are claimed, and addresses."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("claimed", "table", "rows", "sums"))


def sums_of(spans: Sequence[Span]) -> Tensor:
    """Return the sum of each of these, int64 [num_spans]."""
    table, owners = [], []
    for owner, (values, remainder, rows) in enumerate(spans):
        at, left = values.data_ptr(), 0 if remainder is None else remainder.data_ptr()
        form = _FORMS[values.dtype] if remainder is None else _WITH_REMAINDER
        for first in range(0, values.numel(), _TILE):
            numel = min(_TILE, values.numel() - first)
            of_tile = at + first * values.itemsize, left + first * 2, numel, rows.start + first
            table.append((*of_tile, rows.base, rows.length, rows.stride, form))
            owners.append(owner)
    sums = np.zeros(len(spans), dtype=np.uint64)
    if table:
        rows_of_table = np.array(table, dtype=np.int64)
        of_tiles = np.zeros(len(table), dtype=np.uint64)
        call = _Call(0, rows_of_table.ctypes.data, len(table), of_tiles.ctypes.data)
        run_on_threads(_compile(), call, min(len(table), torch.get_num_threads()))
        np.add.at(sums, owners, of_tiles)
    return torch.from_numpy(sums.view(np.int64))


@njit(forceinline=True)
def _word(bits: Any) -> Any:
    return uint64(uint32(bits ^ (bits >> uint32(16))))


@njit(forceinline=True)
def _of_fp32(values: Any, remainder: Any, i: Any) -> Any:
    return _word(pattern_of(load(values, 0, FP32, i)))


@njit(forceinline=True)
def _of_bf16(values: Any, remainder: Any, i: Any) -> Any:
    return uint64(pattern_of(load(values, 0, BF16, i)) >> uint32(16))


@njit(forceinline=True)
def _of_fp16(values: Any, remainder: Any, i: Any) -> Any:
    return _word(pattern_of(load(values, 0, FP16, i)))


@njit(forceinline=True)
def _of_fp64(values: Any, remainder: Any, i: Any) -> Any:
    bits = carray(pointer_at(values), i + 1, np.uint64)[i]
    return uint64(bits ^ (bits >> uint64(32)))


@njit(forceinline=True)
def _of_both(values: Any, remainder: Any, i: Any) -> Any:
    return _word(pattern_of(join(load(values, 0, BF16, i), load(remainder, 1, INT16, i))))


@njit(forceinline=True)
def _key(number: Any) -> Any:
    mixed = uint64(number + 1) * uint64(STEP)
    mixed = uint64(mixed ^ (mixed >> uint64(30))) * uint64(FIRST)
    mixed = uint64(mixed ^ (mixed >> uint64(27))) * uint64(SECOND)
    return uint64(mixed ^ (mixed >> uint64(31))) | uint64(1)


@njit(forceinline=True)
def _sum(word_at: Any, values: Any, remainder: Any, at: Any, stop: Any, index: Any) -> Any:
    """The sum over elements [at, stop), the first of which has this index."""
    total = uint64(0)
    while at < stop:
        of_block, place = uint64(0), index % BLOCK
        count = min(BLOCK - place, stop - at)
        if count == BLOCK:  # of which the compiler knows the length
            for i in range(BLOCK):
                of_block += word_at(values, remainder, at + i) * _KEYS[i]
        else:
            for i in range(count):
                of_block += word_at(values, remainder, at + i) * _KEYS[place + i]
        total += of_block * _key(BLOCK + index // BLOCK)
        at += count
        index += count
    return total


@cache
def _compile() -> Any:
    """A C function that claims rows of the table and sums what they say, until there are none."""

    def run(pointer: Any) -> None:
        call = carray(pointer, 1)[0]
        table = carray(pointer_at(call.table), (call.rows, 8), np.int64)
        sums = carray(pointer_at(call.sums), call.rows, np.uint64)
        tile = claim(pointer, 1)
        while tile < call.rows:
            values, remainder, numel, element, base, length, stride, form = table[tile]  # as ``sums_of`` writes it
            total = uint64(0)
            at = 0
            while at < numel:
                within = element % length
                stop = min(numel, at + length - within)
                index = base + element // length * stride + within
                if form == 0:
                    total += _sum(_of_fp32, values, remainder, at, stop, index)
                elif form == 1:
                    # As fp32 the lower half is 0, so the word has the same 16 bits twice.
                    total += uint64(0x10001) * _sum(_of_bf16, values, remainder, at, stop, index)
                elif form == 2:
                    total += _sum(_of_fp16, values, remainder, at, stop, index)
                elif form == 3:
                    total += _sum(_of_fp64, values, remainder, at, stop, index)
                else:
                    total += _sum(_of_both, values, remainder, at, stop, index)
                element += stop - at
                at = stop
            sums[tile] = total
            tile = claim(pointer, 1)

    return compile_kernel(run, _Call, "fingerprint")
