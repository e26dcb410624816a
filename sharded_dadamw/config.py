"""What a user may choose about sharding: frozen and validated. Hyperparameters live in the parameter groups instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

import torch


class _Choice(Enum):
    """One of several ways, whose value says what it means."""

    def __repr__(self) -> str:
        """As it is written in code; the sentence is in ``value``."""
        return str(self)


class MainParameter(_Choice):
    """What is kept, sharded, beside a parameter that is narrower than fp32, so that small updates and decay count."""

    FP32 = "an fp32 copy, which the parameter is rounded from: 4 bytes per parameter"
    REMAINDER = "the 16 bits that a bf16 parameter lacks of its fp32 value: 2 bytes, and the same results as FP32"
    NONE = "nothing: the parameter is updated in its own dtype, and loses what is smaller than half its last digit"


class Moments(_Choice):
    """How ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq`` are stored. All arithmetic is in fp32 (fp64 for fp64)."""

    FP32 = "fp32: 4 bytes each"
    BF16 = "bf16, rounded stochastically, so that they are right on average: 2 bytes each"
    LIKE_PARAMETERS = "in the parameter's dtype, rounded to the nearest, as DecoupledAdamW stores them"


class GradientResidency(_Choice):
    """What becomes of a bucket's gradients once they are averaged."""

    FULL = "they stay where they are: p.grad can be read until zero_grad (ZeRO stage 1)"
    SHARDED = "only this rank's shard of the mean is kept, and p.grad is None or zeros from then on (ZeRO 2)"


class StateResidency(_Choice):
    """Where optimizer state lives, main parameters among it, and where updates are computed."""

    DEVICE = "beside the parameters: their device holds a rank's share of everything, and updates run there"
    HOST = "in host memory, as a copy of the shards of gradients and parameters: updates run on the host's processors"


class Exchange(_Choice):
    """How ranks average gradients and publish parameters."""

    FASTEST = "on CPUs through memory that the ranks of one host share, or else as RANK_ORDER; on GPUs as BACKEND"
    RANK_ORDER = "each slice straight to its owner, who adds them in rank order in fp32: the same bits on any network"
    BACKEND = "the backend's own reduce-scatter and all-gather, whose order of addition is its own"


