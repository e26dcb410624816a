"""The parameters of a model in their buckets, and what one step does with these, in the order in which it does it.

``memory`` and ``time`` follow the same events, which are those of ``schedule`` and of the verbs on a GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sharded_dadamw.buckets.build import Arrangement, Bucketing
from sharded_dadamw.comm.collectives import Collectives, sent_dtype, sum_dtype
from sharded_dadamw.comm.mesh import MeshVerbs
from sharded_dadamw.comm.tree import check_ranks
from sharded_dadamw.config import Exchange, GradientResidency, ShardingConfig
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter, named_parameters

Found = TypeVar("Found")


class Event(NamedTuple):
    """What happens to a bucket.

    ``gradient``: autograd has made the gradient of ``member``. ``taken``: that is in the bucket. ``begin``: the mean
    goes out. ``go on``: a part of it has come, and the next one, if there is one, begins. ``done``: it was waited for.
    ``update``: and then the parameters are published.
    """

    what: Literal["gradient", "taken", "begin", "go on", "done", "update"]
    number: int
    member: NamedParameter | None = None


class Mean(NamedTuple):
    """One reduce-scatter: of ``numel`` elements for each of ``ranks``, which are in ``dtype`` in memory.

    They are rounded to ``sent``, and the mean to ``out``.
    """

    numel: int
    ranks: int
    dtype: torch.dtype
    sent: torch.dtype
    out: torch.dtype


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

    def __post_init__(self) -> None:
        """Refuse ranks that cannot share the micro-batches."""
        if self.config.micro_batches is not None:
            check_ranks(self.config.micro_batches, self.num_ranks, self.shards)

    def under(self, config: ShardingConfig) -> Model:
        """The same parameters, sharded in another way.

        Raises:
            ValueError: A setting is not for a parameter's dtype, or micro-batches cannot be shared out.
        """
        trainable = [member for member in self.members if member.param.requires_grad]
        buckets = Bucketing(Collectives(0, self.shards), config).arrange(trainable)
        return replace(self, config=config, buckets=tuple(buckets))

    def over(self, shards: int, replicas: int = 1) -> Model:
        """The same buckets, cut for other ranks; raises as ``under``."""
        layouts = {numels: BucketLayout(numels, shards) for numels in {bucket.layout.numels for bucket in self.buckets}}
        buckets = tuple(replace(bucket, layout=layouts[bucket.layout.numels]) for bucket in self.buckets)
        return replace(self, shards=shards, replicas=replicas, buckets=buckets)

    def means_of(self, bucket: Arrangement) -> tuple[Mean, Mean]:
        """How gradients of a bucket are averaged over a row of shards, and then over a column of replicas."""
        shard, dtype, wire = bucket.layout.shard_numel, bucket.members[0].gradient_dtype, self.config.wire_dtype
        narrow = sent_dtype(dtype, wire)
        wide = dtype if self.replicas == 1 or self.config.micro_batches else sum_dtype(narrow, dtype)
        of_column = Mean(-(-shard // self.replicas), self.replicas, wide, sent_dtype(wide, wire), dtype)
        return Mean(shard, self.shards, dtype, narrow, wide), of_column

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.shards * self.replicas

    @property
    def num_elements(self) -> int:
        """Elements of all parameters, frozen ones too."""
        return sum(member.placement.local_numel for member in self.members)

    @property
    def is_direct(self) -> bool:
        """Whether slices of gradients go straight to their owners, who add."""
        return self.config.exchange is Exchange.RANK_ORDER or self.config.micro_batches is not None

    @property
    def passes(self) -> int:
        """Backward passes of a rank in each step, whose gradients are added in a tree: one but with micro-batches."""
        return (self.config.micro_batches or self.num_ranks) // self.num_ranks

    @property
    def keeps_shards(self) -> bool:
        """Whether only a shard of the gradients is kept."""
        return self.config.gradient_residency is GradientResidency.SHARDED

    @property
    def _overlaps(self) -> bool:
        return self.config.overlap and self.num_ranks > 1

    @property
    def _reduces_in_backward(self) -> bool:
        return self.config.reduce_gradients and (self.keeps_shards or self._overlaps)

    @cached_property
    def trainable(self) -> list[NamedParameter]:
        """The parameters that are in buckets, in the order of registration."""
        return [member for member in self.members if member.index in self.homes]

    @cached_property
    def homes(self) -> dict[int, int]:
        """The number of the bucket of each trainable parameter, by its index."""
        return {member.index: number for number, bucket in enumerate(self.buckets) for member in bucket.members}

    @cached_property
    def order(self) -> list[int]:
        """The buckets as backward completes them; gradients come in the reverse order of registration."""
        return list(dict.fromkeys(self.homes[member.index] for member in self.trainable))[::-1]

    def backward(self) -> Iterator[Event]:
        """The last backward pass of a step, as it is from the third step on.

        A complete bucket goes out when the next gradient comes, and the last ones at the end, where none comes.
        """
        means, under_way, complete = _Means(self.replicas), deque[int](), list[int]()
        missing = [len(bucket.members) for bucket in self.buckets]
        ahead = (means.ahead if self._overlaps else 0) if self.keeps_shards else len(self.buckets)

        def go_out() -> Iterator[Event]:
            while complete and self._reduces_in_backward:
                under_way.append(complete.pop())
                yield from means.begin(under_way[-1])
                while len(under_way) > ahead:
                    yield from means.wait(under_way.popleft())

        for member in reversed(self.trainable):
            number = self.homes[member.index]
            yield Event("gradient", number, member)
            yield from go_out()
            yield Event("taken", number, member)
            missing[number] -= 1
            if not missing[number]:
                complete.append(number)
        yield from go_out()
        for number in reversed(under_way):
            yield from means.wait(number)

    def step(self, *, attached: bool) -> Iterator[Event]:
        """``step``; where the model is attached, what forward reads first is updated last."""
        means, under_way = _Means(self.replicas), deque[int]()
        in_step = self.config.reduce_gradients and not self._reduces_in_backward
        rest = deque(self.order if in_step else ())

        def launch_ahead() -> Iterator[Event]:
            while rest and len(under_way) <= means.ahead:
                under_way.append(rest.popleft())
                yield from means.begin(under_way[-1])

        def reduced() -> Iterator[Event]:
            yield from launch_ahead()
            yield from means.wait(under_way.popleft())
            yield from launch_ahead()

        if attached:
            for _ in list(rest):
                yield from reduced()
        for number in reversed(self.order) if attached else self.order:
            if in_step and not attached:
                yield from reduced()
            yield Event("update", number)


class _Means:
    """Means under way. On a mesh each is of three parts, and gets one further when another one begins."""

    def __init__(self, replicas: int) -> None:
        verbs = MeshVerbs if replicas > 1 else Collectives
        self.ahead = verbs.reductions_ahead
        self._num_parts = 3 if replicas > 1 else 1
        self._left: dict[int, int] = {}

    def begin(self, number: int) -> Iterator[Event]:
        yield Event("begin", number)
        if self._num_parts > 1:
            if len(self._left) == self.ahead:
                yield from self._finish(next(iter(self._left)))
            for earlier in list(self._left):
                yield self._go_on(earlier)
        self._left[number] = self._num_parts

    def wait(self, number: int) -> Iterator[Event]:
        while number in self._left:
            yield from self._finish(next(iter(self._left)) if self._num_parts > 1 else number)
        yield Event("done", number)

    def _finish(self, number: int) -> Iterator[Event]:
        while number in self._left:
            yield self._go_on(number)

    def _go_on(self, number: int) -> Event:
        self._left[number] -= 1
        if not self._left[number]:
            del self._left[number]
        return Event("go on", number)


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
