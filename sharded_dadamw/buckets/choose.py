"""Which class serves the weights of a bucket, and which its gradients: by whose memory they are and what was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from sharded_dadamw.buckets.foreign_gradients import CopiedGradients, ForeignGradients
from sharded_dadamw.buckets.full_gradients import FullGradients
from sharded_dadamw.buckets.gradients import Gradients
from sharded_dadamw.buckets.sharded_gradients import ShardedGradients, SpareBuffers
from sharded_dadamw.buckets.weights import BorrowedWeights, OwnWeights, Weights
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import GradientResidency, ShardingConfig
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter


def weights_of(members: Sequence[NamedParameter], layout: BucketLayout, collectives: Collectives) -> Weights:
    """Take the weights of a bucket; plain parameters move into a flat buffer."""
    if members[0].placement.is_borrowed:
        return BorrowedWeights(members, layout, collectives.rank)
    return OwnWeights(members, layout, collectives.rank, collectives.new_buffer)


def gradients_of(
    members: Sequence[NamedParameter],
    layout: BucketLayout,
    collectives: Collectives,
    config: ShardingConfig,
    spares: SpareBuffers,
    *,
    reduces: bool,
) -> Gradients:
    """Make what holds the gradients of a bucket; ``reduces`` says whether it is us who averages them."""
    rank = collectives.rank
    passes = None
    if config.micro_batches is not None:
        passes = config.micro_batches // collectives.everyone.num_ranks
    if not reduces:
        return ForeignGradients(members, layout, rank)
    if members[0].placement.is_borrowed:
        return CopiedGradients(members, layout, rank)
    if config.gradient_residency is GradientResidency.SHARDED:
        return ShardedGradients(members, layout, config.wire_dtype, passes, spares=spares)
    return FullGradients(members, layout, config.wire_dtype, passes, rank=rank, allocate=collectives.new_buffer)
