"""transformers: a Trainer whose optimizer averages the gradients, clips them and is saved whole."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import Trainer

from sharded_dadamw.decoupled import DecoupledAdamW
from sharded_dadamw.layout.param_groups import weight_decay_groups
from sharded_dadamw.sharded import ShardedDecoupledAdamW
from sharded_dadamw.stacks.accelerate import take_over


def sharded() -> Callable[..., ShardedDecoupledAdamW]:
    """The factory for ``Trainer(optimizer_cls_and_kwargs=(sharded, {...}))``, of a ``ShardedTrainer``.

    The keyword arguments are those of ``ShardedDecoupledAdamW``; ``weight_decay`` is per step at the peak, and not that
    of ``TrainingArguments``. Biases and norms do not decay. ``params`` may be groups of your own.
    """
    return partial(_build, ShardedDecoupledAdamW)


def decoupled() -> Callable[..., DecoupledAdamW]:
    """The same for FSDP: a factory of ``DecoupledAdamW``.

    The class itself in its place would take the ``weight_decay`` of ``TrainingArguments`` for its own.
    """
    return partial(_build, DecoupledAdamW)


def _build(cls: Any, model: nn.Module, params: Any = None, weight_decay: float = 1e-5, **kwargs: Any) -> Any:
    groups = weight_decay_groups(model, weight_decay) if params is None else params
    return cls(groups, weight_decay=weight_decay, **kwargs)


class ShardedTrainerMixin:
    """Stands before ``Trainer``, or a Trainer of your own, among the bases of a class.

    Unless ``optimizer_cls_and_kwargs`` names another, the optimizer is ``ShardedDecoupledAdamW``, and under FSDP
    ``DecoupledAdamW``, with what ``TrainingArguments`` say: ``weight_decay`` there is torch's, so it is multiplied by
    ``learning_rate``, and training is AdamW's. ``max_grad_norm``, accumulation, logged norms, and checkpoints that the
    Trainer saves and resumes from are the Trainer's as they were. There is no DDP, unless the optimizer was given
    ``reduce_gradients=False``.
    """

    def create_optimizer(self: Any, model: nn.Module | None = None) -> Any:
        """Build the optimizer, and make accumulation and the clip its own."""
        if self.optimizer is None and self.optimizer_cls_and_kwargs is None:
            args = self.args
            model = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(model))
            rest = [name for name, p in model.named_parameters() if p.requires_grad and name not in decaying]
            weight_decay = args.learning_rate * args.weight_decay
            kwargs = {
                "params": weight_decay_groups(model, weight_decay, no_decay=rest, decay_vectors=True),
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "eps": args.adam_epsilon,
                "weight_decay": weight_decay,
            }
            self.optimizer_cls_and_kwargs = (decoupled if self.is_fsdp_enabled else sharded, kwargs)
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if isinstance(optimizer, ShardedDecoupledAdamW) and optimizer.config.reduce_gradients:
            take_over(self.accelerator, optimizer)
            # For evaluation accelerate does everything but wrap the model in DDP.
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        return optimizer

    def _save_optimizer_and_scheduler(self: Any, output_dir: str) -> None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper holds ours
        if isinstance(optimizer, ShardedDecoupledAdamW):
            optimizer.consolidate_state_dict()
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]


class ShardedTrainer(ShardedTrainerMixin, Trainer):
    """transformers' Trainer with ``ShardedDecoupledAdamW``; see the mixin."""
