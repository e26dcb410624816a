"""accelerate: a loop stays as it is but for the line that prepares model and optimizer."""

from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from sharded_dadamw.sharded import ShardedDecoupledAdamW
from sharded_dadamw.stacks.averaging import refuse_clip_by_value


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: ShardedDecoupledAdamW
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Prepare a model and the optimizer that shards it; data loaders and schedulers go to ``accelerator.prepare``.

    With the default config the optimizer averages, and the model is not wrapped in DDP. From then on
    ``accelerator.accumulate``, ``no_sync`` and ``clip_grad_norm_`` are the optimizer's. With ``reduce_gradients=False``
    the model is wrapped in DDP, and all of that stays accelerate's. ``save_state`` gathers the whole state on the main
    process, and ``load_state`` loads it on any number of processes.

    Args:
        accelerator: Its three methods are replaced on this object alone.
        model: On ``accelerator.device`` already, and not wrapped.
        optimizer: Built of the model's parameters.

    Raises:
        ValueError: The model is elsewhere.
    """
    for name, param in model.named_parameters():
        if param.device.type != accelerator.device.type:
            raise ValueError(
                f"{name} is on {param.device} and accelerate trains on {accelerator.device}: call "
                "model.to(accelerator.device), and build the optimizer after that"
            )
    averages = optimizer.config.reduce_gradients
    if averages:
        take_over(accelerator, optimizer)
    # For evaluation accelerate does everything but wrap the model in DDP.
    model = accelerator.prepare_model(model, device_placement=False, evaluation_mode=averages)
    accelerator.register_save_state_pre_hook(lambda *_: optimizer.consolidate_state_dict())
    return model, accelerator.prepare_optimizer(optimizer)


def take_over(accelerator: Accelerator, optimizer: ShardedDecoupledAdamW) -> None:
    """Make the accelerator's accumulation and clip those of an optimizer that averages."""

    def no_sync(model: nn.Module | None = None) -> AbstractContextManager[None]:
        return optimizer.no_sync()

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        accelerator.unscale_gradients()
        return optimizer.clip_grad_norm_(max_norm, norm_type)

    vars(accelerator).update(no_sync=no_sync, clip_grad_norm_=clip_grad_norm_, clip_grad_value_=refuse_clip_by_value)
