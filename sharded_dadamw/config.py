"""What a user may choose about sharding: frozen and validated. Hyperparameters live in the parameter groups instead."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class MainParameter(Enum):
    """What is kept, sharded, beside a parameter that is narrower than fp32, so that small updates and decay count."""

    FP32 = "an fp32 copy, of which the parameter is the image: 4 bytes per parameter"
    REMAINDER = "the 16 bits that a bf16 parameter lacks of its fp32 value: 2 bytes, and the same results as FP32"
    NONE = "nothing: the parameter is updated in its own dtype, and loses what is smaller than half its last digit"


class Moments(Enum):
    """How ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq`` are stored. All arithmetic is in fp32 (fp64 for fp64)."""

    FP32 = "fp32: 4 bytes each"
    BF16 = "bf16, rounded stochastically, so that they are right on average: 2 bytes each"
    LIKE_PARAMETERS = "in the parameter's dtype, rounded to the nearest, as DecoupledAdamW stores them"
    INT8 = "8 bits and a scale per 256 elements, by torchao; fp32 for small parameters: about 1 byte each"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingConfig:
    """How :class:`~sharded_dadamw.ShardedDecoupledAdamW` spreads its work, and in what precision it keeps state.

    Attributes:
        bucket_cap_mb: Size in MiB (of parameters) up to which parameters share a bucket. Each bucket is one reduction,
            one kernel call and one all-gather. Results do not depend on it.
        reduce_gradients: True: each rank brings its own gradients, and ``step`` averages them. False: something else,
            such as DistributedDataParallel, has averaged them already; they are only read.
        main_parameter: What is kept beside bf16 and fp16 parameters; nothing is kept beside wider ones.
        moments: How moments are stored. fp64 parameters have theirs in fp64, whatever is chosen here.
        seed: Key of the stochastic rounding of ``Moments.BF16``, in [0, 2**32). The random bits for an element follow
            from this, its step and its number alone, so they are the same on any number of ranks and on any device.
        whole_state_dict: False: ``state_dict()`` is this rank's shards. True: it is the state of whole parameters, as
            from :class:`~sharded_dadamw.DecoupledAdamW`: on every rank, in host memory, or DTensors where parameters
            are. Making it is collective, so all ranks have to call it. Either loads, whatever is chosen here.

    Raises:
        TypeError: A value is not of the type it has here.
        ValueError: ``bucket_cap_mb`` is not a finite number > 0, or ``seed`` is out of range.
    """

    bucket_cap_mb: float = 16.0
    reduce_gradients: bool = True
    main_parameter: MainParameter = MainParameter.FP32
    moments: Moments = Moments.FP32
    seed: int = 0
    whole_state_dict: bool = False

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if isinstance(self.bucket_cap_mb, bool) or not isinstance(self.bucket_cap_mb, (int, float)):
            raise TypeError(f"bucket_cap_mb: expected a number of MiB, got {self.bucket_cap_mb!r}")
        if not (math.isfinite(self.bucket_cap_mb) and self.bucket_cap_mb > 0):
            raise ValueError(f"bucket_cap_mb: expected a finite number > 0 (MiB), got {self.bucket_cap_mb}")
        for name in ("reduce_gradients", "whole_state_dict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        for name, kind in (("main_parameter", MainParameter), ("moments", Moments)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                choices = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
                raise TypeError(f"{name}: expected one of {choices}, got {value!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed: expected an integer, got {self.seed!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: expected an integer in [0, 2**32), got {self.seed}")
