"""Outbound: all-gathers of updated parameters, finished within the step or left in flight for whoever reads first.

    step        | update 0 | update 1 | update 2 |
    wire                   |=== gather 0 ===|=== gather 1 ===|=== gather 2 ===|
    forward                                | layer 0 |      | layer 1 |      | layer 2 |     each waits for its own

A pre-forward hook of each attached module waits for the module's own parameters; ``in_flight`` has all other readers
wait.
Compiled code is specialised on classes and must not be interrupted: there the entry waits for all that is below it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.schedule.in_flight import AllGather, finish, is_anything_in_flight, wait_for

_BORROWED_AHEAD = 2
"""All-gathers of borrowed parameters kept under way, each with a buffer of its own."""


class Gatherer:
    """Publishes the shards of one optimizer, and knows what is under way."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self._under_way: list[AllGather] = []
        self._attachments: list[Attachment] = []

    def __del__(self) -> None:
        """Finish what is in flight: other ranks wait for our shards, and buffers must outlive their gathers."""
        with suppress(Exception):
            self.finish()

    @property
    def num_attached(self) -> int:
        """How many modules are attached, which has to be equal on all ranks."""
        return len(self._attachments)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """A context for the part of a step that publishes buckets.

        At its end gathers are left in flight or, where readers cannot be made to wait or something was raised,
        finished.
        """
        try:
            yield
            may_stay = [gather for gather in self._under_way if self._may_stay(gather.bucket)]
            finish([gather for gather in self._under_way if gather not in may_stay])
            self._under_way = may_stay
            for gather in may_stay:
                gather.leave()
        except BaseException:
            # What went wrong first is what to tell, be it a KeyboardInterrupt.
            with suppress(Exception):
                self.finish()
            raise

    def publish(self, bucket: Bucket) -> None:
        """Begin to gather a bucket's parameters. Collective."""
        buffer = bucket.weights.outgoing()
        self._under_way.append(AllGather(bucket, buffer, self._collectives.all_gather_(buffer)))
        if bucket.is_borrowed:
            over = [gather for gather in self._under_way if gather.bucket.is_borrowed][:-_BORROWED_AHEAD]
            finish(over)
            self._under_way = [gather for gather in self._under_way if gather not in over]

    def _may_stay(self, bucket: Bucket) -> bool:
        # Where gathers need the host, a rank that reads would wait for others, who may be waiting for it elsewhere.
        goes_on = self._collectives.num_ranks > 1 and self._collectives.gathers_by_itself
        if not (self._attachments and goes_on):
            return False
        return all(  # of what others lend, parameters are DTensors
            type(member.param) is Parameter and any(id(member.param) in attached.ids for attached in self._attachments)
            for member in bucket.members
        )

    def finish(self) -> None:
        """Finish everything under way; raises as ``AllGather.wait``, after the others have been finished."""
        finish(self._under_way)
        self._under_way.clear()

    def attach(self, model: nn.Module, params: Container[Tensor]) -> Attachment:
        """Leave the gathers of a model's buckets in flight from now on; see ``ShardedDecoupledAdamW.attach``."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {model!r}")
        if not any(param in params for param in model.parameters()):
            raise ValueError("model: expected parameters that this optimizer updates, found none")
        attachment = Attachment(self, model)
        self._attachments.append(attachment)
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Undo an ``attach``; what is in flight is finished."""
        self.finish()
        if attachment in self._attachments:
            self._attachments.remove(attachment)


class Attachment:
    """What ``attach`` returns: ``remove()`` undoes it. It has the ``ids`` of the model's parameters."""

    def __init__(self, gatherer: Gatherer, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{name or 'model'}: expected a module that runs in Python, got a {type(module).__name__}, whose "
                    "parameters are read from C++, which cannot be made to wait; leave the model unattached"
                )
        self.ids = frozenset(map(id, model.parameters()))
        self._gatherer = weakref.ref(gatherer)
        self._undo = ExitStack()
        self._hook(model, set())

    def remove(self) -> None:
        """Let ``step`` finish these all-gathers again, and take the hooks off; more than once does no harm."""
        gatherer = self._gatherer()
        if gatherer is not None:
            gatherer.detach(self)
        self._undo.close()

    def _hook(self, module: nn.Module, seen: set[nn.Module]) -> None:
        """Have a module and those below it wait for what they read."""
        if module in seen:
            return
        seen.add(module)
        below = tuple(module.parameters())
        # module.compile() compiles hooks along; TransformerEncoderLayer evaluates in a slower way where it has one.
        if module._compiled_call_impl is not None or isinstance(module, nn.TransformerEncoderLayer):
            self._undo.callback(_wrap_call(module, _Wait(below, below)))
            return
        # Of a compiled forward all is one piece, and MultiheadAttention reads a module below it that is never called.
        is_one = hasattr(module.forward, "_torchdynamo_orig_callable") or isinstance(module, nn.MultiheadAttention)
        wait = _Wait(below if is_one else tuple(module.parameters(recurse=False)), below)
        self._undo.callback(module.register_forward_pre_hook(wait, prepend=True).remove)
        for child in () if is_one else module.children():
            self._hook(child, seen)


class _Wait:
    """A pre-forward hook that waits for parameters."""

    def __init__(self, own: Sequence[Tensor] = (), below: Sequence[Tensor] = ()) -> None:
        """Wait for ``own``; in evaluation, where torch chooses faster ways by what is ``below``, for all of that."""
        self._own, self._below = own, below

    def __call__(self, module: nn.Module, _args: object = ()) -> None:
        if is_anything_in_flight() or torch.compiler.is_compiling():
            self._wait(module)

    @_disable_dynamo  # where it was compiled after it was attached, the graph has to break
    def _wait(self, module: nn.Module) -> None:
        wait_for(self._own if module.training else self._below)

    def __reduce__(self) -> Any:
        return _Wait, ()  # the parameters of a copied or saved model are others


def _wrap_call(module: nn.Module, wait: _Wait) -> Callable[[], None]:
    """Wait in front of a module's call, without a hook; returns what undoes it."""
    before = module._compiled_call_impl
    call = before or module._call_impl

    def entry(*args: Any, **kwargs: Any) -> Any:
        wait(module)
        return call(*args, **kwargs)

    def undo() -> None:
        if module._compiled_call_impl is entry:  # or it has been compiled again since
            module._compiled_call_impl = before

    module._compiled_call_impl = entry
    return undo
