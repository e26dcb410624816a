"""Gradients in a flat buffer that stays: ``p.grad`` of every parameter that has one is a view of it (ZeRO stage 1).

This rank's shard of the buffer becomes the mean over ranks, in place. A sample of it tells later how it was changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress, repeat
from operator import and_, is_, is_not

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.gradients import GRAD_OF, HOLDS_MEANS, HookedGradients, Stage, are_present
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.update.storage import Allocate

_NUM_SAMPLES = 64
"""Elements of a shard that are remembered, to tell how averages were changed."""


class FullGradients(HookedGradients):
    """Gradients in a flat buffer that stays.

    Attributes:
        buffer: [num_ranks * n], the memory of ``p.grad`` of every parameter that has one.
    """

    def __init__(
        self,
        arrangement: Arrangement,
        wire_dtype: torch.dtype | None,
        num_passes: int | None,
        *,
        rank: int,
        allocate: Allocate,
    ) -> None:
        super().__init__(arrangement, wire_dtype, num_passes)
        self.buffer = allocate(self._layout.numel, self._dtype, self._device)
        # Another name for the same memory: what is written through it does not count as a change to p.grad.
        self._exchanged = self.buffer.data
        self._range = self._layout.shard_range(rank)
        self.shard = self._exchanged[slice(*self._range)]
        self._lay_out(self.buffer)
        self._version = 0
        self._sample: Tensor | None = None

    def collect(self, *, to_clip: bool) -> None:
        """See ``Gradients.collect``. Averages may have been dropped, or before a clip been changed in place."""
        held = self._held()
        if self.stage is not Stage.LOCAL and self._have_ended(held):
            if self.stage is Stage.REDUCED and any(self._has_grad) and any(are_present(self._params)):
                raise self._assigned()
            self._reset()
        self._require_whole()
        if self.stage is Stage.CONSUMED:
            raise _uncleared(self._name())
        if self.stage is Stage.LOCAL:
            self._adopt_all(held)
            return
        are_assigned = not all(held) and held != list(map(is_not, map(GRAD_OF, self._params), repeat(None)))
        if self.stage is Stage.READ and (are_assigned or held != self._has_grad or self._is_written):
            raise self.changed()
        if are_assigned:
            raise self._assigned()
        self._has_grad = held

    def reduce(self, collectives: Collectives) -> None:
        """See ``Gradients.reduce``; in place. Means and used ones only take part for the other ranks' sake."""
        out = self.shard
        if self.stage is Stage.LOCAL:
            self.stage = Stage.REDUCED
            setattr(self.buffer, HOLDS_MEANS, self._layout.num_ranks > 1)
            self._version, self._sample = self.buffer._version, None
        else:
            out = torch.empty_like(self.shard)
        self._reduction = collectives.reduce_scatter_mean(self._exchanged, out, wire_dtype=self._wire_dtype)

    def wait(self) -> None:
        """See ``Gradients.wait``; remembers a sample of the mean."""
        super().wait()
        if self._sample is None:
            self._sample = self._take_sample()

    def _reset(self) -> None:
        super()._reset()
        setattr(self.buffer, HOLDS_MEANS, False)
        self._sample = None

    def look(self) -> None:
        if self.stage is Stage.LOCAL:
            # Of what was assigned or cast; the agreement refuses it everywhere.
            with suppress(RuntimeError, ValueError):
                self._adopt_all(self._held())

    def remember(self) -> None:
        if self.stage is Stage.LOCAL:
            self._has_grad, self._version = self._held(), self.buffer._version
            self._sample = self._take_sample()

    def change(self, *, is_unscaled: bool) -> Tensor | None:
        may_differ = is_unscaled or self._is_written
        if self._sample is None or not may_differ:
            return None
        before, self._sample, self._version = self._sample, self._take_sample(), self.buffer._version
        then, now = before.to(torch.float64), self._sample.to(torch.float64)
        shows = then.isfinite() & ((then != 0) | (now != 0))
        if self._dtype is torch.float16:  # which has few digits below its smallest normal number
            shows &= now.abs() >= torch.finfo(self._dtype).smallest_normal
        factors = now / then
        factors = torch.where(shows, torch.where(factors >= 0, factors, torch.inf), torch.nan)
        if self.stage is not Stage.LOCAL:
            return factors
        known = factors.nan_to_num(nan=0.0, posinf=torch.inf).amax(), factors.nan_to_num(nan=torch.inf).amin()
        is_one = known[0].isfinite() & (known[0] <= known[1] * (1 + 4 * torch.finfo(self._dtype).eps))
        return torch.where(is_one, factors, torch.nan)

    @property
    def _is_written(self) -> bool:
        """Whether somebody has written into gradients since we last looked."""
        return self.buffer._version != self._version

    def _take_sample(self) -> Tensor:
        """A sample of the mean's shard, or of local gradients; nan where there is no gradient."""
        start, stop = (0, self.buffer.numel()) if self.stage is Stage.LOCAL else self._range
        if start == stop:  # of parameters without elements
            return self.shard.new_full((1,), torch.nan)
        stride = max(1, (stop - start) // _NUM_SAMPLES)
        sample = self._exchanged[start:stop:stride].clone()
        if not all(self._has_grad):
            slots = [bisect_right(self._layout.offsets, place) - 1 for place in range(start, stop, stride)]
            absent = torch.tensor([not self._has_grad[slot] for slot in slots], dtype=torch.bool)
            absent = absent.to(sample.device, non_blocking=True)
            sample.masked_fill_(absent, torch.nan)
        return sample

    def is_taken(self, slot: int) -> bool:
        is_averaged = self.stage is not Stage.LOCAL and self._layout.num_ranks > 1
        return is_averaged and self._params[slot].grad is self._views[slot]

    def _make_room(self, slot: int) -> None:
        if self.stage is Stage.LOCAL:
            self._sample = None
            return
        if self._have_ended(self._held(), arriving=slot):
            self._reset()
        elif self.stage is Stage.CONSUMED:
            raise _uncleared(self._name())
        else:
            raise self._too_late(slot)

    def _adopt_all(self, held: list[bool]) -> None:
        """Bring in gradients that were assigned, where ``_held`` says that there may be some; raises as ``collect``."""
        if not all(held):
            is_written = self._is_written
            for slot in range(len(self._members)):
                self._adopt(slot)
            if not is_written:  # which is for others to answer for
                self._version = self.buffer._version
            held = self._held()
        self._has_grad = held

    def _held(self) -> list[bool]:
        """Per slot whether ``p.grad`` is our view."""
        self._leave_moved()
        return list(map(is_, map(GRAD_OF, self._params), self._views))

    def _assigned(self) -> RuntimeError:
        return RuntimeError(
            f"p.grad was assigned after its average over ranks was made, in the bucket of {self._name()}; multiply "
            "gradients in place, by one number on all ranks; for any other change have DistributedDataParallel average "
            "them, and pass ShardingConfig(reduce_gradients=False). Before gradients of your own, call zero_grad()"
        )

    def _have_ended(self, held: Sequence[bool], *, arriving: int | None = None) -> bool:
        """Whether averages were dropped or cleared, by ``model.zero_grad`` or by hand, given what ``_held`` says now.

        Backward has just delivered to the slot ``arriving``, if to one.
        """
        if not any(self._has_grad):
            return self.stage is Stage.CONSUMED or arriving is not None or any(are_present(self._params))
        is_kept = list(map(and_, held, self._has_grad))
        if not any(is_kept) or (self.stage is Stage.REDUCED and arriving is None):
            # Those that were cleared are means times zero, and to look would be to wait for the device.
            return not any(is_kept)
        # Clearing in place changes every gradient and leaves zeros. The one into which backward has just added cannot
        # show its zeros any more, but has changed once more; alone, it shows nothing, and may have been multiplied.
        # Views share one count of changes with their buffer.
        filled = [slot for slot in compress(range(len(is_kept)), is_kept) if self._views[slot].numel()]
        num_changes = max(1, len(filled) + (arriving in filled))  # one also where all are empty, and show no zeros
        return (
            filled != [arriving]
            and self.buffer._version - self._version >= num_changes
            and not any(self._views[slot].any() for slot in filled if slot != arriving)
        )


def _uncleared(name: str) -> RuntimeError:
    return RuntimeError(
        f"the gradient of {name} is one that the last step() has used, or refused; it has been averaged in place, so "
        "call optimizer.zero_grad() between a step and the next backward; to model.zero_grad() leave set_to_none=True"
    )
