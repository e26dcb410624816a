"""Tensors whose values are still on their way, and how their readers are made to wait.

[Note: who waits] The class of a tensor that is still in flight is a subclass of its own, put there by assigning
``tensor.__class__``, as torch does with ``UninitializedParameter``. Every operation of torch that Python gives it to
comes to that subclass's ``__torch_function__`` first, which waits for what is under way, gives all tensors that it
brings their own class back, and lets the operation run. Nothing is slowed down before or after. What reads no elements,
such as ``p.grad`` and ``p.shape``, does not wait, so that ``zero_grad`` can run meanwhile.

[Note: who only looks] Ranks need not read their gradients at the same time: one of them may log a norm while the others
are in a barrier, or in the next collective call. So whoever reads one and changes nothing waits until its value is
there, and not until the other ranks have read this one's. The tensor stays in flight for those who change it, and what
shares its memory becomes so as well.

C++ that is given a tensor without passing through Python's operations (extensions, transforms of ``torch.func``,
scripted functions) cannot be seen that way.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

_ASKED = ("requires_grad", "is_leaf", "grad_fn", "shape", "dtype", "device", "layout", "ndim", "_version")
_GRAD: Any = Tensor.grad
_READS_NOTHING: frozenset[Any] = frozenset(
    [
        *(_GRAD.__get__, _GRAD.__set__, _GRAD.__delete__, Tensor.requires_grad_),
        *(getattr(Tensor, name).__get__ for name in (*_ASKED, "_backward_hooks", "_post_accumulate_grad_hooks")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.element_size, Tensor.__len__),
        *(Tensor.is_contiguous, Tensor.is_floating_point, torch.is_floating_point, torch.numel),
        *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook),
    ]
)
"""What may be asked of a tensor, or done to it, while it is in flight. Whatever is missing here waits."""


def _operations(names: str) -> frozenset[Any]:
    """Those of torch, of its tensors and of its linear algebra that are called so."""
    places = (torch, Tensor, torch.linalg)
    return frozenset(getattr(place, name) for name in names.split() for place in places if hasattr(place, name))


_LOOK = _operations(
    "abs add all allclose amax amin any cat clone count_nonzero cosine_similarity div dot eq equal histc isfinite "
    "isinf isnan item max mean median min mul norm pow quantile square stack std sub sum tolist var vector_norm "
    "_foreach_norm __bool__ __float__ __mul__ __truediv__"
) | {Tensor.__repr__, Tensor.__format__}
"""What reads tensors, changes none, and returns memory of its own. [Note: who only looks]"""
_DATA: Any = Tensor.data
_LOOK_AT_THE_SAME = _operations("cpu detach double flatten float ravel reshape to view") | {_DATA.__get__}
"""What may return the same memory under another name."""


class Arrival(ABC):
    """Something under way that ends in values of tensors.

    Attributes:
        content: What arrives, for messages.
        is_owed: Whether other ranks count on this one to wait for it, whatever happens.
        is_over: Whether it was waited for, with success or not.
        wait_s: Host seconds for which it was waited for.
        device: Where it arrives.
    """

    content = "values"
    is_owed = False

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Take over what has been started.

        Args:
            tensors: Those whose readers are going to wait.
            device: Where they are.
        """
        self.wait_s = 0.0
        self.device = device
        self._tensors = list(tensors)
        self.is_over = False
        self._is_hidden = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # backward runs hooks on threads of its own

    @abstractmethod
    def _arrive(self) -> None:
        """Wait for it; called once."""

    def hide(self) -> None:
        """Make readers of the tensors wait from now on. [Note: who waits]."""
        _in_flight.add(self)
        self._is_hidden = True
        for tensor in self._tensors:
            self._hide(tensor)

    def hide_too(self, tensor: object) -> None:
        """Make readers of another name for the same memory wait as well."""
        with self._lock:
            if not self.is_over and type(tensor) in _PENDING:
                assert isinstance(tensor, Tensor)
                self._tensors.append(tensor)
                self._hide(tensor)

    def _hide(self, tensor: Tensor) -> None:
        vars(tensor)["_arrival"] = self
        tensor.__class__ = _PENDING[type(tensor)]

    @_disable_dynamo
    def read(self) -> None:
        """Wait, because somebody is about to read, and perhaps to write."""
        in_any_mode(self.wait)

    def look(self) -> None:
        """Wait, because somebody is about to read, and to change nothing. [Note: who only looks]."""
        self.read()

    def wait(self) -> None:
        """Wait, and give the tensors back; more than once does no harm.

        Raises:
            RuntimeError: Waiting has failed, now or at an earlier call: the tensors cannot be read any more.
        """
        with self._lock:
            if self._error is not None:
                raise RuntimeError(f"{self.content} were lost on their way from other ranks") from self._error
            if self.is_over:
                return
            self.is_over = True
            _in_flight.discard(self)
            start = time.perf_counter()
            try:
                self._arrive()
            except BaseException as error:
                self._error = error
                raise
            self.wait_s = time.perf_counter() - start
            if self._is_hidden:
                _give_back(self._tensors)
            self._tensors = []


