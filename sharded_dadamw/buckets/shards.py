"""What one optimizer shards: the ranks among which it does, the buckets, and what is frozen."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from sharded_dadamw.buckets.admission import agree_on_groups, connect_holders, group_of_replicas
from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.build import Builder
from sharded_dadamw.comm.agreement import Refusal
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.connect import connect
from sharded_dadamw.config import Exchange, ShardingConfig
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.layout.placement import Placement, placements_of


class Shards:
    """The parameters of an optimizer, spread over ranks.

    Attributes:
        device: Where they live.
        adds_in_tree: Whether steps have the same bits on any number of ranks.
        collectives: The ranks among which they are sharded.
        holders: The ranks that hold any parts of them: others may have other parts of DTensors.
        slots: Per trainable parameter, by its id, its bucket and its slot there.
        frozen: The others.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        groups: Sequence[Mapping[str, Any]],
        process_group: dist.ProcessGroup | DeviceMesh | None,
        config: ShardingConfig,
        refusal: Refusal,
    ) -> None:
        """Shard the first groups of an optimizer. Collective; raises as ``agree_on_groups`` and ``connect``.

        ``params``, the tensors that it was given, tell the ranks even where there are no groups of them. ``refusal`` is
        what this rank has to object so far.
        """
        enter("ShardedDecoupledAdamW()")
        placements: list[Placement] = []
        with refusal:
            placements = placements_of(params)
            process_group = group_of_replicas(placements) if process_group is None else process_group
        self._config = config
        self.adds_in_tree = config.micro_batches is not None
        self.device = next((param.device for param in params if not param.is_meta), torch.device("cpu"))
        self.collectives = connect(process_group, self.device, exchange=None)
        self.holders = connect_holders(placements, self.collectives, self.device)
        members = agree_on_groups(groups, 0, config, self.collectives, self.holders, refusal)
        # This connects all ranks, so they had to agree on the group and on the configuration before.
        exchange = config.exchange
        if config.micro_batches is not None and self.device.type != "cpu":
            exchange = Exchange.RANK_ORDER  # each slice comes to its owner, who adds
        self.collectives = connect(process_group, self.device, exchange=exchange)
        if config.micro_batches is not None:
            self.collectives.add_in_tree(config.micro_batches)
        self.holders = connect_holders(placements, self.collectives, self.device)
        self._builder = Builder(self.collectives, config)
        self.buckets: list[Bucket] = []
        self.slots: dict[int, tuple[Bucket, int]] = {}
        self.frozen: list[NamedParameter] = []
        self._shard(members, groups)

    @property
    def micro_batches(self) -> range:
        """The numbers of this rank's micro-batches of a step, among those of all ranks: one, if none are asked for."""
        num_ranks = self.collectives.everyone.num_ranks
        share = (self._config.micro_batches or num_ranks) // num_ranks
        return range(self.collectives.number * share, (self.collectives.number + 1) * share)

    def add(self, groups: list[dict[str, Any]], extend: Callable[[], None]) -> None:
        """Shard what ``extend`` appends to the groups. Collective; raises as the constructor, and then deletes it."""
        enter("add_param_group()")
        refusal, first_group = Refusal(), len(groups)
        with refusal:
            extend()
        try:
            new = agree_on_groups(groups, first_group, self._config, self.collectives, self.holders, refusal)
            self._shard(new, groups)
        except Exception:
            del groups[first_group:]
            raise

    def add_unfrozen(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Shard what was frozen and is trainable now. Collective."""
        unfrozen = [member for member in self.frozen if member.param.requires_grad]
        self.frozen = [member for member in self.frozen if not member.param.requires_grad]
        self._shard(unfrozen, groups)

    def _shard(self, members: Sequence[NamedParameter], groups: Sequence[Mapping[str, Any]]) -> None:
        """Give parameters, in group order, rank 0's values, and the trainable ones buckets. Collective."""
        for member in members:
            if not member.param.requires_grad:
                self.frozen.append(member)
                if not member.is_left_alone:
                    whole = member.local.contiguous()
                    self.collectives.broadcast_(whole)
                    member.local.copy_(whole)
        buckets = list(self._builder.build([m for m in members if m.param.requires_grad], groups))
        for bucket in buckets:
            self.slots.update({id(member.param): (bucket, slot) for slot, member in enumerate(bucket.members)})
        self.buckets += buckets


_sharded: weakref.WeakKeyDictionary[Optimizer, Shards] = weakref.WeakKeyDictionary()
"""What there is of each sharding optimizer that lives."""


def refuse_other_optimizers(optimizer: Optimizer, shards: Shards) -> None:
    """Have a step of another optimizer fail where this one, which lives, has taken the gradients.

    One of its class has taken the parameters over, and whoever holds it or shares its groups is a wrapper of it.
    """
    _sharded[optimizer] = shards
    _watch_steps()


@cache
def _watch_steps() -> None:
    # Once and for good: to take the hook away with an optimizer would change torch's list of hooks under a step that
    # goes through it, where the garbage collector comes then.
    register_optimizer_step_pre_hook(_refuse)


def _refuse(other: Optimizer, _args: Any, _kwargs: Any) -> None:
    if (found := _conflict(other)) is not None:  # a frame of its own: the trace of the error must not keep optimizers
        raise RuntimeError(found)


def _conflict(other: Optimizer) -> str | None:
    for mine, shards in _sharded.items():
        if isinstance(other, type(mine)) or other.param_groups is mine.param_groups:
            continue
        if any(each is mine for each in vars(other).values()):
            continue
        for param in chain.from_iterable(group["params"] for group in other.param_groups):
            bucket, slot = shards.slots.get(id(param), (None, 0))
            if bucket and bucket.gradients.is_taken(slot):
                return (
                    f"{type(other).__name__}.step() would not find the gradient of {bucket.members[slot].name}, which "
                    f"another optimizer, a {type(mine).__name__}, has averaged; delete that one, and use one optimizer "
                    "for a parameter"
                )
    return None


def with_lists(params: Iterable[Any]) -> tuple[Any, list[Tensor], Refusal]:
    """What an optimizer was given, with a list in the place of every iterator; the tensors in it; and what is wrong."""
    refusal = Refusal()
    if isinstance(params, (Tensor, dict)):
        return params, [], refusal  # which torch refuses
    given: list[Any] = []
    tensors: list[Any] = []
    with refusal:
        for entry in params:
            if isinstance(entry, dict) and "params" in entry and not isinstance(entry["params"], Tensor):
                entry = {**entry, "params": list(entry["params"])}
            given.append(entry)
            of_group = entry.get("params", ()) if isinstance(entry, dict) else [entry]
            of_group = [of_group] if isinstance(of_group, Tensor) else of_group
            tensors += [each[1] if isinstance(each, tuple) and len(each) == 2 else each for each in of_group]
    return given, [tensor for tensor in tensors if isinstance(tensor, Tensor)], refusal
