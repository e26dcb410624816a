"""``sharded_dadamw.kernels.fingerprint`` on the CPU as one compiled loop, on torch's own threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit, uint64
from torch import Tensor

from sharded_dadamw.kernels.fingerprint import OF_BITS, OF_INDEX, OF_SUM, Span
from sharded_dadamw.kernels.numba_kernel import (
    STORAGES,
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
_FP32, _BF16, _INT16 = (STORAGES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.int16))
_FORMS = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_WITH_REMAINDER = 3


class _Call(ctypes.Structure):
    """All that the kernel is told: how many rows of the table are claimed, and addresses."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("claimed", "table", "rows", "sums"))


def sums_of(spans: Sequence[Span]) -> Tensor:
    """Return the sum of each of these, int64 [num_spans]."""
    table, owners = [], []
    of_spans = [span.values if span.values.dtype in _FORMS else span.values.float() for span in spans]
    for owner, ((_, remainder, rows), values) in enumerate(zip(spans, of_spans, strict=True)):
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
def _mix(bits: Any, number: Any) -> Any:
    """As ``sharded_dadamw.kernels.fingerprint``; ``number`` is (index + 1) times its constant."""
    mixed = uint64(bits) * uint64(OF_BITS) + number
    mixed = uint64(mixed ^ (mixed >> uint64(32))) * uint64(OF_SUM)
    return uint64(mixed ^ (mixed >> uint64(29)))


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
                number = uint64(base + element // length * stride + within + 1 - at) * uint64(OF_INDEX)
                if form == 0:
                    for i in range(at, stop):
                        bits = pattern_of(load(values, 0, _FP32, i))
                        total += _mix(bits, number + uint64(i) * uint64(OF_INDEX))
                elif form == 1:
                    for i in range(at, stop):
                        bits = pattern_of(load(values, 0, _BF16, i))
                        total += _mix(bits, number + uint64(i) * uint64(OF_INDEX))
                elif form == 2:
                    words = carray(pointer_at(values), numel, np.uint64)
                    for i in range(at, stop):
                        total += _mix(words[i], number + uint64(i) * uint64(OF_INDEX))
                else:
                    for i in range(at, stop):
                        bits = pattern_of(join(load(values, 0, _BF16, i), load(remainder, 1, _INT16, i)))
                        total += _mix(bits, number + uint64(i) * uint64(OF_INDEX))
                element += stop - at
                at = stop
            sums[tile] = total
            tile = claim(pointer, 1)

    run.__qualname__ = "fingerprint"
    return compile_kernel(run, _Call)
