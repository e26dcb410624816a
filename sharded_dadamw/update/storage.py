"""In what dtypes a bucket keeps its state: the settings of a user, applied to one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_dadamw.config import MainParameter, Moments, ShardingConfig

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What ``optimizer.state`` has of a parameter beside ``step``; the last one with amsgrad only."""

MAINS = {"main_param": torch.float32, "main_remainder": torch.int16}
"""What it may have of the main parameter of a narrow one: an fp32 copy, or the 16 bits that the weight lacks."""

LARGEST_BETA2_FOR_NEAREST = 0.995
"""Up to which a second moment of 16 bits, rounded to the nearest, still follows its gradients."""

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""Makes a flat buffer of zeros."""


def moments_of(amsgrad: bool) -> tuple[str, ...]:
    """Return which of ``MOMENTS`` a parameter's state has."""
    return MOMENTS if amsgrad else MOMENTS[:2]


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer in memory of this process alone."""
    return torch.zeros(numel, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Storage:
    """How the state of some parameters is stored. Parameters of equal storage share buckets.

    Attributes:
        main: fp32: an fp32 copy of each parameter. int16: the remainder of its fp32 value. None: neither.
        rounds_to_nearest: Whether moments narrower than fp32 are rounded to the nearest, and not stochastically.
    """

    param: torch.dtype
    main: torch.dtype | None
    moments: torch.dtype
    rounds_to_nearest: bool

    @classmethod
    def of(cls, param: Tensor, config: ShardingConfig) -> Storage:
        """Choose for a parameter, if the settings are for its dtype."""
        wide = torch.promote_types(param.dtype, torch.float32)
        is_narrow = param.dtype != wide
        main = None
        if is_narrow and config.main_parameter is MainParameter.FP32:
            main = torch.float32
        elif is_narrow and config.main_parameter is MainParameter.REMAINDER:
            if param.dtype is not torch.bfloat16:
                raise ValueError(
                    f"main_parameter: expected MainParameter.FP32 or NONE for {param.dtype}, got REMAINDER; only bf16 "
                    "has the exponent of fp32, and is its upper half"
                )
            main = torch.int16
        moments = wide
        if config.moments is Moments.LIKE_PARAMETERS:
            moments = param.dtype
        elif config.moments is Moments.BF16 and wide is torch.float32:
            moments = torch.bfloat16
        return cls(param.dtype, main, moments, config.moments is Moments.LIKE_PARAMETERS)

    def state(self, *, amsgrad: bool) -> dict[str, torch.dtype]:
        """The tensors of state that there are beside a parameter, by their names in ``optimizer.state``."""
        mains = {name: dtype for name, dtype in MAINS.items() if dtype is self.main}
        return dict.fromkeys(moments_of(amsgrad), self.moments) | mains

    @property
    def is_stochastic(self) -> bool:
        """Whether moments are rounded stochastically."""
        return self.moments is torch.bfloat16 and not self.rounds_to_nearest

    def check_beta2(self, beta2: float) -> None:
        """Refuse a beta2 with which rounding to the nearest would keep ``exp_avg_sq`` from ever falling."""
        if self.rounds_to_nearest and self.moments.itemsize < 4 and beta2 > LARGEST_BETA2_FOR_NEAREST:
            raise ValueError(
                f"betas: expected beta2 <= {LARGEST_BETA2_FOR_NEAREST} with moments in {self.moments} rounded to "
                f"the nearest, got {beta2}: a step of exp_avg_sq is then less than half its last digit, and it never "
                "falls again; use Moments.BF16, which rounds stochastically, or Moments.FP32"
            )
