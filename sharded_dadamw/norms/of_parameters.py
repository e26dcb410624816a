"""What this rank holds of parameters as they lie, as norms and reports want to see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.dtensors import local_gradient
from sharded_dadamw.layout.parameters import named_parameters
from sharded_dadamw.layout.placement import OF_ONE_RANK, local, placements_of
from sharded_dadamw.norms.global_norm import NormOwners, Part, global_norm
from sharded_dadamw.norms.step_report import Snapshot, StepReport
from sharded_dadamw.update.adamw import value_of
from sharded_dadamw.update.storage import MOMENTS


class HeldAsTheyLie:
    """The parameters of groups, of which each rank holds what their own placement says."""

    axis = None
    """Not spread by the optimizer itself."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Tensor]], device: torch.device
    ) -> None:
        self.groups, self.state, self.device = groups, state, device

    def params(self) -> list[Tensor]:
        """Return all of them."""
        return [param for group in self.groups for param in group["params"]]

    def parts(self, rank: int) -> list[Part]:
        """Return what this rank, of this number, holds of them."""
        of_one_rank = {OF_ONE_RANK: f"held by rank {rank}"}
        members = named_parameters(self.groups)
        parts = [of_one_rank.get(m.placement.part, m.placement.part) for m in members]
        return [Part(m.param, m.name, part, self.is_reported(m.param)) for m, part in zip(members, parts, strict=True)]

    def is_reported(self, param: Tensor) -> bool:
        """Whether a parameter is trainable, or has state because it was."""
        return param.requires_grad or bool(self.state.get(param))

    def spread_over(self) -> list[dist.ProcessGroup]:
        """Return the groups of ranks that hold other parts."""
        return [group for placement in placements_of(self.params()) for group in placement.others]

    def look(self, param: Tensor) -> Snapshot:
        """Return this rank's part of a parameter as it is now."""
        state = self.state.get(param, {})
        exp_avg, exp_avg_sq, maximum = (local(state[key]) if key in state else None for key in MOMENTS)
        grad = None if param.grad is None else local_gradient(param)
        return Snapshot(value_of(local(param), None), exp_avg, exp_avg_sq, maximum, state.get("step"), grad)

    def gradient_norm(self, params: Sequence[Tensor], norm_type: float, owners: NormOwners) -> Tensor:
        """The norm of the gradients of these parameters, as ``global_norm`` gives it. Collective."""
        gradients = [*map(local_gradient, params)]  # of all, since it may be collective
        counted = [grad for param, grad in zip(params, gradients, strict=True) if id(param) in owners.counted]
        return global_norm(counted, norm_type, collectives=owners.collectives, device=self.device)

    def make_measurable(self, report: StepReport) -> None:
        """Do nothing: they always are."""
