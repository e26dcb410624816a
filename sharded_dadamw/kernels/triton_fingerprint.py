"""``sharded_dadamw.kernels.fingerprint`` on CUDA: one launch of one Triton kernel for each span, which is read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_dadamw.kernels.fingerprint import BLOCK, FIRST, SECOND, STEP, Span, keys, sum_by_torch
from sharded_dadamw.kernels.triton_language import join

_BLOCKS = 64
"""Blocks whose words one program adds up."""
_COLUMNS = tl.constexpr(8)
"""Neighbouring elements that threads read at once. The rest of a block is one thread's, so it makes the key once."""
_BLOCK = tl.constexpr(BLOCK)
_STEP, _FIRST, _SECOND = tl.constexpr(STEP), tl.constexpr(FIRST), tl.constexpr(SECOND)


def sums_of(spans: Sequence[Span]) -> Tensor:
    """Return the sum of each of these, int64 [num_spans], without waiting for the device."""
    device = spans[0].values.device
    sums = torch.zeros(len(spans), dtype=torch.int64, device=device)
    keys_within = keys(torch.arange(BLOCK, device=device))
    with torch.cuda.device_of(sums):
        for place, (values, remainder, rows) in enumerate(spans):
            if rows.length != rows.stride:  # some columns of a matrix
                sums[place] = sum_by_torch(spans[place])
                continue
            index, numel = rows.base + rows.start, values.numel()
            num_blocks = triton.cdiv(index % BLOCK + numel, BLOCK)
            values = values.view(torch.int16) if values.dtype is torch.bfloat16 else values
            if numel:
                _sum_kernel[(triton.cdiv(num_blocks, _BLOCKS),)](
                    values, remainder, keys_within, sums[place:], index, numel, _BLOCKS
                )
    return sums


@triton.jit(do_not_specialize=["index", "numel"], do_not_specialize_on_alignment=["values", "remainder", "sums"])
def _sum_kernel(
    values: tl.tensor,
    remainder: tl.tensor,  # or None
    keys_within: tl.tensor,
    sums: tl.tensor,
    index: tl.int64,
    numel: tl.int64,
    num_blocks: tl.constexpr,
) -> None:
    """Add to a sum what ``num_blocks`` blocks give of ``numel`` elements, the first of which has this index."""
    first_block = tl.program_id(0).to(tl.int64) * num_blocks
    start = first_block * _BLOCK - index % _BLOCK  # before the first element, if need be
    begin = tl.maximum(-start, 0).to(tl.int32)
    end = tl.minimum(numel - start, num_blocks * _BLOCK).to(tl.int32)
    blocks = tl.arange(0, num_blocks)
    columns = tl.arange(0, _BLOCK // _COLUMNS)[:, None, None] * _COLUMNS + tl.arange(0, _COLUMNS)[None, None, :]
    at = columns + blocks[None, :, None] * _BLOCK
    inside = (at >= begin) & (at < end)
    stored = tl.load(values + start + at, inside, other=0)
    if remainder is not None:
        word = _word(join(stored, tl.load(remainder + start + at, inside, other=0)))
    elif stored.dtype == tl.int16:
        word = stored.to(tl.uint16, bitcast=True).to(tl.uint64)
    elif stored.dtype == tl.float64:
        word = stored.to(tl.uint64, bitcast=True)
        word = word ^ (word >> 32)
    else:
        word = _word(stored.to(tl.float32).to(tl.int32, bitcast=True))
    of_blocks = tl.sum(word * tl.load(keys_within + columns).to(tl.uint64, bitcast=True), axis=0)
    number = (index // _BLOCK + first_block + _BLOCK + blocks).to(tl.uint64, bitcast=True)
    total = tl.sum(of_blocks * _key(number)[:, None])
    if remainder is None and stored.dtype == tl.int16:
        total *= 0x10001  # as an fp32 the lower half of a bf16 is 0, so its word has the same 16 bits twice
    tl.atomic_add(sums, total.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _word(bits: tl.tensor) -> tl.tensor:
    bits = bits.to(tl.uint32, bitcast=True)
    return (bits ^ (bits >> 16)).to(tl.uint64)


@triton.jit
def _key(number: tl.tensor) -> tl.tensor:
    mixed = (number + 1) * _STEP
    mixed = (mixed ^ (mixed >> 30)) * _FIRST
    mixed = (mixed ^ (mixed >> 27)) * _SECOND
    return mixed ^ (mixed >> 31) | 1
