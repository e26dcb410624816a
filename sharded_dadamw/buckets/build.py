"""Allocates buckets: which class serves the weights and the gradients of one, by whose memory they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sharded_dadamw.buckets.arrangement import Arrangement, arrange
from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.foreign_gradients import CopiedGradients, ForeignGradients
from sharded_dadamw.buckets.full_gradients import FullGradients
from sharded_dadamw.buckets.offload import OffloadedBucket
from sharded_dadamw.buckets.sharded_gradients import ShardedGradients, SpareBuffers
from sharded_dadamw.buckets.weights import BorrowedWeights, OwnWeights, Weights
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import GradientResidency, ShardingConfig, StateResidency
from sharded_dadamw.layout.parameters import NamedParameter


class Builder:
    """Builds buckets for a group of ranks; plain parameters move into a flat buffer."""

    def __init__(self, collectives: Collectives, config: ShardingConfig) -> None:
        self._collectives = collectives
        self._config = config
        self._spares = SpareBuffers(collectives.new_buffer)

    def build(self, members: Sequence[NamedParameter], groups: Sequence[Mapping[str, Any]]) -> Iterator[Bucket]:
        """Make buckets of trainable parameters, in the order of their groups, with rank 0's values. Collective."""
        for arrangement in arrange(members, self._collectives, self._config):
            bucket = self._bucket(arrangement, bool(groups[arrangement.members[0].group_index]["amsgrad"]))
            whole = bucket.weights.whole()
            self._collectives.broadcast_(whole)
            bucket.weights.accept_(whole)
            bucket.reset_main_()
            yield bucket

    def _bucket(self, arrangement: Arrangement, amsgrad: bool) -> Bucket:
        rank, new_buffer = self._collectives.rank, self._collectives.new_buffer
        wire_dtype, passes = self._config.wire_dtype, None
        if self._config.micro_batches is not None:
            passes = self._config.micro_batches // self._collectives.everyone.num_ranks
        weights: Weights
        if is_borrowed := arrangement.members[0].placement.is_borrowed:
            weights = BorrowedWeights(arrangement, rank)
        else:
            weights = OwnWeights(arrangement, rank, new_buffer)
        gradients: ForeignGradients | FullGradients | ShardedGradients
        if not arrangement.reduces:
            gradients = ForeignGradients(arrangement, rank)
        elif is_borrowed:
            gradients = CopiedGradients(arrangement, rank)
        elif self._config.gradient_residency is GradientResidency.SHARDED:
            gradients = ShardedGradients(arrangement, wire_dtype, passes, spares=self._spares)
        else:
            gradients = FullGradients(arrangement, wire_dtype, passes, rank=rank, allocate=new_buffer)
        kind = OffloadedBucket if self._config.state_residency is StateResidency.HOST else Bucket
        return kind(arrangement, rank, weights=weights, gradients=gradients, amsgrad=amsgrad)
