"""A range of a flattened tensor as boxes of the tensor itself: integers only.

What one rank holds of a tensor is a range of its elements in row-major order. Checkpoints know boxes, each with its
first index and its sizes. A range is a ragged row, whole rows, and a ragged row, at every depth:

    . . . . .
    . . # # #      [1:2, 2:5]
    # # # # #      [2:4, 0:5]      elements 7 to 21 of a 5 x 5 tensor: three boxes, each a view of the range
    # # # # #
    # # . . .      [4:5, 0:2]

That takes at most ``2 * ndim - 1`` boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor, a product of ranges of indices, that lies end to end in memory.

    Attributes:
        offsets: Index of the first element.
        start: Place of the first element within the range of which this is a part.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def boxes_of(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of a flattened tensor into boxes, in order, none of them empty."""
    cuts = list(_cut(tuple(shape), start, stop))
    places = accumulate((math.prod(sizes) for _, sizes in cuts), initial=0)
    return [Box(*cut, place) for cut, place in zip(cuts, places, strict=False)]


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = start // row, stop // row
    if first == last or start % row:  # the rest of a row, or a part of one
        end = min(stop, (first + 1) * row)
        for offsets, sizes in _cut(shape[1:], start - first * row, end - first * row):
            yield (first, *offsets), (1, *sizes)
        yield from _cut(shape, end, stop)
    else:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
        yield from _cut(shape, last * row, stop)
