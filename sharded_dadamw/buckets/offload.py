"""Where the state of a bucket lives and its update runs: beside the parameters, or in host memory.

    beside the parameters    the update works on the shards themselves; nothing moves

    in host memory           gradient shard  == down ==>  grad  [n]
                                                            | update, with the state, by the kernels for CPUs
                             parameter shard <== up ====  param [n]

[Note: order of copies] Copies have a stream of their own for each direction, so that neither waits for the other, nor
for what else the device is about to do. The way down begins behind all that the device was given so far, the reduction
of the gradients among it; the host waits for its end before it computes. So when the way up begins nobody reads those
parameters any more, and it has nothing to wait for; what the device is given afterwards waits for its end. All memory
that is copied belongs to the bucket, or is kept until the host has waited for it. With parameters on a CPU the same
code runs, and each copy is over at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.buckets.gradients import Gradients
from sharded_dadamw.buckets.weights import Weights
from sharded_dadamw.config import StateResidency
from sharded_dadamw.update.adamw import Step


class Workplace(ABC):
    """Where one bucket is updated.

    Attributes:
        num_ahead: For how many buckets ``fetch_`` is worth calling before the first of them is updated.
    """

    num_ahead: int

    def __init__(self, weights: Weights, gradients: Gradients) -> None:
        """For one bucket, on one rank."""
        self._weights = weights
        self._gradients = gradients

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where state is to be allocated."""

    @property
    @abstractmethod
    def param(self) -> Tensor:
        """[n], what an update takes for this rank's shard of the parameters; its values are there while it runs."""

    @property
    @abstractmethod
    def grad(self) -> Tensor:
        """[n], what an update takes for the shard of the gradients; its values are there until the next ``fetch_``."""

    @abstractmethod
    def current_param(self, part: slice) -> Tensor:
        """A range of this rank's shard of the parameters as it is now, on ``device``; only to be read. May block."""

    @abstractmethod
    def fetch_(self, step: Step, group: int, *, with_param: bool) -> None:
        """Begin to bring here what an update needs, once gradients are reduced.

        Args:
            step: With its tensors on the device of the parameters.
            group: Position of the group of which it takes the scalars.
            with_param: Whether the update reads the parameters, and not only writes them.
        """

    @abstractmethod
    def arrive(self) -> Step:
        """Wait for what ``fetch_`` has begun, and return the step as it can be used here."""

    @abstractmethod
    def deliver_(self, spans: Sequence[slice]) -> None:
        """Begin to bring ranges of ``param`` to the parameters, unless the update was to change nothing.

        What the device is given from now on comes after that.
        """


class BesideParameters(Workplace):
    """State on the parameters' device, and updates of the shards themselves."""

    num_ahead = 0

    @property
    def device(self) -> torch.device:
        """See :attr:`Workplace.device`."""
        return self._weights.shard.device

    @property
    def param(self) -> Tensor:
        """See :attr:`Workplace.param`."""
        return self._weights.shard

    @property
    def grad(self) -> Tensor:
        """See :attr:`Workplace.grad`."""
        return self._gradients.shard

    def current_param(self, part: slice) -> Tensor:
        """See :meth:`Workplace.current_param`; a view."""
        return self._weights.shard[part]

    def fetch_(self, step: Step, group: int, *, with_param: bool) -> None:
        """See :meth:`Workplace.fetch_`."""
        self._step = step

    def arrive(self) -> Step:
        """See :meth:`Workplace.arrive`."""
        return self._step

    def deliver_(self, spans: Sequence[slice]) -> None:
        """See :meth:`Workplace.deliver_`."""


class InHostMemory(Workplace):
    """State in host memory, and updates there, of copies. [Note: order of copies].

    Only what travels is pinned. State never does, and torch rounds the size of pinned memory up to a power of two.
    """

    num_ahead = 1

    def __init__(self, weights: Weights, gradients: Gradients) -> None:
        """Allocate the copies; see :class:`Workplace`."""
        super().__init__(weights, gradients)
        self._down, self._up = _lanes(weights.shard.device)
        self._param = _travelling(weights.shard)
        self._grad = _travelling(gradients.shard)

    @property
    def device(self) -> torch.device:
        """See :attr:`Workplace.device`."""
        return self._param.device

    @property
    def param(self) -> Tensor:
        """See :attr:`Workplace.param`."""
        return self._param

    @property
    def grad(self) -> Tensor:
        """See :attr:`Workplace.grad`."""
        return self._grad

    def current_param(self, part: slice) -> Tensor:
        """See :meth:`Workplace.current_param`; a copy."""
        return self._weights.shard[part].to(self.device, copy=True)

    def fetch_(self, step: Step, group: int, *, with_param: bool) -> None:
        """See :meth:`Workplace.fetch_`."""
        pairs = [(self._grad, self._gradients.shard)]
        if with_param:
            pairs.append((self._param, self._weights.shard))

        def bring(scalar: Tensor) -> Tensor:
            here = _travelling(scalar)
            pairs.append((here, scalar))
            return here

        self._hypers, self._group, hyper = list(step.hypers), group, step.hypers[group]
        if isinstance(hyper.lr, Tensor):
            self._hypers[group] = replace(hyper, lr=bring(hyper.lr))
        self._step = Step(
            self._hypers,
            None if step.divisor is None else bring(step.divisor),
            None if step.found_inf is None else bring(step.found_inf),
        )
        self._down.follow_device()
        self._arrival = self._down.copy_(pairs)

    def arrive(self) -> Step:
        """See :meth:`Workplace.arrive`."""
        self._arrival.synchronize()
        self._hypers[self._group] = self._hypers[self._group].on(self.device)
        return self._step

    def deliver_(self, spans: Sequence[slice]) -> None:
        """See :meth:`Workplace.deliver_`."""
        if self._step.found_inf is not None and bool(self._step.found_inf):
            return  # then it need not be what the parameters are
        self._up.hold_device_until(self._up.copy_([(self._weights.shard[span], self._param[span]) for span in spans]))


_WORKPLACES: dict[StateResidency, type[Workplace]] = {
    StateResidency.DEVICE: BesideParameters,
    StateResidency.HOST: InHostMemory,
}


def workplace_for(residency: StateResidency, weights: Weights, gradients: Gradients) -> Workplace:
    """Where a bucket is updated, for one choice of where state lives."""
    return _WORKPLACES[residency](weights, gradients)


def check_residency(residency: StateResidency, device: torch.device) -> None:
    """Refuse host memory beside devices that cannot copy while they compute.

    Raises:
        ValueError: ``device`` has no streams.
    """
    if residency is StateResidency.HOST and not hasattr(torch.get_device_module(device), "Stream"):
        raise ValueError(
            f"state_residency: expected StateResidency.DEVICE for parameters on {device.type}, got HOST; it takes a "
            "device that has streams, such as CUDA"
        )


class _Lane:
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
def _lanes(device: torch.device) -> tuple[_Lane, _Lane]:
    """The way down from a device and the way up to it, for all buckets of this process."""
    return _Lane(device), _Lane(device)


def _travelling(like: Tensor) -> Tensor:
    """Host memory of the shape and dtype of a tensor on a device, to be copied from there or to it; zeros."""
    return torch.zeros(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.device.type != "cpu")
