"""The gradients of one bucket: where they live, and what they mean at each moment of a step.

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. The first gradient that backward produces is moved into the bucket's flat buffer by
a hook, at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view.

    own, ZeRO stage 1       the buffer stays, and its own slice becomes the mean    LOCAL, REDUCING, REDUCED, CONSUMED
    sharded, ZeRO stage 2   the buffer goes, and means add up in the shard          LOCAL, REDUCED, CONSUMED
    foreign, copied         p.grad is somebody else's memory, and only read         LOCAL, REDUCED
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from itertools import compress, repeat
from operator import and_, attrgetter, is_, is_not
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from sharded_dadamw.collectives import Collectives, Done, Handle
from sharded_dadamw.in_flight import Arrival
from sharded_dadamw.layout import BucketLayout
from sharded_dadamw.parameters import NamedParameter
from sharded_dadamw.placement import local, local_gradient
from sharded_dadamw.storage import Allocate

_GRAD_OF, _IS_TRAINABLE = attrgetter("grad"), attrgetter("requires_grad")


class Stage(Enum):
    """What the gradients of a bucket mean right now."""

    LOCAL = "this rank's own gradients, accumulating"
    REDUCING = "this rank's slice is becoming the mean over ranks; p.grad elsewhere is still local"
    REDUCED = "this rank's shard holds the mean over ranks, and has been read"
    CONSUMED = "a step has used them; zero_grad() makes room for new ones"


class Gradients(ABC):
    """The gradients of one bucket on one rank.

    Attributes:
        shard: [n], this rank's part of the mean over ranks, once they are reduced.
        stage: What the gradients mean right now.
    """

    shard: Tensor

    def __init__(self, members: Sequence[NamedParameter]) -> None:
        """Start without gradients, for ``members`` in slot order."""
        self.stage = Stage.LOCAL
        self._members = tuple(members)
        self._params = tuple(member.param for member in members)

    @property
    @abstractmethod
    def present(self) -> tuple[bool, ...]:
        """Per slot whether its parameter is to be updated."""

    @property
    @abstractmethod
    def are_reduced(self) -> bool:
        """Whether there are gradients, and their mean over ranks has been read."""

    @property
    def are_complete(self) -> bool:
        """Whether backward has delivered all of them since the last reduction."""
        return False

    @property
    def are_partly_local(self) -> bool:
        """Whether some have come, or were assigned, that no reduction has taken, beside a mean of earlier ones."""
        return False

    @property
    @abstractmethod
    def still_holds_last_step(self) -> bool:
        """Whether ``shard`` is what the last step has used, as far as can be known."""

    @abstractmethod
    def mark(self, stage: Stage) -> None:
        """Say what the gradients mean from now on."""

    @abstractmethod
    def collect(self, *, to_clip: bool) -> None:
        """Make sure of the gradients before they are used: bring in those that were assigned by hand.

        Args:
            to_clip: They are about to be clipped, perhaps again, and not yet to be used up.

        Raises:
            RuntimeError: A step has used these gradients already, or they were changed after they were averaged.
            ValueError: A gradient is sparse, or in another dtype than it should be.
        """

    @abstractmethod
    def reduce(self, collectives: Collectives) -> Handle | None:
        """Begin to fill ``shard`` with the mean over ranks; None where it is filled at once. Collective."""

    def release(self) -> None:  # noqa: B027 - most have nothing to wait for
        """Wait until no other rank reads this one's gradients any more, before they are written."""

    @abstractmethod
    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """Bring the gradients of all ranks to one loss scale, and return the one that the mean then has.

        Each rank's loss scaler adapts to what that rank has seen, and a sum makes sense only of equal scales. Gradients
        are not unscaled here: in fp16 that would lose what the scale is there to save. Does nothing to those that are
        reduced already.

        Args:
            own: 0-d fp32, this rank's scale.
            smallest: 0-d fp32, the smallest of the ranks' scales.
        """

    def have_ended(self, *, arriving: int | None = None) -> bool:
        """Whether the marked gradients were dropped or cleared, by ``model.zero_grad`` or by hand.

        Args:
            arriving: The slot to which backward has just delivered a gradient, or None.
        """
        return False

    def _name(self) -> str:
        """A parameter with a gradient, for messages."""
        having = [member for member in self._members if member.param.grad is not None]
        return min(having or self._members, key=lambda member: member.index).name

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

    def __init__(
        self,
        members: Sequence[NamedParameter],
        layout: BucketLayout,
        *,
        dtype: torch.dtype | None,
        wire_dtype: torch.dtype | None,
    ) -> None:
        """Have autograd accumulate in the right dtype.

        Args:
            members: The parameters, in slot order.
            layout: Where they lie.
            dtype: In what gradients of narrower parameters are accumulated; None for the parameters' own dtype.
            wire_dtype: In what they are sent to other ranks; None as they are.
        """
        super().__init__(members)
        own = members[0].param.dtype
        self._dtype = own if dtype is None else torch.promote_types(own, dtype)
        self._wire_dtype = wire_dtype
        self._layout = layout
        self._await_all()
        if self._dtype != own:
            for member in members:
                member.param.grad_dtype = self._dtype

    @property
    def are_complete(self) -> bool:
        """See :meth:`Gradients.are_complete`."""
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
        _check(member, grad, self._dtype)
        view.copy_(grad.detach())  # backward with create_graph must not draw the buffer into its graph
        member.param.grad = view

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + numel].view(member.param.shape)
            for member, offset, numel in zip(self._members, self._layout.offsets, self._layout.numels, strict=True)
        ]

    def _too_late(self, slot: int) -> RuntimeError:
        return RuntimeError(
            f"backward reached {self._members[slot].name} again after its gradient was averaged over ranks; run every "
            "backward of a step but the last inside optimizer.no_sync(), all of them before clip_grad_norm_(), or pass "
            "ShardingConfig(overlap=False), which averages in step()"
        )


