"""What this rank holds of the parameters in its buckets, as norms and reports want to see it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import and_

import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.shards import Shards
from sharded_dadamw.norms.global_norm import NormOwners, Part, exact_norm, global_norm
from sharded_dadamw.norms.step_report import Snapshot, StepReport, gone
from sharded_dadamw.update.adamw import value_of


class HeldInBuckets:
    """The trainable parameters of an optimizer, of which each rank of ``axis`` holds a shard of every bucket."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.axis = shards.collectives
        self.device = shards.device

    def params(self) -> list[Tensor]:
        """Return all of them, in any order; cheap."""
        return [member.param for bucket in self.shards.buckets for member in bucket.members]

    def parts(self, rank: int) -> list[Part]:
        """Return this rank's parts, in the order of groups; some are empty."""
        parts = []
        for bucket in self.shards.buckets:
            for slot, member in enumerate(bucket.members):
                held = bucket.layout.fragment(slot, bucket.rank).in_param
                part = f"{member.placement.part}[{held.start}:{held.stop}]"
                parts.append((member.index, Part(member.param, member.name, part, True)))
        return [part for _, part in sorted(parts, key=lambda pair: pair[0])]

    def is_reported(self, param: Tensor) -> bool:
        """Return True: what has a bucket has state."""
        return True

    def spread_over(self) -> list[dist.ProcessGroup]:
        """Return the groups of ranks that hold other parts of DTensors."""
        members = [member for bucket in self.shards.buckets for member in bucket.members]
        return [group for member in members for group in member.placement.others]

    def look(self, param: Tensor) -> Snapshot:
        """Return this rank's fragment of a parameter as it is now."""
        bucket, slot = self.shards.slots[id(param)]
        now = bucket.operands_of(slot)
        grad = now.grad if bucket.gradients.still_holds_last_step else None
        return Snapshot(value_of(now.param, now.main), now.exp_avg, now.exp_avg_sq, now.max_exp_avg_sq, now.count, grad)

    def make_measurable(self, report: StepReport) -> None:
        """Read weights that others own, and raise, on all ranks, if gradients are gone that have to be measured."""
        updated = {id(param) for param in report.updated}
        for bucket in self.shards.buckets:
            bucket.weights.refresh_()
            are_needed = not bucket.fuses_norms and any(id(member.param) in updated for member in bucket.members)
            if are_needed and not bucket.gradients.still_holds_last_step:
                raise gone()

    def gradient_norm(
        self, present: Mapping[Bucket, Sequence[bool]], norm_type: float, owners: NormOwners | None = None
    ) -> Tensor:
        """The norm of averaged gradients, as ``global_norm`` gives it. Collective.

        ``owners`` say who counts what; None where it does no harm that several ranks count the same.
        """
        runs: list[Tensor] = []
        for bucket, slots in present.items():
            counted = [owners is None or id(member.param) in owners.counted for member in bucket.members]
            runs += [bucket.gradients.shard[run] for run in bucket.runs((*map(and_, slots, counted),))]
        ranks = self.shards.holders if owners is None else owners.collectives
        if self.shards.adds_in_tree and norm_type != math.inf:
            return exact_norm(runs, collectives=ranks, device=self.device)
        return global_norm(runs, norm_type, collectives=ranks, device=self.device)
