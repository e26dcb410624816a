"""Where every element of every parameter lives, on every rank: integers only, frozen.

A bucket lays parameters end to end and cuts the result into one equal shard per rank:

    slots   |  weight 0        |  weight 1    |b0|b1|pad|
    shards  |  rank 0    |  rank 1    |  rank 2         |      (cut on multiples of ALIGNMENT elements)

Parameters whose size is a multiple of ALIGNMENT come first, so that each of them starts on one; the ragged rest is
packed behind them without gaps. The only padding is at the end, less than one alignment unit per rank, whatever the
sizes. The order of the slots does not depend on the number of ranks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

ALIGNMENT = 64
"""Elements. Vectorised kernels give the same bits at any cut on a multiple of 8; copies and GPU blocks want more."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """The part of one parameter inside one shard.

    Attributes:
        slot: Which parameter of the bucket.
        param_start: First element, counted in the flattened parameter.
        shard_start: First element, counted in the shard.
    """

    slot: int
    param_start: int
    shard_start: int
    numel: int

    @property
    def in_param(self) -> slice:
        """Where it is in the flattened parameter."""
        return slice(self.param_start, self.param_start + self.numel)

    @property
    def in_shard(self) -> slice:
        """Where it is in the shard."""
        return slice(self.shard_start, self.shard_start + self.numel)


@dataclass(frozen=True)
class BucketLayout:
    """One bucket: the place of each parameter, by their sizes in slot order, and the cut into equal shards.

    Attributes:
        offsets: First element of each slot in the flat buffer.
        used: Elements that belong to parameters; the rest of the bucket is padding.
        shard_numel: Elements of each shard.
    """

    numels: tuple[int, ...]
    num_ranks: int
    offsets: tuple[int, ...] = field(init=False)
    used: int = field(init=False)
    shard_numel: int = field(init=False)

    def __post_init__(self) -> None:
        """Derive the offsets, how many elements belong to parameters, and the shard size."""
        assert self.num_ranks >= 1 and self.numels, "a bucket holds at least one parameter on at least one rank"
        assert min(self.numels) >= 0
        *offsets, used = accumulate(self.numels, initial=0)
        object.__setattr__(self, "offsets", tuple(offsets))
        object.__setattr__(self, "used", used)
        object.__setattr__(self, "shard_numel", -(-used // (self.num_ranks * ALIGNMENT)) * ALIGNMENT)

    @property
    def numel(self) -> int:
        """Elements of the flat buffer, padding included: ``num_ranks * shard_numel``."""
        return self.num_ranks * self.shard_numel

    def shard_range(self, rank: int) -> tuple[int, int]:
        """First element of a rank's shard in the flat buffer, and the one behind its last."""
        return rank * self.shard_numel, (rank + 1) * self.shard_numel

    def fragment(self, slot: int, rank: int) -> Fragment:
        """The part of a slot's parameter that a rank owns; ``numel`` is 0 where it owns none."""
        shard_start, shard_stop = self.shard_range(rank)
        offset, numel = self.offsets[slot], self.numels[slot]
        start = min(max(shard_start, offset), offset + numel)
        stop = max(start, min(shard_stop, offset + numel))
        inside = start < stop
        return Fragment(slot, start - offset, start - shard_start if inside else 0, stop - start)

    def fragments(self, rank: int) -> Iterator[Fragment]:
        """The fragments that a rank owns, in the order in which they lie in its shard; none of them is empty."""
        shard_start, shard_stop = self.shard_range(rank)
        first = max(0, bisect_right(self.offsets, shard_start) - 1)
        inside = (self.fragment(slot, rank) for slot in range(first, bisect_left(self.offsets, shard_stop)))
        return (fragment for fragment in inside if fragment.numel)


def plan_buckets(numels: Sequence[int], *, cap: int) -> list[tuple[int, ...]]:
    """Group parameters of these sizes, in registration order, into buckets of ``cap`` elements or one larger parameter.

    Returns:
        Per bucket the parameters' indices in slot order. Buckets are filled from the last parameter to the first,
        about the order in which backward produces gradients. Each index appears exactly once.
    """
    buckets: list[list[int]] = []
    filled = cap
    for index in reversed(range(len(numels))):
        if not buckets or filled + numels[index] > cap:
            buckets.append([])
            filled = 0
        buckets[-1].append(index)
        filled += numels[index]
    return [tuple(sorted(bucket, key=lambda index: numels[index] % ALIGNMENT != 0)) for bucket in buckets]
