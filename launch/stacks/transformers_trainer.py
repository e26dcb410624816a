"""transformers' Trainer, and a model of theirs.

torchrun --nproc-per-node 2 -m launch.stacks.transformers_trainer
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from launch.stacks import common
from sharded_dadamw import ShardingConfig
from sharded_dadamw.stacks.transformers import ShardedTrainer, sharded


def build() -> nn.Module:
    """A tiny Llama."""
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=common.CONTEXT, **sizes))


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As the Trainer has it."""
    return model(**batch).loss


class InOrder(ShardedTrainer):
    """The items in their order, so that the control can follow."""

    def _get_train_sampler(self, dataset=None):  # type: ignore[no-untyped-def]
        return SequentialSampler(self.train_dataset if dataset is None else dataset)


def arguments(options: common.Options, **more: Any) -> TrainingArguments:
    """What any script tells the Trainer."""
    return TrainingArguments(
        output_dir=str(options.folder),
        max_steps=common.STEPS,
        per_device_train_batch_size=common.BATCH,
        gradient_accumulation_steps=options.micro_batches,
        learning_rate=common.LR,
        adam_beta1=common.BETAS[0],
        adam_beta2=common.BETAS[1],
        adam_epsilon=common.EPS,
        weight_decay=common.WEIGHT_DECAY,
        max_grad_norm=common.MAX_NORM,
        warmup_steps=common.WARMUP,
        save_steps=common.SAVE_AT,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        **more,
    )


def main(model: nn.Module | None = None) -> None:
    """Train."""
    options = common.options()
    args = arguments(options)
    under_ddp = (sharded, common.OURS | {"config": ShardingConfig(reduce_gradients=False)}) if options.ddp else None
    trainer = InOrder(
        model=model or build(), args=args, train_dataset=common.Items(), optimizer_cls_and_kwargs=under_ddp
    )
    train(trainer, options)


def train(trainer: Trainer, options: common.Options) -> None:
    """Train, from the first checkpoint if there should be one."""
    half = str(options.folder / f"checkpoint-{common.SAVE_AT}")
    trainer.train(resume_from_checkpoint=half if options.resume else None)
    common.keep(options.folder, trainer.model, [line["grad_norm"] for line in trainer.state.log_history[:-1]])


if __name__ == "__main__":
    main()
