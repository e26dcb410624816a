"""The gradients of one bucket: where they live, and what they mean at each moment of a step.

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. The first gradient that backward produces is moved into the bucket's flat buffer by
a hook, at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from sharded_dadamw.collectives import Collectives, Handle
from sharded_dadamw.layout import BucketLayout
from sharded_dadamw.parameters import NamedParameter
from sharded_dadamw.placement import local, local_gradient


class Stage(Enum):
    """What the gradients of a bucket mean right now."""

    LOCAL = "this rank's own gradients, accumulating"
    REDUCED = "this rank's shard holds the mean over ranks; p.grad elsewhere is still local"
    CONSUMED = "a step has used them; zero_grad() makes room for new ones"


class Gradients(ABC):
    """The gradients of one bucket on one rank.

    Attributes:
        shard: [n], this rank's part of the mean over ranks, once the stage is REDUCED.
        stage: What the gradients mean right now.
    """

    shard: Tensor
    can_be_read_again = False
    """Whether reducing them left them as they were."""

    def __init__(self, members: Sequence[NamedParameter]) -> None:
        """Start without gradients, for ``members`` in slot order."""
        self.stage = Stage.LOCAL
        self._members = tuple(members)
        self._marked: list[tuple[ReferenceType[Tensor], int]] = []

    @property
    def present(self) -> tuple[bool, ...]:
        """Per slot whether its parameter is to be updated."""
        return tuple(member.param.grad is not None and member.param.requires_grad for member in self._members)

    @property
    def are_reduced(self) -> bool:
        """Whether there are gradients, and their mean over ranks is in ``shard``."""
        return self.stage is Stage.REDUCED and bool(self._marked)

    def mark(self, stage: Stage) -> None:
        """Say what the gradients mean from now on, and remember which they are, so that their end is noticed."""
        self.stage = stage
        self._marked = [] if stage is Stage.LOCAL else [(ref(grad), version) for grad, version in self._existing()]

    def _existing(self) -> list[tuple[Tensor, int]]:
        """The gradients there are, each with the count of in-place changes to its memory."""
        grads = (member.param.grad for member in self._members)
        # FSDP2 accumulates into what is local, which a DTensor does not notice.
        return [(grad, local(grad)._version) for grad in grads if grad is not None and grad.numel()]

    def reopen_if_ended(self, *, arriving: int | None = None) -> None:
        """Go back to LOCAL if the marked gradients were dropped or cleared, by ``model.zero_grad`` or by hand.

        Args:
            arriving: The slot to which backward has just delivered a gradient, or None.
        """
        if self.stage is Stage.LOCAL:
            return
        if self._marked:
            ended = self._marked_ended(None if arriving is None else self._members[arriving].param.grad)
        else:
            ended = self.stage is Stage.CONSUMED or arriving is not None or bool(self._existing())
        if ended:
            self.mark(Stage.LOCAL)

    def _marked_ended(self, arriving: Tensor | None) -> bool:
        marked = {id(grad()): version for grad, version in self._marked}
        kept = [(grad, version - marked[id(grad)]) for grad, version in self._existing() if id(grad) in marked]
        # Clearing in place changes every gradient and leaves zeros. The one into which backward has just added cannot
        # show its zeros any more, but has changed once more.
        added = any(grad is arriving for grad, _ in kept)
        return self._changed_at_least(kept, added) and not any(grad.any() for grad, _ in kept if grad is not arriving)

    @abstractmethod
    def _changed_at_least(self, kept: Sequence[tuple[Tensor, int]], extra: int) -> bool:
        """Whether each gradient was changed, and ``extra`` more times altogether, given its count of changes."""

    def collect(self, *, to_clip: bool) -> None:
        """Make sure of the gradients before they are used: bring in those that were assigned by hand.

        Args:
            to_clip: They are about to be clipped, perhaps again, and not yet to be used up.

        Raises:
            RuntimeError: A step has used these gradients already, or they were changed after they were averaged.
            ValueError: A gradient is sparse, or in another dtype than its parameter.
        """
        self.reopen_if_ended()
        if self.stage is Stage.CONSUMED:
            raise self._uncleared()
        marked = [(id(grad()), version) for grad, version in self._marked]
        if self.stage is Stage.REDUCED and [(id(grad), version) for grad, version in self._existing()] != marked:
            if not (to_clip and self.can_be_read_again):
                raise RuntimeError(
                    f"gradients were changed between clip_grad_norm_() and step(), in the bucket of {self._name()}; by "
                    "then they have been averaged over ranks, so change them before clipping, or drop them with "
                    "zero_grad()"
                )
            self.mark(Stage.LOCAL)
        for slot in range(len(self._members)):
            self.adopt(slot)

    @abstractmethod
    def reduce(self, collectives: Collectives) -> Handle | None:
        """Begin to fill ``shard`` with the mean over ranks; None where it is filled at once. Collective."""

    @property
    @abstractmethod
    def still_holds_last_step(self) -> bool:
        """Whether ``shard`` is what the last step has used, as far as can be known."""

    @abstractmethod
    def adopt(self, slot: int) -> None:
        """Take over one parameter's gradient, if it has one.

        Raises:
            ValueError: The gradient is sparse, or in another dtype than the parameter.
        """

    def _uncleared(self) -> RuntimeError:
        return RuntimeError(
            f"the gradient of {self._name()} is the one that the last step() has used (averaged in place); call "
            "optimizer.zero_grad() between a step and the next backward"
        )

    def _name(self) -> str:
        return min((m for m in self._members if m.param.grad is not None), key=lambda m: m.index).name

    @abstractmethod
    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """Bring the gradients of all ranks to one loss scale, and return the one that the mean then has.

        Each rank's loss scaler adapts to what that rank has seen, and a sum makes sense only of equal scales. Gradients
        are not unscaled here: in fp16 that would lose what the scale is there to save.

        Args:
            own: 0-d fp32, this rank's scale.
            smallest: 0-d fp32, the smallest of the ranks' scales.
        """


class OwnGradients(Gradients):
    """Gradients that live in a flat buffer of ours, for us to reduce.

    Attributes:
        buffer: [num_ranks * n], the memory of ``p.grad`` of every parameter that has one.
    """

    def __init__(
        self, members: Sequence[NamedParameter], layout: BucketLayout, rank: int, params: Sequence[Tensor]
    ) -> None:
        """Allocate the buffer.

        Args:
            members: The parameters, in slot order.
            layout: Where they lie.
            rank: Which shard is ours.
            params: The parameters' views of their flat buffer; gradients get the same shapes.
        """
        super().__init__(members)
        start, stop = layout.shard_range(rank)
        self.buffer = torch.zeros(layout.numel, dtype=params[0].dtype, device=params[0].device)
        self.shard = self.buffer[start:stop]
        self._views = [
            self.buffer[offset : offset + param.numel()].view(param.shape)
            for offset, param in zip(layout.offsets, params, strict=True)
        ]

    def adopt(self, slot: int) -> None:
        """See :meth:`Gradients.adopt`: moves it into the flat buffer, where it is not there already."""
        member, view = self._members[slot], self._views[slot]
        grad = member.param.grad
        if grad is None or grad is view:
            return
        _check(member, grad)
        view.copy_(grad.detach())  # backward with create_graph must not draw the buffer into its graph
        member.param.grad = view

    def reduce(self, collectives: Collectives) -> Handle | None:
        """See :meth:`Gradients.reduce`; in place."""
        return collectives.reduce_scatter_mean_(self.buffer)

    @property
    def still_holds_last_step(self) -> bool:
        """See :meth:`Gradients.still_holds_last_step`; backward may write into it from ``zero_grad`` on."""
        return self.stage is Stage.CONSUMED

    def deliver(self, slot: int) -> None:
        """Take the gradient that backward has just accumulated for a slot.

        Raises:
            RuntimeError: The gradients before it were used or averaged already, and are still there.
            ValueError: As :meth:`adopt`.
        """
        self.reopen_if_ended(arriving=slot)
        if self.stage is Stage.CONSUMED:
            raise self._uncleared()
        if self.stage is Stage.REDUCED:
            raise RuntimeError(
                f"backward reached {self._members[slot].name} between clip_grad_norm_() and step(): its gradient has "
                "already been averaged over ranks; run every backward of a step before clipping"
            )
        self.adopt(slot)

    def _changed_at_least(self, kept: Sequence[tuple[Tensor, int]], extra: int) -> bool:
        # Views share one count of changes with their buffer.
        return all(num_changes >= len(kept) + extra for _, num_changes in kept)

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`."""
        # Only the CPU's value can be looked at without waiting for the device.
        if self.stage is Stage.LOCAL and (own.is_cuda or own != smallest):
            self.buffer.mul_(smallest / own)
        return smallest


