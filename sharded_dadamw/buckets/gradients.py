"""The gradients of one bucket: what they mean at each moment of a step, whoever holds them.

    full_gradients (ZeRO stage 1)      the flat buffer stays, and this rank's shard of it is averaged in place
    sharded_gradients (ZeRO stage 2)   the flat buffer goes, and means of several backward passes add up in the shard
    foreign_gradients                  p.grad is the memory of others, and is only read

A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that an unused parameter stays
untouched. A hook moves the first gradient that backward produces into the bucket's flat buffer at once, so that two
copies never coexist for more than one parameter; later ones accumulate into that view, or in ``passes``. Only this
module and ``sharded_gradients`` assign ``p.grad``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from itertools import repeat
from operator import and_, attrgetter, is_not

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.passes import Passes
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.pending import DONE
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.layout.placement import local

GRAD_OF, _IS_TRAINABLE = attrgetter("grad"), attrgetter("requires_grad")
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


HOLDS_MEANS = "_holds_means"
"""An attribute of tensors: whether they are what is left of averaged gradients. It outlives the optimizer."""


class Stage(Enum):
    """What the gradients of a bucket mean right now."""

    LOCAL = "this rank's own gradients, accumulating"
    REDUCED = "this rank's shard holds the mean over ranks; what p.grad holds elsewhere is still local"
    READ = "the same, and the mean has been read, as by a clip, so that it must not change any more"
    CONSUMED = "a step has used them, or ranks disagreed about them; zero_grad() makes room for new ones"


class Gradients(ABC):
    """The gradients of one bucket on one rank; ``shard`` [n] is its part of their mean, once they are reduced."""

    shard: Tensor

    def __init__(self, arrangement: Arrangement) -> None:
        self.stage = Stage.LOCAL
        self._arrangement, self._layout, self._members = arrangement, arrangement.layout, arrangement.members
        self._params = tuple(member.param for member in self._members)
        self._dtype, self._device = self._members[0].gradient_dtype, self._params[0].device
        self._reduction = DONE
        self._is_lost = False

    @property
    @abstractmethod
    def present(self) -> tuple[bool, ...]:
        """Per slot whether its parameter is to be updated."""

    @property
    def are_clipped(self) -> bool:
        """Whether there are gradients whose mean has been read, and no step has come since."""
        return self.stage is Stage.READ and any(self.present)

    @property
    def still_holds_last_step(self) -> bool:
        """Whether ``shard`` is what the last step has used, as far as can be known."""
        return self.stage is Stage.CONSUMED

    def drop(self) -> None:
        """Forget all there are, as the optimizer's ``zero_grad`` does."""
        self._reset()

    def _reset(self) -> None:
        """Make room for new ones."""
        self.stage, self._reduction, self._is_lost = Stage.LOCAL, DONE, False

    def set_read(self) -> None:
        """Say that the mean is there, and read from now on."""
        self.stage = Stage.READ

    def consume(self) -> None:
        """Say that a step has used the mean, or that it is of no use."""
        self.stage = Stage.CONSUMED

    @abstractmethod
    def collect(self, *, to_clip: bool) -> None:
        """Make sure of the gradients before they are used: bring in those that were assigned by hand.

        With ``to_clip`` they are about to be clipped, perhaps again, and not yet to be used up.

        Raises:
            RuntimeError: A step has used these gradients already, they were changed after they were clipped, or their
                reduction was broken off.
            ValueError: A gradient is sparse, or in another dtype than it should be.
        """

    @abstractmethod
    def reduce(self, collectives: Collectives) -> None:
        """Begin to fill ``shard`` with the mean over ranks, after ``collect`` or ``look``; ``wait`` ends that.

        Collective.
        """

    def wait(self) -> None:
        """Wait until ``shard`` is the mean and gradients may be written; more than once does no harm."""
        try:
            self._reduction.wait()
        except BaseException:  # after a KeyboardInterrupt, a part of the mean may be missing
            self._is_lost = True
            raise
        self._reduction = DONE

    def look(self) -> None:  # noqa: B027 - most have nothing to do
        """Bring in what there is, ahead of a ``reduce`` without a ``collect``; it costs 0.3 us per parameter."""

    def remember(self) -> None:  # noqa: B027 - most have nothing to do
        """Take note of local gradients as backward has left them, for ``change``."""

    def change(self, *, is_unscaled: bool) -> Tensor | None:
        """Return by what factors gradients were multiplied since they were made, or since this was last asked.

        Local gradients may be edited freely, and the result is averaged. Of them only a common factor is reported,
        because it may come from torch's ``clip_grad_norm_``, whose norm differs from rank to rank. ``is_unscaled`` says
        that a loss scaler may have divided gradients, which torch does not count as a change.

        Returns:
            fp64 [k], of a sample of elements; nan where that does not show, inf where it is no multiplication. None
            where nobody wrote into them.
        """
        return None

    def is_taken(self, slot: int) -> bool:
        """Whether ``p.grad`` of a slot is not what backward has left, so that another optimizer would go wrong."""
        return False

    def sum_of_bits(self) -> Tensor:
        """Return the sum of all elements of all gradients there are, taken as integers: 0-d int64, in [0, 2**60).

        It does not depend on the order of addition, so equal gradients have equal sums on any rank.
        """
        present = [param.grad for param in self._params if param.grad is not None]
        # One copy at a time: of the first step's memory little may be left. Sparse ones are refused anyway.
        grads = (local(grad.detach()).nan_to_num() for grad in present if grad.layout is torch.strided)
        sums = [grad.view(_INTEGERS[grad.itemsize]).sum(dtype=torch.int64) for grad in grads]
        return torch.stack([torch.zeros((), dtype=torch.int64, device=self.shard.device), *sums]).sum() & (2**60 - 1)

    def _name(self) -> str:
        """A parameter with a gradient, for messages."""
        having = [member for member in self._members if member.param.grad is not None]
        return min(having or self._members, key=lambda member: member.index).name

    def changed(self) -> RuntimeError:
        """The error of gradients that are others than those that were clipped."""
        return RuntimeError(
            f"gradients were changed between clip_grad_norm_() and step(), in the bucket of {self._name()}; change "
            "them before clipping, or drop them by optimizer.zero_grad()"
        )


