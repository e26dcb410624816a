"""A pretended accelerator, to see on a CPU that tensors of two devices do not mix, and that copies are waited for.

Inside `pretended_device()` tensors that are made on `ELSEWHERE`, or come of such tensors, say that they are there.
Their memory is the CPU's all the same, so results have the CPU's bits. What a GPU would not do, or too late, fails:

- an operation on tensors of both places, unless it copies, or the host's are 0-d;
- an operation by which the host waits for the device, inside `without_waiting()`;
- a copy in a stream of its own whose host side is not pinned, or that does not wait for what the device does before;
- what goes between ranks from the host's memory, small or not (there is one rank, but its verbs look);
- a copy that nobody waits for: those in streams of their own take place when they are waited for, and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.dlpack import from_dlpack

from sharded_dadamw.buckets import offload, weights
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.schedule.reducer import Reducer, _Delivery

ELSEWHERE = torch.device("cuda", 0)

_ANY: Any = Tensor
_DEVICE, _IS_CUDA = _ANY.device.__get__, _ANY.is_cuda.__get__
_READS = frozenset([Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__int__, Tensor.__bool__])
_STRICT = frozenset([torch.stack, torch.cat])
"""Operations that do not even take the host's 0-d tensors."""


def put_elsewhere(tensor: Tensor) -> Any:
    """The same tensor, from now on on the device."""
    vars(tensor)["is_elsewhere"] = True
    return tensor


class _Stream:
    """Copies that take place when they are waited for; the device's own stream has done everything already."""

    def __init__(self, pretence: _Pretence) -> None:
        self.pretence = pretence
        self.copies: list[Callable[[], object]] = []
        self.num_done = 0
        self.num_ops_waited_for = -1

    def wait_stream(self, stream: _Stream) -> None:
        assert stream is self.pretence.own_stream
        self.num_ops_waited_for = self.pretence.num_ops

    def record_event(self) -> _Event:
        assert self is self.pretence.own_stream
        return _Event()  # of what is over

    def run(self, until: int) -> None:
        until -= self.num_done
        due, self.copies = self.copies[: max(until, 0)], self.copies[max(until, 0) :]
        self.num_done += len(due)
        with torch._C.DisableTorchFunction():
            for copy in due:
                copy()


class _Event:
    def __init__(self) -> None:
        self.stream: _Stream | None = None

    def record(self, stream: _Stream | None = None) -> None:
        self.stream = stream
        self.num_copies = 0 if stream is None else stream.num_done + len(stream.copies)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.num_copies)
            self.stream.pretence.left_under_way.append(len(self.stream.copies))

    def wait(self, stream: _Stream) -> None:
        if self.stream is not None:
            self.stream.run(self.num_copies)


