"""OLMo-core's optimizer config and checkpoints, over a model under FSDP2.

torchrun --nproc-per-node 2 -m launch.stacks.olmo_core_fsdp2
"""

import torch
import torch.distributed as dist
from olmo_core.distributed.checkpoint import load_model_and_optim_state, save_model_and_optim_state
from olmo_core.optim import OptimGroupOverride
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw.stacks.olmo_core import DecoupledAdamWConfig


def main() -> None:
    """Train."""
    options = common.options()
    dist.init_process_group("gloo")
    model = build()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    vectors = OptimGroupOverride(params=["*norm.weight"], opts={"weight_decay": 0.0})
    optimizer = DecoupledAdamWConfig(**common.OURS, group_overrides=[vectors]).build(model)
    items, norms, first, folder = common.Items(), [], 0, options.folder / "half"
    if options.resume:
        load_model_and_optim_state(folder, model, optimizer)
        first = common.SAVE_AT
    schedule = LambdaLR(optimizer, common.factor, last_epoch=first - 1 if first else -1)
    for step in range(first, common.STEPS):
        for batch in common.micro_batches(items, step, options.micro_batches, dist.get_rank(), dist.get_world_size()):
            (loss_of(model, batch) / options.micro_batches).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), common.MAX_NORM)
        norms.append(float(norm.full_tensor()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step + 1 == common.SAVE_AT:
            save_model_and_optim_state(folder, model, optimizer)
    common.keep(options.folder, model, norms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
