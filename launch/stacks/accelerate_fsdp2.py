"""accelerate under FSDP2: its own prepare, clip and save_state, with DecoupledAdamW in AdamW's place.

torchrun --nproc-per-node 2 -m launch.stacks.accelerate_fsdp2
"""

from accelerate import Accelerator
from torch.optim.lr_scheduler import LambdaLR

from launch.stacks import common
from launch.stacks.accelerate_loop import build, loss_of, train
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
    train(accelerator, options, model, optimizer, schedule)


if __name__ == "__main__":
    main()
