"""What ranks compare before a step, or a clip, and what it will do once they have agreed.

To agree changes no value of a parameter, and no state. Whatever a rank has to object is told to the others instead of
raised at once, since they are waiting for it: see ``sharded_dadamw.schedule.handshake``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.buckets.admission import describe_hyperparameters, require_row_major
from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.gradients import HookedGradients, warn_of_forgotten_clip
from sharded_dadamw.buckets.shards import Shards
from sharded_dadamw.comm.agreement import Description, Refusal
from sharded_dadamw.layout.parameters import NamedParameter, check_parameters
from sharded_dadamw.norms.clipping import PendingClip, check_clip
from sharded_dadamw.schedule.handshake import FACTOR, LOSS_SCALE, ORDER, Handshake
from sharded_dadamw.schedule.reducer import Reducer
from sharded_dadamw.update.hyperparameters import Hyperparameters, read_groups


@dataclass(frozen=True, slots=True)
class Asked:
    """What a rank is asked to do.

    Attributes:
        num_attached: Models that are attached.
        objection: Why this rank cannot take part, if that is so.
        clip: The clip that waits for this step; forgotten where its gradients have been dropped since.
        adds_metrics: Whether the step adds up norms over ranks.
        to_clip: ``max_norm`` and ``norm_type``, where gradients are about to be clipped only.
        found_inf: 0-d, this rank's non-finite flag, or None without a loss scaler.
        grad_scale: 0-d, this rank's loss scale, or None where gradients are not scaled.
    """

    num_attached: int
    objection: str | None
    clip: PendingClip
    adds_metrics: bool
    to_clip: tuple[float, float] | None = None
    max_grad_norm: float | None = None
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @property
    def call(self) -> str:
        """The call, with its arguments and with what a loss scaler makes of it."""
        if self.to_clip is not None:
            return "clip_grad_norm_(max_norm={}, norm_type={})".format(*self.to_clip)
        also = "" if self.max_grad_norm is None else f" with max_grad_norm={self.max_grad_norm}"
        checks, scales = self.found_inf is not None, self.grad_scale is not None
        also += " with metrics_in_step" * self.adds_metrics
        return "step()" + also + " with a non-finite check" * checks + " with a scale" * scales


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the ranks agreed on.

    Attributes:
        present: Per bucket and slot whether its parameter has a gradient.
        void: 0-d fp32, 1 where the step is void on all ranks; None where nothing can make it so.
        unfrozen: Parameters that have been unfrozen since the last step. They are to be sharded, and ranks to agree
            anew: they have not compared yet whose gradients came along.
    """

    present: dict[Bucket, tuple[bool, ...]]
    hypers: list[Hyperparameters]
    void: Tensor | None
    unfrozen: list[NamedParameter]


