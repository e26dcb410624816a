"""Parameters whose all-gather is in flight, and how whoever reads one is made to wait.

The class of a parameter in flight is a subclass of Parameter, put there by assigning ``param.__class__``. Every
operation of torch that Python gives it to comes to that subclass's ``__torch_function__`` first, which waits for
everything in flight in this process and then lets the operation run. Modules of an attached model do not come that far:
their hooks (``gatherer``) wait for their own parameters only.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.comm.pending import Pending

_METADATA = frozenset(("grad", "requires_grad", "shape", "dtype", "device", "is_floating_point"))
"""What may be asked of a parameter in flight, and ``grad`` also set: what loops do between a step and a forward."""

_in_flight: dict[int, AllGather] = {}
"""By the ``id`` of each parameter. A gather keeps its parameters alive, so ids are not used again meanwhile."""
_LOST = "parameters were lost on their way from other ranks; start again from a checkpoint"
_lock = threading.RLock()  # backward runs hooks on threads of its own


class AllGather:
    """The all-gather of one bucket, under way into ``buffer`` [num_ranks * n]."""

    def __init__(self, bucket: Bucket, buffer: Tensor, handle: Pending) -> None:
        self.bucket, self._buffer, self._handle = bucket, buffer, handle
        self._params: Sequence[Tensor] = ()
        self._is_over = False
        self._error: Exception | None = None

    def leave(self) -> None:
        """Leave it in flight; readers of its parameters wait from now on."""
        self._params = [member.param for member in self.bucket.members]
        for param in self._params:
            _in_flight[id(param)] = self
            param.__class__ = ParameterInFlight

    def wait(self) -> None:
        """Wait, and give the parameters back; more than once does no harm, and a failure is raised at each call."""
        with _lock:
            if self._error is not None:
                raise RuntimeError(_LOST) from self._error
            if self._is_over:
                return
            try:
                self._handle.wait()
                self.bucket.weights.accept_(self._buffer)
            except Exception as error:
                self._error = error
                self._give_back(LostParameter)
                raise
            self._give_back(Parameter)
            self._is_over = True  # and not before: after a KeyboardInterrupt, who reads next waits again

    def _give_back(self, kind: type[Parameter]) -> None:
        for param in self._params:
            param.__class__ = kind
            _in_flight.pop(id(param), None)
        self._params = ()


class ParameterInFlight(Parameter):
    """A Parameter whose values are on their way."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain Parameter, which is what ``type(param)(...)`` means to whoever copies one."""
        return Parameter(*args, **kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Wait for everything in flight, unless nothing is read."""
        kwargs = kwargs or {}
        asked = getattr(func, "__self__", func)  # the property, where this is its getter or setter
        if getattr(asked, "__name__", "") not in _METADATA and wait_for_all():
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


class LostParameter(Parameter):
    """A Parameter whose values never came."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be read."""
        raise RuntimeError(_LOST)


def wait_for(params: Iterable[Tensor | None]) -> None:
    """Wait for those of these parameters that are in flight."""
    if _in_flight:
        finish([gather for param in params if (gather := _in_flight.get(id(param))) is not None])


def is_anything_in_flight() -> bool:
    """Whether there is anything to wait for in this process."""
    return bool(_in_flight)


def wait_for_all() -> bool:
    """Wait for everything in flight in this process; returns whether there was anything."""
    with _lock:
        gathers = list(dict.fromkeys(_in_flight.values()))
        finish(gathers)
        return bool(gathers)


def finish(gathers: Sequence[AllGather]) -> None:
    """Wait for these, also where one of them fails: no message may be left over."""
    with ExitStack() as stack:
        for gather in reversed(gathers):
            stack.callback(gather.wait)


def _wait_at_exit() -> None:
    devices = {param.device for gather in _in_flight.values() for param in gather._params}
    wait_for_all()
    for device in devices:
        if device.type == "cuda":  # where waiting holds up the stream only
            torch.cuda.synchronize(device)


atexit.register(_wait_at_exit)  # the other ranks wait for our shards
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=wait_for_all)  # nothing would ever arrive in the child
