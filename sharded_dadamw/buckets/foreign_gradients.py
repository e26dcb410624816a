"""Gradients that live elsewhere, such as in FSDP's or DistributedDataParallel's memory, and are only read."""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.gradients import (
    Gradients,
    Stage,
    are_present,
    check_gradient,
    version_of,
    warn_of_forgotten_clip,
)
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.dtensors import local_gradient


class ForeignGradients(Gradients):
    """Gradients that live elsewhere and are means over ranks already; they are only read."""

    def __init__(self, arrangement: Arrangement, rank: int) -> None:
        super().__init__(arrangement)
        self.shard = torch.zeros(self._layout.shard_numel, dtype=self._dtype, device=self._device)
        self._fragments = tuple(self._layout.fragments(rank))
        self._read: list[tuple[ReferenceType[Tensor], int]] = []

    @property
    def present(self) -> tuple[bool, ...]:
        return are_present(self._params)

    @property
    def still_holds_last_step(self) -> bool:
        return True

    def set_read(self) -> None:
        super().set_read()
        self._read = [(ref(grad), version) for grad, version in self._existing()]

    def consume(self) -> None:
        """See ``Gradients.consume``. A step uses up nothing here, so it need not hold on to anything."""
        self._reset()

    def _existing(self) -> list[tuple[Tensor, int]]:
        """The gradients there are, each with the count of in-place changes to its memory."""
        return [(param.grad, version_of(param.grad)) for param in self._params if param.grad is not None]

    def collect(self, *, to_clip: bool) -> None:
        """See ``Gradients.collect``; before another clip they may be read again. Some may have been dropped."""
        if self.stage is Stage.READ:
            read = {(id(grad()), version) for grad, version in self._read}
            are_changed = not read.issuperset((id(grad), version) for grad, version in self._existing())
            if self._have_ended():
                self._reset()
            elif are_changed and to_clip:
                warn_of_forgotten_clip()
                self._reset()
            elif are_changed:
                raise self.changed()
        for member in self._members:
            if member.param.grad is not None:
                check_gradient(member, member.param.grad, self._dtype)

    def _have_ended(self) -> bool:
        """Whether gradients that were read were dropped, or cleared in place; where there were none they have, too."""
        read = {id(grad()): version for grad, version in self._read}
        kept = [(grad, version - read[id(grad)]) for grad, version in self._existing() if id(grad) in read]
        return all(num_changes >= 1 for _, num_changes in kept) and not any(grad.any() for grad, _ in kept)

    def reduce(self, collectives: Collectives) -> None:
        """See ``Gradients.reduce``: copies this rank's fragments."""
        grads = self._local_gradients()
        for fragment in self._fragments:
            if (grad := grads.get(fragment.slot)) is not None:
                self.shard[fragment.in_shard].copy_(grad.reshape(-1)[fragment.in_param])

    def _local_gradients(self) -> dict[int, Tensor]:
        """This rank's part of each gradient there is, by slot."""
        params = {slot: member.param for slot, member in enumerate(self._members)}
        return {slot: local_gradient(param) for slot, param in params.items() if param.grad is not None}


class CopiedGradients(ForeignGradients):
    """Gradients of borrowed parameters, which live elsewhere and are still to be averaged over ranks.

    They are only read: the flat buffer of their exchange exists while it is under way.
    """

    def reduce(self, collectives: Collectives) -> None:
        buffer = self.shard.new_zeros(self._layout.numel)
        views = self._arrangement.views(buffer)
        for slot, grad in self._local_gradients().items():
            views[slot].copy_(grad)
        self._reduction = collectives.reduce_scatter_mean(buffer, self.shard)
