"""Which parameters go together into one bucket, and where each lies there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import ShardingConfig
from sharded_dadamw.layout.bucket_layout import BucketLayout, plan_buckets
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Storage


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What goes into one bucket: parameters in slot order, and whether it is us who averages their gradients."""

    members: tuple[NamedParameter, ...]
    storage: Storage
    layout: BucketLayout
    reduces: bool

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The places of the parameters in a flat buffer, each in the shape of this rank's part."""
        return [
            buffer[offset : offset + member.placement.local_numel].view(member.placement.local_shape)
            for member, offset in zip(self.members, self.layout.offsets, strict=True)
        ]


def arrange(
    members: Sequence[NamedParameter], collectives: Collectives, config: ShardingConfig
) -> Iterator[Arrangement]:
    """Lay the parameters that a group of ranks shares into buckets, in the order of their groups; allocates nothing.

    Raises:
        ValueError: A setting is not for a parameter's dtype.
    """
    for _, of_group in groupby(members, key=lambda member: member.group_index):
        kinds: dict[tuple[Storage, torch.dtype, bool, bool], list[NamedParameter]] = {}
        for member in of_group:
            reduces = config.reduce_gradients and not member.placement.is_replicated_over(collectives.are_all_of)
            storage = Storage.of(member.local, config)
            kind = storage, member.gradient_dtype, member.placement.is_borrowed, reduces
            kinds.setdefault(kind, []).append(member)
        for (storage, _, _, reduces), alike in kinds.items():
            numels = [member.placement.local_numel for member in alike]
            cap = int(config.bucket_cap_mb * 2**20) // storage.param.itemsize
            for slots in plan_buckets(numels, cap=cap):
                layout = BucketLayout(tuple(numels[slot] for slot in slots), collectives.num_ranks)
                yield Arrangement(tuple(alike[slot] for slot in slots), storage, layout, reduces)
