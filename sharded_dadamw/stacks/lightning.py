"""Lightning: a strategy without DDP, whose optimizers average and clip."""

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from sharded_dadamw.stacks.averaging import averaging, no_sync, refuse_clip_by_value


class ShardedStrategy(DDPStrategy):
    """``Trainer(strategy=ShardedStrategy())``: the module's ``ShardedDecoupledAdamW`` averages, and there is no DDP.

    ``accumulate_grad_batches``, ``gradient_clip_val`` and checkpoints are Lightning's as they were. Arguments are those
    of ``DDPStrategy``, without DDP's own.
    """

    def configure_ddp(self) -> None:
        """Leave the model as it is; its clip becomes the optimizer's."""
        self.precision_plugin.clip_grad_by_norm = lambda optimizer, clip_val: optimizer.clip_grad_norm_(clip_val)
        self.precision_plugin.clip_grad_by_value = refuse_clip_by_value

    def setup_optimizers(self, trainer: Any) -> None:
        """Take the module's optimizers; a TypeError for one that does not average."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            averaging(optimizer)

    def block_backward_sync(self) -> AbstractContextManager[Any]:
        """Accumulate inside."""
        return no_sync(self.optimizers)
