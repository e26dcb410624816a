"""Lightning under FSDP2: its ModelParallelStrategy, clip and checkpoints, with DecoupledAdamW in AdamW's place.

torchrun --nproc-per-node 2 -m launch.stacks.lightning_fsdp2
"""

import os

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from launch.stacks import common, lightning_trainer
from launch.stacks.lightning_trainer import build, loss_of
from sharded_dadamw import DecoupledAdamW

__all__ = ["build", "loss_of"]


class Module(lightning_trainer.Module):
    """The model in shards."""

    optimizer = DecoupledAdamW

    def configure_model(self) -> None:
        """Shard the model, ahead of the optimizer."""
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def main() -> None:
    """Train."""
    options = common.options()
    ranks = int(os.environ["WORLD_SIZE"])  # by default all of them share the tensors of one replica
    strategy = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    lightning_trainer.train(options, Module(options.ddp), strategy)


if __name__ == "__main__":
    main()