class HookedGradients(Gradients):
    """Gradients of plain parameters, which backward delivers one by one through hooks."""

    def __init__(self, arrangement: Arrangement, wire_dtype: torch.dtype | None, num_passes: int | None) -> None:
        """``num_passes``: how many gradients of each parameter are added in the tree; None: as many as there are."""
        super().__init__(arrangement)
        self._wire_dtype = wire_dtype
        self._buffer: Tensor | None = None  # in which gradients lie, where there is one
        self._views: list[Tensor] = []  # of that
        self._places: list[int] = []  # where those lie
        # Per slot whether there is a gradient, or a mean of one, as last looked.
        self._has_grad = [False] * len(self._members)
        self._passes = None if num_passes is None else Passes(num_passes, len(self._members), self._new_views)
        self._all_present = (True,) * len(self._members)
        self._await_all()

    @property
    def present(self) -> tuple[bool, ...]:
        """See ``Gradients.present``; as ``collect`` has found them."""
        if all(self._has_grad) and all(map(_IS_TRAINABLE, self._params)):
            return self._all_present
        return tuple(map(and_, self._has_grad, map(_IS_TRAINABLE, self._params)))

    def _reset(self) -> None:
        super()._reset()
        self._await_all()
        if self._passes is not None:
            self._passes.forget()

    def _new_views(self) -> list[Tensor]:
        return self._arrangement.views(torch.empty(self._layout.numel, dtype=self._dtype, device=self._device))

    def _lay_out(self, buffer: Tensor) -> None:
        """Have gradients lie in a flat buffer."""
        self._views = self._arrangement.views(buffer)
        self._places = list(map(Tensor.data_ptr, self._views))
        self._buffer = buffer  # and not before: after a KeyboardInterrupt, a buffer has all its views

    def _leave_moved(self) -> None:
        """Take gradients that were given other memory, as by ``p.grad.data = ...``, for assigned ones."""
        if list(map(Tensor.data_ptr, self._views)) != self._places:
            assert self._buffer is not None
            moved, places = self._views, self._places
            self._lay_out(self._buffer)
            for slot, (view, place) in enumerate(zip(moved, places, strict=True)):
                if view.data_ptr() == place:
                    self._views[slot] = view

    def _target(self, slot: int) -> Tensor:
        """The place in the flat buffer of a slot's gradient, which is about to come there."""
        if self._views[slot].data_ptr() != self._places[slot]:
            self._leave_moved()
        return self._views[slot]

    def is_last_pass(self, slot: int) -> bool:
        """Whether a gradient that comes now is the last one of a slot before a step, as far as is known."""
        return self._passes is None or self._passes.is_last(slot)

    def _require_whole(self) -> None:
        """Refuse a mean of which a part may be missing, and gradients that did not come from each of the passes."""
        if self._is_lost:
            raise RuntimeError(
                f"the reduction of gradients was broken off, in the bucket of {self._name()}; drop them by "
                "optimizer.zero_grad()"
            )
        passes = self._passes
        if passes is None or self.stage is Stage.CONSUMED:
            return
        for member, count in zip(self._members, passes.counts, strict=True):
            is_by_hand = count == 0 and passes.number > 1 and member.param.grad is not None
            if count not in (0, passes.number) or is_by_hand:
                raise RuntimeError(
                    f"gradient of {member.name}: expected it from {passes.number} backward passes, this rank's share "
                    f"of ShardingConfig(micro_batches=...), or from none, got it from {count}"
                    f"{' and one that was assigned, or added up before it was unfrozen here' * is_by_hand}; call "
                    "optimizer.zero_grad(), and run all passes of the step again"
                )

    @property
    def are_complete(self) -> bool:
        """Whether backward has delivered all of them since the last reduction."""
        return self.stage is Stage.LOCAL and not self._missing

    def deliver(self, slot: int, *, counts: bool) -> None:
        """Take the gradient that backward has just accumulated for a slot.

        ``counts`` says whether it is the last of this slot before a reduction, as far as backward passes go.

        Raises:
            RuntimeError: The gradients before it were used or averaged already, and are still there.
            ValueError: It is sparse.
        """
        self._make_room(slot)
        if self._passes is None:
            self._adopt(slot)
        else:
            self._take_pass(self._passes, slot)
        if counts:
            self._missing.discard(slot)

    def bring_zeros(self, present: Sequence[bool]) -> None:
        """Give the parameters of these slots a gradient of zeros each."""
        for param, is_present in zip(self._params, present, strict=True):
            if is_present:
                param.grad = torch.zeros_like(param, dtype=self._dtype)

    def _take_pass(self, passes: Passes, slot: int) -> None:
        """Add the gradient of one pass to those before it. ``p.grad`` is None until the last one, then the sum."""
        member = self._members[slot]
        if passes.counts[slot] == passes.number:
            raise self._too_late(slot)
        grad = member.param.grad
        assert grad is not None
        check_gradient(member, grad, self._dtype)
        total = self._target(slot) if passes.is_last(slot) else None
        passes.add(slot, grad.detach(), total)
        member.param.grad = total

    @abstractmethod
    def _make_room(self, slot: int) -> None:
        """Make sure that a gradient may come, and where it goes."""

    def _await_all(self) -> None:
        self._missing = set(range(len(self._members)))

    def _adopt(self, slot: int) -> None:
        """Move one parameter's gradient, if it has one, into the flat buffer, where it is not there already."""
        member = self._members[slot]
        grad = member.param.grad
        if grad is not None and grad is not (view := self._target(slot)):
            check_gradient(member, grad, self._dtype)
            if _holds_means(grad):
                raise RuntimeError(
                    f"the gradient of {member.name} is one that was averaged for an earlier optimizer; call "
                    "zero_grad(set_to_none=True) between the last step of that one and the first backward for this one"
                )
            if view._use_count() > 1:  # type: ignore[attr-defined] # another parameter has it in p.grad, as where two swap theirs
                view.data = view.clone()
                view = self._target(slot)
            view.copy_(grad.detach())  # backward with create_graph must not draw the buffer into its graph
            member.param.grad = view

    def _too_late(self, slot: int) -> RuntimeError:
        if self._passes is not None:
            return RuntimeError(
                f"backward reached {self._members[slot].name} once more than the {self._passes.number} times that are "
                "this rank's share of ShardingConfig(micro_batches=...); call step(), and optimizer.zero_grad() before "
                "the next backward"
            )
        instead = (
            "all of them before clip_grad_norm_()"
            if self.stage is Stage.READ
            else "or pass ShardingConfig(overlap=False), which averages in step()"
        )
        return RuntimeError(
            f"backward reached {self._members[slot].name} again after its gradient was averaged over ranks; run every "
            f"backward of a step but the last inside optimizer.no_sync(), {instead}"
        )


