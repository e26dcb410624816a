"""The gradients of one bucket: what they mean at each moment of a step, whoever holds them.

own_gradients, ZeRO stage 1       the buffer stays, its own slice is averaged    LOCAL, REDUCING, REDUCED, CONSUMED
sharded_gradients, ZeRO stage 2   the buffer goes, means add up in the shard     LOCAL, REDUCED, CONSUMED
foreign_gradients                 p.grad is other people's memory, only read     LOCAL, REDUCED
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from itertools import repeat
from operator import and_, attrgetter, is_not

import torch
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives, Handle
from sharded_dadamw.layout.parameters import NamedParameter

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
        can_settle_scale: Whether a step can still bring ranks' gradients to one loss scale before they are averaged.
        shard: [n], this rank's part of the mean over ranks, once they are reduced.
        stage: What the gradients mean right now.
    """

    can_settle_scale = False
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

    def settle_scale_(self, own: Tensor, smallest: Tensor) -> None:  # noqa: B027 - most cannot
        """Bring the gradients of all ranks to one loss scale, the smallest, before they are averaged.

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
        raise ValueError(f"gradient of {member.name}: expected {dtype}, got {grad.dtype}")
