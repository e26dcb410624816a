"""Norms of what is spread over ranks: one all-reduce, nothing read on the host.

Every rank squares what it counts, of which ``held`` sees to it that no other rank does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.kernels.exact_squares import UNIT, exact_squares
from sharded_dadamw.kernels.tiles import chunk_size


def global_norm(runs: Sequence[Tensor], norm_type: float, *, collectives: Collectives, device: torch.device) -> Tensor:
    """The norm over all ranks of what each rank holds, 0-d fp32 on ``device``, the same bits on every rank.

    ``runs`` are tensors of any shape that no other rank counts; there may be none. ``norm_type`` is 2 or inf. Squares
    are summed in fp64. A nan anywhere gives nan, and with inf, where backends disagree about the larger of nan and a
    number, it gives inf.
    """
    if norm_type == math.inf:
        largest = [run.abs().amax().to(torch.float64) for run in runs if run.numel()]
        norm = torch.stack(largest).amax() if largest else torch.zeros((), dtype=torch.float64, device=device)
        norm = norm.nan_to_num(nan=math.inf, posinf=math.inf)
        collectives.all_reduce_(norm, dist.ReduceOp.MAX)
        return norm.to(torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=device)
    if filled := [run for run in runs if run.numel()]:
        total = sums_of_squares(filled).sum()
    collectives.all_reduce_(total, dist.ReduceOp.SUM)
    return total.sqrt().to(torch.float32)


def exact_norm(runs: Sequence[Tensor], *, collectives: Collectives, device: torch.device) -> Tensor:
    """As ``global_norm`` of order 2, with bits that do not depend on who holds what, nor on any order of addition.

    Squares are cut to 52 binary digits below that of the largest element of all, which every rank knows, and added up
    as integers. Up to 2**36 elements. It takes two all-reduces.

    Source: Demmel and Nguyen, "Fast reproducible floating-point summation" (2013), with integers for the bins.
    """
    filled = [run.reshape(-1) for run in runs if run.numel()]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    largest = torch.stack([zero, *(run.abs().amax().to(torch.float64) for run in filled)]).amax()
    words = torch.zeros(3, dtype=torch.int64, device=device)
    words[2] = largest.isnan()
    largest = largest.nan_to_num(nan=math.inf, posinf=math.inf)
    collectives.all_reduce_(largest, dist.ReduceOp.MAX)
    exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0)).exponent.to(torch.int64).clamp(-1021, 1021)
    scale = ((1023 - exponent) << 52).view(torch.float64)  # 2**-exponent: with it, all are below 1
    for run in filled:
        words[:2] += exact_squares(run, scale)
    collectives.all_reduce_(words, dist.ReduceOp.SUM)
    total = (words[0].to(torch.float64) + words[1].to(torch.float64) / UNIT) / UNIT
    norm = (total.sqrt() / scale).to(torch.float32)
    return torch.where(largest.isfinite(), norm, torch.where(words[2] > 0, math.nan, math.inf))


def sums_of_squares(runs: Sequence[Tensor]) -> Tensor:
    """Of tensors of any shape on one device, at least one: fp64 [num_runs], in few launches on an accelerator.

    The square of an fp32 is exact in fp64, so only the additions round.
    """
    if runs[0].device.type == "cpu":
        return torch.stack([_sum_of_squares(run.reshape(-1)) for run in runs])
    return torch.stack(torch._foreach_norm(list(runs), 2.0, dtype=torch.float64)).square()


def _sum_of_squares(run: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for chunk in torch.split(run, chunk_size(run.device)):
        wide = chunk.to(torch.float64)  # a running sum in fp32 would drift
        total += torch.dot(wide, wide)
    return total
