"""DeepSpeed's engine around ``DecoupledAdamW``: ZeRO, accumulation, clip and checkpoints are DeepSpeed's.

torchrun --nproc-per-node 2 -m launch.stacks.deepspeed_loop
"""

import deepspeed
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import DecoupledAdamW, weight_decay_groups


def main() -> None:
    """Train."""
    options = common.options()
    deepspeed.init_distributed("gloo")
    model = build()
    optimizer = DecoupledAdamW(weight_decay_groups(model, common.OURS["weight_decay"]), **common.OURS)
    config = {
        "train_micro_batch_size_per_gpu": common.BATCH,
        "gradient_accumulation_steps": options.micro_batches,
        "gradient_clipping": common.MAX_NORM,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    schedule = LambdaLR(optimizer, common.factor)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
    items, norms = common.Items(), []
    if options.resume:
        engine.load_checkpoint(options.folder)
    for step in range(engine.global_steps, common.STEPS):
        for batch in common.micro_batches(items, step, options.micro_batches, dist.get_rank(), dist.get_world_size()):
            engine.backward(loss_of(engine, batch))
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        if step + 1 == common.SAVE_AT:
            engine.save_checkpoint(options.folder)
    common.keep(options.folder, engine.module, norms)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
