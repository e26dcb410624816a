"""Time of one step: what each transfer takes on named links, and what of it compute does not hide.

    compute | backward, last layer first | update 0 | update 1 | forward
    wire        |= reduce 0 =|= reduce 1 =|        |= gather 0 =|= gather 1 =|

A rank computes one thing at a time, and its wire carries one transfer at a time, in the order of their start. What
waits for what is what ``schedule`` does.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import groupby

from sharded_dadamw.buckets.arrangement import Arrangement
from sharded_dadamw.config import StateResidency
from sharded_dadamw.plan.model import Follower, Gradient, Model

_OF_A_COPY = 0.95
"""Of the speed of a plain copy, what one update reaches: docs/benchmarks.md has 92 to 99 %."""
_HOST = 25e9
"""Bytes per second of an update by one thread of a host, docs/benchmarks.md; a PCIe 4 bus is about as fast."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """One way in which NCCL sends through a ring: seconds to start, of a step over each kind of link, share of speed.

    Source: NCCL, src/graph/tuning.cc, baseLat and hwLat.
    """

    start: float
    intra: float
    inter: float
    share: float


NCCL = (
    Protocol(6.6e-6, 0.6e-6, 2.7e-6, 0.5),
    Protocol(14.0e-6, 1.9e-6, 4.0e-6, 0.92),
    Protocol(8.4e-6, 3.4e-6, 14.0e-6, 1.0),
)
"""LL, LL128 and Simple; the fastest is taken."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device, and what it is connected by.

    Attributes:
        memory: Bytes that a process can allocate.
        flops: Dense bf16 operations per second.
        copy: Bytes that a plain copy reads and writes per second.
        intra: Bytes per second and direction to ranks of the same host.
        inter: Bytes per second and direction through the device's own network adapter.
        protocols: How it sends.
        slowdown: How much longer it computes while it sends, too, by what it takes alone: both need multiprocessors and
            memory. Source: Lee et al., arXiv:2507.03114, the mean over A100, H100, MI210 and MI250.
    """

    memory: float
    flops: float
    copy: float
    intra: float
    inter: float
    protocols: tuple[Protocol, ...] = NCCL
    slowdown: float = 0.189


GPUS = {
    "a100-40": Gpu(39 * 2**30, 312e12, 1.40e12, 235e9, 24e9),
    "a100": Gpu(79 * 2**30, 312e12, 1.80e12, 235e9, 24e9),
    "h100": Gpu(79 * 2**30, 989e12, 3.029e12, 331e9, 48e9),
    "h200": Gpu(139 * 2**30, 989e12, 4.307e12, 331e9, 48e9),
    "b200": Gpu(178 * 2**30, 2250e12, 7.00e12, 660e9, 48e9),
}
"""Copies of the H100 and the H200 are measured, as is the H100's NVLink; the rest is from data sheets, less a tenth."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Ranks that exchange data: how many, and how many of them share a host."""

    ranks: int
    per_host: int


