"""Which parameters are let into buckets: those that all ranks of a group share, and agree on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.buckets.offload import check_residency
from sharded_dadamw.comm.agreement import Description, Refusal, require_agreement
from sharded_dadamw.comm.collectives import Collectives, ranks_of
from sharded_dadamw.comm.connect import connect_over
from sharded_dadamw.config import ShardingConfig
from sharded_dadamw.layout.parameters import NamedParameter, check_parameters, named_parameters
from sharded_dadamw.layout.placement import Placement
from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.storage import Storage


def group_of_replicas(placements: Sequence[Placement]) -> dist.ProcessGroup | None:
    """The axis along which DTensors among the parameters are replicated; None where there are no DTensors.

    Raises:
        ValueError: There is no such axis, or there are plain parameters beside them.
    """
    borrowed = [placement for placement in placements if placement.is_borrowed]
    if not borrowed:
        return None
    if len(borrowed) < len(placements):
        raise ValueError(
            "expected process_group, since there are plain parameters beside DTensors; pass the ranks that hold the "
            "same parameters, such as mesh['dp']"
        )
    group = _common_group([placement.same for placement in borrowed])
    if group is None:
        raise ValueError(
            "expected process_group, since these DTensors are replicated along no axis of their mesh; pass the ranks "
            "that hold the same shards, such as mesh['dp'] beside tensor parallelism; or if there are none, nothing is "
            "left to shard: use DecoupledAdamW, which updates the local shards as they are"
        )
    return group


def _common_group(choices: Sequence[Sequence[dist.ProcessGroup]]) -> dist.ProcessGroup | None:
    """The largest group of which each choice has one with the same ranks, or None."""
    groups = {ranks_of(group): group for group in choices[0]}
    common = groups.keys() & set.intersection(*(set(map(ranks_of, choice)) for choice in choices))
    return groups[max(common, key=len)] if common else None


def _check_sharing(
    members: Sequence[NamedParameter], first_group: int, collectives: Collectives, config: ShardingConfig
) -> None:
    """Refuse parameters that the ranks of a group do not share, or whose gradients nobody would average.

    Raises:
        ValueError: A parameter is sharded among these ranks already, or is a plain one beside HSDP's, or has
            strides that whoever else reduces its gradient may go by; or one from ``first_group`` on has a gradient, to
            which autograd would add that of the first micro-batch.
    """
    replicated = [
        member
        for member in members
        if member.placement.others and member.placement.is_replicated_over(collectives.are_all_of)
    ]
    for member in members:
        if config.micro_batches is not None and member.placement.is_borrowed:
            raise ValueError(
                f"{member.name}: expected a plain parameter with micro_batches, got a DTensor, whose gradients others "
                "add up, in an order of their own"
            )
        if config.micro_batches is not None and member.group_index >= first_group and member.param.grad is not None:
            raise ValueError(
                f"{member.name}: expected a parameter without a gradient with micro_batches, which are added in an "
                "order of their own, got one in p.grad; call model.zero_grad() before the optimizer gets the parameter"
            )
        among_us = [collectives.are_all_of(group) for group in member.placement.others]
        if any(among_us) and collectives.num_ranks > 1:
            raise ValueError(
                f"{member.name}: expected a parameter that all ranks of the process group hold alike, got a DTensor "
                "that is sharded among them already; use DecoupledAdamW, which updates the local shards as they are"
            )
        if not (config.reduce_gradients or member.placement.is_borrowed):
            require_row_major(member)
        if replicated and config.reduce_gradients and not member.placement.is_borrowed:
            raise ValueError(
                f"{member.name}: expected a DTensor like {replicated[0].name}, got a plain parameter, whose gradient "
                "nobody would average over all ranks; put it into an optimizer of its own"
            )


def require_row_major(member: NamedParameter) -> None:
    """Refuse a parameter whose gradient something else reduces, and whose elements do not lie in the order of rows."""
    if not member.param.is_contiguous():
        # DistributedDataParallel writes gradients in the order in which it found parameters to lie in memory.
        raise ValueError(
            f"{member.name}: expected a row-major parameter where reduce_gradients=False, got strides "
            f"{member.param.stride()}; call model.to(memory_format=torch.contiguous_format), or make it "
            "contiguous(), before the model is wrapped"
        )


def connect_holders(placements: Sequence[Placement], collectives: Collectives, device: torch.device) -> Collectives:
    """Return the ranks that hold parts of these parameters: if one of them stopped alone, the others would wait."""
    others = [group for placement in placements for group in placement.others]
    try:
        return connect_over(others, device, also=collectives)
    except ValueError:  # they are not known; then at least those that hold the same parts
        return collectives


def agree_on_groups(
    groups: Sequence[Mapping[str, Any]],
    first_group: int,
    config: ShardingConfig,
    collectives: Collectives,
    holders: Collectives,
    refusal: Refusal,
) -> list[NamedParameter]:
    """Have all ranks confirm that they were given the same groups from ``first_group`` on. Collective.

    What this rank has to object already is in ``refusal``. ``holders`` have any parts of the parameters;
    ``collectives`` are the ranks among which to shard. Returns the parameters of those groups.

    Raises:
        Exception: This rank's refusal, where it has one.
        ValueError: Another rank refuses, or ranks were given different groups.
    """
    description: Description = {}
    parts: Description = {}
    new: list[NamedParameter] = []
    with refusal:
        members = named_parameters(groups)
        check_parameters(members)
        check_residency(config.state_residency, members[0].param.device)
        for member in (member for member in members if not member.is_left_alone):
            Storage.of(member.local, config).check_beta2(float(groups[member.group_index]["betas"][1]))
        new = [member for member in members if member.group_index >= first_group]
        description = _describe_groups(new, groups, first_group, config)
        parts = {f"the part of {m.name}": m.placement.part for m in members if m.placement.part}
        _check_sharing(members, first_group, collectives, config)
    require_agreement(holders, description, refusal.error)
    if parts:
        require_agreement(collectives, parts, None)
    return new


def _describe_groups(
    new: Sequence[NamedParameter], groups: Sequence[Mapping[str, Any]], first_group: int, config: ShardingConfig
) -> Description:
    """What a rank is about to build of the groups from ``first_group`` on."""
    description = {f"parameter {member.index}": member.describe() for member in new}
    for index, group in enumerate(groups[first_group:], start=first_group):
        description[f"param_groups[{index}]"] = f"{len(group['params'])} parameters"
        description.update(describe_hyperparameters(index, Hyperparameters.from_group(group)))
    description.update({f"config.{key}": str(value) for key, value in asdict(config).items()})
    return description


def describe_hyperparameters(index: int, hyper: Hyperparameters) -> Description:
    """The scalars of a group, by the names they have there."""
    lr = hyper.lr
    values = {
        "lr": f"a tensor on {lr.device}" if isinstance(lr, Tensor) else str(lr),  # whose value the host cannot see
        "initial_lr": hyper.initial_lr,
        "betas": (hyper.beta1, hyper.beta2),
        "eps": hyper.eps,
        "weight_decay": hyper.weight_decay,
        "amsgrad": hyper.amsgrad,
    }
    return {f"param_groups[{index}][{name!r}]": str(value) for name, value in values.items()}
