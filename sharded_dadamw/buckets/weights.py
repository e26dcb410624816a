"""The parameters of one bucket: where they live, and how this rank's shard of them is published.

Plain parameters lie in a flat buffer of ours, which is gathered in place. The memory of a DTensor belongs to FSDP or to
tensor parallelism: its elements are read before each update and written back after it, through a flat buffer that
exists only meanwhile.

    own        p.data lies in        |        |  shard |        |     [num_ranks * n]
    borrowed                                  |  shard |              [n], a copy; p's memory stays where it is
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Allocate, zeros

log = logging.getLogger("sharded_dadamw")
_alive: WeakSet[OwnWeights] = WeakSet()


class Weights(ABC):
    """The parameters of one bucket on one rank, which updates ``shard`` [n]."""

    shard: Tensor

    def __init__(self, arrangement: Arrangement, rank: int) -> None:
        self._arrangement = arrangement
        self._members = arrangement.members
        self._params = tuple(member.param for member in self._members)
        self._range = arrangement.layout.shard_range(rank)

    def _copied(self, allocate: Allocate = zeros) -> Tensor:
        """A new flat buffer [num_ranks * n] with all parameters in it."""
        first = self._members[0].param
        buffer = allocate(self._arrangement.layout.numel, first.dtype, first.device)
        for member, view in zip(self._members, self._arrangement.views(buffer), strict=True):
            view.copy_(member.local)
        return buffer

    @abstractmethod
    def misplaced(self) -> list[tuple[NamedParameter, str]]:
        """The parameters that are no longer where they were, and why they cannot be taken back, or an empty text."""

    def take_back_(self) -> None:
        """Bring parameters that are elsewhere back to where they were."""
        raise NotImplementedError

    def refresh_(self) -> None:  # noqa: B027 - own ones are always up to date
        """Bring ``shard`` up to what the parameters are now."""

    @abstractmethod
    def whole(self) -> Tensor:
        """A flat buffer [num_ranks * n] with all parameters in it."""

    @abstractmethod
    def outgoing(self) -> Tensor:
        """A flat buffer [num_ranks * n] with ``shard`` in its place."""

    def accept_(self, buffer: Tensor) -> None:  # noqa: B027 - own ones lie in it
        """Write what ``whole`` or ``outgoing`` returned, filled by all ranks, into the parameters."""


class OwnWeights(Weights):
    """Parameters that live in a flat buffer of ours.

    Constructing it moves them there: ``p.data`` becomes contiguous memory of the buffer, ``p`` stays the same object.
    """

    def __init__(self, arrangement: Arrangement, rank: int, allocate: Allocate) -> None:
        super().__init__(arrangement, rank)
        self.buffer = self._copied(allocate)
        self.shard = self.buffer[slice(*self._range)]
        self._homes = arrangement.views(self.buffer)
        self._move_in()
        self._places = list(map(Tensor.data_ptr, self._params))
        self._matrices = [param for param in self._params if param.dim() > 1]
        _alive.add(self)

    def misplaced(self) -> list[tuple[NamedParameter, str]]:
        # Whatever moves or casts them changes their addresses; what transposes them does not.
        if list(map(Tensor.data_ptr, self._params)) == self._places and all(map(Tensor.is_contiguous, self._matrices)):
            return []
        owners = {
            place: (each, member) for each in _alive for member, place in zip(each._members, each._places, strict=True)
        }
        return [
            (member, self._why(member.param, home, owners))
            for member, home, place in zip(self._members, self._homes, self._places, strict=True)
            if member.param.data_ptr() != place or not member.param.is_contiguous()
        ]

    def _why(self, param: Tensor, home: Tensor, owners: Mapping[int, tuple[OwnWeights, NamedParameter]]) -> str:
        memory = param.untyped_storage().data_ptr()
        if memory in owners and param.numel():
            owner, member = owners[memory]
            if member.param is not param:
                return f"it has the memory of {member.name} now. To tie them, use one Parameter for both"
            if owner is not self:
                return "it was given to another optimizer, which has it now"
        return _difference(param, tuple(home.shape), home.dtype, home.device)

    def take_back_(self) -> None:
        """Move parameters that are elsewhere back into the buffer, with the values that they have there."""
        for param, home, place in zip(self._params, self._homes, self._places, strict=True):
            if param.data_ptr() != place or not param.is_contiguous():
                home.copy_(param.data.clone())  # which may lie there, in another order
        self._move_in()
        log.info("%s and others were moved, and are back in the optimizer's bucket", self._members[0].name)

    def _move_in(self) -> None:
        # Each gets a storage of its own over the buffer's memory. Who saves a tensor saves its storage, and takes those
        # that share one for tied weights. A tensor's own __dlpack__ refuses devices other than the current one.
        for param, home in zip(self._params, self._homes, strict=True):
            param.data = from_dlpack(to_dlpack(home))

    def whole(self) -> Tensor:
        return self.buffer

    def outgoing(self) -> Tensor:
        return self.buffer


class BorrowedWeights(Weights):
    """Parameters whose memory belongs to something else."""

    def __init__(self, arrangement: Arrangement, rank: int) -> None:
        super().__init__(arrangement, rank)
        first, layout = self._params[0], arrangement.layout
        self._fragments = tuple(layout.fragments(rank))
        self.shard = torch.zeros(layout.shard_numel, dtype=first.dtype, device=first.device)
        self.refresh_()

    def misplaced(self) -> list[tuple[NamedParameter, str]]:
        """See ``Weights.misplaced``; their owner may move them, but not cut them in another way."""
        dtype, device = self.shard.dtype, self.shard.device
        whys = [(each, _difference(each.local, each.placement.local_shape, dtype, device)) for each in self._members]
        return [(member, why) for member, why in whys if why]

    def refresh_(self) -> None:
        for fragment in self._fragments:
            self.shard[fragment.in_shard].copy_(self._members[fragment.slot].local.reshape(-1)[fragment.in_param])

    def whole(self) -> Tensor:
        return self._copied()

    def outgoing(self) -> Tensor:
        buffer = self.shard.new_empty(self._arrangement.layout.numel)
        buffer[slice(*self._range)].copy_(self.shard)
        return buffer

    def accept_(self, buffer: Tensor) -> None:
        self.shard.copy_(buffer[slice(*self._range)])
        for member, view in zip(self._members, self._arrangement.views(buffer), strict=True):
            member.local.copy_(view)


def _difference(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """In what a tensor is not what it was, in words; empty if in nothing."""
    now = tuple(tensor.shape), tensor.dtype, tensor.device
    changes = [f"from {was} to {is_}" for was, is_ in zip((shape, dtype, device), now, strict=True) if was != is_]
    return "it has changed " + " and ".join(changes) if changes else ""
