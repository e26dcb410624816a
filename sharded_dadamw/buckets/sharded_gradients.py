"""Gradients in a flat buffer that goes (ZeRO stage 2): only this rank's shard of their mean is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_dadamw.buckets.gradients import Stage
from sharded_dadamw.buckets.hooked_gradients import HookedGradients
from sharded_dadamw.comm.collectives import Collectives, Done, Handle
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Allocate


class SpareBuffers:
    """Memory for gradients between backward and their reduction; one buffer is kept for the next ones."""

    def __init__(self, allocate: Allocate) -> None:
        """Make new ones with ``allocate``."""
        self._allocate = allocate
        self._spare: Tensor | None = None
        self._returned: list[tuple[Tensor, Handle]] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer [numel] with anything in it."""
        self.release()
        spare, self._spare = self._spare, None
        if spare is None or spare.numel() < numel or spare.dtype != dtype or spare.device != device:
            spare = self._allocate(numel, dtype, device)
        return spare[:numel]

    def give_back(self, buffer: Tensor, reduction: Handle) -> None:
        """Keep it until other ranks have read it."""
        self._returned.append((buffer, reduction))

    def release(self) -> None:
        """Wait until other ranks have read what was given back, and keep the largest of it."""
        for buffer, reduction in self._returned:
            reduction.wait()
            if self._spare is None or self._spare.numel() < buffer.numel():
                self._spare = buffer
        self._returned.clear()


class ShardedGradients(HookedGradients):
    """Gradients of which only this rank's shard of the mean is kept; the means of several reductions add up there.

    A flat buffer exists from the first gradient until the reduction is done. ``p.grad`` is None from the moment at
    which the reduction begins, so gradients that come later go into another buffer, and another reduction.
    """

    def __init__(
        self,
        members: Sequence[NamedParameter],
        layout: BucketLayout,
        *,
        dtype: torch.dtype | None,
        wire_dtype: torch.dtype | None,
        spares: SpareBuffers,
    ) -> None:
        """Allocate the shard; see :class:`HookedGradients`."""
        super().__init__(members, layout, dtype=dtype, wire_dtype=wire_dtype)
        self._device = members[0].param.device
        self._spares = spares
        self.shard = torch.zeros(layout.shard_numel, dtype=self._dtype, device=self._device)
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []
        self._had = bytearray(len(members))
        self._holds_a_mean = False

    @property
    def present(self) -> tuple[bool, ...]:
        """See :meth:`Gradients.present`; those that came since gradients were last dropped."""
        return tuple(
            bool(had) and member.param.requires_grad for had, member in zip(self._had, self._members, strict=True)
        )

    @property
    def are_reduced(self) -> bool:
        """See :meth:`Gradients.are_reduced`."""
        return self.stage is Stage.REDUCED and any(self._had)

    @property
    def still_holds_last_step(self) -> bool:
        """See :meth:`Gradients.still_holds_last_step`."""
        return self.stage is Stage.CONSUMED

    @property
    def are_partly_local(self) -> bool:
        """See :meth:`Gradients.are_partly_local`."""
        return self._buffer is not None

    def mark(self, stage: Stage) -> None:
        """See :meth:`Gradients.mark`; LOCAL drops all there are."""
        self.stage = stage
        if stage is not Stage.LOCAL:
            return
        if self._buffer is not None:
            for member, view in zip(self._members, self._views, strict=True):
                if member.param.grad is view:
                    member.param.grad = None
            self._spares.give_back(self._buffer, Done())
            self._buffer = None
        self._had = bytearray(len(self._members))
        self._holds_a_mean = False
        self._await_all()

    def collect(self, *, to_clip: bool) -> None:
        """See :meth:`Gradients.collect`. After a step there is nothing to clear."""
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        if self.stage is Stage.REDUCED and any(member.param.grad is not None for member in self._members):
            raise self._changed()
        for slot, member in enumerate(self._members):
            if member.param.grad is not None:
                self._adopt(slot)

    def reduce(self, collectives: Collectives) -> Handle | None:
        """See :meth:`Gradients.reduce`; adds to what is there. Takes part without gradients, too."""
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        buffer = (
            self._spares.take(self._layout.numel, self._dtype, self._device) if self._buffer is None else self._buffer
        )
        views = self._views_of(buffer) if self._buffer is None else self._views
        for member, view in zip(self._members, views, strict=True):
            if member.param.grad is not view:  # none came since the last reduction, or it was dropped
                view.zero_()
            member.param.grad = None
        self._buffer, self._views = None, []
        self._await_all()
        add, self._holds_a_mean = self._holds_a_mean, True
        reduction = collectives.reduce_scatter_mean(buffer, self.shard, add=add, wire_dtype=self._wire_dtype)
        return _ThenGiveBack(reduction, buffer, self._spares)

    def release(self) -> None:
        """See :meth:`Gradients.release`."""
        self._spares.release()

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        if self.stage is Stage.REDUCED:
            raise self._too_late(slot)

    def _adopt(self, slot: int) -> None:
        if self._buffer is None:
            self._buffer = self._spares.take(self._layout.numel, self._dtype, self._device)
            self._views = self._views_of(self._buffer)
        self._move(slot, self._views[slot])
        self._had[slot] = True


class _ThenGiveBack:
    """A reduction under way, after which its buffer may hold other gradients."""

    def __init__(self, reduction: Handle, buffer: Tensor, spares: SpareBuffers) -> None:
        self._reduction = reduction
        self._loan: tuple[Tensor, SpareBuffers] | None = (buffer, spares)

    def arrive(self) -> None:
        self._reduction.arrive()
        if self._loan is not None:
            buffer, spares = self._loan
            self._loan = None
            spares.give_back(buffer, self._reduction)

    def wait(self) -> None:
        self.arrive()
        self._reduction.wait()
