"""Lightning's Trainer: accumulation, clip and checkpoints are its own options.

torchrun --nproc-per-node 2 -m launch.stacks.lightning_trainer
"""

import os
from typing import Any

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, DistributedSampler, Subset

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import ShardedDecoupledAdamW, weight_decay_groups
from sharded_dadamw.stacks.lightning import ShardedStrategy


class Module(lightning.LightningModule):
    """The model and its optimizer."""

    def optimizer(self, groups: Any, **hyper: Any) -> Any:
        """Averages gradients itself, where there is no DDP."""
        return ShardedDecoupledAdamW(groups, **hyper, config={"reduce_gradients": not self.ddp})

    def __init__(self, ddp: bool) -> None:
        super().__init__()
        self.model, self.ddp, self.norms = build(), ddp, []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The loss."""
        return loss_of(self.model, batch)

    def train_dataloader(self) -> DataLoader[Any]:
        """The next items in their order, so that the control can follow: an epoch is 10 steps."""
        size = common.SAVE_AT * common.BATCH * self.trainer.accumulate_grad_batches * self.trainer.world_size
        items = Subset(common.Items(), range(self.current_epoch * size, (self.current_epoch + 1) * size))
        sampler = DistributedSampler(items, shuffle=False, **self.trainer.distributed_sampler_kwargs)
        return DataLoader(items, common.BATCH, sampler=sampler)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by steps."""
        optimizer = self.optimizer(weight_decay_groups(self, common.OURS["weight_decay"]), **common.OURS)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, common.factor), "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: ShardedDecoupledAdamW) -> None:
        """Log the norm, by a clip that changes nothing; then Lightning clips."""
        if not self.ddp:  # under DDP it is Lightning's grad_norm that is right
            self.norms.append(float(optimizer.clip_grad_norm_(float("inf"))))


def main() -> None:
    """Train."""
    options = common.options()
    train(options, Module(options.ddp), "ddp" if options.ddp else ShardedStrategy())


def train(options: common.Options, module: Module, strategy: Any) -> None:
    """Train, from the checkpoint if there should be one."""
    saving = ModelCheckpoint(options.folder, "{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy,
        max_epochs=common.STEPS // common.SAVE_AT,
        accumulate_grad_batches=options.micro_batches,
        gradient_clip_val=common.MAX_NORM,
        callbacks=[] if options.resume else [saving],
        enable_checkpointing=not options.resume,
        logger=False,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(module, ckpt_path=options.folder / "epoch=0.ckpt" if options.resume else None)
    common.keep(options.folder, module.model, module.norms)


if __name__ == "__main__":
    main()
