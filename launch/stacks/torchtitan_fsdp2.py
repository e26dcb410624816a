"""torchtitan's optimizers container and clip, over a model under FSDP2, saved by torch.distributed.checkpoint.

torchrun --nproc-per-node 2 -m launch.stacks.torchtitan_fsdp2
"""

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.distributed.utils import clip_grad_norm_

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw.stacks.torchtitan import DecoupledOptimizers


def main() -> None:
    """Train."""
    options = common.options()
    dist.init_process_group("gloo")
    model = build()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    vectors = ParamGroupConfig(
        pattern=r"norm\.weight$",
        optimizer_name="DecoupledAdamW",
        optimizer_kwargs=common.OURS | {"weight_decay": 0.0},
    )
    rest = ParamGroupConfig(pattern=".*", optimizer_name="DecoupledAdamW", optimizer_kwargs=common.OURS)
    optimizers = DecoupledOptimizers(DecoupledOptimizers.Config(param_groups=[vectors, rest]), model_parts=[model])
    [schedule] = [LambdaLR(optimizer, common.factor) for optimizer in optimizers]
    items, norms, folder = common.Items(), [], options.folder / "half"
    if options.resume:
        state = {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "schedule": schedule.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        model.load_state_dict(state["model"])
        optimizers.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    for step in range(schedule.last_epoch, common.STEPS):
        for batch in common.micro_batches(items, step, options.micro_batches, dist.get_rank(), dist.get_world_size()):
            (loss_of(model, batch) / options.micro_batches).backward()
        norms.append(float(clip_grad_norm_(model.parameters(), common.MAX_NORM)))
        optimizers.step()
        schedule.step()
        optimizers.zero_grad()
        if step + 1 == common.SAVE_AT:
            state = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
            dcp.save(state | {"schedule": schedule.state_dict()}, checkpoint_id=folder)
    common.keep(options.folder, model, norms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
