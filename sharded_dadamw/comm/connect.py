"""Which verbs serve a group of ranks best."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sharded_dadamw.comm.collectives import BackendVerbs, Collectives, RankOrderVerbs, is_alive, ranks_of
from sharded_dadamw.comm.mesh import MeshVerbs
from sharded_dadamw.comm.messages import GlooVerbs, MessageVerbs
from sharded_dadamw.comm.shared_memory import SharedMemoryVerbs, map_files
from sharded_dadamw.config import Exchange


def connect(
    process_group: dist.ProcessGroup | DeviceMesh | None,
    device: torch.device,
    *,
    exchange: Exchange | None = Exchange.FASTEST,
    called: str = "process_group",
) -> Collectives:
    """Build the best verbs for a group of ranks and the device their buffers live on.

    Collective, with the same arguments on all ranks, unless ``exchange`` is None.

    Args:
        process_group: A group that this rank is in, a 1-D mesh, a 2-D mesh whose axes are replicas and shards in this
            order, or None for the default group; None without an initialised torch.distributed means one rank.
        device: Where parameters live.
        exchange: How data is to be exchanged. None: nothing but small tensors is going to be reduced.
        called: The argument's name in messages.

    Raises:
        TypeError: It is none of these.
        ValueError: The mesh has more than two axes, or two that leave ranks out or have them in an order of which rows
            and columns differ, or the group does not have this rank, is destroyed, or cannot reach the device's memory.
        RuntimeError: There is no group, though the environment says that there are several ranks.
    """
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, torch.distributed is not initialised, "
                "so each rank would be on its own; call torch.distributed.init_process_group() before, or unset it"
            )
        return Collectives()
    if not isinstance(process_group, DeviceMesh) or process_group.ndim != 2:
        return _connect_group(_group_of(process_group, device, called), device, exchange)
    everyone = _group_of(_spanning(process_group, called), device, called)
    together = _connect_group(everyone, device, None)
    if exchange is None:
        return together
    _check_order(process_group, called)
    column, row = (_connect_group(process_group.get_group(axis), device, exchange) for axis in (0, 1))
    return MeshVerbs(row, column, together) if column.num_ranks > 1 else row


def _connect_group(group: dist.ProcessGroup, device: torch.device, exchange: Exchange | None) -> BackendVerbs:
    if device.type != "cpu" or "cpu:gloo" not in dist.get_backend_config(group):
        is_ordered = exchange is Exchange.RANK_ORDER or (exchange is Exchange.FASTEST and device.type == "cpu")
        return RankOrderVerbs(group, device) if is_ordered else BackendVerbs(group, device)
    if exchange is None or exchange is Exchange.BACKEND:
        return GlooVerbs(group, device)
    if exchange is Exchange.FASTEST and dist.get_world_size(group) > 1:
        files = map_files(GlooVerbs(group, device))
        if files is not None:
            return SharedMemoryVerbs(group, device, files)
    return MessageVerbs(group, device)


def _group_of(
    process_group: dist.ProcessGroup | DeviceMesh | None, device: torch.device, called: str
) -> dist.ProcessGroup:
    """The process group that was meant, if it can be used."""
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"{called}: expected a group or a mesh with one axis or two, got {process_group.ndim} axes "
                f"{process_group.mesh_dim_names}; pass one axis, such as mesh['dp'], two, such as mesh['replicate', "
                "'shard'], or a group of all their ranks"
            )
        process_group = process_group.get_group()
    if process_group is None:
        process_group = dist.group.WORLD
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{called}: expected a group with this rank in it, got {process_group}, which new_group() returns on "
            "the ranks outside; build the optimizer on the group's own ranks only"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{called}: expected a ProcessGroup, a DeviceMesh or None, got {process_group!r}")
    if not is_alive(process_group):
        raise ValueError(f"{called}: expected a live process group, got one that has been destroyed")
    backend = dist.get_backend_config(process_group)
    if f"{device.type}:" not in backend:
        raise ValueError(
            f"{called}: expected a backend for parameters on {device.type}, got {backend}; move the model to the "
            "backend's device before building the optimizer"
        )
    return process_group


def _spanning(mesh: DeviceMesh, called: str) -> dist.ProcessGroup:
    """A group of all ranks of a mesh with two axes."""
    ranks = set(mesh.mesh.flatten().tolist())
    for group in (mesh.get_group(0), mesh.get_group(1), dist.group.WORLD):
        if group is not None and ranks_of(group) == ranks:
            return group
    raise ValueError(
        f"{called}: expected a mesh with two axes to have all {dist.get_world_size()} ranks, got the {len(ranks)} "
        f"of {mesh.mesh_dim_names}; pass one axis, or a group of all these ranks"
    )


def _check_order(mesh: DeviceMesh, called: str) -> None:
    """Refuse a mesh in which a column has other numbers in its rows: torch numbers the ranks of a group as they rise.

    Raises:
        ValueError: Shards would not be added to their replicas, or rows not in one order.
    """
    ranks = mesh.mesh.cpu()
    for axis in (0, 1):
        numbers = ranks.argsort(axis).argsort(axis)
        if not torch.equal(numbers, numbers.narrow(1 - axis, 0, 1).expand_as(numbers)):
            raise ValueError(
                f"{called}: expected a mesh whose rows have their lowest rank, the next one and so on in the same "
                f"columns, and its columns in the same rows, got {ranks.tolist()}, where shards would not meet their "
                "replicas; sort the ranks, as init_device_mesh does"
            )


def group_in_background(collectives: Collectives) -> dist.ProcessGroup:
    """A second group of all ranks, whose messages cannot meet those of training. Collective the first time.

    Raises:
        ValueError: They are not all ranks: torch could not make the group without the others.
    """
    world = dist.group.WORLD
    assert world is not None
    if not collectives.are_all_of(world):
        raise ValueError(
            f"process_group: expected all {dist.get_world_size()} ranks for saving in the background, got "
            f"{collectives.num_ranks} of them; leave process_group out, or save with asynchronous=False"
        )
    reference = _in_background.get(world)
    group = None if reference is None else reference()
    if group is None or not is_alive(group):
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        _in_background[world] = weakref.ref(group)
    return group


_in_background: weakref.WeakKeyDictionary[dist.ProcessGroup, weakref.ref[dist.ProcessGroup]]
_in_background = weakref.WeakKeyDictionary()  # weakly, as BackendVerbs does


def connect_over(groups: Sequence[dist.ProcessGroup], device: torch.device, *, also: Collectives) -> Collectives:
    """The verbs of all ranks among which parameters are spread.

    There is a group for each axis of a mesh along which they are sharded, perhaps repeatedly; ``also`` is a further
    axis, whose ranks are the answer where there is no other.

    Raises:
        ValueError: There are several axes, and they are not all there is: no one group is known to hold their product.
    """
    also = also.everyone
    by_ranks = {ranks_of(group): group for group in groups}
    by_ranks = {ranks: group for ranks, group in by_ranks.items() if len(ranks) > 1}
    if all(also.are_all_of(group) for group in by_ranks.values()):
        return also
    if also.group is not None:
        by_ranks[ranks_of(also.group)] = also.group
    largest = max(by_ranks, key=len)
    if all(ranks <= largest for ranks in by_ranks):
        return connect(by_ranks[largest], device, exchange=None)
    sizes = sorted(len(ranks) for ranks in by_ranks)
    if math.prod(sizes) != dist.get_world_size():
        raise ValueError(
            f"parameters are sharded along axes of {sizes} ranks, which are not all {dist.get_world_size()} ranks; "
            "pass norm_group, the ranks over which norms are to be added up"
        )
    return connect(None, device, exchange=None)