class _Pretence(TorchFunctionMode):
    """What `pretended_device` returns.

    `num_copies` counts copies in streams of their own; `left_under_way` is how many there still were in a stream, each
    time that the host waited for earlier ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_ops = 0
        self.num_copies = 0
        self.left_under_way: list[int] = []
        self.waits = True
        self.own_stream = self.stream = _Stream(self)
        self.pinned: set[int] = set()

    @contextmanager
    def in_stream(self, stream: _Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if hasattr(tensor, "is_elsewhere")]
        if func == _DEVICE:
            return ELSEWHERE if there else func(*args)
        if func == _IS_CUDA:
            return bool(there)
        if func is Tensor.to:
            return self._move(args[0], bool(there), *args[1:], **kwargs)
        if func is Tensor.cpu:
            return self._move(args[0], bool(there), "cpu")
        if func is Tensor.copy_ and 0 < len(there) < len(tensors):
            return self._copy(*args, **kwargs)
        if func in _READS and there:
            self._wait(func)
        here = [tensor for tensor in tensors if not hasattr(tensor, "is_elsewhere")]
        mixes = there and any(tensor.ndim or func in _STRICT for tensor in here)
        assert not mixes, f"{func} takes tensors of both devices"
        self.num_ops += bool(there)
        pins = kwargs.pop("pin_memory", False)
        if kwargs.get("device") is not None:
            there = [Tensor()] if torch.device(kwargs.pop("device")) == ELSEWHERE else []
        result = func(*args, **kwargs)
        if pins:
            self.pinned.add(result.untyped_storage().data_ptr())
        return tree_map_only(Tensor, put_elsewhere, result) if there else result

    def _wait(self, what: object) -> None:
        assert self.waits, f"the host waits for the device: {what}"

    def _move(self, tensor: Tensor, is_there: bool, *args: Any, **kwargs: Any) -> Tensor:
        names = [kwargs.pop("device", None), *args]
        devices = [torch.device(each) for each in names if isinstance(each, (torch.device, str))]
        to_there = devices[0] == ELSEWHERE if devices else is_there
        if is_there and not to_there:
            self._wait(Tensor.to)
        rest = [each for each in args if not isinstance(each, (torch.device, str))]
        kwargs["copy"] = kwargs.get("copy", False) or is_there != to_there
        kwargs.setdefault("dtype", rest[0] if rest else tensor.dtype)
        moved = tensor.to(**kwargs)
        return put_elsewhere(moved) if to_there else moved

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        comes_down = hasattr(source, "is_elsewhere")
        on_host = target if comes_down else source
        if self.stream is self.own_stream:
            if comes_down and not non_blocking:
                self._wait(Tensor.copy_)
            return target.copy_(source)
        assert on_host.untyped_storage().data_ptr() in self.pinned, "copies would not be asynchronous"
        assert non_blocking and target.dtype == source.dtype and target.shape == source.shape
        if comes_down:
            assert self.stream.num_ops_waited_for == self.num_ops, "the device may still be writing what is copied"
        self.num_copies += 1
        self.stream.copies.append(lambda: target.copy_(source))
        return target


def _as_on_the_device(pretence: _Pretence, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that autograd calls, which leaves modes behind, and makes gradients of its own."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for param in args:
            if hasattr(param, "is_elsewhere") and param.grad is not None:
                put_elsewhere(param.grad)
        with pretence:
            return method(self, *args, **kwargs)

    return call


def _on_the_device(verb: Callable[..., Any]) -> Callable[..., Any]:
    def look(self: Collectives, *args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        assert all(hasattr(tensor, "is_elsewhere") for tensor in tensors), f"{verb.__name__} of the host's memory"
        return verb(self, *args, **kwargs)

    return look


def _from_dlpack(exported: list[Tensor]) -> Tensor:
    """As a device's own memory, of which a tensor from outside is on that device."""
    (tensor,) = exported  # and not the tensor itself, which torch refuses unless its device is the current one
    shared = from_dlpack(tensor)
    return put_elsewhere(shared) if hasattr(tensor, "is_elsewhere") else shared


def _stream_of(pretence: _Pretence, device: torch.device) -> _Stream:
    assert device == ELSEWHERE
    return pretence.own_stream


@contextmanager
def pretended_device() -> Iterator[_Pretence]:
    """A context with a second device."""
    pretence = _Pretence()
    stream_of = partial(_stream_of, pretence)
    module = SimpleNamespace(
        Stream=lambda device: _Stream(pretence),
        Event=_Event,
        stream=pretence.in_stream,
        current_stream=stream_of,
    )
    offload._copiers.cache_clear()
    try:
        with (
            ExitStack() as verbs,
            mock.patch.object(torch, "get_device_module", lambda device: module),
            mock.patch("torch.cuda.current_stream", stream_of),
            mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
            mock.patch.object(weights, "to_dlpack", lambda tensor: [tensor]),
            mock.patch.object(weights, "from_dlpack", _from_dlpack),
            pretence,
        ):
            for kind, name in ((_Delivery, "__call__"), (Reducer, "_end_backward"), (Reducer, "_remember")):
                method = _as_on_the_device(pretence, getattr(kind, name))
                verbs.enter_context(mock.patch.object(kind, name, method))
            for name in ("reduce_scatter_mean", "all_gather_", "all_reduce_", "broadcast_"):
                verbs.enter_context(mock.patch.object(Collectives, name, _on_the_device(getattr(Collectives, name))))
            yield pretence
    finally:
        offload._copiers.cache_clear()


@contextmanager
def without_waiting(pretence: _Pretence) -> Iterator[None]:
    """Inside, an operation by which the host waits for the device fails; an event may be waited for."""
    pretence.waits = False
    try:
        yield
    finally:
        pretence.waits = True


def parameters_elsewhere(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Copies on the device."""
    return {name: put_elsewhere(nn.Parameter(param.detach().clone())) for name, param in params.items()}
