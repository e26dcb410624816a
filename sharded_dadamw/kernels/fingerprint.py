"""A 64-bit number of a tensor that does not depend on how the tensor is cut, or in what order it is read.

It is the sum over elements, modulo 2**64, of ``mix(bits, index)``, where ``index`` counts the elements of the flattened
whole from 0, and ``bits`` is the pattern of the element as an unsigned integer. A value narrower than fp32 counts as
the fp32 that equals it, and a bf16 parameter with a remainder as the fp32 that both make up; an fp64 counts as it is.

    x = bits * 0x9E3779B97F4A7C15 + (index + 1) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 32) * 0x94D049BB133111EB
    mix = x ^ x >> 29

All of it is modulo 2**64, with logical shifts. For each index ``mix`` is a bijection of ``bits``, so a tensor in which
one element differs has another sum for sure, and any other tensor but for one chance in about 2**64.

Source of the mixing: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), with fewer rounds.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_dadamw.kernels.choose import compiled_kernel
from sharded_dadamw.kernels.tiles import chunk_size
from sharded_dadamw.layout.indices import Rows
from sharded_dadamw.update.precision import join

OF_BITS, OF_INDEX, OF_SUM = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Span(NamedTuple):
    """Some elements of a tensor, and where they are in the whole.

    Attributes:
        values: 1-D, contiguous, of a floating dtype.
        remainder: The int16 remainder of bf16 values, 1-D, or None.
        rows: Where they are; ``rows.stop - rows.start`` is their number.
    """

    values: Tensor
    remainder: Tensor | None
    rows: Rows


def sums_of(spans: Sequence[Span]) -> Tensor:
    """Return the sum of each of these, all of one device: int64 [num_spans], the bits of the unsigned numbers."""
    if not spans:
        return torch.zeros(0, dtype=torch.int64)
    if spans[0].values.device.type == "cpu" and compiled_kernel("cpu") is not None:
        sums: Tensor = importlib.import_module("sharded_dadamw.kernels.numba_fingerprint").sums_of(spans)
        return sums
    return torch.stack([sum_by_torch(span) for span in spans])


def sum_by_torch(span: Span) -> Tensor:
    """Return the sum of one of these, by torch's operations, in blocks; 0-d int64."""
    values, rows, device = span.values, span.rows, span.values.device
    total = torch.zeros((), dtype=torch.int64, device=device)
    size = chunk_size(device)
    for start in range(0, values.numel(), size):
        part = values[start : start + size]
        part = part if span.remainder is None else join(part, span.remainder[start : start + size])
        first = rows.start + start
        element = torch.arange(first, first + part.numel(), device=device)
        if rows.length != rows.stride:
            element += element.div(rows.length, rounding_mode="floor").mul_(rows.stride - rows.length)
        total += _mix(_bits_of(part), element.add_(rows.base + 1)).sum()
    return total


def _bits_of(values: Tensor) -> Tensor:
    """The patterns, int64; a new tensor but for fp64."""
    if values.dtype is torch.float64:
        return values.view(torch.int64)
    return values.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _mix(bits: Tensor, number: Tensor) -> Tensor:
    """``mix``, in the memory of ``number``, which is the index + 1; int64, whose arithmetic is modulo 2**64."""
    mixed = number.mul_(signed(OF_INDEX)).add_(bits * signed(OF_BITS))
    mixed.bitwise_xor_(_shifted(mixed, 32)).mul_(signed(OF_SUM))
    return mixed.bitwise_xor_(_shifted(mixed, 29))


def _shifted(word: Tensor, by: int) -> Tensor:
    return (word >> by) & ((1 << (64 - by)) - 1)


def signed(word: int) -> int:
    """The same 64 bits as torch has them."""
    return word - (1 << 64) if word >> 63 else word
