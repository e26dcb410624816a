"""What this rank holds of the parameters of an optimizer, as norms, reports and fingerprints want to see it.

Of the ranks that hold the same part of a parameter the first one counts it, and the others add zero. So the sum over
ranks is that of the whole, each element counted once, in every layout.

    rank 0    weight, part 0 of 2: counts        bias: counts
    rank 1    weight, part 1 of 2: counts        bias: held by rank 0 as well
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import and_
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.shards import Shards
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.dtensors import local_gradient
from sharded_dadamw.kernels.operands import Operands
from sharded_dadamw.layout.parameters import NamedParameter, named_parameters
from sharded_dadamw.layout.placement import OF_ONE_RANK, local, shape_of
from sharded_dadamw.norms.global_norm import exact_norm, global_norm
from sharded_dadamw.norms.step_report import StepReport, gone
from sharded_dadamw.update.storage import MOMENTS


class Holding(NamedTuple):
    """A parameter, and of which elements of this rank's part of it, flattened, this rank keeps the state.

    Attributes:
        state: Those elements in one dimension or in the part's shape, and ``step``; empty where there is none.
    """

    member: NamedParameter
    start: int
    stop: int
    state: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class NormOwners:
    """Which rank counts what, of all parameters of a group of ranks: of equal parts the first one's.

    Attributes:
        names: Of the parameters of all ranks, each once, in the same order on every rank.
        reported: Per name whether any rank reported it when names were exchanged.
        row_of: The row in ``names`` of each parameter of this rank, by its id.
        counted: The ids of the parameters of which this rank counts its part.
        first_here: The ids of the parameters of which no rank before this one holds any part.
    """

    collectives: Collectives
    names: tuple[str, ...]
    reported: tuple[bool, ...]
    row_of: Mapping[int, int]
    counted: frozenset[int]
    first_here: frozenset[int]


class Held(ABC):
    """The parameters of an optimizer on this rank.

    Attributes:
        axis: The ranks over which the optimizer itself spreads them; one where it does not.
        device: Where they live.
    """

    axis: Collectives
    device: torch.device

    @abstractmethod
    def params(self) -> list[Tensor]:
        """Return those of which norms are, in any order; cheap."""

    @abstractmethod
    def holdings(self) -> list[Holding]:
        """Return what this rank holds of all of them, in the order of groups."""

    @abstractmethod
    def is_reported(self, param: Tensor) -> bool:
        """Whether a parameter is trainable, or has state because it was."""

    @abstractmethod
    def look(self, param: Tensor) -> Operands:
        """Return what this rank holds of a parameter as it is now, only to be read; what there is not has no elements.

        Its gradient may be another one than the last step's; see ``make_measurable``.
        """

    @abstractmethod
    def make_measurable(self, report: StepReport) -> None:
        """Raise, on all ranks, if gradients are gone that have to be measured; read weights that others own."""

    def find_owners(self, ranks: Collectives) -> NormOwners:
        """Exchange what every rank holds. Collective, and host-blocking.

        Two parameters of one name and different shapes are a ValueError on every rank.
        """
        here, of_one_rank = self.holdings(), {OF_ONE_RANK: f"held by rank {ranks.rank}"}
        parts = [
            f"{of_one_rank.get(member.placement.part, member.placement.part)}[{start}:{stop}]"
            for member, start, stop, _ in here
        ]
        said = [
            (member.name, part, self.is_reported(member.param), shape_of(member.param))
            for (member, *_), part in zip(here, parts, strict=True)
        ]
        owner: dict[tuple[str, str], int] = {}
        first: dict[str, int] = {}
        reported: dict[str, bool] = {}
        shapes: dict[str, list[int]] = {}
        for rank, text in enumerate(ranks.gather_texts(json.dumps(said))):
            for name, part, is_reported, shape in json.loads(text):
                if shapes.setdefault(name, shape) != shape:
                    raise ValueError(
                        f"{name}: expected one parameter of this name, got {shapes[name]} on rank {first[name]} and "
                        f"{shape} on rank {rank}; give parameters names that tell the stages of a pipeline apart"
                    )
                owner.setdefault((name, part), rank)
                first.setdefault(name, rank)
                reported[name] = is_reported or reported.get(name, False)
        rows, members = {name: row for row, name in enumerate(first)}, [holding.member for holding in here]
        return NormOwners(
            ranks,
            names=tuple(first),
            reported=tuple(reported[name] for name in first),
            row_of={id(m.param): rows[m.name] for m in members},
            counted=frozenset(
                id(m.param) for m, part in zip(members, parts, strict=True) if owner[m.name, part] == ranks.rank
            ),
            first_here=frozenset(id(m.param) for m in members if first[m.name] == ranks.rank),
        )

    def spread_over(self) -> list[dist.ProcessGroup]:
        """Return the groups of ranks that hold other parts, beside those of ``axis``."""
        return [group for holding in self.holdings() for group in holding.member.placement.others]


class HeldInBuckets(Held):
    """The trainable parameters of an optimizer, of which each rank of ``axis`` holds a shard of every bucket."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.axis = shards.collectives
        self.device = shards.device

    def params(self) -> list[Tensor]:
        return [member.param for bucket in self.shards.buckets for member in bucket.members]

    def holdings(self) -> list[Holding]:
        found = [Holding(member, 0, member.placement.local_numel, {}) for member in self.shards.frozen]
        for bucket in self.shards.buckets:
            for slot, member in enumerate(bucket.members):
                held = bucket.layout.fragment(slot, bucket.rank).in_param
                found.append(Holding(member, held.start, held.stop, bucket.state_of(slot)))
        return sorted(found, key=lambda holding: holding.member.index)

    def is_reported(self, param: Tensor) -> bool:
        return id(param) in self.shards.slots

    def look(self, param: Tensor) -> Operands:
        bucket, slot = self.shards.slots[id(param)]
        return bucket.operands_of(slot)

    def make_measurable(self, report: StepReport) -> None:
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


class HeldAsTheyLie(Held):
    """The parameters of groups, of which each rank holds what their own placement says."""

    axis = Collectives()

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self._groups, self._state, self.device = groups, state, device

    def params(self) -> list[Tensor]:
        return [param for group in self._groups for param in group["params"]]

    def holdings(self) -> list[Holding]:
        return [Holding(m, 0, m.placement.local_numel, self._state_of(m.param)) for m in named_parameters(self._groups)]

    def is_reported(self, param: Tensor) -> bool:
        return param.requires_grad or bool(self._state.get(param))

    def look(self, param: Tensor) -> Operands:
        nothing = torch.empty(0, device=param.device)
        state = self._state_of(param)
        exp_avg, exp_avg_sq = (state.get(key, nothing) for key in MOMENTS[:2])
        grad = nothing if param.grad is None else local_gradient(param)
        count, maximum = state.get("step", nothing), state.get("max_exp_avg_sq")
        return Operands(local(param), grad, exp_avg, exp_avg_sq, maximum, None, count)

    def make_measurable(self, report: StepReport) -> None:
        if any(param.grad is None for param, _ in report.unmeasured):
            raise gone()

    def gradient_norm(self, params: Sequence[Tensor], norm_type: float, owners: NormOwners) -> Tensor:
        """The norm of the gradients of these parameters, as ``global_norm`` gives it. Collective."""
        gradients = [*map(local_gradient, params)]  # of all, since it may be collective
        counted = [grad for param, grad in zip(params, gradients, strict=True) if id(param) in owners.counted]
        return global_norm(counted, norm_type, collectives=owners.collectives, device=self.device)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        return {key: local(value) for key, value in self._state.get(param, {}).items()}
