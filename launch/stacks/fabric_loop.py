"""Fabric: a loop of one's own, accumulation, clip, save and load.

torchrun --nproc-per-node 2 -m launch.stacks.fabric_loop
"""

import os

from lightning.fabric import Fabric
from torch.optim.lr_scheduler import LambdaLR

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import ShardedDecoupledAdamW, weight_decay_groups
from sharded_dadamw.stacks.fabric import ShardedStrategy


def main() -> None:
    """Train."""
    options = common.options()
    strategy = "ddp" if options.ddp else ShardedStrategy()
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), strategy=strategy)
    fabric.launch()
    model = build().to(fabric.device)
    groups = weight_decay_groups(model, common.OURS["weight_decay"])
    optimizer = ShardedDecoupledAdamW(groups, **common.OURS, config={"reduce_gradients": not options.ddp})
    schedule = LambdaLR(optimizer, common.factor)
    model, optimizer = fabric.setup(model, optimizer)
    items, norms, state = common.Items(), [], {"model": model, "optimizer": optimizer, "schedule": schedule}
    if options.resume:
        fabric.load(options.folder / "half.ckpt", state)
    for step in range(schedule.last_epoch, common.STEPS):
        micro_batches = common.micro_batches(items, step, options.micro_batches, fabric.global_rank, fabric.world_size)
        for number, batch in enumerate(micro_batches, 1):
            with fabric.no_backward_sync(model, enabled=number < len(micro_batches)):
                fabric.backward(loss_of(model, batch) / len(micro_batches))
        norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=common.MAX_NORM)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == common.SAVE_AT:
            fabric.save(options.folder / "half.ckpt", state)
    common.keep(options.folder, model.module, norms)


if __name__ == "__main__":
    main()
