"""The plan of a training run, as data and as text."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from sharded_dadamw.comm.tree import fitting
from sharded_dadamw.config import GradientResidency, MainParameter, Moments, ShardingConfig, StateResidency
from sharded_dadamw.plan.memory import Bytes, Phase, Sent, at_rest, checkpoint_bytes, fully_sharded, phases, sent
from sharded_dadamw.plan.model import Model
from sharded_dadamw.plan.parameters import parameters_of
from sharded_dadamw.plan.time import GPUS, Axis, Gpu, Time, axes_of, on_links, play

_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Alternative:
    """What another setting would change.

    Attributes:
        setting: What to set.
        peak: Bytes of the device at most; without activations.
        host: Bytes of host memory per rank at most.
        step: Seconds of a step; None where compute is not known.
    """

    setting: str
    peak: int
    host: int
    step: float | None


@dataclass(frozen=True)
class Plan:
    """What a training run needs on one rank; all ranks need the same. Bytes and seconds.

    Attributes:
        model: What it was called.
        num_parameters: Elements of all parameters.
        ranks: All of them.
        per_host: Ranks of one host.
        mesh: Replicas and shards.
        gpu: The device's name.
        settings: How the optimizer shards, by the names of ``ShardingConfig``, and the dtypes of the model.
        num_buckets: Reductions, updates and gathers of a step.
        phases: By name.
        by_ranks: What is always there on the device of each of other numbers of ranks, without replicas.
        activations: As told.
        memory: Of the device.
        smallest: The fewest ranks on which the device's memory is enough; None where that is never so.
        sent: Bytes that a rank sends in a step.
        links: The same by the link that carries them: ``intra`` a host, and ``inter``.
        checkpoint: Bytes of a whole checkpoint.
        time: Of a step.
        alternatives: Other settings that make a difference, the one that saves most memory first.
        fsdp2: Bytes at rest if FSDP2 sharded everything, in fp32.
        unknown: What is not in these figures.
    """

    model: str
    num_parameters: int
    ranks: int
    per_host: int
    mesh: tuple[int, int]
    gpu: str
    settings: dict[str, str]
    num_buckets: int
    phases: dict[str, Phase]
    by_ranks: dict[int, Bytes]
    activations: int
    memory: int
    smallest: int | None
    sent: Sent
    links: dict[str, float]
    checkpoint: int
    time: Time
    alternatives: tuple[Alternative, ...]
    fsdp2: int
    unknown: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes of the device at most, with the activations that were told."""
        return _peak(self.phases) + self.activations

    @property
    def host(self) -> int:
        """Bytes of host memory at most."""
        return _on_host(self.phases)

    @property
    def fits(self) -> bool:
        """Whether the device has that."""
        return self.peak <= self.memory

    def as_dict(self) -> dict[str, Any]:
        """What JSON has, everything in it."""
        return asdict(self) | {"peak": self.peak, "fits": self.fits}


def plan(
    model: str | nn.Module | Mapping[str, Tensor],
    *,
    ranks: int,
    per_host: int = 8,
    mesh: tuple[int, int] | None = None,
    gpu: str | Gpu = "h200",
    config: ShardingConfig | None = None,
    dtype: torch.dtype | None = None,
    gradient_dtype: torch.dtype | None = None,
    amsgrad: bool = False,
    attached: bool = True,
    memory: float | None = None,
    activations: float = 0.0,
    compute: float | None = None,
    tokens: int | None = None,
    mfu: float | None = None,
) -> Plan:
    """Plan a training run of ``ShardedDecoupledAdamW`` on plain parameters.

    Args:
        model: As ``parameters_of`` takes it.
        ranks: All of them.
        per_host: Ranks of one host.
        mesh: Replicas and shards, for a 2-D mesh; None to shard over all ranks.
        gpu: One of ``GPUS``, or another.
        config: How the optimizer shards; None for its defaults.
        dtype: What parameters are held in; None for what the model says.
        gradient_dtype: What gradients are accumulated in; None for the parameters' dtype.
        amsgrad: Whether there is a third moment.
        attached: Whether the model is attached, so that gathers go on behind the next forward.
        memory: Bytes of the device, where not what the GPU has.
        activations: Bytes that a backward pass begins with.
        compute: Seconds of forward and backward in a step. It may follow from ``tokens`` and ``mfu`` instead.
        tokens: Of one rank in a step.
        mfu: The share of the device's operations per second that compute alone reaches, above 0 and up to 1.

    Raises:
        ValueError: There is no such model or GPU; hosts do not divide the ranks, or the mesh not; a number is none that
            can be; or a setting is not for a dtype, or not planned.
    """
    if isinstance(gpu, str) and gpu not in GPUS:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {gpu}")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"mfu: expected a number above 0 and up to 1, got {mfu}")
    for what, number in {"memory": memory, "activations": activations, "compute": compute}.items():
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{what}: expected a finite number from 0 on, got {number}")
    told = (compute is not None, tokens is not None, mfu is not None)
    if told not in ((False, False, False), (True, False, False), (False, True, True)):
        raise ValueError("compute: expected seconds, or else tokens and mfu, got one of these without the other or all")
    name, device = (gpu, GPUS[gpu]) if isinstance(gpu, str) else ("as given", gpu)
    config = config or ShardingConfig()
    row, column = axes_of(ranks, per_host, mesh)
    params = parameters_of(model, dtype)
    for param in params.values():
        param.grad_dtype = gradient_dtype or param.dtype
    cut = Model.of(params, config, row.ranks, column.ranks, amsgrad)
    if compute is None and tokens is not None and mfu is not None:
        compute = 6 * cut.num_elements * tokens / (device.flops * mfu)  # operations per parameter and token
    available = int(device.memory if memory is None else memory)

    def time_of(model: Model) -> Time:
        axes = axes_of(model.num_ranks, per_host, (model.replicas, model.shards))
        return play(model, device, *axes, compute, attached=attached)

    held, time = phases(cut), time_of(cut)

    def alternatives() -> Iterator[Alternative]:
        for setting, changes in _others(config).items():
            with suppress(ValueError):  # it is not for these parameters
                other = cut.under(replace(config, **changes)) if changes else cut.over(2 * row.ranks, column.ranks)
                then = phases(other)
                theirs = _peak(then), _on_host(then), time_of(other).step
                if theirs != (_peak(held), _on_host(held), time.step):
                    yield Alternative(setting, *theirs)

    return Plan(
        model=model if isinstance(model, str) else type(model).__name__,
        num_parameters=cut.num_elements,
        ranks=ranks,
        per_host=min(per_host, ranks),
        mesh=(column.ranks, row.ranks),
        gpu=name,
        settings=_settings(cut),
        num_buckets=len(cut.kind_of),
        phases=held,
        by_ranks={shards: at_rest(cut.over(shards)).device for shards in _steps(ranks, per_host, config)},
        activations=int(activations),
        memory=available,
        smallest=_fewest(cut, _numbers(config, per_host), available - int(activations)),
        sent=sent(cut),
        links=_links(cut, row, column),
        checkpoint=checkpoint_bytes(cut),
        time=time,
        alternatives=tuple(sorted(alternatives(), key=lambda each: each.peak)),
        fsdp2=fully_sharded(cut.members, ranks),
        unknown=tuple(_unknown(cut, activations, compute)),
    )


