"""Gradients in a flat buffer that stays (ZeRO stage 1): reductions average in place, each rank its own slice."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import and_, attrgetter, is_

import torch
from torch import Tensor

from sharded_dadamw.buckets.gradients import Stage, are_present
from sharded_dadamw.buckets.hooked_gradients import HookedGradients
from sharded_dadamw.comm.collectives import Collectives, Handle
from sharded_dadamw.comm.in_flight import Arrival, in_any_mode
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Allocate

_GRAD_OF, _IS_TRAINABLE = attrgetter("grad"), attrgetter("requires_grad")


class OwnGradients(HookedGradients):
    """Gradients that live in a flat buffer of ours, and stay there.

    Attributes:
        buffer: [num_ranks * n], the memory of ``p.grad`` of every parameter that has one.
    """

    can_settle_scale = True

    def __init__(
        self,
        members: Sequence[NamedParameter],
        layout: BucketLayout,
        rank: int,
        *,
        dtype: torch.dtype | None,
        wire_dtype: torch.dtype | None,
        allocate: Allocate,
    ) -> None:
        """Allocate the buffer; see :class:`HookedGradients`."""
        super().__init__(members, layout, dtype=dtype, wire_dtype=wire_dtype)
        self.buffer = allocate(layout.numel, self._dtype, members[0].param.device)
        # Other names for the same memory: what is written through them does not count as a change to p.grad.
        self._exchanged = self.buffer.data
        self.shard = self._exchanged[slice(*layout.shard_range(rank))]
        self._views = self._views_of(self.buffer)
        self._marked = (False,) * len(members)
        self._version = 0
        self._reduction: _Reduction | None = None

    @property
    def present(self) -> tuple[bool, ...]:
        """See :meth:`Gradients.present`; as :meth:`collect` has found them."""
        return tuple(map(and_, self._marked, map(_IS_TRAINABLE, self._params)))

    @property
    def are_reduced(self) -> bool:
        """See :meth:`Gradients.are_reduced`."""
        return self.stage is Stage.REDUCED and any(self._marked)

    @property
    def still_holds_last_step(self) -> bool:
        """See :meth:`Gradients.still_holds_last_step`; backward may write into it from ``zero_grad`` on."""
        return self.stage is Stage.CONSUMED

    def mark(self, stage: Stage) -> None:
        """See :meth:`Gradients.mark`; remembers which they are, so that their end is noticed."""
        self.stage = stage
        if stage is Stage.LOCAL:
            self._await_all()
        elif stage is Stage.REDUCING:
            self._marked, self._version = self._held(), self.buffer._version
        elif stage is Stage.REDUCED:
            self._version = self.buffer._version  # which are there, collect() has found out

    def have_ended(self, *, arriving: int | None = None) -> bool:
        """See :meth:`Gradients.have_ended`."""
        if not any(self._marked):
            return self.stage is not Stage.REDUCED or arriving is not None or any(are_present(self._params))
        kept = [slot for slot, (now, then) in enumerate(zip(self._held(), self._marked, strict=True)) if now and then]
        # Clearing in place changes every gradient and leaves zeros. The one into which backward has just added cannot
        # show its zeros any more, but has changed once more. Views share one count of changes with their buffer.
        filled = [slot for slot in kept if self._views[slot].numel()]
        num_changes = len(filled) + (arriving in filled)
        return self.buffer._version - self._version >= num_changes and not any(
            self._views[slot].any() for slot in filled if slot != arriving
        )

    def collect(self, *, to_clip: bool) -> None:
        """See :meth:`Gradients.collect`. What backward has had reduced may be dropped, or changed in place."""
        if self.stage in (Stage.CONSUMED, Stage.REDUCED) and self.have_ended():
            self.mark(Stage.LOCAL)
        if self.stage is Stage.CONSUMED:
            raise _uncleared(self._name())
        if self.stage is Stage.LOCAL:
            self._marked = self._held()
            if not all(self._marked):
                for slot in range(len(self._members)):
                    self._adopt(slot)
                self._marked = self._held()
            return
        held = self._held()
        replaced = held != self._marked and any(
            member.param.grad is not None and not (now and then)
            for member, now, then in zip(self._members, held, self._marked, strict=True)
        )
        if self.stage is Stage.REDUCED and (held != self._marked or self.buffer._version != self._version or replaced):
            raise self._changed()
        if replaced:
            raise RuntimeError(
                f"p.grad was assigned after its average over ranks had begun, in the bucket of {self._name()}; change "
                "gradients in place, or pass ShardingConfig(overlap=False), which averages in step()"
            )
        self._marked = held

    def reduce(self, collectives: Collectives) -> Handle | None:
        """See :meth:`Gradients.reduce`; in place. Used ones only take part for the other ranks' sake, and stay."""
        self.release()
        out = self.shard
        if self.stage is Stage.CONSUMED:
            out = torch.empty_like(self.shard)
        else:
            self.mark(Stage.REDUCING)
        handle = collectives.reduce_scatter_mean(self._exchanged, out, wire_dtype=self._wire_dtype)
        self._reduction = _Reduction(handle, list(compress(self._views, self._marked)))
        if collectives.num_ranks > 1:
            self._reduction.hide()
        return self._reduction

    def release(self) -> None:
        """See :meth:`Gradients.release`."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> None:
        """See :meth:`Gradients.settle_scale_`."""
        # Only the CPU's value can be looked at without waiting for the device.
        if self.stage is Stage.LOCAL and (own.is_cuda or own != smallest):
            self._exchanged.mul_(smallest / own)

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.LOCAL:
            return
        if self.have_ended(arriving=slot):
            self.mark(Stage.LOCAL)
        elif self.stage is Stage.CONSUMED:
            raise _uncleared(self._name())
        else:
            raise self._too_late(slot)

    def _adopt(self, slot: int) -> None:
        if self._reduction is not None and self._params[slot].grad is not None:
            self.release()
        self._move(slot, self._views[slot])

    def _held(self) -> tuple[bool, ...]:
        """Per slot whether ``p.grad`` is our view."""
        return tuple(map(is_, map(_GRAD_OF, self._params), self._views))


class _Reduction(Arrival):
    """A reduction under way of gradients that can be read, and changed, as soon as it is done."""

    content = "gradients"

    def __init__(self, handle: Handle, views: Sequence[Tensor]) -> None:
        super().__init__(views, views[0].device if views else torch.device("cpu"))
        self._handle = handle

    def _arrive(self) -> None:
        self._handle.wait()

    def look(self) -> None:
        """See :meth:`Arrival.look`."""
        with self._lock:
            if not self.is_over:
                in_any_mode(self.arrive)

    def arrive(self) -> None:
        """The means are there to be used; who reads or changes gradients waits for the other ranks, too."""
        self._handle.arrive()


def _uncleared(name: str) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {name} is the one that the last step() has used (averaged in place); call "
        "optimizer.zero_grad() between a step and the next backward"
    )
