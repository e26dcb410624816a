"""transformers' Trainer under FSDP2, which the same line of ours serves: the optimizer is DecoupledAdamW.

torchrun --nproc-per-node 2 -m launch.stacks.transformers_fsdp2
"""

from launch.stacks import common
from launch.stacks.transformers_trainer import InOrder, arguments, build, loss_of, train

__all__ = ["build", "loss_of"]


def main() -> None:
    """Train."""
    options = common.options()
    args = arguments(options, fsdp=True, fsdp_config={"version": 2, "state_dict_type": "SHARDED_STATE_DICT"})
    common.switch_on_fsdp2_for_cpus(**args.fsdp_plugin_args)
    train(InOrder(model=build(), args=args, train_dataset=common.Items()), options)


if __name__ == "__main__":
    main()
