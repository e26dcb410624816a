"""torchrun alone: the optimizer averages, clips, and is saved with the model at any number of ranks.

torchrun --nproc-per-node 2 -m launch.stacks.torchrun_loop
"""

from contextlib import nullcontext

import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import ShardedDecoupledAdamW, weight_decay_groups
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint


def main() -> None:
    """Train."""
    options = common.options()
    dist.init_process_group("gloo")
    model = build()
    optimizer = ShardedDecoupledAdamW(weight_decay_groups(model, common.OURS["weight_decay"]), **common.OURS)
    schedule = LambdaLR(optimizer, common.factor)
    run = {"model": model, "optimizer": optimizer, "scheduler": schedule}
    items, norms = common.Items(), []
    if options.resume:
        load_checkpoint(options.folder / "checkpoints", **run)
    for step in range(schedule.last_epoch, common.STEPS):
        micro_batches = common.micro_batches(items, step, options.micro_batches, dist.get_rank(), dist.get_world_size())
        for number, batch in enumerate(micro_batches, 1):
            with optimizer.no_sync() if number < len(micro_batches) else nullcontext():
                (loss_of(model, batch) / len(micro_batches)).backward()
        norms.append(float(optimizer.clip_grad_norm_(common.MAX_NORM)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == common.SAVE_AT:
            save_checkpoint(options.folder / "checkpoints", step=step + 1, **run)
    common.keep(options.folder, model, norms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