def _holds_means(grad: Tensor) -> bool:
    whole = grad if grad._base is None else grad._base  # which it still has where it was given other memory
    return bool(getattr(whole, HOLDS_MEANS, False)) and 0 <= grad.data_ptr() - whole.data_ptr() < whole.nbytes


def are_present(params: Sequence[Tensor]) -> tuple[bool, ...]:
    """Per parameter whether it has a gradient, and is to be updated."""
    grads = map(GRAD_OF, params)
    return tuple(map(and_, map(is_not, grads, repeat(None)), map(_IS_TRAINABLE, params)))


def version_of(grad: Tensor) -> int:
    """The count of in-place changes to a gradient; FSDP2 accumulates into what is local, unseen by a DTensor."""
    return local(grad)._version


def warn_of_forgotten_clip() -> None:
    """Warn that gradients which were clipped have changed, and are clipped again as if they had never been."""
    warnings.warn(
        "gradients have changed since clip_grad_norm_(), and are clipped anew without what that clip made; this "
        "is right only where they were cleared meanwhile. Clip once, after the last backward of a step, and drop "
        "gradients by optimizer.zero_grad()",
        stacklevel=2,
    )


def check_gradient(member: NamedParameter, grad: Tensor, dtype: torch.dtype) -> None:
    """Refuse a gradient that is sparse, or not in ``dtype``."""
    if grad.layout != torch.strided:
        raise ValueError(
            f"gradient of {member.name}: expected a dense tensor, got layout {grad.layout}; build embeddings with "
            "sparse=False"
        )
    if grad.dtype != dtype:
        raise ValueError(
            f"gradient of {member.name}: expected {dtype}, got {grad.dtype}; if the model was cast, as by "
            "model.bfloat16(), build the optimizer after that"
        )
