"""Outbound: all-gathers of updated parameters, finished within the step or left in flight for whoever reads first.

    step        | update 0 | update 1 | update 2 |
    wire                   |=== gather 0 ===|=== gather 1 ===|=== gather 2 ===|
    forward                                | layer 0 |      | layer 1 |      | layer 2 |     each waits for its own

Readers wait as :mod:`in_flight` says. C++ that is given a parameter without passing through Python's operations cannot
be made to. It is mostly called by the module that the parameter belongs to, so a hook of each attached module also
waits for the module's own parameters. Compiled code is specialised on classes: there the hook is at the entry, and
waits for all that the compiled part holds.

[Note: who keeps a gather] Until it is finished, its parameters refer to it and it to them, and neither needs the
optimizer. When all of them are deleted, when the process forks and when it exits, gathers are finished, because other
ranks wait for our slice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.comm.collectives import Collectives, Handle
from sharded_dadamw.comm.in_flight import Arrival, can_be_hidden, in_any_mode, wait_for, wait_for_all

_BORROWED_AHEAD = 2
"""All-gathers of borrowed parameters kept under way, each with a buffer of its own."""

_CHOOSE_THEIR_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that in evaluation compute in a faster way, unless a parameter below them has a subclass, or a module a hook.
Their own code is torch's, and needs no hook."""


class Gather(Arrival):
    """The all-gather of one bucket, under way.

    Attributes:
        may_stay: Whether it may be left in flight when the step ends.
    """

    def __init__(
        self, bucket: Bucket, buffer: Tensor, handle: Handle, may_stay: bool, note: Callable[[], object]
    ) -> None:
        """Take over what has been started.

        Args:
            bucket: Whose parameters are on their way.
            buffer: [num_ranks * n], into which they are gathered.
            handle: To be waited for.
            may_stay: See above.
            note: Called when somebody reads a parameter.
        """
        super().__init__([member.param for member in bucket.members] if may_stay else [], buffer.device)
        self.may_stay = may_stay
        self._weights = bucket.weights
        self._buffer = buffer
        self._handle = handle
        self._note = note

    content = "parameters"
    is_owed = True

    def fetch(self) -> None:
        """Have all there is to have, whenever the other ranks do so."""
        self._handle.arrive()

    def _arrive(self) -> None:
        self._handle.wait()
        self._weights.accept_(self._buffer)

    def read(self) -> None:
        """See :meth:`Arrival.read`."""
        self._note()
        super().read()

    def __del__(self) -> None:
        """Wait even so: other ranks wait for our slice."""
        if not self.is_over:
            in_any_mode(self.wait)


