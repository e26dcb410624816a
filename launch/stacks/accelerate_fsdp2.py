"""accelerate under FSDP2: its own prepare, clip and save_state, with DecoupledAdamW in AdamW's place.

torchrun --nproc-per-node 2 -m launch.stacks.accelerate_fsdp2
"""

from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from launch.stacks import common
from launch.stacks.common import build, loss_of
from sharded_dadamw import DecoupledAdamW, weight_decay_groups

__all__ = ["build", "loss_of"]


def main() -> None:
    """Train."""
    options = common.options()
    common.switch_on_fsdp2_for_cpus(fsdp_version=2, transformer_cls_names_to_wrap=["Block"])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.micro_batches)
    model = build()
    optimizer = DecoupledAdamW(weight_decay_groups(model, common.OURS["weight_decay"]), **common.OURS)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = LambdaLR(optimizer.optimizer, common.factor)
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
    common.keep(options.folder, model, norms)
    accelerator.end_training()


if __name__ == "__main__":
    main()
