"""Where the elements of a part of a tensor are in the flattened whole: integers only.

A part is a box, the product of a range of indices along each dimension. Flattened it is rows that lie end to end, and
in the whole each row begins so many elements after the one before it:

    . . . . . .
    . # # # . .      part [1:4, 1:4] of 4 x 6: rows of 3, the first begins at element 7, the others 6 further on each
    . # # # . .
    . # # # . .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rows(NamedTuple):
    """Elements ``[start, stop)`` of rows laid end to end.

    Element ``j`` is element ``base + j // length * stride + j % length`` of the flattened whole.

    Attributes:
        base: Index in the whole of element 0 of the rows.
        length: Elements of a row.
        stride: Elements of the whole from the beginning of one row to that of the next.
        place: Where element ``start`` is in the range that was asked for.
    """

    base: int
    length: int
    stride: int
    start: int
    stop: int
    place: int


def rows_of(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], start: int, stop: int) -> list[Rows]:
    """Say where elements [start, stop) of the flattened part at ``offsets``, with ``sizes``, are in the whole."""
    if start >= stop:
        return []
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    levels: list[tuple[int, int]] = [(1, 1)]  # size and stride, the outermost first; neighbours joined where they can
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        inner, inner_stride = levels[0]
        if stride == inner * inner_stride or size == 1:
            levels[0] = (inner * size, inner_stride)
        else:
            levels.insert(0, (size, stride))
    return list(_cut(levels, base, start, stop))


def _cut(levels: Sequence[tuple[int, int]], base: int, start: int, stop: int) -> list[Rows]:
    length = levels[-1][0]
    if len(levels) <= 2:
        return [Rows(base, length, levels[0][1] if len(levels) == 2 else length, start, stop, 0)]
    block, stride = math.prod(size for size, _ in levels[1:]), levels[0][1]
    found = []
    for number in range(start // block, -(-stop // block)):
        first, last = max(start, number * block), min(stop, (number + 1) * block)
        within = _cut(levels[1:], base + number * stride, first - number * block, last - number * block)
        found += [rows._replace(place=rows.place + first - start) for rows in within]
    return found
