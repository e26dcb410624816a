"""Lightning: a strategy without DDP, whose optimizers average and clip."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from sharded_dadamw.sharded import ShardedDecoupledAdamW


class ShardedStrategy(DDPStrategy):
    """``Trainer(strategy=ShardedStrategy())``: the module's ``ShardedDecoupledAdamW`` averages, and there is no DDP.

    ``accumulate_grad_batches``, ``gradient_clip_val`` and checkpoints are Lightning's as they were. Arguments are those
    of ``DDPStrategy``, without DDP's own.
    """

    def configure_ddp(self) -> None:
        """Leave the model as it is; its clip becomes the optimizer's."""
        self.precision_plugin.clip_grad_by_norm = _clip_by_norm
        self.precision_plugin.clip_grad_by_value = _clip_by_value

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate inside."""
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                if isinstance(optimizer, ShardedDecoupledAdamW):
                    stack.enter_context(optimizer.no_sync())
            yield


def _clip_by_norm(optimizer: Any, clip_val: float) -> None:
    optimizer.clip_grad_norm_(clip_val)


def _clip_by_value(optimizer: Any, clip_val: float) -> None:
    raise ValueError(
        'gradients are averaged by the optimizer and are clipped by their norm alone: gradient_clip_algorithm="norm"'
    )