class OwnGradients(HookedGradients):
    """Gradients that live in a flat buffer of ours, and stay there.

    Attributes:
        buffer: [num_ranks * n], the memory of ``p.grad`` of every parameter that has one.
    """

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
            return self.stage is not Stage.REDUCED or arriving is not None or any(_present(self._params))
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
        """See :meth:`Gradients.reduce`; in place."""
        self.release()
        if self.stage is not Stage.CONSUMED:  # or they take part for the other ranks' sake
            self.mark(Stage.REDUCING)
        handle = collectives.reduce_scatter_mean(self._exchanged, self.shard, wire_dtype=self._wire_dtype)
        self._reduction = _Reduction(handle, list(compress(self._views, self._marked)))
        if collectives.num_ranks > 1:
            self._reduction.hide()
        return self._reduction

    def release(self) -> None:
        """See :meth:`Gradients.release`."""
        if self._reduction is not None:
            self._reduction.wait()
            self._reduction = None

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`."""
        # Only the CPU's value can be looked at without waiting for the device.
        if self.stage is Stage.LOCAL and (own.is_cuda or own != smallest):
            self._exchanged.mul_(smallest / own)
        return smallest

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

    def arrive(self) -> None:
        """The means are there to be used; who reads or changes gradients waits for the other ranks, too."""
        self._handle.arrive()


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

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`; a scaler finds no gradients here, and is refused before."""
        return smallest

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


class ForeignGradients(Gradients):
    """Gradients that live elsewhere and are means over ranks already; they are only read."""

    def __init__(self, members: Sequence[NamedParameter], layout: BucketLayout, rank: int) -> None:
        """Allocate memory for this rank's shard alone.

        Args:
            members: The parameters, in slot order.
            layout: Where they lie.
            rank: Which shard is ours.
        """
        super().__init__(members)
        first = members[0].param
        self.shard = torch.zeros(layout.shard_numel, dtype=first.dtype, device=first.device)
        self._layout = layout
        self._rank = rank
        self._fragments = tuple(layout.fragments(rank))
        self._marked: list[tuple[ReferenceType[Tensor], int]] = []

    @property
    def present(self) -> tuple[bool, ...]:
        """See :meth:`Gradients.present`."""
        return _present(self._params)

    @property
    def are_reduced(self) -> bool:
        """See :meth:`Gradients.are_reduced`."""
        return self.stage is Stage.REDUCED and bool(self._marked)

    @property
    def still_holds_last_step(self) -> bool:
        """See :meth:`Gradients.still_holds_last_step`."""
        return True

    def mark(self, stage: Stage) -> None:
        """See :meth:`Gradients.mark`. A step uses up nothing here, so it need not hold on to anything."""
        self.stage = Stage.LOCAL if stage is Stage.CONSUMED else stage
        reduced = self.stage is not Stage.LOCAL
        self._marked = [(ref(grad), version) for grad, version in self._existing()] if reduced else []

    def _existing(self) -> list[tuple[Tensor, int]]:
        """The gradients there are, each with the count of in-place changes to its memory."""
        grads = (member.param.grad for member in self._members)
        # FSDP2 accumulates into what is local, which a DTensor does not notice.
        return [(grad, local(grad)._version) for grad in grads if grad is not None and grad.numel()]

    def collect(self, *, to_clip: bool) -> None:
        """See :meth:`Gradients.collect`; before another clip they may be read again."""
        if self.stage is Stage.REDUCED:
            marked = [(id(grad()), version) for grad, version in self._marked]
            if self._have_ended() or (to_clip and [(id(g), v) for g, v in self._existing()] != marked):
                self.mark(Stage.LOCAL)
            elif [(id(g), v) for g, v in self._existing()] != marked:
                raise self._changed()
        for member in self._members:
            if member.param.grad is not None:
                _check(member, member.param.grad, member.param.dtype)

    def _have_ended(self) -> bool:
        """Whether the marked gradients were dropped, or cleared in place."""
        if not self._marked:
            return bool(self._existing())
        marked = {id(grad()): version for grad, version in self._marked}
        kept = [(grad, version - marked[id(grad)]) for grad, version in self._existing() if id(grad) in marked]
        return all(num_changes >= 1 for _, num_changes in kept) and not any(grad.any() for grad, _ in kept)

    def reduce(self, collectives: Collectives) -> Handle | None:
        """See :meth:`Gradients.reduce`: copies this rank's fragments."""
        grads = self._local_gradients()
        for fragment in self._fragments:
            if (grad := grads.get(fragment.slot)) is not None:
                own = grad.reshape(-1)[fragment.param_start : fragment.param_start + fragment.numel]
                self.shard[fragment.shard_start : fragment.shard_start + fragment.numel].copy_(own)
        return None

    def _local_gradients(self) -> dict[int, Tensor]:
        """This rank's part of each gradient there is, by slot."""
        params = {slot: member.param for slot, member in enumerate(self._members)}
        return {slot: local_gradient(param) for slot, param in params.items() if param.grad is not None}

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`; these are means already, and only have this rank's scale."""
        return own


class CopiedGradients(ForeignGradients):
    """Gradients of borrowed parameters, which live elsewhere and are still to be averaged over ranks.

    They are only read: the flat buffer of their exchange exists while it is under way.
    """

    _rescale: Tensor | None = None

    def reduce(self, collectives: Collectives) -> Handle | None:
        """See :meth:`Gradients.reduce`."""
        buffer = torch.zeros(self._layout.numel, dtype=self.shard.dtype, device=self.shard.device)
        for slot, grad in self._local_gradients().items():
            offset = self._layout.offsets[slot]
            buffer[offset : offset + grad.numel()].view(grad.shape).copy_(grad)
        if self._rescale is not None:
            buffer.mul_(self._rescale)
            self._rescale = None
        return collectives.reduce_scatter_mean(buffer, self.shard)

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`."""
        if self.stage is Stage.LOCAL:
            self._rescale = smallest / own
        return smallest


def _present(params: Sequence[Tensor]) -> tuple[bool, ...]:
    grads = map(_GRAD_OF, params)
    return tuple(map(and_, map(is_not, grads, repeat(None)), map(_IS_TRAINABLE, params)))


def _uncleared(name: str) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {name} is the one that the last step() has used (averaged in place); call "
        "optimizer.zero_grad() between a step and the next backward"
    )


def _check(member: NamedParameter, grad: Tensor, dtype: torch.dtype) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != dtype:
        raise ValueError(f"gradient of {member.name}: expected {dtype}, got {grad.dtype}")
