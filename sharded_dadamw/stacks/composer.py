"""Composer and LLM Foundry: an optimizer that leaves averaging to their DDP, and is saved whole."""

from collections.abc import Mapping
from typing import Any

from composer.utils import get_device
from composer.utils.dist import get_world_size, initialize_dist
from torch.optim.optimizer import ParamsT

from sharded_dadamw import sharded
from sharded_dadamw.buckets.shards import with_lists
from sharded_dadamw.config import ShardingConfig


class ShardedDecoupledAdamW(sharded.ShardedDecoupledAdamW):
    """Under DDP, in which Composer wraps a model on several ranks where FSDP does not; arguments are those of its base.

    Composer's clip, accumulation and checkpoints are as they were. The process group is made and the parameters are
    moved to the GPU here, as the Trainer would do when the optimizer has been built.

    Args:
        config: As the base takes it; a mapping, or None, has ``reduce_gradients=False`` unless it says otherwise.
    """

    def __init__(
        self, params: ParamsT, *args: Any, config: ShardingConfig | Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if config is None or isinstance(config, Mapping):
            config = {"reduce_gradients": False} | dict(config or {})
        device = get_device()
        if get_world_size() > 1:
            initialize_dist(device)
        params, tensors, _ = with_lists(params)
        for tensor in tensors:
            tensor.data = device.tensor_to_device(tensor.data)
        super().__init__(params, *args, config=config, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The whole state on rank 0, which pickles it; collective, as Composer asks every rank."""
        self.consolidate_state_dict()
        return super().state_dict()
