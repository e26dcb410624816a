"""Norms of what is spread over ranks: each element counted exactly once, one all-reduce, nothing read on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.collectives import Collectives

_CPU_CHUNK = 1 << 15
"""Elements widened to fp64 at a time on CPU, so that the copy stays in cache. A running fp32 sum would drift."""


def global_norm(runs: Sequence[Tensor], norm_type: float, *, collectives: Collectives, device: torch.device) -> Tensor:
    """The norm over all ranks of what each rank holds.

    Args:
        runs: 1-D tensors that no other rank holds; may be empty.
        norm_type: 2 or inf.
        collectives: The ranks to add up.
        device: Where the result goes.

    Returns:
        0-d fp32, the same bits on every rank. Squares are summed in fp64. A nan anywhere gives nan, and with
        ``norm_type`` inf, where backends disagree about the larger of nan and a number, it gives inf.
    """
    if norm_type == math.inf:
        largest = [run.abs().amax().to(torch.float64) for run in runs if run.numel()]
        norm = torch.stack(largest).amax() if largest else torch.zeros((), dtype=torch.float64, device=device)
        norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
        collectives.all_reduce_(norm, dist.ReduceOp.MAX).wait()
        return norm.to(torch.float32)
    squares = [_sum_of_squares(run) for run in runs if run.numel()]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
    collectives.all_reduce_(total, dist.ReduceOp.SUM).wait()
    return total.sqrt().to(torch.float32)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of this norm are multiplied by, at most 1; torch's ``clip_grad_norm_`` has the same formula.

    Args:
        norm: 0-d fp32.
        max_norm: The norm that must not be exceeded.
    """
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def _sum_of_squares(run: Tensor) -> Tensor:
    """0-d fp64. The square of an fp32 is exact in fp64, so only the additions round."""
    if run.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(run, dtype=torch.float64)
        return norm.square()
    total = torch.zeros((), dtype=torch.float64)
    for chunk in torch.split(run, _CPU_CHUNK):
        wide = chunk.to(torch.float64)
        total += torch.dot(wide, wide)
    return total
