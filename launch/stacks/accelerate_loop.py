"""accelerate: a loop of one's own, accumulation, clip, and save_state.

torchrun --nproc-per-node 2 -m launch.stacks.accelerate_loop
"""

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import ShardedDecoupledAdamW, weight_decay_groups
from sharded_dadamw.stacks.accelerate import prepare


def main() -> None:
    """Train."""
    options = common.options()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.micro_batches)
    model = build().to(accelerator.device)
    groups = weight_decay_groups(model, common.OURS["weight_decay"])
    optimizer = ShardedDecoupledAdamW(groups, **common.OURS, config={"reduce_gradients": not options.ddp})
    schedule = LambdaLR(optimizer, common.factor)  # not prepared: accelerate would step it once a process
    model, optimizer = prepare(accelerator, model, optimizer)
    train(accelerator, options, model, optimizer, schedule)


def train(
    accelerator: Accelerator, options: common.Options, model: nn.Module, optimizer: Optimizer, schedule: LambdaLR
) -> None:
    """Train what has been prepared, from the checkpoint if there should be one."""
    accelerator.register_for_checkpointing(schedule)
    loader = accelerator.prepare(DataLoader(common.Items(), common.BATCH))
    folder, done, norms = options.folder / "state", 0, []
    if options.resume:
        accelerator.load_state(folder)
        done = schedule.last_epoch
        loader = accelerator.skip_first_batches(loader, done * options.micro_batches)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                norms.append(float(accelerator.clip_grad_norm_(model.parameters(), common.MAX_NORM)))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            schedule.step()
            if done == common.SAVE_AT:
                accelerator.save_state(folder)
        if done == common.STEPS:
            break
    common.keep(options.folder, accelerator.unwrap_model(model), norms)
    accelerator.end_training()


if __name__ == "__main__":
    main()
