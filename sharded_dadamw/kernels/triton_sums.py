"""Sums of rows that belong to fragments, in as many launches of one Triton kernel as the longest needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_dadamw.kernels.tiles import plan_tiles

_SUMMANDS = 256
"""Rows of squared norms that one program adds up."""


def levels_of_sums(first_rows: Tensor) -> list[Tensor]:
    """How to add up rows that belong to fragments, in launches whose programs add up few rows each.

    A fragment's sum does not depend on the others: it passes unchanged through levels that only they need. Per launch
    there is the first row that each program adds up, and the end, as ``first_rows`` has it of the fragments. A program
    makes a row of the next level, and the last level's rows are the fragments.
    """
    counts = first_rows.diff()
    if int(counts.max()) <= _SUMMANDS:
        return [first_rows]
    chunks = plan_tiles(tuple(counts.tolist()), _SUMMANDS)
    first_of_chunks = first_rows[chunks.fragment] + chunks.start
    return [torch.cat([first_of_chunks, first_rows[-1:]]), *levels_of_sums(chunks.offsets)]


def add_up(rows: Tensor, levels: Sequence[Tensor]) -> Tensor:
    """Return the sums of rows, [num_rows, 4] fp32, by the ``levels`` of their fragments: [num_fragments, 4] fp64."""
    for bounds in levels:
        summands, rows = rows, rows.new_empty(len(bounds) - 1, 4, dtype=torch.float64)
        _sum_kernel[(len(rows),)](summands, bounds, rows, num_summands=_SUMMANDS, num_warps=1)
    return rows


@triton.jit(do_not_specialize_on_alignment=["first_rows"])
def _sum_kernel(rows: tl.tensor, first_rows: tl.tensor, sums: tl.tensor, num_summands: tl.constexpr) -> None:
    """Add up the rows between two of ``first_rows`` in fp64."""
    program = tl.program_id(0)
    begin = tl.load(first_rows + program)
    count = tl.load(first_rows + program + 1) - begin
    summands = tl.arange(0, num_summands)[:, None]
    norms = tl.arange(0, 4)[None, :]
    values = tl.load(rows + (begin + summands) * 4 + norms, summands < count, other=0)
    tl.store(sums + program * 4 + tl.arange(0, 4), tl.sum(values.to(tl.float64), axis=0))
