"""OLMo-core: two optimizer configs."""

from dataclasses import dataclass
from typing import Any

from olmo_core.optim import OptimConfig

from sharded_dadamw.decoupled import DecoupledAdamW
from sharded_dadamw.sharded import ShardedDecoupledAdamW


@OptimConfig.register("decoupled_adamw")
@dataclass
class DecoupledAdamWConfig(OptimConfig[Any]):
    """Of ``DecoupledAdamW``, for FSDP and DDP; ``weight_decay`` is per step at the schedule's peak.

    After a load the config's ``initial_lr`` counts, and not the checkpoint's: OLMo-core sets it back.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    amsgrad: bool = False
    max_grad_norm: float | None = None

    @classmethod
    def optimizer(cls) -> type[Any]:
        """The class that ``build`` calls."""
        return DecoupledAdamW


@OptimConfig.register("sharded_decoupled_adamw")
@dataclass
class ShardedDecoupledAdamWConfig(DecoupledAdamWConfig):
    """Of ``ShardedDecoupledAdamW``, whose settings ``config`` spells out; for HSDP and DDP."""

    config: dict[str, Any] | None = None

    @classmethod
    def optimizer(cls) -> type[Any]:
        """The class that ``build`` calls."""
        return ShardedDecoupledAdamW
