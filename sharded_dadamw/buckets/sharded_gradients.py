"""Gradients of which only this rank's shard of the mean is kept, and ``p.grad`` is None from then on (ZeRO stage 2).

The smallest parameter of a bucket has zeros in ``p.grad`` instead, a witness: whoever clips, scales or drops what
backward has left writes into it, or drops it. torch's ``clip_grad_norm_`` finds no gradient, and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import or_

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.gradients import GRAD_OF, HOLDS_MEANS, HookedGradients, Stage, are_present
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.update.storage import Allocate

_LARGEST_WITNESS = 2**16
"""Elements. What is larger has None in ``p.grad``, too."""


def witness_of(members: Sequence[NamedParameter]) -> int | None:
    """The slot of a bucket's witness, if it has one."""
    smallest = min(range(len(members)), key=lambda slot: members[slot].param.numel())
    return smallest if members[smallest].param.numel() <= _LARGEST_WITNESS else None


class SpareBuffers:
    """Memory for gradients between backward and their reduction, which is kept for the next buckets of about its size.

    New memory costs a page fault for every 4 KiB. A bucket that would fill less than half of a buffer does not get it:
    it may be that of an embedding, whose turn comes meanwhile.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._spares: list[Tensor] = []

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer [numel] with anything in it."""
        alike = (spare for spare in self._spares if spare.dtype == dtype and spare.device == device)
        near = [spare for spare in alike if numel / 2 <= spare.numel() <= 2 * numel]
        if near:
            largest = max(near, key=Tensor.numel)
            self._spares = [spare for spare in self._spares if spare is not largest]
            if largest.numel() >= numel:  # else a larger one comes back in its place
                return largest[:numel]
        return self._allocate(numel, dtype, device)[:]

    def give_back(self, buffer: Tensor) -> None:
        """Take back what nobody reads any more."""
        assert buffer._base is not None  # of which ``take`` has handed out a part
        self._spares.append(buffer._base)