class Gatherer:
    """Publishes the shards of one optimizer, and knows what is under way."""

    def __init__(self, collectives: Collectives) -> None:
        """Gather from the ranks of ``collectives``."""
        self._collectives = collectives
        self._under_way: list[Gather] = []
        self._attachments: list[Attachment] = []
        self._may_stay: dict[Bucket, bool] = {}
        self._numbers: dict[Bucket, int] = {}
        self._read: dict[int, None] = {}
        self._agreed: list[Bucket] = []
        self._has_left_any = False
        self._wait_s = 0.0

    @property
    def num_attached(self) -> int:
        """How many modules are attached, which has to be equal on all ranks."""
        return len(self._attachments)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """A context for the part of a step that publishes buckets.

        At its end gathers are hidden behind their parameters or, where that cannot be, finished; if something is
        raised, all are finished.
        """
        try:
            yield
            wait_for_all([gather for gather in self._under_way if not gather.may_stay])
            self._under_way = [gather for gather in self._under_way if gather.may_stay]
            for gather in self._under_way:
                if not self._collectives.gathers_by_itself:
                    gather.fetch()  # or a rank that reads would wait for others, who may be waiting for it elsewhere
                gather.hide()
            self._has_left_any = self._has_left_any or bool(self._attachments)
        except BaseException:
            # What went wrong first is what to tell, be it a KeyboardInterrupt.
            with suppress(Exception):
                self.finish()
            raise

    def publish(self, bucket: Bucket) -> None:
        """Begin to gather a bucket's parameters. Collective."""
        number = self._numbers.setdefault(bucket, len(self._numbers))
        note = partial(self._read.setdefault, number)
        buffer = bucket.weights.outgoing()
        self._under_way.append(
            Gather(bucket, buffer, self._collectives.all_gather_(buffer), self._may_be_left(bucket), note)
        )
        if bucket.is_borrowed:
            for gather in self._under_way[:-_BORROWED_AHEAD]:
                if not gather.may_stay:
                    gather.wait()

    def _may_be_left(self, bucket: Bucket) -> bool:
        if bucket not in self._may_stay:
            self._may_stay[bucket] = (
                not bucket.is_borrowed
                and self._collectives.num_ranks > 1
                and all(any(m.param in attached.params for attached in self._attachments) for m in bucket.members)
            )
        return self._may_stay[bucket] and all(can_be_hidden(member.param) for member in bucket.members)

    def finish(self) -> None:
        """Finish everything under way.

        Raises:
            RuntimeError: As :meth:`Arrival.wait`, after the others have been finished.
        """
        gathers, self._under_way = self._under_way, []
        wait_for_all(gathers)
        self._wait_s += sum(gather.wait_s for gather in gathers)

    def take_wait_s(self) -> float:
        """Host seconds that readers have waited for what was left in flight and is finished, and were not yet told."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def attach(self, model: nn.Module) -> Attachment:
        """Leave the gathers of a model's buckets in flight from now on.

        Raises:
            TypeError: A module is scripted: its parameters are read from C++.
        """
        attachment = Attachment(self, model)
        self._attachments.append(attachment)
        self._may_stay.clear()
        return attachment

    def detach(self, attachment: Attachment) -> None:
        """Undo an ``attach``; what is in flight is finished."""
        self.finish()
        if attachment in self._attachments:
            self._attachments.remove(attachment)
        self._may_stay.clear()

    def order_of_reading(self) -> list[Bucket]:
        """The buckets that this rank has ever read while they were in flight, in the order of their first times."""
        buckets = list(self._numbers)
        return [buckets[number] for number in self._read]

    def in_order_of_reading(self, buckets: Sequence[Bucket]) -> list[Bucket]:
        """Buckets in the order in which rank 0 reads them; those of which that is not known come last, as they are.

        Collective, with the same buckets on every rank, in the same order. Data goes between ranks only until the order
        is known, which is at the first call after a forward that found something in flight.
        """
        if not self._has_left_any or len(buckets) < 2:
            return list(buckets)
        if set(self._agreed) == set(buckets):
            return self._agreed
        numbers = [self._numbers.get(bucket, -1) for bucket in buckets]
        last = len(self._read)
        place = {number: place for place, number in enumerate(self._read)}
        places = torch.tensor([place.get(number, last) for number in numbers], device=buckets[0].weights.shard.device)
        self._collectives.broadcast_(places)
        agreed = places.tolist()
        ordered = [buckets[index] for index in sorted(range(len(buckets)), key=agreed.__getitem__)]
        if any(agreed):
            self._agreed = ordered
        return ordered


class Attachment:
    """What ``attach`` returns: ``remove()`` undoes it.

    Attributes:
        params: The model's parameters.
    """

    def __init__(self, gatherer: Gatherer, model: nn.Module) -> None:
        """Put hooks on the modules that need them."""
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"{name or 'model'}: expected a module that runs in Python, got a {type(module).__name__}, whose "
                    "parameters are read from C++, which cannot be made to wait; leave the model unattached"
                )
        self.params = frozenset(model.parameters())
        self._gatherer = weakref.ref(gatherer)
        self._undo = ExitStack()
        self._hook(model, set())
        # A path that is chosen by what parameters are must find them at rest.
        self._hook_in_front(model, _Wait(tuple(model.parameters()), only_in_evaluation=True))

    def remove(self) -> None:
        """Let ``step`` finish these all-gathers again, and take the hooks off; more than once does no harm."""
        gatherer = self._gatherer()
        if gatherer is not None:
            gatherer.detach(self)
        self._undo.close()

    def _hook(self, module: nn.Module, seen: set[nn.Module]) -> None:
        """Have a module and those below it wait for what C++ or compiled code may read in them."""
        if module in seen or type(module) in _CHOOSE_THEIR_PATH:
            return
        seen.add(module)
        if module._compiled_call_impl is not None:  # by module.compile(), which compiles hooks along
            entry = _Entry(module._compiled_call_impl, tuple(module.parameters()))
            module._compiled_call_impl = entry
            self._undo.callback(entry.remove_from, module)
        elif hasattr(module.forward, "_torchdynamo_orig_callable"):  # by torch.compile(module) or (module.forward)
            self._hook_in_front(module, _Wait(tuple(module.parameters())))
        else:
            if own := tuple(module.parameters(recurse=False)):
                self._hook_in_front(module, _Wait(own))
            for child in module.children():
                self._hook(child, seen)

    def _hook_in_front(self, module: nn.Module, wait: _Wait) -> None:
        if module._compiled_call_impl is None and type(module) not in _CHOOSE_THEIR_PATH:
            self._undo.callback(module.register_forward_pre_hook(wait, prepend=True).remove)


class _Wait:
    """A forward pre-hook that waits for parameters."""

    def __init__(self, params: Sequence[Tensor] = (), *, only_in_evaluation: bool = False) -> None:
        self._params = params
        self._only_in_evaluation = only_in_evaluation

    def __call__(self, module: nn.Module, _args: object) -> None:
        if torch.compiler.is_compiling() or (self._only_in_evaluation and module.training):
            return
        for param in self._params:
            wait_for(param)

    def __reduce__(self) -> Any:
        return _Wait, ()  # the parameters of a copied or saved model are others


class _Entry:
    """The compiled call of a module, once its parameters are at rest."""

    def __init__(self, call: Callable[..., Any], params: Sequence[Tensor]) -> None:
        self._call, self._params = call, params

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for param in self._params:
            wait_for(param)
        return self._call(*args, **kwargs)

    def remove_from(self, module: nn.Module) -> None:
        """Put back what was there, unless it has been compiled again since."""
        if module._compiled_call_impl is self:
            module._compiled_call_impl = self._call
