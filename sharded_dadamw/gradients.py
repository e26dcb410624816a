"""The gradients of one bucket: where they live, and what they mean at each moment of a step.

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. The first gradient that backward produces is moved into the bucket's flat buffer by
a hook, at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from sharded_dadamw.layout import BucketLayout
from sharded_dadamw.parameters import NamedParameter


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
        self._marked: list[tuple[Tensor, int]] = []

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
        self._marked = [] if stage is Stage.LOCAL else self._existing()

    def _existing(self) -> list[tuple[Tensor, int]]:
        """The gradients there are, each with the count of in-place changes to its memory."""
        grads = (member.param.grad for member in self._members)
        return [(grad, grad._version) for grad in grads if grad is not None and grad.numel()]

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
        marked = {id(grad): version for grad, version in self._marked}
        kept = [(grad, grad._version - marked[id(grad)]) for grad, _ in self._existing() if id(grad) in marked]
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
        if self.stage is Stage.REDUCED and not _are_same(self._existing(), self._marked):
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

    def __init__(
        self, members: Sequence[NamedParameter], layout: BucketLayout, rank: int, params: Sequence[Tensor]
    ) -> None:
        """Allocate memory for this rank's shard alone; the arguments are those of :class:`OwnGradients`."""
        super().__init__(members)
        self.shard = torch.zeros(layout.shard_numel, dtype=params[0].dtype, device=params[0].device)
        self._fragments = tuple(layout.fragments(rank))

    def adopt(self, slot: int) -> None:
        """See :meth:`Gradients.adopt`; it stays where it is."""
        member = self._members[slot]
        if member.param.grad is not None:
            _check(member, member.param.grad)

    def read(self) -> None:
        """Copy this rank's fragments into ``shard``."""
        for fragment in self._fragments:
            grad = self._members[fragment.slot].param.grad
            if grad is not None:
                own = grad.reshape(-1)[fragment.param_start : fragment.param_start + fragment.numel]
                self.shard[fragment.shard_start : fragment.shard_start + fragment.numel].copy_(own)

    def mark(self, stage: Stage) -> None:
        """See :meth:`Gradients.mark`. A step uses up nothing here, so it need not hold on to anything."""
        super().mark(Stage.LOCAL if stage is Stage.CONSUMED else stage)

    def _changed_at_least(self, kept: Sequence[tuple[Tensor, int]], extra: int) -> bool:
        return all(num_changes >= 1 + extra for _, num_changes in kept)

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> Tensor:
        """See :meth:`Gradients.settle_scale_`; these are means already, and only have this rank's scale."""
        return own


def _are_same(now: Sequence[tuple[Tensor, int]], before: Sequence[tuple[Tensor, int]]) -> bool:
    return [(id(grad), version) for grad, version in now] == [(id(grad), version) for grad, version in before]


def _check(member: NamedParameter, grad: Tensor) -> None:
    if grad.layout != torch.strided:
        raise ValueError(f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}")
    if grad.dtype != member.param.dtype:
        raise ValueError(f"gradient of {member.name}: expected {member.param.dtype}, got {grad.dtype}")
