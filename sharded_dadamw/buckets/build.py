"""How parameters become buckets: which go together, and where each lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.kinds import gradients_of, weights_of
from sharded_dadamw.buckets.offload import OffloadedBucket
from sharded_dadamw.buckets.sharded_gradients import SpareBuffers
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import ShardingConfig, StateResidency
from sharded_dadamw.layout.bucket_layout import BucketLayout, plan_buckets
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Storage


class Bucketing:
    """Lays the parameters that a group of ranks shares into buckets."""

    def __init__(self, collectives: Collectives, config: ShardingConfig) -> None:
        """For the ranks of a group, in the way that a user has chosen."""
        self._collectives = collectives
        self._config = config
        self._spares = SpareBuffers(collectives.new_buffer)

    def fill(self, members: Sequence[NamedParameter], groups: Sequence[Mapping[str, Any]]) -> Iterator[Bucket]:
        """New buckets with these parameters, which get rank 0's values. Collective.

        Args:
            members: Trainable parameters in the order of their groups. Plain ones become views of flat buffers.
            groups: All parameter groups.
        """
        for group_index, of_group in groupby(members, key=lambda member: member.group_index):
            amsgrad = bool(groups[group_index]["amsgrad"])
            for storage, reduces, alike in self._sorted_by_kind(list(of_group)):
                numels = [member.placement.local_numel for member in alike]
                cap = int(self._config.bucket_cap_mb * 2**20) // storage.param.itemsize
                for slots in plan_buckets(numels, cap=cap):
                    bucket = self._bucket([alike[i] for i in slots], storage, reduces, amsgrad)
                    whole = bucket.weights.whole()
                    self._collectives.broadcast_(whole)
                    bucket.weights.accept_(whole)
                    bucket.reset_main_()
                    yield bucket

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

    def _bucket(self, members: Sequence[NamedParameter], storage: Storage, reduces: bool, amsgrad: bool) -> Bucket:
        numels = tuple(member.placement.local_numel for member in members)
        layout = BucketLayout(numels, self._collectives.num_ranks)
        kind = OffloadedBucket if self._config.state_residency is StateResidency.HOST else Bucket
        return kind(
            layout,
            members,
            storage,
            rank=self._collectives.rank,
            group_index=members[0].group_index,
            weights=weights_of(members, layout, self._collectives),
            gradients=gradients_of(members, layout, self._collectives, self._config, self._spares, reduces=reduces),
            amsgrad=amsgrad,
        )
