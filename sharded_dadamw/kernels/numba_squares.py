"""``sharded_dadamw.kernels.exact_squares`` on the CPU as one compiled loop."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, njit

from sharded_dadamw.kernels.exact_squares import UNIT


@njit(nogil=True)
def sums_of(run: Any, scale: float) -> tuple[int, int]:
    """Return the sums of upper and of lower digits of a 1-D fp32 array, which ``scale`` makes smaller than 2**13."""
    upper_sum, lower_sum = int64(0), int64(0)
    for index in range(run.size):
        value = np.float64(run[index]) * scale
        square = value * value
        upper = np.floor(square)
        upper_sum += int64(upper)
        lower_sum += int64(np.rint((square - upper) * UNIT))
    return upper_sum, lower_sum
