"""Bytes of one rank, by kind and phase: what is allocated for buckets, and what comes and goes with them.

Every rank holds the same number of bytes, since shards are equal. Left out are the step counters and other tensors of
a few bytes per parameter.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharded_dadamw.buckets.build import Arrangement, Bucketing
from sharded_dadamw.buckets.sharded_gradients import SpareBuffers
from sharded_dadamw.comm.collectives import Collectives, sent_dtype, sum_dtype
from sharded_dadamw.config import Exchange, GradientResidency, ShardingConfig, StateResidency
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter, named_parameters

Found = TypeVar("Found")
_AHEAD = 2
"""Reductions that are under way together where they are not all begun in backward."""


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
        return (getattr(self, kind) for kind in KINDS)

    def __add__(self, other: Bytes) -> Bytes:
        """The sum, kind by kind."""
        return Bytes(*map(add, self, other))


KINDS = tuple(field.name for field in fields(Bytes))


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


@dataclass(frozen=True)
class Model:
    """The parameters of a model, cut into buckets for a number of ranks.

    Attributes:
        members: All parameters in the order of registration.
        amsgrad: Whether there is a third moment.
        config: How they are sharded.
        shards: Ranks among which buckets are cut.
        replicas: Ranks that hold the same shard; 1 but on a mesh with two axes.
        buckets: What lies where.
    """

    members: tuple[NamedParameter, ...]
    amsgrad: bool
    config: ShardingConfig
    shards: int
    replicas: int
    buckets: tuple[Arrangement, ...]

    @classmethod
    def of(
        cls, params: Mapping[str, Tensor], config: ShardingConfig, shards: int, replicas: int = 1, amsgrad: bool = False
    ) -> Model:
        """Cut parameters, which may be on the meta device, in one parameter group."""
        group = {"params": list(params.values()), "param_names": list(params)}
        return cls(tuple(named_parameters([group])), amsgrad, config, shards, replicas, ()).under(config)

    def under(self, config: ShardingConfig) -> Model:
        """The same parameters, sharded in another way.

        Raises:
            ValueError: A setting is not for a parameter's dtype.
        """
        trainable = [member for member in self.members if member.param.requires_grad]
        buckets = Bucketing(Collectives(0, self.shards), config).arrange(trainable)
        return replace(self, config=config, buckets=tuple(buckets))

    def over(self, shards: int, replicas: int = 1) -> Model:
        """The same buckets, cut for other ranks."""
        layouts = {numels: BucketLayout(numels, shards) for numels in {bucket.layout.numels for bucket in self.buckets}}
        buckets = tuple(replace(bucket, layout=layouts[bucket.layout.numels]) for bucket in self.buckets)
        return replace(self, shards=shards, replicas=replicas, buckets=buckets)

    def at_rest(self) -> Phase:
        """What a rank holds between steps, without what gradients leave behind."""
        device, host, resident = Bytes(parameters=self._frozen()), Bytes(), once(self._resident)
        for bucket in self.buckets:
            more_on_device, more_on_host = resident(bucket)
            device, host = device + more_on_device, host + more_on_host
        return Phase(device, host)

    def phases(self) -> dict[str, Phase]:
        """What a rank holds at most in each phase."""
        rest = self.at_rest()
        in_backward, kept = self._in_backward()
        held = replace(rest.device, in_flight=kept)
        share = Bytes(staging=self.checkpoint_bytes() // self.num_ranks)
        return {
            "construct": Phase(self._constructing(), rest.host),
            "forward": Phase(held, rest.host),
            "backward peak": Phase(replace(held, in_flight=in_backward), rest.host),
            "step": Phase(replace(held, in_flight=kept + self._in_step()), rest.host),
            "gather": Phase(held, rest.host),
            "save": Phase(held, rest.host + share),
        }

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.shards * self.replicas

    @property
    def num_elements(self) -> int:
        """Elements of all parameters, frozen ones too."""
        return sum(member.placement.local_numel for member in self.members)

    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors in a checkpoint of model and optimizer; what padding holds is not saved."""
        state = sum(
            bucket.layout.used * (bucket.storage.param.itemsize + _per_element(bucket, self.amsgrad))
            + len(bucket.members) * torch.float32.itemsize
            for bucket in self.buckets
        )
        return self._frozen() + state

    def sent(self) -> Sent:
        """Bytes that a rank sends in a step with one reduction of each bucket."""
        reduce = gather = replicas = 0
        for bucket in self.buckets:
            shard, dtype = bucket.layout.shard_numel, bucket.members[0].gradient_dtype
            sent = sent_dtype(dtype, self.config.wire_dtype)
            gather += (self.shards - 1) * shard * bucket.storage.param.itemsize
            if bucket.reduces:
                reduce += (self.shards - 1) * shard * sent.itemsize
                piece, wide = -(-shard // self.replicas), sent_dtype(sum_dtype(sent, dtype), self.config.wire_dtype)
                replicas += (self.replicas - 1) * piece * (wide.itemsize + dtype.itemsize)
        return Sent(reduce, gather, replicas)

    def backward(self) -> Iterator[tuple[NamedParameter | None, tuple[int, ...], int]]:
        """A backward pass as it is from the third step on: (whose gradient comes, buckets that go out, its bucket).

        Gradients come in the reverse order of registration. A complete bucket goes out when the next gradient comes,
        and the last ones at the end, where none comes.
        """
        missing = [len(bucket.members) for bucket in self.buckets]
        complete: list[int] = []
        for member in reversed([member for member in self.members if member.index in self.homes]):
            number = self.homes[member.index]
            yield member, tuple(complete), number
            missing[number] -= 1
            complete = [] if missing[number] else [number]
        yield None, tuple(complete), 0

    def _frozen(self) -> int:
        return sum(m.placement.local_numel * m.param.itemsize for m in self.members if not m.param.requires_grad)

    @property
    def keeps_shards(self) -> bool:
        """Whether only a shard of the gradients is kept."""
        return self.config.gradient_residency is GradientResidency.SHARDED

    @property
    def overlaps(self) -> bool:
        """Whether reductions go on behind backward."""
        return self.config.overlap and self.num_ranks > 1

    @property
    def reduces_in_backward(self) -> bool:
        """Whether each bucket goes out when it is complete."""
        return self.config.reduce_gradients and (self.keeps_shards or self.overlaps)

    @property
    def reduces_in_step(self) -> bool:
        """Whether buckets go out in ``step`` instead."""
        return self.config.reduce_gradients and not self.reduces_in_backward

    @property
    def most_under_way(self) -> int:
        """How many reductions may be under way while backward goes on."""
        return int(self.overlaps) if self.keeps_shards else len(self.buckets)

    @cached_property
    def homes(self) -> dict[int, int]:
        """The number of the bucket of each trainable parameter, by its index."""
        return {member.index: number for number, bucket in enumerate(self.buckets) for member in bucket.members}

    def _resident(self, bucket: Arrangement) -> tuple[Bytes, Bytes]:
        """What the optimizer allocates for a bucket: on the device, and in host memory."""
        shard, whole, dtype = bucket.layout.shard_numel, bucket.layout.numel, bucket.members[0].gradient_dtype
        main = 0 if bucket.storage.main is None else shard * bucket.storage.main.itemsize
        state = Bytes(main=main, moments=shard * _per_element(bucket, self.amsgrad) - main)
        held = Bytes(parameters=whole * bucket.storage.param.itemsize)
        if not bucket.reduces:  # p.grad is somebody else's, and a copy of this rank's part ours
            held += Bytes(gradients=bucket.layout.used * dtype.itemsize, staging=shard * dtype.itemsize)
        else:
            held += Bytes(gradients=(shard if self.keeps_shards else whole) * dtype.itemsize)
        if self.config.state_residency is StateResidency.DEVICE:
            return held + state, Bytes()
        return held, state + Bytes(staging=shard * (bucket.storage.param.itemsize + dtype.itemsize))

    def _constructing(self) -> Bytes:
        """What the device holds at most while buckets are built, each beside the parameters that move into it."""
        held = Bytes(parameters=sum(member.placement.local_numel * member.param.itemsize for member in self.members))
        most, resident = held, once(self._resident)
        for bucket in self.buckets:
            more, _ = resident(bucket)
            moving = held + Bytes(parameters=more.parameters)
            held += more + Bytes(parameters=-bucket.layout.used * bucket.storage.param.itemsize)
            most = max(most, moving, held, key=lambda each: each.total)
        return most

    def _in_backward(self) -> tuple[int, int]:
        """What there is at most of gradients in delivery, flat buffers and what reductions need; and what is kept."""
        counted, needed = _Counted(), once(self._scratch)
        spares = SpareBuffers(counted.allocate)
        open_: dict[int, Tensor] = {}
        under_way: deque[tuple[int, Tensor, int]] = deque()

        def finish_all_but(num_ahead: int, *, last_first: bool = False) -> None:
            while len(under_way) > num_ahead:
                number, buffer, scratch = under_way.pop() if last_first else under_way.popleft()
                counted.at_most(needed(self.buckets[number])[1])
                counted.add(-scratch)
                if self.keeps_shards:
                    spares.give_back(buffer)

        for _ in range(2):  # what is left over from one pass serves the next
            for member, leaving, home in self.backward():
                arriving = 0 if member is None else member.placement.local_numel * member.gradient_dtype.itemsize
                counted.add(arriving)
                for number in leaving if self.reduces_in_backward else ():
                    scratch = needed(self.buckets[number])[0]
                    counted.add(scratch)
                    under_way.append((number, open_.pop(number, _NOTHING), scratch))
                    finish_all_but(self.most_under_way)
                if member is not None and self.keeps_shards and self.config.reduce_gradients and home not in open_:
                    layout = self.buckets[home].layout
                    open_[home] = spares.take(layout.numel, member.gradient_dtype, _NOTHING.device)
                counted.add(-arriving)
            finish_all_but(0, last_first=self.replicas == 1)
        return counted.most, counted.now

    def _in_step(self) -> int:
        """What reductions need that ``step`` begins."""
        if not self.reduces_in_step:
            return 0
        scratch = list(map(once(self._scratch), self.buckets))
        return max(
            sum(under_way for under_way, _ in scratch[first : first + _AHEAD]) + scratch[first][1]
            for first in range(len(scratch))
        )

    def _scratch(self, bucket: Arrangement) -> tuple[int, int]:
        """What a reduction of a bucket allocates until it ends, and what more while it ends, by the backend's verbs.

        A backend keeps what it sends until it is waited for. So a narrowed copy is gone while the reduction ends.
        """
        shard, dtype = bucket.layout.shard_numel, bucket.members[0].gradient_dtype
        sent = sent_dtype(dtype, self.config.wire_dtype)
        wide = sum_dtype(sent, dtype)
        if self.num_ranks == 1:
            return 0, 0
        if self.replicas == 1:
            return self._scratch_of_row(bucket, dtype)
        padded = -(-shard // self.replicas) * self.replicas
        of_row = padded * wide.itemsize
        under_way, ending = self._scratch_of_row(bucket, wide)
        sent_on = sent_dtype(wide, self.config.wire_dtype)
        of_all = padded * dtype.itemsize + (padded * sent_on.itemsize if sent_on != wide else 0)
        if sent_on != dtype:
            of_all += padded // self.replicas * sent_on.itemsize
        return of_row + under_way, max(ending, of_all - under_way, 0)

    def _scratch_of_row(self, bucket: Arrangement, out: torch.dtype) -> tuple[int, int]:
        """The same, within a row of ranks, of a mean in ``out``."""
        whole, shard, dtype = bucket.layout.numel, bucket.layout.shard_numel, bucket.members[0].gradient_dtype
        sent = sent_dtype(dtype, self.config.wire_dtype)
        copied = whole * sent.itemsize if sent != dtype else 0
        if self.config.exchange is Exchange.RANK_ORDER:
            return copied + whole * sent.itemsize, max(0, shard * sum_dtype(sent, out).itemsize - copied)
        if sent == out:
            return copied, 0
        return copied + shard * sent.itemsize, max(0, shard * out.itemsize - copied)


def once(told: Callable[[Arrangement], Found]) -> Callable[[Arrangement], Found]:
    """Tell of a bucket what is told, and work it out once for all of one size and kind: layers repeat."""
    known: dict[Any, Found] = {}

    def tell(bucket: Arrangement) -> Found:
        dtype = bucket.members[0].gradient_dtype
        key = bucket.layout.shard_numel, bucket.layout.used, bucket.storage, dtype, bucket.reduces
        if key not in known:
            known[key] = told(bucket)
        return known[key]

    return tell


def fully_sharded(members: Sequence[NamedParameter], shards: int) -> int:
    """Bytes at rest under FSDP2 with DecoupledAdamW, everything in fp32: parameters, gradients and two moments.

    The largest rank's: FSDP2 cuts parameters along their first dimension.
    """
    held = 0
    for param in (member.param for member in members):
        numel = -(-param.shape[0] // shards) * param[0].numel() if param.dim() and param.numel() else param.numel()
        held += numel * (16 if param.requires_grad else 4)
    return held


class _Counted:
    """Memory that is allocated for nothing but to be counted, on the meta device.

    Attributes:
        now: Bytes there are.
        most: Bytes there were at most.
    """

    def __init__(self) -> None:
        self.most = self.now = 0

    def add(self, num_bytes: int) -> None:
        """Count more, or where negative less."""
        self.now += num_bytes
        self.at_most(0)

    def at_most(self, more: int) -> None:
        """Count what is there only at this moment."""
        self.most = max(self.most, self.now + more)

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat buffer that is counted until nothing refers to it."""
        buffer = torch.empty(numel, dtype=dtype, device="meta")
        self.add(buffer.nbytes)
        weakref.finalize(buffer, self.add, -buffer.nbytes)
        return buffer


_NOTHING = torch.empty(0, device="meta")


def _per_element(bucket: Arrangement, amsgrad: bool) -> int:
    """Bytes of state of one element."""
    return sum(dtype.itemsize for dtype in bucket.storage.state(amsgrad=amsgrad).values())
