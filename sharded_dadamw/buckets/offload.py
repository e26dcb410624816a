"""A bucket whose state lives in host memory: its update runs there, between two copies.

    gradient shard  == down ==>  grad  [n]
                                   | update, with the state, by the kernels for CPUs
    parameter shard <== up ====  param [n]

Copies have a stream of their own for each direction, so that neither waits for the other, nor for what else the device
is about to do. The way down begins behind all that the device was given so far, the reduction of the gradients among
it; the host waits for its end before it computes. So when the way up begins nobody reads those parameters any more, and
it has nothing to wait for; what the device is given afterwards waits for its end. All memory that is copied belongs to
the bucket, or is kept until the host has waited for it. With parameters on a CPU the same code runs, and each copy is
over at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.gradients import Gradients
from sharded_dadamw.buckets.weights import Weights
from sharded_dadamw.config import StateResidency
from sharded_dadamw.update.adamw import Step


class OffloadedBucket(Bucket):
    """A bucket with its state in host memory, and its updates there, of copies.

    Only what is copied is pinned. State never is: torch rounds the size of pinned memory up to a power of two.
    """

    num_ahead = 1  # the next gradients come down beside an update

    def __init__(self, *args: Any, weights: Weights, gradients: Gradients, **others: Any) -> None:
        """Allocate the copies and the state; see ``Bucket``."""
        self._down, self._up = _copiers(weights.shard.device)
        self._param, self._grad = _pinned_like(weights.shard), _pinned_like(gradients.shard)
        super().__init__(*args, weights=weights, gradients=gradients, **others)

    @property
    def param(self) -> Tensor:
        """See ``Bucket.param``; its values are there while the update runs."""
        return self._param

    @property
    def grad(self) -> Tensor:
        """See ``Bucket.grad``; its values are there until the next ``fetch_``."""
        return self._grad

    def current_param(self, part: slice) -> Tensor:
        """See ``Bucket.current_param``; a copy. Waits for the device."""
        return self.weights.shard[part].to(self._param.device, copy=True)

    def fetch_(self, step: Step) -> None:
        """See ``Bucket.fetch_``; begin to copy gradients and parameters down."""
        super().fetch_(step)
        pairs = [(self._grad, self.gradients.shard), (self._param, self.weights.shard)]

        def bring(scalar: Any) -> Any:
            if isinstance(scalar, Tensor):
                pairs.append((_pinned_like(scalar), scalar))
                return pairs[-1][0]
            return scalar

        hyper = step.hypers[self.group_index]
        self._hyper = replace(hyper, lr=bring(hyper.lr))
        self._divisor, self._void = bring(step.divisor), bring(step.void)
        self._down.follow_device()
        self._arrival = self._down.copy_(pairs)

    def update_(self, step: Step, present: tuple[bool, ...]) -> tuple[list[Tensor], Tensor | None]:
        """See ``Bucket.update_``; then begin to copy parameters up. What the device is given next waits for it."""
        self._arrival.synchronize()
        hypers = list(step.hypers)
        hypers[self.group_index] = self._hyper.on(self._param.device)
        updated = super().update_(Step(hypers, self._divisor, self._void), present)
        pairs = [(self.weights.shard[run], self._param[run]) for run in self.runs(present)]
        self._up.hold_device_until(self._up.copy_(pairs))
        return updated


def check_residency(residency: StateResidency, device: torch.device) -> None:
    """Refuse host memory beside devices that cannot copy while they compute, for want of streams."""
    if residency is StateResidency.HOST and not hasattr(torch.get_device_module(device), "Stream"):
        raise ValueError(
            f"state_residency: expected StateResidency.DEVICE for parameters on {device.type}, got HOST; it takes a "
            "device that has streams, such as CUDA"
        )


class _Copier:
    """Copies in one direction between a device and host memory, one behind the other."""

    def __init__(self, device: torch.device) -> None:
        self._of_device: Any = torch.get_device_module(device)
        self._device = device
        self._stream = self._of_device.Stream(device)

    def follow_device(self) -> None:
        """Have later copies wait for all that the device was given so far."""
        self._stream.wait_stream(self._of_device.current_stream(self._device))

    def hold_device_until(self, event: Any) -> None:
        """Have all that the device is given from now on wait."""
        event.wait(self._of_device.current_stream(self._device))

    def copy_(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Begin to copy to the first tensor of each pair from the second; the event of its end."""
        with self._of_device.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        event = self._of_device.Event()
        event.record(self._stream)
        return event


@cache
def _copiers(device: torch.device) -> tuple[_Copier, _Copier]:
    """The way down from a device and the way up to it, for all buckets of this process."""
    return _Copier(device), _Copier(device)


def _pinned_like(tensor: Tensor) -> Tensor:
    """Host memory of the shape and dtype of a tensor on a device, to be copied from there or to it; zeros."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.device.type != "cpu")
