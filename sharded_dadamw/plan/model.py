"""The parameters of a model in their buckets, and what one step does with these, in the order in which it does it.

``memory`` and ``time`` follow the same events, which are those of ``schedule`` and of the verbs on a GPU. Layers
repeat, and so do their buckets: what holds for one is worked out once for each kind.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sharded_dadamw.buckets.arrangement import Arrangement, arrange
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.means import sent_dtype, sum_dtype
from sharded_dadamw.comm.mesh import MeshVerbs
from sharded_dadamw.comm.tree import check_ranks
from sharded_dadamw.config import Exchange, GradientResidency, ShardingConfig
from sharded_dadamw.layout.bucket_layout import BucketLayout
from sharded_dadamw.layout.parameters import NamedParameter, named_parameters

Told = TypeVar("Told")


class Gradient(NamedTuple):
    """What backward makes for one parameter, and the number of the bucket that it goes to."""

    name: str
    numel: int
    bucket: int


class Follower:
    """Is told what a step does; does nothing about it. Buckets are told by their numbers."""

    def made(self, gradient: Gradient) -> None:
        """Autograd has made a gradient."""

    def taken(self, gradient: Gradient) -> None:
        """It is in its bucket."""

    def begin(self, bucket: int) -> None:
        """The mean of a bucket goes out."""

    def go_on(self, bucket: int) -> None:
        """A part of the mean has come, and the next one, if there is one, begins."""

    def done(self, bucket: int) -> None:
        """The mean was waited for."""

    def update(self, bucket: int) -> None:
        """A bucket is updated, and then its parameters are published."""


class Mean(NamedTuple):
    """One reduce-scatter: of ``numel`` elements for each of ``ranks``, which are in ``dtype`` in memory.

    They are rounded to ``sent``, and the mean to ``out``.
    """

    numel: int
    ranks: int
    dtype: torch.dtype
    sent: torch.dtype
    out: torch.dtype

    @property
    def sent_bytes(self) -> int:
        """Of all slices together, on their way."""
        return self.ranks * self.numel * self.sent.itemsize


class Transfer(NamedTuple):
    """A reduce-scatter or an all-gather of a buffer of so many bytes; ``is_direct`` if slices go straight to owners."""

    num_bytes: int
    ranks: int
    is_direct: bool = False

    @property
    def sent(self) -> int:
        """Bytes that one rank sends."""
        return self.num_bytes // self.ranks * (self.ranks - 1)


@dataclass(frozen=True)
class Model:
    """The parameters of a model, cut into buckets for a number of ranks.

    Attributes:
        members: All parameters in the order of registration.
        amsgrad: Whether there is a third moment.
        config: How they are sharded.
        shards: Ranks among which buckets are cut.
        replicas: Ranks that hold the same shard; 1 but on a mesh with two axes.
        kinds: One bucket of each size, storage and dtype of gradients, of those that reduce and those that do not.
        kind_of: Which of these each bucket is like.
        gradients: As backward makes them, the last parameter's first.
    """

    members: tuple[NamedParameter, ...]
    amsgrad: bool
    config: ShardingConfig
    shards: int
    replicas: int
    kinds: tuple[Arrangement, ...] = ()
    kind_of: tuple[int, ...] = ()
    gradients: tuple[Gradient, ...] = ()

    @classmethod
    def of(
        cls, params: Mapping[str, Tensor], config: ShardingConfig, shards: int, replicas: int = 1, amsgrad: bool = False
    ) -> Model:
        """Cut parameters, which may be on the meta device, in one parameter group."""
        group = {"params": list(params.values()), "param_names": list(params)}
        return cls(tuple(named_parameters([group])), amsgrad, config, shards, replicas).under(config)

    def __post_init__(self) -> None:
        """Refuse ranks that cannot share the micro-batches."""
        if self.config.micro_batches is not None:
            check_ranks(self.config.micro_batches, self.num_ranks, self.shards)

    def under(self, config: ShardingConfig) -> Model:
        """The same parameters, sharded in another way.

        Raises:
            ValueError: A setting is not for a parameter's dtype, or micro-batches cannot be shared out.
        """
        kinds: dict[object, tuple[int, Arrangement]] = {}
        kind_of, gradients = [], {}
        trainable = [member for member in self.members if member.param.requires_grad]
        for number, bucket in enumerate(arrange(trainable, Collectives(0, self.shards), config)):
            key = bucket.layout, bucket.storage, bucket.members[0].gradient_dtype, bucket.reduces
            kind_of.append(kinds.setdefault(key, (len(kinds), bucket))[0])
            for member, numel in zip(bucket.members, bucket.layout.numels, strict=True):
                gradients[member.index] = Gradient(member.name, numel, number)
        last_first = tuple(gradients[index] for index in sorted(gradients, reverse=True))
        each_once = tuple(bucket for _, bucket in kinds.values())
        return replace(self, config=config, kinds=each_once, kind_of=tuple(kind_of), gradients=last_first)

    def over(self, shards: int, replicas: int = 1) -> Model:
        """The same buckets, cut for other ranks; raises as ``under``."""
        kinds = (replace(kind, layout=BucketLayout(kind.layout.numels, shards)) for kind in self.kinds)
        return replace(self, shards=shards, replicas=replicas, kinds=tuple(kinds))

    def counted(self) -> Iterator[tuple[Arrangement, int]]:
        """Each kind of bucket, and how many there are."""
        for kind, count in Counter(self.kind_of).items():
            yield self.kinds[kind], count

    def each(self, told: Callable[[Arrangement], Told]) -> list[Told]:
        """What is told of each bucket; asked once of each kind."""
        of_kind = list(map(told, self.kinds))
        return [of_kind[kind] for kind in self.kind_of]

    def state_bytes(self, bucket: Arrangement) -> int:
        """Of one element of a bucket."""
        return sum(dtype.itemsize for dtype in bucket.storage.state(amsgrad=self.amsgrad).values())

    def means_of(self, bucket: Arrangement) -> tuple[Mean, Mean]:
        """How gradients of a bucket are averaged over a row of shards, and then over a column of replicas."""
        shard, dtype, wire = bucket.layout.shard_numel, bucket.members[0].gradient_dtype, self.config.wire_dtype
        narrow = sent_dtype(dtype, wire)
        wide = dtype if self.replicas == 1 or self.config.micro_batches else sum_dtype(narrow, dtype)
        of_column = Mean(-(-shard // self.replicas), self.replicas, wide, sent_dtype(wide, wire), dtype)
        return Mean(shard, self.shards, dtype, narrow, wide), of_column

    def transfers_of(self, bucket: Arrangement) -> list[Transfer]:
        """Over a row what publishes a bucket and what averages gradients, and over a column the rest of the mean."""
        means = self.means_of(bucket)[: min(2, self.replicas)] if bucket.reduces else ()
        parts = [Transfer(mean.sent_bytes, mean.ranks, self.is_direct) for mean in means]
        parts += [Transfer(mean.ranks * mean.numel * mean.out.itemsize, mean.ranks) for mean in means[1:]]
        return [Transfer(bucket.layout.numel * bucket.storage.param.itemsize, self.shards), *parts]

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

    @property
    def _order(self) -> list[int]:
        """The numbers of the buckets as backward completes them."""
        return list(dict.fromkeys(gradient.bucket for gradient in reversed(self.gradients)))[::-1]

    def backward(self, follower: Follower) -> None:
        """Tell of the last backward pass of a step, as it is from the third step on.

        A complete bucket goes out when the next gradient comes, and the last one at the end, where none comes.
        """
        means, under_way, complete = _Means(follower, self.replicas), deque[int](), list[int]()
        missing = self.each(lambda bucket: len(bucket.members))
        ahead = (means.ahead if self._overlaps else 0) if self.keeps_shards else len(missing)

        def go_out() -> None:
            while complete:
                under_way.append(complete.pop())
                means.begin(under_way[-1])
                while len(under_way) > ahead:
                    means.wait(under_way.popleft())

        reduces = self._reduces_in_backward
        for gradient in self.gradients:
            follower.made(gradient)
            go_out()
            follower.taken(gradient)
            missing[gradient.bucket] -= 1
            if reduces and not missing[gradient.bucket]:
                complete.append(gradient.bucket)
        go_out()
        for number in reversed(under_way):
            means.wait(number)

    def step(self, follower: Follower, *, attached: bool) -> None:
        """Tell of ``step``; where the model is attached, what forward reads first is updated first."""
        in_step = self.config.reduce_gradients and not self._reduces_in_backward
        reduced = self._reduced(follower) if in_step else self._order
        for number in list(reduced)[::-1] if attached else reduced:
            follower.update(number)

    def _reduced(self, follower: Follower) -> Iterator[int]:
        """Tell of the reductions in a step, some of them ahead, and yield each bucket that is reduced."""
        means, under_way, rest = _Means(follower, self.replicas), deque[int](), deque(self._order)

        def launch_ahead() -> None:
            while rest and len(under_way) <= means.ahead:
                under_way.append(rest.popleft())
                means.begin(under_way[-1])

        launch_ahead()
        while under_way:
            number = under_way.popleft()
            means.wait(number)
            launch_ahead()
            yield number


class _Means:
    """Means under way. On a mesh each is of three parts, and gets one further when another one begins."""

    def __init__(self, follower: Follower, replicas: int) -> None:
        self._is_on_mesh = replicas > 1
        self.ahead = (MeshVerbs if self._is_on_mesh else Collectives).reductions_ahead
        self._follower = follower
        self._parts_left: dict[int, int] = {}

    def begin(self, number: int) -> None:
        self._follower.begin(number)
        if self._is_on_mesh:
            if len(self._parts_left) == self.ahead:
                self._finish(next(iter(self._parts_left)))
            for earlier in list(self._parts_left):
                self._go_on(earlier)
        self._parts_left[number] = 3 if self._is_on_mesh else 1

    def wait(self, number: int) -> None:
        while number in self._parts_left:
            self._finish(next(iter(self._parts_left)) if self._is_on_mesh else number)
        self._follower.done(number)

    def _finish(self, number: int) -> None:
        while number in self._parts_left:
            self._go_on(number)

    def _go_on(self, number: int) -> None:
        self._parts_left[number] -= 1
        if not self._parts_left[number]:
            del self._parts_left[number]
        self._follower.go_on(number)
