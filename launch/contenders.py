"""The optimizers a run can be made with, behind one small interface.

All follow one law: the share of a matrix that decays in a step is `weight_decay * lr / peak_lr`. An optimizer that
multiplies its decay by the learning rate, as torch's does, is therefore handed `weight_decay / peak_lr`.
"""

import importlib
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from launch.cluster import ranks_per_host
from launch.options import Choice, Settings, fail
from sharded_dadamw import DecoupledAdamW, MainParameter, ShardedDecoupledAdamW, ShardingConfig, weight_decay_groups


class Contender:
    """A module to call, an optimizer to step, and what is known of their cost.

    As it stands: DistributedDataParallel around the model, which reduces gradients during backward, and an optimizer
    that updates whole parameters.

    Attributes:
        model: what forward goes through, wrapped as the optimizer wants it.
        optimizer: the one whose param_groups a schedule writes to.
        holder: the one that holds this rank's state.
        hidden: for each part of a step that cannot be timed apart, where its time is.
    """

    averages_micro_batches = False
    """Whether a step is the mean over micro-batches, and not over ranks of the sums of theirs."""

    def __init__(self, model: Any, optimizer: Any, holder: Optimizer | None = None, gather: str = "none") -> None:
        self.model = model
        self.optimizer = optimizer
        self.holder: Optimizer = holder or optimizer
        self.hidden = {"reduction": "in forward+backward", "gather": gather}

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward accumulates and moves nothing between ranks."""
        context: AbstractContextManager[None] = self.model.no_sync()
        return context

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip by the global norm, which is returned."""
        return nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad()

    def parts(self, seconds: float) -> dict[str, float | None]:
        """Split the host seconds that clipping and stepping took; None where a part hides inside another."""
        return {"reduction": None, "update": seconds, "gather": None}

    def synchronize(self) -> None:
        """Wait for what the last step left under way."""

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint of all ranks' parameters and state; an error where replicas differ. Ours alone have one."""
        made: dict[str, Any] = self.optimizer.fingerprint(dist.group.WORLD).as_dict()
        return made

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank, step counters aside."""
        return sum(
            value.numel() * value.element_size()
            for state in self.holder.state.values()
            for key, value in state.items()
            if key != "step"
        )

    @property
    def wire_bytes(self) -> int | None:
        """Data bytes that this rank sent in the last step, where somebody counts them."""
        return None


class Sharded(Contender):
    """Ours: the bare model, since the optimizer reduces the gradients itself, and keeps count."""

    averages_micro_batches = True

    def no_sync(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.optimizer.no_sync()
        return context

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        norm: Tensor = self.optimizer.clip_grad_norm_(max_norm)
        return norm

    def parts(self, seconds: float) -> dict[str, float | None]:
        cost = self.optimizer.last_step
        return {"reduction": cost.reduce_s, "update": cost.update_s, "gather": cost.gather_s}

    def synchronize(self) -> None:
        self.optimizer.synchronize()

    @property
    def state_bytes(self) -> int:
        return int(self.optimizer.state_bytes)

    @property
    def wire_bytes(self) -> int | None:
        return int(self.optimizer.last_step.wire_bytes)


class Fairscale(Contender):
    """fairscale's OSS under its ShardedDataParallel: whole parameters dealt out, gradients reduced to their owner."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """See Contender; a rank holds reduced gradients of its own parameters only."""
        norm: Tensor = self.optimizer.clip_grad_norm(max_norm)
        return norm

    def zero_grad(self) -> None:
        """See Contender; gradients are views of buckets, which setting them to None would cut them off from."""
        self.model.zero_grad(set_to_none=False)


def contender_for(settings: Settings, model: nn.Module, device: torch.device) -> Contender:
    """Make the contender of `settings.optimizer` around `model`, which lies on `device`; called on every rank."""
    shared: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, 0.95), "eps": 1e-8, "amsgrad": settings.amsgrad}
    # What torch's law, decay = lr * weight_decay, needs to decay as much.
    coupled = settings.weight_decay / settings.lr
    match settings.optimizer:
        case Choice.SHARDED:
            named = groups_of(model, settings.weight_decay, named=True)
            micro_batches = settings.num_micro_batches
            config = ShardingConfig(main_parameter=MainParameter.REMAINDER, micro_batches=micro_batches)
            if settings.bucket_cap_mb is not None:
                config = replace(config, bucket_cap_mb=settings.bucket_cap_mb)
            mesh = None
            if settings.shard_within_host:
                per_host = largest_over_ranks(ranks_per_host(), device)
                if settings.ranks % per_host:
                    fail(f"expected as many ranks on every host for --shard-within-host, got {settings.ranks} in all")
                shape = (settings.ranks // per_host, per_host)
                mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
            try:
                return Sharded(model, ShardedDecoupledAdamW(named, config=config, process_group=mesh, **shared))
            except ValueError as error:  # such as of ranks that micro-batches cannot be shared out to
                fail(error)
        case Choice.DECOUPLED:
            return Contender(
                under_ddp(model, device), DecoupledAdamW(groups_of(model, settings.weight_decay), **shared)
            )
        case Choice.DDP_ADAMW:
            return Contender(under_ddp(model, device), AdamW(groups_of(model, coupled), fused=True, **shared))
        case Choice.TORCH_ZERO:
            zero_class = imported("torch.distributed.optim", "ZeroRedundancyOptimizer")
            zero = zero_class(groups_of(model, coupled), AdamW, parameters_as_bucket_view=True, fused=True, **shared)
            return Contender(under_ddp(model, device), zero, zero.optim, gather="in update")
        case Choice.FAIRSCALE_OSS:
            oss = imported("fairscale.optim", "OSS")(groups_of(model, settings.weight_decay), DecoupledAdamW, **shared)
            wrapper = imported("fairscale.nn.data_parallel", "ShardedDataParallel")
            return Fairscale(wrapper(model, oss), oss, oss.optim, gather="in update")


def groups_of(model: nn.Module, weight_decay: float, *, named: bool = False) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    groups = weight_decay_groups(model, weight_decay)
    return groups if named else [{**group, "params": [param for _, param in group["params"]]} for group in groups]


def under_ddp(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """A model that lies on a device in torch's wrapper. Collective."""
    on_gpu = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, on_gpu, gradient_as_bucket_view=True)


def imported(module: str, name: str) -> Any:
    """A peer that is optional, or slow to import: paid for only by the run that wants it."""
    return getattr(importlib.import_module(module), name)


def largest_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' values; a collective."""
    largest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
