"""``sharded_dadamw.kernels.exact_squares`` on the CPU as one compiled loop."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numba import carray, float64, int64
from torch import Tensor

from sharded_dadamw.kernels.numba_language import FP32, compile_kernel, load, run_on_threads


class _Call(ctypes.Structure):
    """The elements, and the sums that come out."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("values", "numel", "upper", "lower")),
        *((name, ctypes.c_double) for name in ("scale", "unit")),
    )


def sums_of(chunk: Tensor, scale: float, unit: float) -> tuple[int, int]:
    """As ``exact_squares``, of a contiguous fp32 chunk, which ``scale`` makes smaller than 2**13."""
    call = _Call(chunk.data_ptr(), chunk.numel(), 0, 0, scale, unit)
    run_on_threads(_compile(), call, 1)
    return call.upper, call.lower


@cache
def _compile() -> Any:
    def run(pointer: Any) -> None:
        call = carray(pointer, 1)
        values, numel, scale, unit = call[0].values, call[0].numel, call[0].scale, call[0].unit
        upper_sum, lower_sum = int64(0), int64(0)
        for index in range(numel):
            value = float64(load(values, 0, FP32, index)) * scale
            square = value * value
            upper = np.floor(square)
            upper_sum += int64(upper)
            lower_sum += int64(np.rint((square - upper) * unit))
        call[0].upper = upper_sum
        call[0].lower = lower_sum

    return compile_kernel(run, _Call, "exact_squares")
