"""A 64-bit number of a tensor that does not depend on how the tensor is cut, or in what order it is read.

It is the sum over elements, modulo 2**64, of ``word * key(index % 64) * key(64 + index // 64)``, where ``index`` counts
the elements of the flattened whole from 0. With ``bits``, the pattern of the element as an unsigned integer, ``word``
is ``bits ^ bits >> 16``; of fp64, ``bits ^ bits >> 32``. A value narrower than fp32 counts as the fp32 that equals it,
and a bf16 parameter with a remainder as the fp32 that both make up. Keys are random odd numbers:

    x = (number + 1) * 0x9E3779B97F4A7C15
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    key = x ^ x >> 31 | 1

All of it is modulo 2**64, with logical shifts. A tensor in which one element differs has another sum for sure, since a
word says what the bits are, and odd numbers have inverses. Any other tensor has another one but for one chance in
2**64; where each difference of words is a multiple of ``2**k``, in ``2**(64 - k)``, and k is 15 if only signs differ.
Within a block of 64 elements that is one multiplication for each, of a constant and a word of 16 or 32 bits.

Sources: multilinear hashing, Carter and Wegman, "Universal classes of hash functions" (1979); the keys are numbers of
SplitMix64 from seed 0, Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_dadamw.kernels.choose import COMPILERS, compiled_kernel
from sharded_dadamw.kernels.tiles import chunk_size
from sharded_dadamw.layout.indices import Rows
from sharded_dadamw.update.precision import join

BLOCK = 64
"""Elements that share a key, as many as shards are cut on multiples of."""
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


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
    device_type = spans[0].values.device.type
    if compiled_kernel(device_type) is not None:
        compiled = importlib.import_module(f"sharded_dadamw.kernels.{COMPILERS[device_type]}_fingerprint")
        sums: Tensor = compiled.sums_of(spans)
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
        index = torch.arange(first, first + part.numel(), device=device)
        if rows.length != rows.stride:
            index += index.div(rows.length, rounding_mode="floor").mul_(rows.stride - rows.length)
        index += rows.base
        total += _words_of(part).mul_(keys(index % BLOCK)).mul_(keys(BLOCK + index // BLOCK)).sum()
    return total


def _words_of(values: Tensor) -> Tensor:
    """A new tensor, int64."""
    if values.dtype is torch.float64:
        bits = values.view(torch.int64)
        return bits ^ _shifted(bits, 32)
    bits = values.to(torch.float32).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return bits ^ bits >> 16


def keys(numbers: Tensor) -> Tensor:
    """The keys of int64 numbers; int64, whose arithmetic is modulo 2**64."""
    mixed = (numbers + 1).mul_(signed(STEP))
    mixed.bitwise_xor_(_shifted(mixed, 30)).mul_(signed(FIRST))
    mixed.bitwise_xor_(_shifted(mixed, 27)).mul_(signed(SECOND))
    return mixed.bitwise_xor_(_shifted(mixed, 31)).bitwise_or_(1)


def _shifted(word: Tensor, by: int) -> Tensor:
    return (word >> by) & ((1 << (64 - by)) - 1)


def signed(word: int) -> int:
    """The same 64 bits as torch has them."""
    return word - (1 << 64) if word >> 63 else word
