"""Gradients of plain parameters, which backward delivers one by one through hooks, into a flat buffer of ours.

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. The first gradient that backward produces is moved into the bucket's flat buffer by
a hook, at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_dadamw.buckets.gradients import Gradients, Stage, check_gradient
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter


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
        check_gradient(member, grad, self._dtype)
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
