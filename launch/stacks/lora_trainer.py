"""transformers' Trainer, and adapters of peft in a model that is frozen.

torchrun --nproc-per-node 2 -m launch.stacks.lora_trainer
"""

from peft import LoraConfig, get_peft_model
from torch import nn

from launch.stacks import transformers_trainer
from launch.stacks.transformers_trainer import loss_of

__all__ = ["loss_of"]


def build() -> nn.Module:
    """The tiny Llama, of which the adapters alone train."""
    return get_peft_model(transformers_trainer.build(), LoraConfig(target_modules="all-linear", r=4, lora_alpha=64))


def main() -> None:
    """Train."""
    transformers_trainer.main(build())


if __name__ == "__main__":
    main()
