"""What this rank holds of a parameter's state, and of which whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket


@dataclass(frozen=True, slots=True)
class Piece:
    """One live tensor of a parameter's state: a range of the flattened local part of a whole.

    The local part is what the ranks of the shard group share: the whole, or this rank's part of a DTensor.

    Attributes:
        live: This rank's elements, 1-D, or ``step``.
        start: Number of the first element within the local part.
        writes: Whether it falls to this rank to save it; False where another one has the same elements.
    """

    name: str
    live: Tensor
    shape: tuple[int, ...]
    part_shape: tuple[int, ...]
    start: int
    writes: bool


def pieces_of(bucket: Bucket, slot: int) -> dict[str, Piece]:
    """The state of the parameter in a slot."""
    member, fragment = bucket.members[slot], bucket.layout.fragment(slot, bucket.rank)
    shape, part_shape, start = tuple(member.param.shape), member.placement.local_shape, fragment.param_start
    is_first = start == 0 and fragment.numel > 0 if bucket.layout.numels[slot] else bucket.rank == 0
    return {
        key: Piece(f"{member.name}, {key}", live, (), (), 0, writes=is_first)
        if key == "step"  # which every rank has
        else Piece(f"{member.name}, {key}", live, shape, part_shape, start, writes=True)
        for key, live in bucket.state_of(slot).items()
    }
