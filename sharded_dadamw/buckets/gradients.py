"""The gradients of one bucket: what they mean at each moment of a step, whoever holds them.

    FullGradients (ZeRO stage 1)      the flat buffer stays, and this rank's slice of it is averaged in place
    ShardedGradients (ZeRO stage 2)   the flat buffer goes, and means of several backward passes add up in the shard
    foreign_gradients                 p.grad is the memory of others, and is only read

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. A hook moves the first gradient that backward produces into the bucket's flat
buffer at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view. No
other file assigns ``p.grad``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum
from itertools import repeat
from operator import and_, attrgetter, is_, is_not

import torch
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.pending import DONE
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.layout.placement import local
from sharded_dadamw.update.storage import Allocate

_GRAD_OF, _IS_TRAINABLE = attrgetter("grad"), attrgetter("requires_grad")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NUM_SAMPLES = 64
"""Elements of a slice that are remembered, to tell how averages were changed."""


class Stage(Enum):
    """What the gradients of a bucket mean right now."""

    LOCAL = "this rank's own gradients, accumulating"
    REDUCED = "this rank's shard holds the mean over ranks; what p.grad holds elsewhere is still local"
    CONSUMED = "a step has used them, or ranks disagreed about them; zero_grad() makes room for new ones"


class Gradients(ABC):
    """The gradients of one bucket on one rank.

    Attributes:
        stage: What the gradients mean right now.
        is_read: Whether the mean has been used, as by a clip, so that it must not change any more.
        shard: [n], this rank's part of the mean over ranks, once they are reduced.
    """

    shard: Tensor

    def __init__(self, members: Sequence[NamedParameter]) -> None:
        """Start without gradients, for ``members`` in slot order."""
        self.stage = Stage.LOCAL
        self.is_read = False
        self._members = tuple(members)
        self._params = tuple(member.param for member in members)
        self._reduction = DONE
        self._is_lost = False

    @property
    @abstractmethod
    def present(self) -> tuple[bool, ...]:
        """Per slot whether its parameter is to be updated."""

    @property
    @abstractmethod
    def are_clipped(self) -> bool:
        """Whether there are gradients whose mean has been used, and no step has come since."""

    @property
    def still_holds_last_step(self) -> bool:
        """Whether ``shard`` is what the last step has used, as far as can be known."""
        return self.stage is Stage.CONSUMED

    @abstractmethod
    def mark(self, stage: Stage, *, is_read: bool = False) -> None:
        """Say what the gradients mean from now on."""

    def drop(self) -> None:
        """Forget all there are, as the optimizer's ``zero_grad`` does."""
        self.mark(Stage.LOCAL)

    @abstractmethod
    def collect(self, *, to_clip: bool) -> None:
        """Make sure of the gradients before they are used: bring in those that were assigned by hand.

        Args:
            to_clip: They are about to be clipped, perhaps again, and not yet to be used up.

        Raises:
            RuntimeError: A step has used these gradients already, they were changed after they were clipped, or their
                reduction was broken off.
            ValueError: A gradient is sparse, or in another dtype than it should be.
        """

    @abstractmethod
    def reduce(self, collectives: Collectives) -> None:
        """Begin to fill ``shard`` with the mean over ranks; ``wait`` ends that. Collective."""

    def wait(self) -> None:
        """Wait until ``shard`` is the mean and gradients may be written; more than once does no harm.

        Raises:
            RuntimeError: As :meth:`~sharded_dadamw.comm.pending.Pending.wait`.
        """
        try:
            self._reduction.wait()
        except BaseException:  # after a KeyboardInterrupt, a part of the mean may be missing
            self._is_lost = True
            raise
        self._reduction = DONE

    def remember(self) -> None:  # noqa: B027 - most have nothing to do
        """Take note of local gradients as backward has left them, for :meth:`change`."""

    def change(self, *, is_unscaled: bool) -> Tensor | None:
        """Return by what factors gradients were multiplied since they were made, or since this was last asked.

        Local gradients may be edited freely, and the result is averaged. Of them only a common factor is reported,
        because it may come from torch's ``clip_grad_norm_``, whose norm differs from rank to rank.

        Args:
            is_unscaled: A loss scaler says that it has divided gradients, which torch does not count as a change.

        Returns:
            fp64 [k], of a sample of elements; nan where that does not show, inf where it is no multiplication. None
            where nobody wrote into them.
        """
        return None

    def sum_of_bits(self) -> Tensor:
        """Return the sum of all elements of all gradients there are, taken as integers: 0-d int64, in [0, 2**60).

        It does not depend on the order of addition, so equal gradients have equal sums on any rank.
        """
        grads = [local(param.grad.detach()).nan_to_num() for param in self._params if param.grad is not None]
        sums = [grad.view(_INTEGERS[grad.itemsize]).sum(dtype=torch.int64) for grad in grads]
        return torch.stack([torch.zeros((), dtype=torch.int64, device=self.shard.device), *sums]).sum() & (2**60 - 1)

    def _name(self) -> str:
        """A parameter with a gradient, for messages."""
        having = [member for member in self._members if member.param.grad is not None]
        return min(having or self._members, key=lambda member: member.index).name

    def _require_reduced(self) -> None:
        if self._is_lost:
            raise RuntimeError(
                f"the reduction of gradients was broken off, in the bucket of {self._name()}; drop them by "
                "optimizer.zero_grad()"
            )

    def _changed(self) -> RuntimeError:
        return RuntimeError(
            f"gradients were changed between clip_grad_norm_() and step(), in the bucket of {self._name()}; by then "
            "they have been averaged over ranks, so change them before clipping, or drop them with zero_grad()"
        )


