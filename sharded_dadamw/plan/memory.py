"""Bytes of one rank, by kind and phase: what is allocated for buckets, and what comes and goes with them.

Every rank holds the same number of bytes, since shards are equal. Left out are the step counters and other tensors of
a few bytes per parameter.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from operator import add, attrgetter

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.buckets.sharded_gradients import SpareBuffers, witness_of
from sharded_dadamw.comm.means import sum_dtype
from sharded_dadamw.config import StateResidency
from sharded_dadamw.layout.parameters import NamedParameter
from sharded_dadamw.plan.model import Follower, Gradient, Mean, Model


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes in one place at one moment, by kind.

    Attributes:
        parameters: Flat buffers of parameters, their padding included, and frozen parameters.
        gradients: Flat buffers or shards of gradients.
        main: Main parameters, or the remainders of bf16 ones.
        moments: The shards of ``exp_avg`` and the like.
        in_flight: What exists only while gradients are delivered and averaged.
        staging: Copies on their way between a device and host memory, or to a disk.
    """

    parameters: int = 0
    gradients: int = 0
    main: int = 0
    moments: int = 0
    in_flight: int = 0
    staging: int = 0

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(self)

    def __iter__(self) -> Iterator[int]:
        """The bytes of each of ``KINDS``."""
        return iter(_BY_KIND(self))

    def __add__(self, other: Bytes) -> Bytes:
        """The sum, kind by kind."""
        return Bytes(*map(add, self, other))

    def __mul__(self, times: int) -> Bytes:
        """So many times as much."""
        return Bytes(*(times * each for each in self))


KINDS = tuple(field.name for field in fields(Bytes))
_BY_KIND = attrgetter(*KINDS)


@dataclass(frozen=True, slots=True)
class Phase:
    """What one rank holds at most in a phase: on its device, and in host memory."""

    device: Bytes
    host: Bytes


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that one rank sends in a step, as ``last_step.wire_bytes`` counts them.

    Attributes:
        reduce: To average gradients, among the ranks that hold different shards.
        gather: To publish parameters, among the same.
        replicas: To average gradients over replicas, on a mesh with two axes.
    """

    reduce: int
    gather: int
    replicas: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.reduce + self.gather + self.replicas


def at_rest(model: Model) -> Phase:
    """What a rank holds between steps, without what gradients leave behind."""
    device, host = Bytes(parameters=_frozen(model)), Bytes()
    waiting = 0 if model.keeps_shards else (model.passes - 1).bit_length()  # gradients for each level of the tree
    for bucket, count in model.counted():
        held = _resident(model, bucket)
        in_tree = Bytes(gradients=waiting * bucket.layout.numel * bucket.members[0].gradient_dtype.itemsize)
        device, host = device + (held.device + in_tree) * count, host + held.host * count
    return Phase(device, host)


def phases(model: Model) -> dict[str, Phase]:
    """What a rank holds at most in each phase."""
    rest, in_flight = at_rest(model), _InFlight(model)
    witnesses = sum(count * _witness(model, bucket) for bucket, count in model.counted())
    for _ in range(2 if model.keeps_shards else 1):  # what is left over from one step serves the next
        in_flight.wait_in_tree()
        model.backward(in_flight)
        in_flight.now -= witnesses  # in step
    in_backward, kept = in_flight.most, in_flight.now
    in_flight.most = 0
    model.step(in_flight, attached=True)
    held = replace(rest.device, in_flight=kept)
    share = Bytes(staging=checkpoint_bytes(model) // model.num_ranks)
    return {
        "construct": Phase(_constructing(model), rest.host),
        "forward": Phase(held, rest.host),
        "backward peak": Phase(replace(held, in_flight=in_backward), rest.host),
        "step": Phase(replace(held, in_flight=max(kept + witnesses, in_flight.most)), rest.host),
        "gather": Phase(held, rest.host),
        "save": Phase(held, rest.host + share),
    }


def checkpoint_bytes(model: Model) -> int:
    """Bytes of the tensors in a checkpoint of model and optimizer; what padding holds is not saved."""
    total = _frozen(model)
    for bucket, count in model.counted():
        counters = len(bucket.members) * torch.float32.itemsize
        per_element = bucket.storage.param.itemsize + model.state_bytes(bucket)
        total += count * (bucket.layout.used * per_element + counters)
    return total


def sent(model: Model) -> Sent:
    """Bytes that a rank sends in a step with one reduction of each bucket."""
    reduce = gather = replicas = 0
    for bucket, count in model.counted():
        published, *parts = (transfer.sent for transfer in model.transfers_of(bucket))
        gather += count * published
        reduce += count * sum(parts[:1])
        replicas += count * sum(parts[1:])
    return Sent(reduce, gather, replicas)


def fully_sharded(members: Sequence[NamedParameter], shards: int) -> int:
    """Bytes at rest under FSDP2 with DecoupledAdamW, everything in fp32: parameters, gradients and two moments.

    The largest rank's: FSDP2 cuts parameters along their first dimension.
    """
    held = 0
    for param in (member.param for member in members):
        numel = -(-param.shape[0] // shards) * param[0].numel() if param.dim() and param.numel() else param.numel()
        held += numel * (16 if param.requires_grad else 4)
    return held


def _frozen(model: Model) -> int:
    return sum(m.placement.local_numel * m.param.itemsize for m in model.members if not m.param.requires_grad)


def _resident(model: Model, bucket: Arrangement) -> Phase:
    """What the optimizer allocates for a bucket."""
    shard, whole, dtype = bucket.layout.shard_numel, bucket.layout.numel, bucket.members[0].gradient_dtype
    main = 0 if bucket.storage.main is None else shard * bucket.storage.main.itemsize
    state = Bytes(main=main, moments=shard * model.state_bytes(bucket) - main)
    held = Bytes(parameters=whole * bucket.storage.param.itemsize)
    if not bucket.reduces:  # p.grad is somebody else's, and a copy of this rank's part ours
        held += Bytes(gradients=bucket.layout.used * dtype.itemsize, staging=shard * dtype.itemsize)
    else:
        held += Bytes(gradients=(shard if model.keeps_shards else whole) * dtype.itemsize)
    if model.config.state_residency is StateResidency.DEVICE:
        return Phase(held + state, Bytes())
    return Phase(held, state + Bytes(staging=shard * (bucket.storage.param.itemsize + dtype.itemsize)))


def _witness(model: Model, bucket: Arrangement) -> int:
    """The zeros in ``p.grad`` that stand for a bucket's sharded gradients, until ``step``."""
    slot = witness_of(bucket.members) if model.keeps_shards and bucket.reduces else None
    return 0 if slot is None else bucket.members[slot].param.numel() * bucket.members[slot].gradient_dtype.itemsize