def in_any_mode(wait: Callable[[], object]) -> None:
    """Wait outside of whatever transform, trace or mode of torch the reader may be in: it is none of their business."""
    with (
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        torch._C._DisableTorchDispatch(),
        torch._C._DisableFuncTorch(),
    ):
        wait()


class _Pending:
    """What a tensor in flight does differently. [Note: who waits]."""

    __slots__ = ()

    def __new__(cls, data: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        # Who copies a tensor with type(t)(...) means its own class.
        return _PLAIN[cls](data, *args, **kwargs)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS_NOTHING:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        pending = list(_pending_among((args, kwargs)))
        if not pending:  # it is somewhere in there all the same
            land()
        if (func in _LOOK or func in _LOOK_AT_THE_SAME) and "out" not in kwargs and set(types) <= _PLAIN.keys():
            still_pending = [tensor for tensor in pending if not _look_at(tensor)]
            if still_pending:
                with torch._C.DisableTorchFunctionSubclass():
                    if func in (Tensor.__repr__, Tensor.__format__):
                        args = (args[0].detach(), *args[1:])  # what is shown has its own class, as at other times
                    result = func(*args, **kwargs)
                    if func in _LOOK_AT_THE_SAME:
                        _hide_alias(result, still_pending)
                return result
        for tensor in pending:
            wait_for(tensor)
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Or what it waits for would be pickled along with its other attributes.
        wait_for(self)
        return self.__reduce_ex__(protocol)


class PendingParameter(_Pending, Parameter):
    """A Parameter in flight."""


class PendingTensor(_Pending, Tensor):
    """A Tensor in flight: a gradient, or what is optimized without being a Parameter."""


_PENDING: dict[type, type] = {Parameter: PendingParameter, Tensor: PendingTensor}
_PLAIN: dict[type, type] = {pending: plain for plain, pending in _PENDING.items()}


def can_be_hidden(tensor: Tensor) -> bool:
    """Whether readers of a tensor can be made to wait, which takes one without a class of its own."""
    return type(tensor) in _PENDING


def wait_for(tensor: object) -> None:
    """Wait for a tensor, if it is under way, because it is about to be read."""
    if type(tensor) in _PLAIN:
        arrival = _arrival_of(tensor)
        if arrival is not None:  # or another thread is just giving it back
            arrival.read()
        _give_back([tensor])  # it may have traded places with another one, as by torch.utils.swap_tensors


def _look_at(tensor: object) -> bool:
    """Wait until a tensor can be read; returns whether it can be changed, too."""
    arrival = _arrival_of(tensor)
    if arrival is not None:
        arrival.look()
    return arrival is None or arrival.is_over


def _hide_alias(result: Tensor, pending: Sequence[Any]) -> None:
    for tensor in pending:
        arrival = _arrival_of(tensor)
        if arrival is not None and result is not tensor and torch._C._is_alias_of(result, tensor):  # type: ignore[attr-defined]
            arrival.hide_too(result)


def _arrival_of(tensor: object) -> Arrival | None:
    arrival: Arrival | None = vars(tensor).get("_arrival")
    return arrival


def _give_back(tensors: Sequence[object]) -> None:
    plain_of = _PLAIN.get
    for tensor in tensors:
        plain = plain_of(type(tensor))
        if plain is not None:
            tensor.__dict__.pop("_arrival", None)
            tensor.__class__ = plain


def _pending_among(value: object) -> Iterator[object]:
    if type(value) in _PLAIN:
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _pending_among(part)
    elif isinstance(value, dict):
        yield from _pending_among(list(value.values()))


_in_flight: weakref.WeakSet[Arrival] = weakref.WeakSet()


def wait_for_all(arrivals: Sequence[Arrival]) -> None:
    """Wait for all of them, also where one fails: no message may be left over."""
    with ExitStack() as stack:
        for arrival in reversed(arrivals):
            stack.callback(arrival.wait)


def land() -> None:
    """Wait for everything in flight in this process."""
    wait_for_all(list(_in_flight))


def _land_at_exit() -> None:
    owed = [arrival for arrival in _in_flight if arrival.is_owed]
    devices = {arrival.device for arrival in owed}
    wait_for_all(owed)
    for device in devices:
        if device.type == "cuda":  # there waiting holds up the stream only
            torch.cuda.synchronize(device)


atexit.register(_land_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=land)  # nothing would ever arrive in the child