class HookedGradients(Gradients):
    """Gradients of plain parameters, which backward delivers one by one through hooks.

    Attributes:
        num_missing: Of how many slots the gradient has not come since the last reduction.
    """

    def __init__(self, members: Sequence[NamedParameter], layout: BucketLayout, wire_dtype: torch.dtype | None) -> None:
        """Start without gradients.

        Args:
            members: The parameters, in slot order, whose gradients are of one dtype.
            layout: Where they lie.
            wire_dtype: In what gradients are sent to other ranks; None as they are.
        """
        super().__init__(members)
        self._dtype = members[0].gradient_dtype
        self._wire_dtype = wire_dtype
        self._layout = layout
        self._marked = [False] * len(members)  # per slot whether there is a gradient, as last looked or delivered
        self._await_all()

    @property
    def present(self) -> tuple[bool, ...]:
        """See :meth:`Gradients.present`; as :meth:`collect` has found them."""
        return tuple(map(and_, self._marked, map(_IS_TRAINABLE, self._params)))

    @property
    def are_clipped(self) -> bool:
        """See :attr:`Gradients.are_clipped`."""
        return self.stage is Stage.REDUCED and self.is_read and any(self._marked)

    def mark(self, stage: Stage, *, is_read: bool = False) -> None:
        """See :meth:`Gradients.mark`."""
        self.stage, self.is_read = stage, is_read
        if stage is Stage.LOCAL:
            self._reduction, self._is_lost = DONE, False
            self._await_all()

    @property
    def are_complete(self) -> bool:
        """Whether backward has delivered all of them since the last reduction."""
        return self.stage is Stage.LOCAL and not self.num_missing

    def deliver(self, slot: int, *, counts: bool) -> None:
        """Take the gradient that backward has just accumulated for a slot.

        Args:
            slot: Whose it is.
            counts: Whether it is the last of this slot before a reduction, as far as backward passes go.

        Raises:
            RuntimeError: The gradients before it were used or averaged already, and are still there.
            ValueError: It is sparse.
        """
        self._make_room(slot)
        self._adopt(slot)
        if counts and not self._has_come[slot]:
            self._has_come[slot] = True
            self.num_missing -= 1

    def bring_zeros(self, present: Sequence[bool]) -> None:
        """Give the parameters of these slots a gradient of zeros each."""
        for param, is_present in zip(self._params, present, strict=True):
            if is_present:
                param.grad = torch.zeros_like(param, dtype=self._dtype)

    @abstractmethod
    def _make_room(self, slot: int) -> None:
        """Make sure that a gradient may come, and where it goes."""

    @abstractmethod
    def _adopt(self, slot: int) -> None:
        """Move one parameter's gradient, if it has one, into the flat buffer, where it is not there already."""

    def _await_all(self) -> None:
        self._has_come = bytearray(len(self._members))
        self.num_missing = len(self._members)

    def _move(self, slot: int, view: Tensor) -> None:
        member = self._members[slot]
        grad = member.param.grad
        if grad is None or grad is view:
            return
        check_gradient(member, grad, self._dtype)
        view.copy_(grad.detach())  # backward with create_graph must not draw the buffer into its graph
        member.param.grad = view

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + numel].view(member.param.shape)
            for member, offset, numel in zip(self._members, self._layout.offsets, self._layout.numels, strict=True)
        ]

    def _too_late(self, slot: int) -> RuntimeError:
        instead = (
            "all of them before clip_grad_norm_()"
            if self.is_read
            else "or pass ShardingConfig(overlap=False), which averages in step()"
        )
        return RuntimeError(
            f"backward reached {self._members[slot].name} again after its gradient was averaged over ranks; run every "
            f"backward of a step but the last inside optimizer.no_sync(), {instead}"
        )