_CHOICES: dict[str, type[_Choice]] = {
    "gradient_residency": GradientResidency,
    "state_residency": StateResidency,
    "exchange": Exchange,
    "main_parameter": MainParameter,
    "moments": Moments,
}
"""The settings that are one of several ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingConfig:
    """How ``ShardedDecoupledAdamW`` spreads its work, and in what precision it keeps state.

    Attributes:
        bucket_cap_mb: Size in MiB (of parameters) up to which parameters share a bucket. Each bucket is one reduction,
            one kernel call and one all-gather. Results do not depend on it.
        reduce_gradients: True: each rank brings its own gradients, and the optimizer averages them. False: something
            else, such as DistributedDataParallel, has averaged them already; they are only read.
        overlap: True: a bucket's reduction begins in backward, once its gradients are there; of several backward passes
            before a step all but the last belong inside ``no_sync()``. False: reductions begin in ``step``, after
            however many passes; with sharded gradients, one after the other in each pass. Results are the same.
        gradient_residency: What becomes of gradients once they are averaged.
        state_residency: Where state lives and updates are computed. In host memory the parameters' device needs room
            for parameters and gradients alone. ``step`` then waits for gradients to come down, and for the host.
        exchange: How ranks average gradients and publish parameters.
        wire_dtype: What gradients are rounded to before they are sent to another rank: bf16, fp16, or None to send them
            as they are. The mean is formed in fp32, but with ``Exchange.BACKEND`` in this dtype.
        skip_nonfinite: True: a step whose averaged gradients hold a nan or an infinity changes nothing, on any rank. It
            costs a pass over the gradient shard and an all-reduce, unless the step was clipped.
        main_parameter: What is kept beside bf16 and fp16 parameters; nothing is kept beside wider ones.
        micro_batches: None: a step is the mean over ranks. A number: it is the mean over so many micro-batches of all
            ranks, whoever computes them, and has the same bits on any number of ranks that they can be shared out to.
            Each rank runs its share of backward passes per step, in order, with the mean loss of a micro-batch each;
            ``p.grad`` is None between them. See docs/same_run.md.
        moments: How moments are stored. fp64 parameters have theirs in fp64, whatever is chosen here.

    Raises:
        TypeError: A value is not of the type it has here.
        ValueError: ``bucket_cap_mb`` is not a finite number > 0, or a dtype is none of those above.
    """

    bucket_cap_mb: float = 16.0
    reduce_gradients: bool = True
    overlap: bool = True
    gradient_residency: GradientResidency = GradientResidency.FULL
    state_residency: StateResidency = StateResidency.DEVICE
    exchange: Exchange = Exchange.FASTEST
    wire_dtype: torch.dtype | None = None
    skip_nonfinite: bool = False
    main_parameter: MainParameter = MainParameter.FP32
    moments: Moments = Moments.FP32
    micro_batches: int | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if isinstance(self.bucket_cap_mb, bool) or not isinstance(self.bucket_cap_mb, (int, float)):
            raise TypeError(f"bucket_cap_mb: expected a number of MiB, got {self.bucket_cap_mb!r}")
        if not (math.isfinite(self.bucket_cap_mb) and self.bucket_cap_mb > 0):
            raise ValueError(f"bucket_cap_mb: expected a finite number > 0 (MiB), got {self.bucket_cap_mb}")
        for name in ("reduce_gradients", "overlap", "skip_nonfinite"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                choices = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise TypeError(f"{name}: expected one of {choices}, got {value!r}")
        if self.wire_dtype is not None and not isinstance(self.wire_dtype, torch.dtype):
            raise TypeError(f"wire_dtype: expected a torch.dtype or None, got {self.wire_dtype!r}")
        if self.wire_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"wire_dtype: expected torch.bfloat16 or torch.float16 or None, got {self.wire_dtype}")

        if self.micro_batches is not None:
            self._check_micro_batches()

    def _check_micro_batches(self) -> None:
        """Refuse what would make a step depend on the number of ranks."""
        number = self.micro_batches
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"micro_batches: expected a whole number > 0, or None, got {number!r}")
        if number < 1:
            raise ValueError(f"micro_batches: expected a whole number > 0, or None, got {number}")
        for name, differs, why in (
            ("reduce_gradients=False", not self.reduce_gradients, "something else adds gradients up, in its own order"),
            ("wire_dtype", self.wire_dtype is not None, "what is rounded depends on the number of ranks"),
            ("Exchange.BACKEND", self.exchange is Exchange.BACKEND, "the order of its sums is the backend's"),
        ):
            if differs:
                raise ValueError(f"micro_batches: expected a config without {name}, with which {why}")

    @classmethod
    def of(cls, settings: ShardingConfig | Mapping[str, Any] | None) -> ShardingConfig:
        """Return the config that is given, or that a mapping spells out, as a YAML file can hold it.

        Args:
            settings: A config; None for the defaults; or values by the name of the setting. A choice and a dtype may be
                given by name, in any case: ``{"gradient_residency": "sharded", "wire_dtype": "bfloat16"}``.

        Raises:
            TypeError, ValueError: As the constructor; or this is no mapping, or names a setting that there is not.
        """
        if settings is None or isinstance(settings, cls):
            return settings or cls()
        if not isinstance(settings, Mapping):
            raise TypeError(f"config: expected a ShardingConfig, or a mapping of its settings, got {settings!r}")
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"config: expected settings among {', '.join(known)}, got {unknown[0]!r}")
        return cls(**{name: _by_name(name, value) for name, value in settings.items()})


def _by_name(setting: str, value: Any) -> Any:
    """The member or dtype that a text names; what the constructor refuses, and other values, as they are."""
    if not isinstance(value, str):
        return value
    if setting in _CHOICES:
        return _CHOICES[setting].__members__.get(value.upper(), value)
    dtype = getattr(torch, value.lower(), None) if setting == "wire_dtype" else None
    return dtype if isinstance(dtype, torch.dtype) else value
