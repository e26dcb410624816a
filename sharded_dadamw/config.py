"""What a user may choose about sharding: frozen and validated. Hyperparameters live in the parameter groups instead."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingConfig:
    """How :class:`~sharded_dadamw.ShardedDecoupledAdamW` spreads its work.

    Attributes:
        bucket_cap_mb: Size in MiB (of parameters) up to which parameters share a bucket. Each bucket is one reduction,
            one kernel call and one all-gather. Results do not depend on it.
        reduce_gradients: True: each rank brings its own gradients, and ``step`` averages them. False: something else,
            such as DistributedDataParallel, has averaged them already; they are only read.
        main_dtype: ``torch.float32``: parameters in a narrower dtype get an fp32 main parameter, sharded like the
            moments, and the update acts on that. None: every parameter is updated in its own dtype, with moments in
            that dtype, exactly as ``DecoupledAdamW`` does; a bf16 parameter then loses small decays to rounding.

    Raises:
        TypeError: ``bucket_cap_mb`` is not a number, or ``reduce_gradients`` is not a bool.
        ValueError: ``bucket_cap_mb`` is not a finite number > 0, or ``main_dtype`` is neither fp32 nor None.
    """

    bucket_cap_mb: float = 16.0
    reduce_gradients: bool = True
    main_dtype: torch.dtype | None = torch.float32

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if isinstance(self.bucket_cap_mb, bool) or not isinstance(self.bucket_cap_mb, (int, float)):
            raise TypeError(f"bucket_cap_mb: expected a number of MiB, got {self.bucket_cap_mb!r}")
        if not (math.isfinite(self.bucket_cap_mb) and self.bucket_cap_mb > 0):
            raise ValueError(f"bucket_cap_mb: expected a finite number > 0 (MiB), got {self.bucket_cap_mb}")
        if not isinstance(self.reduce_gradients, bool):
            raise TypeError(f"reduce_gradients: expected True or False, got {self.reduce_gradients!r}")
        if self.main_dtype not in (None, torch.float32):
            raise ValueError(f"main_dtype: expected torch.float32 or None, got {self.main_dtype}")