class ShardedGradients(HookedGradients):
    """Gradients of which only this rank's shard of the mean is kept.

    The means of several reductions add up there, once the optimizer's ``zero_grad`` has been called. A flat buffer
    exists from the first gradient until the reduction is done; gradients that come later go into another one.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        wire_dtype: torch.dtype | None,
        num_passes: int | None,
        *,
        spares: SpareBuffers,
    ) -> None:
        super().__init__(arrangement, wire_dtype, num_passes)
        self._spares = spares
        self.shard = torch.zeros(self._layout.shard_numel, dtype=self._dtype, device=self._device)
        self._leaving: Tensor | None = None
        self._holds_a_mean = False
        self._is_cleared = True
        self._witness_slot = witness_of(self._members)
        self._witness: Tensor | None = None
        self._version = 0  # of the witness, as we left it

    @property
    def present(self) -> tuple[bool, ...]:
        """See ``Gradients.present``: those of the mean, and those that are still to be averaged."""
        of_mean = super().present
        return of_mean if of_mean is self._all_present else tuple(map(or_, of_mean, are_present(self._params)))

    def _reset(self) -> None:
        super()._reset()
        self._dismiss_witness()
        if self._buffer is not None:
            for member, view in zip(self._members, self._views, strict=True):
                if member.param.grad is view:
                    member.param.grad = None
            self._spares.give_back(self._buffer)
            self._buffer, self._views, self._places = None, [], []
        self._has_grad = [False] * len(self._members)
        self._holds_a_mean = False

    def consume(self) -> None:
        super().consume()
        self._dismiss_witness()
        self._is_cleared = False

    def drop(self) -> None:
        super().drop()
        self._is_cleared = True

    def collect(self, *, to_clip: bool) -> None:
        """See ``Gradients.collect``. After a step there is nothing to clear."""
        if self.stage is Stage.CONSUMED:
            self._reset()
        self._require_whole()
        self._leave_moved()
        if self._witness is not None and self._witness_slot is not None:
            grad = self._params[self._witness_slot].grad
            if grad is not self._witness or grad._version != self._version:
                raise self._touched(self._witness_slot)
        for slot, grad in enumerate(map(GRAD_OF, self._params)):
            is_witness = grad is self._witness and slot == self._witness_slot
            if grad is not None and not is_witness:
                if self.stage is Stage.READ:
                    raise self.changed()
                if self._has_grad[slot] and not (self._buffer is not None and grad is self._views[slot]):
                    raise self._touched(slot)
                self._adopt(slot)

    def reduce(self, collectives: Collectives) -> None:
        """See ``Gradients.reduce``; adds to what is there. Takes part without gradients, too."""
        if self.stage is Stage.CONSUMED:
            self._reset()
        buffer = self._filling()
        self._leave_moved()
        for slot, (param, view) in enumerate(zip(self._params, self._views, strict=True)):
            grad = param.grad
            is_as_delivered = grad is view
            if not is_as_delivered and grad is not self._witness:  # it was assigned
                with suppress(RuntimeError, ValueError):  # which the agreement raises, where other ranks hear of it
                    self._adopt(slot)
                grad = param.grad
            if grad is view:
                self._has_grad[slot], param.grad = True, None
                if slot == self._witness_slot and is_as_delivered:  # else DistributedDataParallel wants its own view
                    param.grad = self._witness = torch.zeros(param.shape, dtype=self._dtype, device=self._device)
                    self._version = self._witness._version
                    setattr(self._witness, HOLDS_MEANS, True)
            else:
                view.zero_()
        self._buffer, self._views, self._places, self._leaving = None, [], [], buffer
        self._await_all()
        if self._passes is not None:
            self._passes.free()
        if self.stage is Stage.LOCAL:
            self.stage = Stage.REDUCED
        add, self._holds_a_mean = self._holds_a_mean, True
        self._reduction = collectives.reduce_scatter_mean(buffer, self.shard, add=add, wire_dtype=self._wire_dtype)

    def wait(self) -> None:
        """See ``Gradients.wait``; the buffer may hold other gradients then."""
        super().wait()
        if self._leaving is not None:
            self._spares.give_back(self._leaving)
            self._leaving = None

    def is_taken(self, slot: int) -> bool:
        grad = self._params[slot].grad
        return self._has_grad[slot] and (grad is None or grad is self._witness)

    def _dismiss_witness(self) -> None:
        witness, self._witness = self._witness, None
        if self._witness_slot is not None and self._params[self._witness_slot].grad is witness:
            self._params[self._witness_slot].grad = None

    def _touched(self, slot: int) -> RuntimeError:
        return RuntimeError(
            f"the gradient of {self._members[slot].name} was changed, dropped or made anew after backward, which with "
            "GradientResidency.SHARDED leaves nothing but this rank's shard of the mean; clip by "
            "optimizer.clip_grad_norm_() or max_grad_norm=, and drop by optimizer.zero_grad(). If something else "
            "averages gradients, such as DistributedDataParallel, pass ShardingConfig(reduce_gradients=False)"
        )

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.CONSUMED:
            self._reset()
        if self.stage is Stage.READ or (self._passes is not None and self._holds_a_mean):
            raise self._too_late(slot)
        if self._witness is not None and slot == self._witness_slot:
            if self._witness._version == self._version:  # backward has found another one, or none
                raise self._touched(slot)
            setattr(self._witness, HOLDS_MEANS, False)
            self._witness = None
        if self._holds_a_mean and not self._is_cleared:  # model.zero_grad(), which finds p.grad at None, drops no mean
            raise RuntimeError(
                f"backward reached {self._members[slot].name} again after its gradient was averaged over ranks, and it "
                "was not dropped since the last step; call optimizer.zero_grad() between a step and the next backward, "
                "for model.zero_grad() cannot drop sharded gradients"
            )

    def _target(self, slot: int) -> Tensor:
        self.stage = Stage.LOCAL
        self._filling()
        return super()._target(slot)

    def _filling(self) -> Tensor:
        """The buffer that gradients go to until the next reduction."""
        if self._buffer is None:
            self._lay_out(self._spares.take(self._layout.numel, self._dtype, self._device))
        assert self._buffer is not None
        return self._buffer
