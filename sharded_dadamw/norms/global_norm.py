"""Norms of what is spread over ranks: each element counted exactly once, one all-reduce, nothing read on the host.

Every rank squares what it holds. Of the ranks that hold the same part of a parameter the first one counts; the others
add zero. So the sum over ranks, and the norm, is that of the whole, in every layout.

    rank 0    weight, part 0 of 2: counts        bias: counts
    rank 1    weight, part 1 of 2: counts        bias: held by rank 0 as well
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.kernels.exact_squares import UNIT, exact_squares
from sharded_dadamw.kernels.tiles import chunk_size
from sharded_dadamw.layout.placement import shape_of


class Part(NamedTuple):
    """What one rank holds of a parameter: equal names mean one parameter, equal parts the same elements of it.

    One is reported which is trainable, or has state because it was.
    """

    param: Tensor
    name: str
    part: str
    is_reported: bool


@dataclass(frozen=True, slots=True)
class NormOwners:
    """Which rank counts what, of all parameters of a group of ranks: of equal parts the first one's.

    Attributes:
        names: Of the parameters of all ranks, each once, in the same order on every rank.
        reported: Per name whether any rank reported it when names were exchanged.
        row_of: The row in ``names`` of each parameter of this rank, by its id.
        counted: The ids of the parameters of which this rank counts its part.
        first_here: The ids of the parameters of which no rank before this one holds any part.
    """

    collectives: Collectives
    names: tuple[str, ...]
    reported: tuple[bool, ...]
    row_of: Mapping[int, int]
    counted: frozenset[int]
    first_here: frozenset[int]


def find_norm_owners(collectives: Collectives, parts: Sequence[Part]) -> NormOwners:
    """Exchange what every rank holds. Collective, and host-blocking.

    Raises:
        ValueError: Two ranks have parameters of one name and different shapes. On every rank.
    """
    held = [(part.name, part.part, part.is_reported, shape_of(part.param)) for part in parts]
    owner: dict[tuple[str, str], int] = {}
    first: dict[str, int] = {}
    reported: dict[str, bool] = {}
    shapes: dict[str, list[int]] = {}
    for rank, text in enumerate(collectives.gather_texts(json.dumps(held))):
        for name, part, is_reported, shape in json.loads(text):
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"{name}: expected one parameter of this name, got {shapes[name]} on rank {first[name]} and "
                    f"{shape} on rank {rank}; give parameters names that tell the stages of a pipeline apart"
                )
            owner.setdefault((name, part), rank)
            first.setdefault(name, rank)
            reported[name] = is_reported or reported.get(name, False)
    rows = {name: row for row, name in enumerate(first)}
    here = collectives.rank
    return NormOwners(
        collectives,
        names=tuple(first),
        reported=tuple(reported[name] for name in first),
        row_of={id(part.param): rows[part.name] for part in parts},
        counted=frozenset(id(part.param) for part in parts if owner[part.name, part.part] == here),
        first_here=frozenset(id(part.param) for part in parts if first[part.name] == here),
    )


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