class StepAgreement:
    """Has all ranks confirm that they are about to do the same."""

    def __init__(self, shards: Shards, reducer: Reducer) -> None:
        self._shards = shards
        self._reducer = reducer
        self._own: Sequence[Tensor] = ()  # those of param_groups, as last found to be ours
        self._sizes: Sequence[int] = ()  # how many of them are in each group
        self._handshake = Handshake(shards.holders, shards.device, after_refusal=reducer.after_refusal)

    def reach(self, asked: Asked, groups: Sequence[Mapping[str, Any]]) -> Agreed:
        """Agree on a call, given all parameter groups. Collective; raises before anything is changed.

        Raises:
            Exception: This rank's refusal, on ranks that have one.
            RuntimeError: Another rank refuses, or ranks differ; names the first difference.
        """
        buckets, frozen, reducer = self._shards.buckets, self._shards.frozen, self._reducer
        present: dict[Bucket, tuple[bool, ...]] = {}
        hypers: list[Hyperparameters] = []
        unfrozen = [member for member in frozen if member.param.requires_grad]
        refusal = Refusal()
        with refusal:
            if asked.objection is not None:
                raise RuntimeError(asked.objection)
            if asked.to_clip is not None:
                check_clip(*asked.to_clip)
            _refuse_scaler(asked, reducer)
            if reducer.is_accumulating:
                raise RuntimeError(f"{asked.call} was called inside no_sync(); leave the context first")
            self.require_own_parameters(groups)
            moved: list[tuple[NamedParameter, str]] = []
            for bucket in buckets:  # all there is to do for one of them at once, while its parameters are cached
                if misplaced := bucket.weights.misplaced():
                    moved += [(member, why) for member, why in misplaced if why]
                    if not moved:
                        if not isinstance(bucket.gradients, HookedGradients):
                            for member, _ in misplaced:
                                require_row_major(member)
                        bucket.weights.take_back_()
                        reducer.hook(bucket)
                if moved:  # which explains whatever else is wrong
                    continue
                bucket.gradients.collect(to_clip=asked.to_clip is not None)
                present[bucket] = bucket.gradients.present
            _refuse_moved(moved)
            hypers = read_groups(groups)
            _require_fitting_state(buckets, hypers)
            if unfrozen:
                check_parameters(unfrozen)
            _keep_or_forget_clip(asked, [bucket for bucket, slots in present.items() if any(slots)])
        reducer.catch_up(begin=True)
        # A clip is not told of a loss scaler. What it shards now is remembered as it is now, so the others have to be.
        is_unscaled = bool(unfrozen) or (asked.found_inf is not None and asked.grad_scale is None)
        changes = reducer.changes(is_unscaled=is_unscaled)
        side = _Side(asked, hypers, unfrozen, present, reducer.still_local(), changes, reducer.launches.order)
        void = self._handshake.check(
            side.describe,
            side.key(),
            found_inf=asked.found_inf,
            grad_scale=asked.grad_scale,
            factors=list(changes.values()),
            tolerance=side.tolerance,
            sums=None if reducer.knows_source else self._sum_of_gradients(),
            updates=asked.to_clip is None,
            refusal=refusal.error,
        )
        reducer.launches.agree()
        if not reducer.knows_source:
            self._learn_source()
        return Agreed(present, hypers, void, unfrozen)

    def require_own_parameters(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise a RuntimeError where groups hold other parameters than were added to them, or in another order."""
        given = [*chain.from_iterable(group["params"] for group in groups)]
        sizes = [len(group["params"]) for group in groups]
        if sizes == self._sizes and all(map(is_, given, self._own)):
            return
        ours = [*chain.from_iterable(bucket.members for bucket in self._shards.buckets), *self._shards.frozen]
        if set(map(id, given)) != {id(member.param) for member in ours}:
            raise RuntimeError(
                "param_groups do not hold the parameters that this optimizer was built with; something replaced them, "
                "as fully_shard does. Build the optimizer when the model is as it will be trained, and add parameters "
                "by add_param_group"
            )
        places = [(index, id(param)) for index, group in enumerate(groups) for param in group["params"]]
        ours.sort(key=attrgetter("index"))
        if places != [(member.group_index, id(member.param)) for member in ours]:
            raise RuntimeError(
                "param_groups hold parameters in other groups, or in another order, than they were added in; their "
                "hyperparameters and saved state go by that. Change hyperparameters in the groups that there are, or "
                "build a new optimizer"
            )
        self._own, self._sizes = given, sizes

    @property
    def _are_comparable(self) -> bool:
        """Whether ranks that see equal gradients must have averaged them, and hold whole ones to be compared."""
        return not (self._reducer.keeps_shards or any(bucket.is_borrowed for bucket in self._shards.buckets))

    def _sum_of_gradients(self) -> Tensor | None:
        sums = [bucket.gradients.sum_of_bits() for bucket in self._shards.buckets] if self._are_comparable else []
        return torch.stack(sums).sum() if sums else None

    def _learn_source(self) -> None:
        """Find out by the first gradients whether somebody else averages them, who should. Equal on all ranks."""
        differ, self._handshake.sums_differ = self._handshake.sums_differ, None
        if differ and not all(isinstance(bucket.gradients, HookedGradients) for bucket in self._shards.buckets):
            raise RuntimeError(
                "gradients differ between ranks, and ShardingConfig(reduce_gradients=False) says that something else "
                "has averaged them; wrap the model in DistributedDataParallel and call the wrapper, or leave out "
                "reduce_gradients=False"
            )
        if differ is not None or not self._are_comparable:
            self._reducer.learn_source(are_equal=differ is False)


def _refuse_scaler(asked: Asked, reducer: Reducer) -> None:
    if asked.found_inf is not None and reducer.keeps_shards:
        raise RuntimeError(
            "a GradScaler looks for non-finite values in p.grad, which is None with GradientResidency.SHARDED; use "
            "bf16 without a scaler, and ShardingConfig(skip_nonfinite=True), or GradientResidency.FULL"
        )


def _refuse_moved(moved: Sequence[tuple[NamedParameter, str]]) -> None:
    if moved:
        first, why = min(moved, key=lambda each: each[0].index)
        raise RuntimeError(
            f"{first.name} is no longer as the optimizer was built with it: {why}. Build the optimizer after the model "
            "is on its device and in its dtype, and use one optimizer for a parameter"
        )


def _keep_or_forget_clip(asked: Asked, buckets: Sequence[Bucket]) -> None:
    """Forget a clip whose gradients are gone, of which these buckets have some; a step refuses half of them."""
    rest = [bucket for bucket in buckets if not bucket.gradients.are_clipped]
    if asked.clip and 0 < len(rest) < len(buckets):
        if asked.to_clip is None:
            raise rest[0].gradients.changed()
        warn_of_forgotten_clip()
    if rest or not buckets:
        asked.clip.clear()


def _require_fitting_state(buckets: Sequence[Bucket], hypers: Sequence[Hyperparameters]) -> None:
    for bucket in buckets:
        bucket.storage.check_beta2(hypers[bucket.group_index].beta2)
        built, asked_for = bucket.max_exp_avg_sq is not None, hypers[bucket.group_index].amsgrad
        if built != asked_for:
            raise ValueError(
                f"param_groups[{bucket.group_index}]['amsgrad']: expected {built}, as when it was sharded, "
                f"got {asked_for}; choose it when the group is added"
            )


@dataclass(frozen=True)
class _Side:
    """One rank's side of a step.

    Attributes:
        asked: What this rank is asked to do. The loss scale in it is here for the message alone: what ranks
            compare has scales and factors of its own, which need no reading on the host.
        local: The buckets whose gradients are still to be averaged.
        changes: Where somebody wrote into averages, per bucket by what factors elements were multiplied.
        order: In which order optimizers of the process group have averaged.
    """

    asked: Asked
    hypers: Sequence[Hyperparameters]
    unfrozen: Sequence[NamedParameter]
    present: Mapping[Bucket, Sequence[bool]]
    local: Sequence[Bucket]
    changes: Mapping[Bucket, Tensor]
    order: str

    @cached_property
    def _texts(self) -> tuple[Description, Description]:
        """What is said ahead of gradients and behind them, but for what lies on a device."""
        ahead: Description = {
            "the call": self.asked.call,
            "the number of attached models": str(self.asked.num_attached),
            "clip_grad_norm_() before it": str(bool(self.asked.clip)),
        }
        for index, hyper in enumerate(self.hypers):
            ahead.update(describe_hyperparameters(index, hyper))
        ahead.update({f"{member.name}.requires_grad": "True" for member in self.unfrozen})
        averages = "to come" if self.local else "made"
        return ahead, {"the averages of gradients": averages, ORDER: self.order or "one alone"}

    def key(self) -> bytes:
        """Bytes that differ where descriptions differ."""
        # Ranks that hold other parts of the parameters may have other buckets.
        present = b"".join(map(bytes, self.present.values()))
        return present + repr((self._texts, bool(self.changes))).encode()

    @property
    def tolerance(self) -> float:
        """By how much factors may differ, for each element was rounded."""
        return 2.0 * max((torch.finfo(bucket.gradients.shard.dtype).eps for bucket in self.changes), default=0.0)

    def describe(self) -> Description:
        """All of it, in the order in which differences should be reported."""
        ahead, behind = self._texts
        gradients = {
            member.index: (f"the gradient of {member.name}", "a tensor" if here else "None")
            for bucket, present in self.present.items()
            for member, here in zip(bucket.members, present, strict=True)
        }
        description = ahead | dict(gradients[index] for index in sorted(gradients)) | behind
        if self.asked.grad_scale is not None:
            description[LOSS_SCALE] = str(float(self.asked.grad_scale))
        description[FACTOR] = _range(torch.cat([*self.changes.values()]).tolist()) if self.changes else "untouched"
        return description


def _range(factors: Sequence[float]) -> str:
    """The smallest and the largest of those that are known."""
    known = [factor for factor in factors if not math.isnan(factor)]
    ends = dict.fromkeys(f"{end:.6g}" for end in (min(known), max(known))) if known else {"unknown": None}
    return " to ".join(ends)