class FullGradients(HookedGradients):
    """Gradients in a flat buffer that stays.

    Attributes:
        buffer: [num_ranks * n], the memory of ``p.grad`` of every parameter that has one.
    """

    def __init__(
        self,
        members: Sequence[NamedParameter],
        layout: BucketLayout,
        wire_dtype: torch.dtype | None,
        *,
        rank: int,
        allocate: Allocate,
    ) -> None:
        """Allocate the buffer; see :class:`HookedGradients`."""
        super().__init__(members, layout, wire_dtype)
        self.buffer = allocate(layout.numel, self._dtype, members[0].param.device)
        # Another name for the same memory: what is written through it does not count as a change to p.grad.
        self._exchanged = self.buffer.data
        self._range = layout.shard_range(rank)
        self.shard = self._exchanged[slice(*self._range)]
        self._views = self._views_of(self.buffer)
        self._version = 0
        self._sample: Tensor | None = None

    def collect(self, *, to_clip: bool) -> None:
        """See :meth:`Gradients.collect`. Averages may have been dropped, or before a clip been changed in place."""
        if self.stage is not Stage.LOCAL and self._have_ended():
            if (
                self.stage is Stage.REDUCED
                and not self.is_read
                and any(self._marked)
                and any(are_present(self._params))
            ):
                raise self._assigned()
            self.mark(Stage.LOCAL)
        self._require_reduced()
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
        are_assigned = not all(held) and held != list(map(is_not, map(_GRAD_OF, self._params), repeat(None)))
        if self.is_read and (are_assigned or held != self._marked or self.buffer._version != self._version):
            raise self._changed()
        if are_assigned:
            raise self._assigned()
        self._marked = held

    def reduce(self, collectives: Collectives) -> None:
        """See :meth:`Gradients.reduce`; in place. Means and used ones only take part for the other ranks' sake."""
        out = self.shard
        if self.stage is Stage.LOCAL:
            self.mark(Stage.REDUCED)
            self._marked, self._version, self._sample = self._held(), self.buffer._version, None
        else:
            out = torch.empty_like(self.shard)
        self._reduction = collectives.reduce_scatter_mean(self._exchanged, out, wire_dtype=self._wire_dtype)

    def wait(self) -> None:
        """See :meth:`Gradients.wait`; remembers a sample of the mean."""
        super().wait()
        if self._sample is None:
            self._sample = self._take_sample()

    def mark(self, stage: Stage, *, is_read: bool = False) -> None:
        """See :meth:`Gradients.mark`."""
        super().mark(stage, is_read=is_read)
        if stage is Stage.LOCAL:
            self._sample = None

    def remember(self) -> None:
        """See :meth:`Gradients.remember`."""
        if self.stage is Stage.LOCAL:
            self._marked, self._version = self._held(), self.buffer._version
            self._sample = self._take_sample()

    def change(self, *, is_unscaled: bool) -> Tensor | None:
        """See :meth:`Gradients.change`."""
        may_differ = is_unscaled or self.buffer._version != self._version
        if self.stage is Stage.CONSUMED or self._sample is None or not may_differ:
            return None
        before, self._sample, self._version = self._sample, self._take_sample(), self.buffer._version
        then, now = before.to(torch.float64), self._sample.to(torch.float64)
        shows = then.isfinite() & ((then != 0) | (now != 0))
        if self._dtype is torch.float16:  # which has few digits below its smallest normal number
            shows &= now.abs() >= torch.finfo(self._dtype).smallest_normal
        factors = now / then
        factors = torch.where(shows, torch.where(factors >= 0, factors, torch.inf), torch.nan)
        if self.stage is Stage.REDUCED:
            return factors
        known = factors.nan_to_num(nan=0.0, posinf=torch.inf).amax(), factors.nan_to_num(nan=torch.inf).amin()
        is_one = known[0] <= known[1] * (1 + 4 * torch.finfo(self._dtype).eps)
        return torch.where(is_one, factors, torch.nan)

    def _take_sample(self) -> Tensor:
        """A sample of the mean's shard, or of local gradients; nan where there is no gradient."""
        start, stop = self._range if self.stage is Stage.REDUCED else (0, self.buffer.numel())
        stride = max(1, (stop - start) // _NUM_SAMPLES)
        sample = self._exchanged[start:stop:stride].clone()
        if not all(self._marked):
            slots = [bisect_right(self._layout.offsets, place) - 1 for place in range(start, stop, stride)]
            absent = torch.tensor([not self._marked[slot] for slot in slots], dtype=torch.bool)
            absent = absent.to(sample.device, non_blocking=True)
            sample.masked_fill_(absent, torch.nan)
        return sample

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.LOCAL:
            self._sample = None
            return
        if self._have_ended(arriving=slot):
            self.mark(Stage.LOCAL)
        elif self.stage is Stage.CONSUMED:
            raise _uncleared(self._name())
        else:
            raise self._too_late(slot)

    def _adopt(self, slot: int) -> None:
        self._move(slot, self._views[slot])

    def _held(self) -> list[bool]:
        """Per slot whether ``p.grad`` is our view."""
        return list(map(is_, map(_GRAD_OF, self._params), self._views))

    def _assigned(self) -> RuntimeError:
        return RuntimeError(
            f"p.grad was assigned after its average over ranks was made, in the bucket of {self._name()}; multiply "
            "gradients in place, by one number on all ranks; for any other change have DistributedDataParallel average "
            "them, and pass ShardingConfig(reduce_gradients=False). Before gradients of your own, call zero_grad()"
        )

    def _have_ended(self, *, arriving: int | None = None) -> bool:
        """Whether gradients that were averaged were dropped or cleared, by ``model.zero_grad`` or by hand.

        Args:
            arriving: The slot to which backward has just delivered a gradient, or None.
        """
        if not any(self._marked):
            return self.stage is Stage.CONSUMED or arriving is not None or any(are_present(self._params))
        kept = [slot for slot, (now, then) in enumerate(zip(self._held(), self._marked, strict=True)) if now and then]
        if not kept or (self.stage is Stage.REDUCED and not self.is_read and arriving is None):
            return not kept  # those that were cleared are means times zero, and to look would be to wait for the device
        # Clearing in place changes every gradient and leaves zeros. The one into which backward has just added cannot
        # show its zeros any more, but has changed once more. Views share one count of changes with their buffer.
        filled = [slot for slot in kept if self._views[slot].numel()]
        num_changes = len(filled) + (arriving in filled)
        return self.buffer._version - self._version >= num_changes and not any(
            self._views[slot].any() for slot in filled if slot != arriving
        )


class SpareBuffers:
    """Memory for gradients between backward and their reduction; the largest buffer is kept for the next ones."""

    def __init__(self, allocate: Allocate) -> None:
        """Make new ones with ``allocate``."""
        self._allocate = allocate
        self._spare: Tensor | None = None

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer [numel] with anything in it."""
        spare, self._spare = self._spare, None
        if spare is None or spare.numel() < numel or spare.dtype != dtype or spare.device != device:
            spare = self._allocate(numel, dtype, device)
        return spare[:numel]

    def give_back(self, buffer: Tensor) -> None:
        """Take back what nobody reads any more."""
        if self._spare is None or self._spare.numel() < buffer.numel():
            self._spare = buffer


class ShardedGradients(HookedGradients):
    """Gradients of which only this rank's shard of the mean is kept.

    The means of several reductions add up there, once the optimizer's ``zero_grad`` has been called.

    A flat buffer exists from the first gradient until the reduction is done. ``p.grad`` is None from the moment at
    which the reduction begins, so gradients that come later go into another buffer, and another reduction.
    """

    def __init__(
        self,
        members: Sequence[NamedParameter],
        layout: BucketLayout,
        wire_dtype: torch.dtype | None,
        *,
        spares: SpareBuffers,
    ) -> None:
        """Allocate the shard; see :class:`HookedGradients`."""
        super().__init__(members, layout, wire_dtype)
        self._device = members[0].param.device
        self._spares = spares
        self.shard = torch.zeros(layout.shard_numel, dtype=self._dtype, device=self._device)
        self._buffer: Tensor | None = None
        self._views: list[Tensor] = []  # of the buffer, where there is one
        self._leaving: Tensor | None = None
        self._holds_a_mean = False
        self._is_cleared = True

    def mark(self, stage: Stage, *, is_read: bool = False) -> None:
        """See :meth:`Gradients.mark`; LOCAL drops all there are."""
        super().mark(stage, is_read=is_read)
        self._is_cleared = self._is_cleared and stage is not Stage.CONSUMED
        if stage is not Stage.LOCAL:
            return
        if self._buffer is not None:
            for member, view in zip(self._members, self._views, strict=True):
                if member.param.grad is view:
                    member.param.grad = None
            self._spares.give_back(self._buffer)
            self._buffer = None
        self._marked = [False] * len(self._members)
        self._holds_a_mean = False

    def drop(self) -> None:
        """See :meth:`Gradients.drop`."""
        super().drop()
        self._is_cleared = True

    def collect(self, *, to_clip: bool) -> None:
        """See :meth:`Gradients.collect`. After a step there is nothing to clear."""
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        self._require_reduced()
        for slot, member in enumerate(self._members):
            if member.param.grad is not None:
                if self.is_read:
                    raise self._changed()
                if self._marked[slot] and not (self._buffer is not None and member.param.grad is self._views[slot]):
                    raise RuntimeError(
                        f"the gradient of {member.name} is there again, after backward has delivered one; if something "
                        "else averages gradients, such as DistributedDataParallel, pass "
                        "ShardingConfig(reduce_gradients=False); otherwise assign none beside those of backward"
                    )
                self._adopt(slot)

    def reduce(self, collectives: Collectives) -> None:
        """See :meth:`Gradients.reduce`; adds to what is there. Takes part without gradients, too."""
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        buffer, views = self._buffer, self._views
        if buffer is None:
            buffer = self._spares.take(self._layout.numel, self._dtype, self._device)
            views = self._views_of(buffer)
        for member, view in zip(self._members, views, strict=True):
            if member.param.grad is not view:  # none came since the last reduction, or it was dropped
                view.zero_()
            member.param.grad = None
        self._buffer, self._views, self._leaving = None, [], buffer
        self._await_all()
        self.stage = Stage.REDUCED
        add, self._holds_a_mean = self._holds_a_mean, True
        self._reduction = collectives.reduce_scatter_mean(buffer, self.shard, add=add, wire_dtype=self._wire_dtype)

    def wait(self) -> None:
        """See :meth:`Gradients.wait`; the buffer may hold other gradients then."""
        super().wait()
        if self._leaving is not None:
            self._spares.give_back(self._leaving)
            self._leaving = None

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.CONSUMED:
            self.mark(Stage.LOCAL)
        if self.is_read:
            raise self._too_late(slot)
        if self._holds_a_mean and not self._is_cleared:  # model.zero_grad(), which finds p.grad at None, drops no mean
            raise RuntimeError(
                f"backward reached {self._members[slot].name} again after its gradient was averaged over ranks, and it "
                "was not dropped since the last step; call optimizer.zero_grad() between a step and the next backward, "
                "for model.zero_grad() cannot drop sharded gradients"
            )

    def _adopt(self, slot: int) -> None:
        self.stage = Stage.LOCAL
        if self._buffer is None:
            buffer = self._spares.take(self._layout.numel, self._dtype, self._device)
            self._views = self._views_of(buffer)
            self._buffer = buffer
        self._move(slot, self._views[slot])
        self._marked[slot] = True


def are_present(params: Sequence[Tensor]) -> tuple[bool, ...]:
    """Per parameter whether it has a gradient, and is to be updated."""
    grads = map(_GRAD_OF, params)
    return tuple(map(and_, map(is_not, grads, repeat(None)), map(_IS_TRAINABLE, params)))


def check_gradient(member: NamedParameter, grad: Tensor, dtype: torch.dtype) -> None:
    """Refuse a gradient that is not what is expected of a member's.

    Raises:
        ValueError: It is sparse, or not in ``dtype``.
    """
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != dtype:
        raise ValueError(
            f"gradient of {member.name}: expected {dtype}, got {grad.dtype}; if the model was cast, as by "
            "model.bfloat16(), build the optimizer after that"
        )


def _uncleared(name: str) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {name} is one that the last step() has used, or refused; it has been averaged in place, so "
        "call optimizer.zero_grad() between a step and the next backward"
    )
