"""Where a parameter's elements are: its part on this rank, who holds the same part, and who holds others.

                                                same part                     other parts
    plain parameter                             (what the caller says)        -
    FSDP1, flat or with original parameters     -                             (what the caller says)
    DTensor (FSDP2, HSDP, tensor parallel)      mesh axes with Replicate      mesh axes with Shard

State can be spread over ranks that hold the same; norms have to be added up over ranks that hold others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor
from torch.distributed import ProcessGroup

OF_ONE_RANK = "held by this rank alone"
"""The part of a parameter that FSDP1 has sharded, on every rank another one."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where one parameter's elements are.

    It refers to groups weakly, as does ``sharded_dadamw.comm.collectives.BackendVerbs``.

    Attributes:
        local_shape: Shape of this rank's part.
        part: Says which of the elements this rank holds; equal on two ranks that hold the same ones of a parameter.
        first_element: Number of the part's first element in the flattened whole, or where parts are not contiguous
            something like it: a key for random numbers.
        is_borrowed: Whether its memory belongs to something else, which may move it: read it, and write back into it.
    """

    local_shape: tuple[int, ...]
    part: str = ""
    first_element: int = 0
    is_borrowed: bool = False
    _same: tuple[ReferenceType[ProcessGroup], ...] = ()
    _others: tuple[ReferenceType[ProcessGroup], ...] = ()

    @property
    def local_numel(self) -> int:
        """Number of elements of this rank's part."""
        return math.prod(self.local_shape)

    @property
    def same(self) -> list[ProcessGroup]:
        """Groups of ranks that hold the same part, one for each axis of a mesh along which it is replicated."""
        return [group for reference in self._same if (group := reference()) is not None]

    @property
    def others(self) -> list[ProcessGroup]:
        """Groups of ranks that hold different parts, one for each axis along which it is sharded."""
        return [group for reference in self._others if (group := reference()) is not None]

    def is_replicated_over(self, are_ours: Callable[[ProcessGroup], bool]) -> bool:
        """Whether FSDP replicates it over ranks that are ours, and so reduces its gradient over them."""
        return any(map(are_ours, self.same))


def placements_of(params: Sequence[Tensor]) -> list[Placement]:
    """The placement of each parameter."""
    flattened = [param for param in params if is_of_fsdp1(param)]
    unsharded = {param.untyped_storage().data_ptr() for param in flattened if param.ndim != 1}
    return [_of_fsdp1(param, unsharded) if is_of_fsdp1(param) else _of_tensor(param) for param in params]


def is_of_fsdp1(param: Tensor) -> bool:
    """Whether it is a flat parameter of ``FullyShardedDataParallel``, or a view of one."""
    return bool(getattr(param, "_fsdp_flattened", False))


def shape_of(param: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; () where it is not known, of what FSDP1 has flattened."""
    return () if is_of_fsdp1(param) else tuple(param.shape)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is, since FSDP1's are their own local parts.

    The same object in every call, which ``to_local`` does not return for a parameter.
    """
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


def _of_tensor(param: Any) -> Placement:
    if not hasattr(param, "to_local"):
        return Placement(tuple(param.shape))
    mesh = param.device_mesh
    coordinate = mesh.get_coordinate()
    sharded = [axis for axis, placement in enumerate(param.placements) if not placement.is_replicate()]
    index, num_parts = 0, 1
    for axis in sharded:
        index = index * mesh.size(axis) + coordinate[axis]
        num_parts *= mesh.size(axis)
    return Placement(
        tuple(param.detach().to_local().shape),
        part=", ".join(f"{coordinate[axis]} of {mesh.size(axis)} along mesh axis {axis}" for axis in sharded),
        first_element=index * -(-param.numel() // num_parts),
        is_borrowed=True,
        _same=tuple(ref(mesh.get_group(axis)) for axis in range(mesh.ndim) if axis not in sharded),
        _others=tuple(ref(mesh.get_group(axis)) for axis in sharded),
    )


def _of_fsdp1(param: Any, unsharded: Collection[int]) -> Placement:
    """The placement of a flat parameter, or of a view of one; no way leads from there to the ranks that have others.

    FSDP1 says how large a flat parameter is in all. Where it shards, the views are 1-D; under NO_SHARD, whose units'
    memory is at the addresses ``unsharded``, they have the shapes of the originals, which tells unless all are vectors.
    """
    whole_size = getattr(param, "_unpadded_unsharded_size", None)
    if whole_size is None:
        is_whole = param.untyped_storage().data_ptr() in unsharded
    else:
        is_whole = param.numel() >= whole_size.numel()
    return Placement(tuple(param.shape), part="" if is_whole else OF_ONE_RANK, is_borrowed=True)
