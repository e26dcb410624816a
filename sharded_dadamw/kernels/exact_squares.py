"""Sums of squares as integers, which have no order of addition, and so the same bits whoever holds what.

A square below 1 is cut to ``2 * DIGITS`` binary digits, the last one rounded: an integer of the upper digits and one of
the lower. The square of an fp32 is exact in fp64, so both are a function of the element alone.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from sharded_dadamw.kernels.choose import compiled_kernel
from sharded_dadamw.kernels.tiles import chunk_size

DIGITS = 26
"""Of 2**36 numbers of so many binary digits, the sum fits into 62."""
UNIT = 2.0**DIGITS


def exact_squares(run: Tensor, scale: Tensor) -> Tensor:
    """Return the sums of upper and of lower digits of ``(scale * run)**2``: int64 [2], in units of 1/UNIT, 1/UNIT**2.

    ``scale`` is a power of two, 0-d fp64, that makes all elements smaller than 1.
    """
    words = torch.zeros(2, dtype=torch.int64, device=run.device)
    chunks = torch.split(run.reshape(-1), chunk_size(run.device))
    scale = scale * 2.0 ** (DIGITS // 2)  # whose square is UNIT
    if run.device.type == "cpu" and run.dtype is not torch.float64 and compiled_kernel("cpu") is not None:
        compiled = importlib.import_module("sharded_dadamw.kernels.numba_exact_squares")
        for chunk in chunks:
            words += torch.tensor(compiled.sums_of(chunk.to(torch.float32).contiguous(), float(scale), UNIT))
        return words
    for chunk in chunks:
        square = chunk.to(torch.float64).mul(scale).square_()
        upper = square.floor()  # the sums of so few are exact in fp64 as well
        words[0] += upper.sum().to(torch.int64)
        words[1] += square.sub_(upper).mul_(UNIT).round_().sum().to(torch.int64)
    return words
