"""What a rank is about to do in a step, as the ranks compare it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.sharing import hyperparameter_claims
from sharded_dadamw.comm.agreement import Claims
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.adamw import Hyperparameters


@dataclass(frozen=True)
class StepClaims:
    """One rank's side of a step.

    Attributes:
        doing: The call, with its arguments.
        num_rounds: Reductions that will have been made by then.
        num_attached: Models that are attached.
        hypers: The scalars of every group.
        unfrozen: Parameters that have been unfrozen since the last step.
        slots: Per bucket and slot whether there is a gradient.
        one_scale: 0-d, this rank's loss scale if that has to be the other ranks' too, else None. The ranks' notes have
            scales of their own, which need no reading on the host; here it is for the message.
        are_clipped: Whether gradients were averaged to be clipped.
    """

    doing: str
    num_rounds: int
    num_attached: int
    hypers: Sequence[Hyperparameters]
    unfrozen: Sequence[NamedParameter]
    slots: Mapping[Bucket, Sequence[bool]]
    one_scale: Tensor | None
    are_clipped: bool

    def key(self) -> bytes:
        """Bytes that differ where what is spelled out differs."""
        unfrozen = [member.index for member in self.unfrozen]
        facts = (self.num_rounds, self.num_attached, self.are_clipped, self.one_scale is not None)
        summary = (self.doing, *facts, self._scalars, unfrozen)
        return b"".join(map(bytes, self.slots.values())) + repr(summary).encode()

    def spell_out(self) -> Claims:
        """All of it, in the order in which differences should be reported."""
        claims: Claims = {
            "the call": self.doing,
            "the number of reductions so far": str(self.num_rounds),
            "the number of attached models": str(self.num_attached),
            "clip_grad_norm_() before it": str(self.are_clipped),
            **self._scalars,
        }
        if self.one_scale is not None:
            how = "clipped without scaler.unscale_(optimizer)" if self.are_clipped else "averaged before the step"
            claims[f"the loss scale of gradients that were {how}"] = str(float(self.one_scale))
        for member in self.unfrozen:
            claims[f"{member.name}.requires_grad"] = "True"
        gradients = {
            member.index: (f"the gradient of {member.name}", "a tensor" if here else "None")
            for bucket, present in self.slots.items()
            for member, here in zip(bucket.members, present, strict=True)
        }
        claims.update(gradients[index] for index in sorted(gradients))
        return claims

    @cached_property
    def _scalars(self) -> Claims:
        scalars: Claims = {}
        for index, hyper in enumerate(self.hypers):
            scalars.update(hyperparameter_claims(index, hyper))
        return scalars
