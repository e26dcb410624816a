"""torchtitan: an optimizers container that knows ``DecoupledAdamW`` and ``ShardedDecoupledAdamW`` by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from sharded_dadamw.decoupled import DecoupledAdamW
from sharded_dadamw.sharded import ShardedDecoupledAdamW

_OURS: dict[str, type[Optimizer]] = {
    "DecoupledAdamW": DecoupledAdamW,
    "ShardedDecoupledAdamW": ShardedDecoupledAdamW,
}


class DecoupledOptimizers(OptimizersContainer[Any]):
    """torchtitan's container; ``optimizer_name`` may be one of our two, and is torchtitan's otherwise.

    ``DecoupledAdamW`` under FSDP2, which torchtitan uses always. ``ShardedDecoupledAdamW`` under HSDP, with
    ``optimizer_factory_kwargs_by_name={"ShardedDecoupledAdamW": {"config": {"reduce_gradients": False}}}``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        return _OURS.get(name) or OptimizersContainer._resolve_optimizer_factory(name)
