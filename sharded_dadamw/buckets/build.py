"""How parameters become buckets: which go together, and where each lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.choose import gradients_of, weights_of
from sharded_dadamw.buckets.offload import OffloadedBucket
from sharded_dadamw.buckets.sharded_gradients import SpareBuffers
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import ShardingConfig, StateResidency
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


class Bucketing:
    """Lays the parameters that a group of ranks shares into buckets."""

    def __init__(self, collectives: Collectives, config: ShardingConfig) -> None:
        self._collectives = collectives
        self._config = config
        self._spares = SpareBuffers(collectives.new_buffer)

    def fill(self, members: Sequence[NamedParameter], groups: Sequence[Mapping[str, Any]]) -> Iterator[Bucket]:
        """Make buckets of trainable parameters, in the order of their groups, with rank 0's values. Collective."""
        for arrangement in self.arrange(members):
            bucket = self._bucket(arrangement, bool(groups[arrangement.members[0].group_index]["amsgrad"]))
            whole = bucket.weights.whole()
            self._collectives.broadcast_(whole)
            bucket.weights.accept_(whole)
            bucket.reset_main_()
            yield bucket

    def arrange(self, members: Sequence[NamedParameter]) -> Iterator[Arrangement]:
        """Say which of these parameters go together, and where they lie; allocates nothing.

        Raises:
            ValueError: A setting is not for a parameter's dtype.
        """
        for _, of_group in groupby(members, key=lambda member: member.group_index):
            for storage, reduces, alike in self._sorted_by_kind(list(of_group)):
                numels = [member.placement.local_numel for member in alike]
                cap = int(self._config.bucket_cap_mb * 2**20) // storage.param.itemsize
                for slots in plan_buckets(numels, cap=cap):
                    layout = BucketLayout(tuple(numels[slot] for slot in slots), self._collectives.num_ranks)
                    yield Arrangement(tuple(alike[slot] for slot in slots), storage, layout, reduces)

    def _sorted_by_kind(
        self, members: Sequence[NamedParameter]
    ) -> Iterator[tuple[Storage, bool, list[NamedParameter]]]:
        """Those that can share buckets, with their storage, and whether it is us who reduces their gradients."""
        kinds: dict[tuple[Storage, torch.dtype, bool, bool], list[NamedParameter]] = {}
        for member in members:
            by_fsdp = member.placement.is_replicated_over(self._collectives.are_all_of)
            reduces = self._config.reduce_gradients and not by_fsdp
            storage = Storage.of(member.local, self._config)
            kind = storage, member.gradient_dtype, member.placement.is_borrowed, reduces
            kinds.setdefault(kind, []).append(member)
        for (storage, _, _, reduces), alike in kinds.items():
            yield storage, reduces, alike

    def _bucket(self, arrangement: Arrangement, amsgrad: bool) -> Bucket:
        members, layout = arrangement.members, arrangement.layout
        kind = OffloadedBucket if self._config.state_residency is StateResidency.HOST else Bucket
        return kind(
            layout,
            members,
            arrangement.storage,
            rank=self._collectives.rank,
            weights=weights_of(members, layout, self._collectives),
            gradients=gradients_of(
                members, layout, self._collectives, self._config, self._spares, reduces=arrangement.reduces
            ),
            amsgrad=amsgrad,
        )