def _constructing(model: Model) -> Bytes:
    """What the device holds at most while buckets are built, each beside the parameters that move into it."""
    there = Bytes(parameters=sum(member.placement.local_numel * member.param.itemsize for member in model.members))

    def gained(bucket: Arrangement) -> Bytes:
        leaves = bucket.layout.used * bucket.storage.param.itemsize
        return _resident(model, bucket).device + Bytes(parameters=-leaves)

    of_each = model.each(gained)
    moving = [*model.each(lambda bucket: bucket.layout.numel * bucket.storage.param.itemsize), 0]
    totals = list(map(add, accumulate((more.total for more in of_each), initial=0), moving))
    last = totals.index(max(totals))
    return sum(of_each[:last], there + Bytes(parameters=moving[last]))


class _InFlight(Follower):
    """Memory of gradients in delivery, of flat buffers that go, and of means under way.

    Attributes:
        now: Bytes there are.
        most: Bytes there were at most.
    """

    def __init__(self, model: Model) -> None:
        self.most = self.now = 0
        self._model = model
        self._keeps_shards = model.keeps_shards
        self._buckets = model.each(lambda bucket: bucket)
        self._itemsizes = model.each(lambda bucket: bucket.members[0].gradient_dtype.itemsize)
        self._scratch = model.each(partial(_scratch, model))
        self._witnesses = model.each(partial(_witness, model))
        self._parts_left: dict[int, deque[tuple[int, int]]] = {}
        self._waiting = Counter[int]()
        self._spares = SpareBuffers(self._allocate)
        self._buffers: dict[int, Tensor] = {}

    def wait_in_tree(self) -> None:
        """Follow the passes before the last one, whose gradients wait as in ``buckets.passes``."""
        passes = self._model.passes
        for index in sorted({passes - 2, *(2**level - 1 for level in range((passes - 1).bit_length()))} - {-1}):
            for gradient in self._model.gradients:  # others than these passes need no more
                self.made(gradient)
                if self._keeps_shards:
                    number = gradient.bucket
                    levels = (index + 1).bit_length() * self._buckets[number].layout.numel
                    more = levels * self._itemsizes[number] - self._waiting[number]
                    self._waiting[number] += more
                    self._add(more)
                self._add(-gradient.numel * self._itemsizes[gradient.bucket])

    def made(self, gradient: Gradient) -> None:
        self._add(gradient.numel * self._itemsizes[gradient.bucket])

    def taken(self, gradient: Gradient) -> None:
        if self._keeps_shards and gradient.bucket not in self._buffers:
            bucket = self._buckets[gradient.bucket]
            if bucket.reduces:  # else the flat buffer is there all the time
                dtype = bucket.members[0].gradient_dtype
                self._buffers[gradient.bucket] = self._spares.take(bucket.layout.numel, dtype, torch.device("meta"))
        self.now -= gradient.numel * self._itemsizes[gradient.bucket]

    def begin(self, bucket: int) -> None:
        self._parts_left[bucket] = deque(self._scratch[bucket])
        self._add(self._witnesses[bucket])
        self._add(-self._waiting.pop(bucket, 0))
        self._add(self._parts_left[bucket][0][0])

    def go_on(self, bucket: int) -> None:
        parts = self._parts_left[bucket]
        under_way, at_its_end = parts.popleft()
        self._add(at_its_end)
        self._add(-under_way - at_its_end)
        if parts:
            self._add(parts[0][0])

    def done(self, bucket: int) -> None:
        if self._keeps_shards:
            self._spares.give_back(self._buffers.pop(bucket))

    def _add(self, num_bytes: int) -> None:
        self.now += num_bytes
        if self.now > self.most:
            self.most = self.now

    def _allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer without memory, which is counted until nothing refers to it."""
        buffer = torch.empty(numel, dtype=dtype, device=device)
        self._add(buffer.nbytes)
        weakref.finalize(buffer, self._add, -buffer.nbytes)
        return buffer


def _scratch(model: Model, bucket: Arrangement) -> list[tuple[int, int]]:
    """What each part of a mean holds while it is under way, and what more while it ends, by the backend's verbs."""
    of_row, of_column = model.means_of(bucket)
    in_tree = model.config.micro_batches is not None
    if model.num_ranks == 1:
        return [(0, _in_tree(of_row) if in_tree else 0)]
    first, second = (_scratch_of(mean, is_direct=model.is_direct, in_tree=in_tree) for mean in (of_row, of_column))
    if model.replicas == 1:
        return [first]
    padded = of_column.ranks * of_column.numel
    are_in_place = padded == of_row.numel
    sums = 0 if are_in_place and of_row.out == of_column.out else padded * of_row.out.itemsize
    means = 0 if are_in_place else padded * of_column.out.itemsize
    return [(sums + first[0], first[1]), (sums + means + second[0], second[1]), (means, 0)]


def _scratch_of(mean: Mean, *, is_direct: bool, in_tree: bool) -> tuple[int, int]:
    """The same of one reduce-scatter. A backend keeps what it sends until it is waited for, and so a narrowed copy."""
    copied = mean.sent_bytes if mean.sent != mean.dtype else 0
    if is_direct:
        total = mean.numel * sum_dtype(mean.sent, mean.out).itemsize
        return copied + mean.sent_bytes, total + (_in_tree(mean) if in_tree else 0)
    if mean.sent == mean.out:
        return copied, 0
    return copied + mean.numel * mean.sent.itemsize, max(0, mean.numel * mean.out.itemsize - copied)


def _in_tree(mean: Mean) -> int:
    """What ``comm.means.mean_in_tree`` allocates at most: a sum for each level that waits, and then the quotient.

    That is in fp32 or wider, and there is one sum by then, unless a single rank has it all.
    """
    wide = torch.promote_types(mean.dtype, torch.float32)
    divided = wide.itemsize * (1 if wide == mean.dtype else 2)
    sums = mean.ranks.bit_length() - 1
    return mean.numel * max(sums * mean.dtype.itemsize, min(sums, 1) * mean.dtype.itemsize + divided)
