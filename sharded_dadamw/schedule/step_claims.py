"""What a rank is about to do in a step, as the ranks compare it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.sharing import hyperparameter_claims
from sharded_dadamw.comm.agreement import FACTOR, LOSS_SCALE, Claims
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.adamw import Hyperparameters


@dataclass(frozen=True)
class StepClaims:
    """One rank's side of a step.

    Attributes:
        doing: The call, with its arguments.
        num_attached: Models that are attached.
        hypers: The scalars of every group.
        unfrozen: Parameters that have been unfrozen since the last step.
        slots: Per bucket and slot whether there is a gradient.
        local: The buckets whose gradients are still to be averaged.
        changes: Of the buckets into whose averages somebody wrote, by what factors elements were multiplied.
        grad_scale: 0-d, this rank's loss scale, or None. Ranks' notes have scales and factors of their own, which need
            no reading on the host; here they are for the message.
        are_clipped: Whether gradients were averaged to be clipped.
    """

    doing: str
    num_attached: int
    hypers: Sequence[Hyperparameters]
    unfrozen: Sequence[NamedParameter]
    slots: Mapping[Bucket, Sequence[bool]]
    local: Sequence[Bucket]
    changes: Mapping[Bucket, Tensor]
    grad_scale: Tensor | None
    are_clipped: bool

    def key(self) -> bytes:
        """Bytes that differ where what is spelled out differs."""
        unfrozen = [member.index for member in self.unfrozen]
        summary = (self.doing, self.num_attached, self.are_clipped, self._scalars, unfrozen)
        local = set(self.local)
        flags = bytes(2 * (bucket in local) + (bucket in self.changes) for bucket in self.slots)
        return b"".join(map(bytes, self.slots.values())) + flags + repr(summary).encode()

    @property
    def tolerance(self) -> float:
        """By how much factors may differ, for each element was rounded."""
        return 2.0 * max((torch.finfo(bucket.gradients.shard.dtype).eps for bucket in self.changes), default=0.0)

    def spell_out(self) -> Claims:
        """All of it, in the order in which differences should be reported."""
        claims: Claims = {
            "the call": self.doing,
            "the number of attached models": str(self.num_attached),
            "clip_grad_norm_() before it": str(self.are_clipped),
            **self._scalars,
        }
        for member in self.unfrozen:
            claims[f"{member.name}.requires_grad"] = "True"
        gradients = {
            member.index: (f"the gradient of {member.name}", "a tensor" if here else "None")
            for bucket, present in self.slots.items()
            for member, here in zip(bucket.members, present, strict=True)
        }
        claims.update(gradients[index] for index in sorted(gradients))
        local = set(self.local)
        for bucket in self.slots:
            claims[f"the average of the bucket of {bucket.members[0].name}"] = "to come" if bucket in local else "made"
        if self.grad_scale is not None:
            claims[LOSS_SCALE] = str(float(self.grad_scale))
        claims[FACTOR] = ", ".join(
            _range(self.changes[bucket].tolist()) if bucket in self.changes else "untouched" for bucket in self.slots
        )
        return claims

    @cached_property
    def _scalars(self) -> Claims:
        scalars: Claims = {}
        for index, hyper in enumerate(self.hypers):
            scalars.update(hyperparameter_claims(index, hyper))
        return scalars


def _range(factors: Sequence[float]) -> str:
    """The smallest and the largest of those that are known."""
    known = [factor for factor in factors if not math.isnan(factor)]
    ends = dict.fromkeys(f"{end:.6g}" for end in (min(known), max(known))) if known else {"unknown": None}
    return " to ".join(ends)
