"""Fragments cut into tiles, the runs of elements that a compiled kernel works on.

    fragments      |  0          |1 |  2      |
    tiles          |    |    |   |  |    |    |        runs of at most one tile size, never across two fragments

Squared norms are summed within a tile, and over the tiles of a fragment in order, so that they are the same bits in
every run, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """The tiles of a list of fragments, in order.

    Attributes:
        fragment: int32 [num_tiles], which fragment each belongs to.
        start: int64 [num_tiles], its first element, counted in the fragment.
        offsets: int64 [num_fragments + 1], the first tile of each fragment, and the end.
    """

    fragment: Tensor
    start: Tensor
    offsets: Tensor


def chunk_size(device: torch.device) -> int:
    """Elements to widen at a time by torch's operations: on a CPU so few that the copy stays in its cache."""
    return 1 << 15 if device.type == "cpu" else 1 << 22


@lru_cache(maxsize=16)
def plan_tiles(numels: Sequence[int], size: int) -> Tiles:
    """Cut fragments of these sizes (a tuple) into tiles of at most ``size`` elements; on the CPU, not to be changed.

    An empty fragment has no tiles.
    """
    counts = -(-torch.tensor(numels, dtype=torch.int64) // size)
    offsets = torch.zeros(len(numels) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    fragment = torch.repeat_interleave(torch.arange(len(numels)), counts)
    start = (torch.arange(int(offsets[-1])) - offsets[fragment]) * size
    return Tiles(fragment.to(torch.int32), start, offsets)