def _peak(phases: Mapping[str, Phase]) -> int:
    return max(phase.device.total for phase in phases.values())


def _on_host(phases: Mapping[str, Phase]) -> int:
    return max(phase.host.total for phase in phases.values())


def _fewest(model: Model, candidates: Sequence[int], room: int) -> int | None:
    """The first of these numbers of ranks on which there is room.

    Numbers further on are tried until there is, and then those in between: on very many ranks padding takes more than
    they save, so that it may fit on few ranks and not on many.
    """

    def fits(shards: int) -> bool:
        other = model.over(shards)
        return at_rest(other).device.total <= room and _peak(phases(other)) <= room

    tried = 1
    while not fits(candidates[tried - 1]):
        if tried == len(candidates):
            return None
        tried = min(2 * tried, len(candidates))
    return candidates[bisect_left(candidates, True, tried // 2, tried - 1, key=fits)]


def _numbers(config: ShardingConfig, per_host: int) -> list[int]:
    """Numbers of ranks, whole hosts where they take more than one, that can share the micro-batches."""
    fit = [*range(1, per_host), *range(per_host, _MOST_RANKS + 1, per_host)]
    return fit if config.micro_batches is None else sorted({*fit} & {*fitting(config.micro_batches)})


def _steps(ranks: int, per_host: int, config: ShardingConfig) -> list[int]:
    """Some of these from one on, four times as many each beyond a host, up to twice as many as there are."""
    host = min(per_host, ranks)
    beyond = takewhile(lambda more: more <= 2 * ranks, (host * 4**power for power in count()))
    return sorted({1, ranks, *beyond} & {ranks, *_numbers(config, host)})


def _others(config: ShardingConfig) -> dict[str, dict[str, Any]]:
    """What to set, and what that changes in the settings."""
    return {
        "gradients sharded": {"gradient_residency": GradientResidency.SHARDED},
        "main remainder": {"main_parameter": MainParameter.REMAINDER},
        "moments bf16": {"moments": Moments.BF16},
        "state on the host": {"state_residency": StateResidency.HOST},
        "wire bf16": {"wire_dtype": torch.bfloat16},
        "overlap": {"overlap": True},
        "buckets 4 times as large": {"bucket_cap_mb": 4 * config.bucket_cap_mb},
        "twice the ranks": {},
    }


def _settings(model: Model) -> dict[str, str]:
    found = {
        "parameters": _names(member.param.dtype for member in model.members),
        "gradients": _names(bucket.members[0].gradient_dtype for bucket in model.kinds),
    }
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        found[field.name] = value.name.lower() if isinstance(value, Enum) else str(value).removeprefix("torch.")
    return found


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes}))


def _links(model: Model, row: Axis, column: Axis) -> dict[str, float]:
    """Bytes that a rank sends in a step, by the link that carries them."""
    intra = inter = 0.0
    for bucket, number in model.counted():
        for each, axis in zip(model.transfers_of(bucket), (row, row, column, column), strict=False):
            within, across = on_links(each.num_bytes, axis, direct=each.is_direct)
            intra, inter = intra + number * within, inter + number * across
    return {"intra": intra, "inter": inter}


def _unknown(model: Model, activations: float, compute: float | None) -> Iterator[str]:
    if not activations:
        yield "activations: none were told"
    yield "CUDA's context, NCCL's buffers and the allocator's slack: 1 to 3 GB as a rule"
    if compute is None:
        yield "what overlap hides: neither the compute time of a step was told, nor tokens and MFU"
    yield "other parameter groups, each of which has buckets of its own; buffers of the model"
    if model.config.micro_batches is None:
        yield "accumulation: one backward per step is planned; in no_sync(), sharded gradients take whole buffers"
    if model.config.state_residency is StateResidency.HOST:
        yield "pinned memory, which torch rounds up to a power of two, and how fast the host updates (25 GB/s assumed)"
    if not model.config.reduce_gradients:
        yield "what the wrapper that reduces the gradients holds and sends"