class ForeignGradients(Gradients):
    """Gradients that live elsewhere and are means over ranks already; they are only read."""

    can_be_read_again = True

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

    def adopt(self, slot: int) -> None:
        """See :meth:`Gradients.adopt`; it stays where it is."""
        member = self._members[slot]
        if member.param.grad is not None:
            _check(member, member.param.grad)

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

    @property
    def still_holds_last_step(self) -> bool:
        """See :meth:`Gradients.still_holds_last_step`."""
        return True

    def mark(self, stage: Stage) -> None:
        """See :meth:`Gradients.mark`. A step uses up nothing here, so it need not hold on to anything."""
        super().mark(Stage.LOCAL if stage is Stage.CONSUMED else stage)

    def _changed_at_least(self, kept: Sequence[tuple[Tensor, int]], extra: int) -> bool:
        return all(num_changes >= 1 + extra for _, num_changes in kept)

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
        start, stop = self._layout.shard_range(self._rank)
        return _ThenCopy(collectives.reduce_scatter_mean_(buffer), buffer[start:stop], self.shard)

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`."""
        if self.stage is Stage.LOCAL:
            self._rescale = smallest / own
        return smallest


class _ThenCopy:
    """A reduction under way whose result goes elsewhere."""

    def __init__(self, reduction: Handle, result: Tensor, target: Tensor) -> None:
        self._reduction, self._result, self._target = reduction, result, target

    def wait(self) -> None:
        self._reduction.wait()
        self._target.copy_(self._result)


def _check(member: NamedParameter, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != member.param.dtype:
        raise ValueError(f"gradient of {member.name}: expected {member.param.dtype}, got {grad.dtype}")