@dataclass(frozen=True, slots=True)
class Span:
    """Something that takes a while, and its seconds since the step's start.

    Attributes:
        lane: ``compute``, ``wire``, or on a mesh ``between replicas``, which have a communicator of their own.
        what: The phase, and the number of the bucket or the name of the parameter.
        start: When it begins.
        end: When it ends.
    """

    lane: str
    what: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one step on one rank.

    Attributes:
        reduce: All reductions, on the wire.
        update: All updates.
        gather: All gathers, on the wire.
        compute: Forward and backward; None where it is not known, and so is all below.
        exposed_reduce: What the rank waits for reductions.
        exposed_gather: What it waits for gathers.
        step: From one backward to the next.
        spans: What happens when.
    """

    reduce: float
    update: float
    gather: float
    compute: float | None = None
    exposed_reduce: float | None = None
    exposed_gather: float | None = None
    step: float | None = None
    spans: tuple[Span, ...] = ()


def on_links(num_bytes: float, axis: Axis, *, direct: bool) -> tuple[float, float]:
    """Bytes that a rank sends to ranks of its host, and through its own network adapter.

    Through rings, one for each rank of a host, partial sums of a whole host cross to the next one. Straight to their
    owners, every rank's values cross.

    Args:
        num_bytes: Of the whole buffer.
        axis: The ranks that reduce-scatter or all-gather it.
        direct: Whether slices go straight to their owners.
    """
    sent, hosts = num_bytes * (axis.ranks - 1) / axis.ranks, axis.ranks // axis.per_host
    if direct:
        across = num_bytes * (axis.ranks - axis.per_host) / axis.ranks
    else:
        across = sent / axis.per_host if hosts > 1 else 0.0
    return sent - across, across


def transfer(num_bytes: float, axis: Axis, gpu: Gpu, *, direct: bool = False) -> float:
    """Seconds of a reduce-scatter or an all-gather of a buffer; see ``on_links``."""
    if axis.ranks == 1:
        return 0.0
    hosts = axis.ranks // axis.per_host
    intra, inter = on_links(num_bytes, axis, direct=direct)
    slowest = max(intra / gpu.intra, inter / gpu.inter)
    within, between = (1, min(1, hosts - 1)) if direct else (axis.ranks - hosts, hosts - 1)
    return min(each.start + within * each.intra + between * each.inter + slowest / each.share for each in gpu.protocols)


def axes_of(ranks: int, per_host: int, mesh: tuple[int, int] | None) -> tuple[Axis, Axis]:
    """The row and the column of a mesh of (replicas, shards), ranks of a row being neighbours; or one row.

    Raises:
        ValueError: Hosts do not divide the ranks, or a row lies across them unevenly, or the mesh has other ranks.
    """
    if per_host < 1:
        raise ValueError(f"per_host: expected a number above 0, got {per_host}")
    if ranks < 1 or (ranks > per_host and ranks % per_host):
        raise ValueError(f"ranks: expected a multiple of the {per_host} ranks per host, or fewer, got {ranks}")
    per_host = min(ranks, per_host)
    replicas, shards = mesh or (1, ranks)
    if replicas * shards != ranks or min(replicas, shards) < 1:
        raise ValueError(f"mesh: expected replicas x shards = {ranks} ranks, got {replicas} x {shards}")
    if math.gcd(shards, per_host) != min(shards, per_host):
        raise ValueError(f"mesh: expected rows that fill hosts of {per_host} ranks or divide them, got {shards} shards")
    return Axis(shards, min(shards, per_host)), Axis(replicas, max(1, per_host // shards))


def play(
    model: Model, gpu: Gpu, row: Axis, column: Axis, compute: float | None = None, *, attached: bool = True
) -> Time:
    """Time one step, from one backward to the next.

    Args:
        model: Cut over a row of ranks, and replicated along a column.
        gpu: What computes and sends.
        row: The ranks that hold different shards.
        column: Those that hold the same.
        compute: Seconds of forward and backward, of which backward takes two thirds; None for not known.
        attached: Whether gathers are left in flight behind the next forward.
    """
    schedule = _Schedule(model, gpu, row, column)
    return Time(*schedule.sums) if compute is None else schedule.play(compute, attached=attached)


class _Schedule(Follower):
    """What a step does when, on a clock of its own."""

    def __init__(self, model: Model, gpu: Gpu, row: Axis, column: Axis) -> None:
        """Time the buckets of a model, cut over a row of ranks and replicated along a column."""
        self._model = model
        self._gpu = gpu
        timed = model.each(
            lambda bucket: [
                transfer(each.num_bytes, axis, gpu, direct=each.is_direct)
                for each, axis in zip(model.transfers_of(bucket), (row, row, column, column), strict=False)
            ]
        )
        self._gather = [gather for gather, *_ in timed]
        self._reduce = [parts for _, *parts in timed]
        self._update = model.each(self._update_of)
        self.sums = sum(map(sum, self._reduce)), sum(self._update), sum(self._gather)
        self._backward = 0.0
        self._numel = sum(gradient.numel for gradient in model.gradients)
        self._now = 0.0
        self._free = {"wire": 0.0, "between replicas": 0.0}
        self._waited = {"reduce": 0.0, "gather": 0.0}
        self._arrivals: dict[int, float] = {}
        self._parts: dict[int, deque[float]] = {}
        self._spans: list[Span] = []

    def _update_of(self, bucket: Arrangement) -> float:
        """Seconds of one pass over a shard: gradients are read, parameters and state are written, too."""
        gradient, kept = bucket.members[0].gradient_dtype.itemsize, self._model.state_bytes(bucket)
        num_bytes = bucket.layout.shard_numel * (gradient + 2 * (bucket.storage.param.itemsize + kept))
        on_host = self._model.config.state_residency is StateResidency.HOST
        return num_bytes / (_HOST if on_host else self._gpu.copy * _OF_A_COPY)

    def play(self, compute: float, *, attached: bool) -> Time:
        """From one backward to the next."""
        last = compute / self._model.passes
        self._backward = last * 2 / 3
        self._model.backward(self)
        self._model.step(self, attached=attached)
        if not attached:
            self._wait(self._free["wire"], "gather")
        self._forward(last / 3)
        if self._model.passes > 1:
            self._work("backward and forward, all but the last", compute - last)
        exposed = self._waited["reduce"], self._waited["gather"]
        return Time(*self.sums, compute, *exposed, self._now, tuple(self._spans))

    def made(self, gradient: Gradient) -> None:
        self._work(f"backward {gradient.name}", self._backward * gradient.numel / self._numel)

    def begin(self, bucket: int) -> None:
        self._parts[bucket] = deque(self._reduce[bucket])
        self._arrivals[bucket] = self._send(f"reduce {bucket}", self._parts[bucket].popleft())

    def go_on(self, bucket: int) -> None:
        self._wait(self._arrivals[bucket], "reduce")
        if self._parts[bucket]:
            seconds = self._parts[bucket].popleft()
            self._arrivals[bucket] = self._send(f"reduce {bucket}", seconds, "between replicas")

    def update(self, bucket: int) -> None:
        self._work(f"update {bucket}", self._update[bucket])
        self._arrivals[bucket] = self._send(f"gather {bucket}", self._gather[bucket])

    def _forward(self, seconds: float) -> None:
        """Play forward, in which each module waits for the buckets of its own parameters."""
        for module, own in groupby(reversed(self._model.gradients), key=lambda each: each.name.rpartition(".")[0]):
            gradients = list(own)
            self._wait(max(self._arrivals[each.bucket] for each in gradients), "gather")
            self._work(f"forward {module}", seconds * sum(each.numel for each in gradients) / self._numel)

    def _work(self, what: str, seconds: float) -> None:
        """Compute for so many seconds, and longer while something is sent."""
        slowdown, sending = self._gpu.slowdown, max(self._free.values()) - self._now
        if sending > 0.0:
            seconds += slowdown * min(seconds, sending / (1 + slowdown))
        self._spans.append(Span("compute", what, self._now, self._now + seconds))
        self._now += seconds

    def _send(self, what: str, seconds: float, lane: str = "wire") -> float:
        """Begin a transfer; returns when it will have arrived."""
        start = max(self._now, self._free[lane])
        self._free[lane] = start + seconds
        self._spans.append(Span(lane, what, start, self._free[lane]))
        return self._free[lane]

    def _wait(self, arrival: float, what: str) -> None:
        if arrival > self._now:
            self._waited[what] += arrival - self._now
            self._now = arrival
