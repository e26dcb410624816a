"""Fabric: a strategy without DDP, whose optimizers average and clip."""

from contextlib import AbstractContextManager
from typing import Any

from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.optim import Optimizer

from sharded_dadamw.sharded import ShardedDecoupledAdamW
from sharded_dadamw.stacks.averaging import averaging, no_sync, refuse_clip_by_value


class ShardedStrategy(DDPStrategy):
    """``Fabric(strategy=ShardedStrategy())``: ``ShardedDecoupledAdamW`` averages, and there is no DDP.

    ``no_backward_sync``, ``clip_gradients(max_norm=)``, ``save`` and ``load`` are Fabric's as they were. Build the
    optimizer of a model on its device, after ``fabric.launch()``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._averaging: list[ShardedDecoupledAdamW] = []
        self._backward_sync_control = _NoSync(self._averaging)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Leave the model as it is."""
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Remember who averages; a TypeError for an optimizer that does not."""
        self._averaging.append(averaging(optimizer))
        return optimizer

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm over all parameters and ranks."""
        self.precision.unscale_gradients(optimizer)
        norm: Tensor = optimizer.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite)
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float) -> None:
        """Refuse."""
        refuse_clip_by_value()


class _NoSync(_BackwardSyncControl):
    def __init__(self, averaging: list[ShardedDecoupledAdamW]) -> None:
        self._averaging = averaging

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return no_sync(self._averaging if enabled else ())
