"""The contenders: ours, in several settings, and what others train or update with.

A package that is missing raises ImportError where its contender is built, and the table says so.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from launch.cluster import ranks_per_host
from launch.contenders import Contender, Sharded, contender_for, groups_of, imported, under_ddp
from launch.model import GPT
from launch.options import PRESETS, Choice, Precision, Preset, Settings
from scripts.bench.harness import OnRanks
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.config import Exchange, GradientResidency, MainParameter, StateResidency
from sharded_dadamw.kernels.operands import Operands
from sharded_dadamw.update.hyperparameters import Hyperparameters

# --- of a training step ---


class Kind(NamedTuple):
    """What a contender is.

    Attributes:
        spread: Which of parameters, gradients and state a rank has only its share of, by their first letters.
        settings: Of ours, as ShardingConfig has them; None for others.
        is_attached: Whether forward waits for our gathers.
    """

    description: str
    spread: str = ""
    settings: dict[str, Any] | None = None
    is_attached: bool = False


LAW: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95)}
WEIGHT_DECAY = 3e-5
"""The share of a matrix that decays per step."""
MESSAGES = {"exchange": Exchange.RANK_ORDER}
ZERO2 = {"gradient_residency": GradientResidency.SHARDED}
KINDS = {
    "ddp-adamw": Kind("DistributedDataParallel + torch.optim.AdamW(fused=True)"),
    "sharded-attached": Kind("ShardedDecoupledAdamW, attached", "s", {}, True),
    "sharded": Kind("ShardedDecoupledAdamW", "s", {}),
    "sharded-no-overlap": Kind("ShardedDecoupledAdamW, overlap=False", "s", {"overlap": False}),
    "sharded-messages": Kind("ShardedDecoupledAdamW, exchange=RANK_ORDER, attached", "s", MESSAGES, True),
    "sharded-zero2": Kind("ShardedDecoupledAdamW, gradient_residency=SHARDED, attached", "gs", ZERO2, True),
    "torch-zero": Kind("DDP + ZeroRedundancyOptimizer(AdamW, fused, parameters_as_bucket_view)", "s"),
    "fairscale-oss": Kind("fairscale ShardedDataParallel + OSS(DecoupledAdamW)", "s"),
    "fsdp2": Kind("fully_shard per block, reshard_after_forward=False + AdamW(fused=True)", "pgs"),
    "deepspeed-zero1": Kind("DeepSpeed, ZeRO stage 1 + AdamW(fused=True)", "s"),
    "deepspeed-zero2": Kind("DeepSpeed, ZeRO stage 2 + AdamW(fused=True)", "gs"),
    "decoupled": Kind("DDP + DecoupledAdamW"),
    "sharded-under-ddp": Kind("DDP + ShardedDecoupledAdamW, reduce_gradients=False", "s", {"reduce_gradients": False}),
    "sharded-mesh": Kind("ShardedDecoupledAdamW, sharded within a host", "s", {}),
    "sharded-host": Kind("ShardedDecoupledAdamW, state in host memory", "s", {"state_residency": StateResidency.HOST}),
    "adamw": Kind("torch.optim.AdamW(fused=True), on one rank"),
}
"""The contenders by name, in the order of the table; the last three on request."""
ON_REQUEST = 3


@dataclass(frozen=True, kw_only=True)
class Training(OnRanks):
    """A benchmark that trains the GPT of launch/."""

    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.MEDIUM
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank and step.")] = 1
    dtype: Annotated[Precision, typer.Option(help="Of the model's parameters.")] = Precision.FP32

    def new_model(self) -> GPT:
        """A fresh copy of the model."""
        return GPT(replace(PRESETS[self.preset], context=self.context)).to(self.torch_device, self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @cached_property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(param.numel() for param in self.new_model().parameters())

    @property
    def model_in_words(self) -> str:
        """Its size, and that of a batch."""
        size = f"{self.num_parameters / 1e6:.1f} M {self.dtype} parameters"
        return f"{size}, {self.batch} x {self.context} tokens per rank and step"

    def batch_of(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets [batch, context]."""
        draw = torch.Generator().manual_seed(step * self.ranks + dist.get_rank())
        text = torch.randint(256, (self.batch, self.context + 1), generator=draw).to(self.torch_device)
        return text[:, :-1], text[:, 1:]


@dataclass(frozen=True, kw_only=True)
class Contest(Training):
    """A benchmark in which several optimizers train it."""

    contenders: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(list(KINDS)[:-ON_REQUEST])
    remainder: Annotated[bool, typer.Option(help="Keep 16 bits beside bfloat16 in ours, not an fp32 copy.")] = False
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size of ours.")] = ShardingConfig().bucket_cap_mb

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in KINDS]:
            raise typer.BadParameter(f"expected --contenders to be of {', '.join(KINDS)}, got {', '.join(unknown)}")

    @property
    def names(self) -> list[str]:
        """Whom to measure."""
        return list(dict.fromkeys(self.contenders.split(",")))


class FullyShard(Contender):
    """FSDP2: parameters, gradients and state are DTensors, of each of which this rank holds one shard."""

    @property
    def state_bytes(self) -> int:
        """See Contender; a DTensor's own size would be that of all shards together."""
        held = (value for state in self.holder.state.values() for key, value in state.items() if key != "step")
        return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in held)


class DeepSpeed(Contender):
    """A DeepSpeed engine, which is called, stepped, clipped and cleared itself."""

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """See Contender; the engine's step does it."""
        return torch.zeros(())

    def zero_grad(self) -> None:
        """See Contender; the engine's step has done it."""

    @property
    def state_bytes(self) -> int:
        """See Contender; what the inner optimizer takes for parameters is an fp32 copy of this rank's shard."""
        copies: list[Tensor] = [param for group in self.holder.param_groups for param in group["params"]]
        return super().state_bytes + sum(copy.nbytes for copy in copies)


def build(name: str, plan: Contest, clip: float = 0.0) -> Contender:
    """Make a contender around a fresh copy of the model. Collective.

    Raises:
        ImportError: It needs a package that is not installed.
    """
    kind, device, model = KINDS[name], plan.torch_device, plan.new_model()
    if kind.settings is not None:
        main = MainParameter.REMAINDER if plan.remainder else MainParameter.FP32
        config = ShardingConfig(bucket_cap_mb=plan.bucket_cap_mb, main_parameter=main, **kind.settings)
        group = None
        if name == "sharded-mesh":
            shape = (plan.ranks // ranks_per_host(), ranks_per_host())
            group = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        groups = groups_of(model, WEIGHT_DECAY)
        optimizer = ShardedDecoupledAdamW(groups, **LAW, config=config, process_group=group)
        if kind.is_attached:
            optimizer.attach(model)
        return Sharded(model if config.reduce_gradients else under_ddp(model, device), optimizer)
    if name in tuple(Choice):
        return contender_for(Settings(optimizer=Choice(name), lr=LAW["lr"], weight_decay=WEIGHT_DECAY), model, device)
    if name == "fsdp2":
        mesh = init_device_mesh(device.type, (plan.ranks,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
    # What torch's rule, decay = lr * weight_decay, needs to decay as much as ours.
    adamw = AdamW(groups_of(model, WEIGHT_DECAY / LAW["lr"]), **LAW, fused=True)
    if name.startswith("deepspeed"):
        return deepspeed_engine(name, model, adamw, plan, clip)
    return FullyShard(model, adamw) if name == "fsdp2" else Contender(model, adamw)


def deepspeed_engine(name: str, model: nn.Module, optimizer: Optimizer, plan: Contest, clip: float) -> Contender:
    """DeepSpeed's ZeRO around a model and an optimizer.

    Raises:
        ImportError: It is not installed.
    """
    imported("deepspeed.utils", "logger").setLevel("ERROR")
    elements = int(plan.bucket_cap_mb * 2**20) // plan.torch_dtype.itemsize
    engine, wrapped, *_ = imported("deepspeed", "initialize")(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": plan.batch,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": clip,  # by default it clips
            "bf16": {"enabled": plan.dtype is Precision.BF16},
            "zero_optimization": {"stage": int(name[-1]), "reduce_bucket_size": elements},
        },
    )
    return DeepSpeed(engine, engine, wrapped.optimizer)


def composers_optimizer() -> Any:
    """Composer's own class.

    Raises:
        ImportError: It is not installed.
    """
    client = importlib.import_module("tests.composer_client")  # it knows what Composer's imports need
    return client.composer.optim.DecoupledAdamW


# --- of an update ---

HYPER = Hyperparameters(lr=1e-5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=1e-5, initial_lr=1e-5, amsgrad=False)
STEP = 10.0


def stepping(module: str, name: str, at: Operands, **options: Any) -> Callable[[], object]:
    """The step of an optimizer of one flat fp32 parameter; keeps moments of its own."""
    law = {"lr": HYPER.lr, "betas": (HYPER.beta1, HYPER.beta2), "eps": HYPER.eps, "weight_decay": HYPER.weight_decay}
    at.param.grad = at.grad
    step: Callable[[], object] = imported(module, name)([at.param], **law, **options).step
    return step


def transcribed_adamw(at: Operands) -> None:
    """The operations of ``composer.optim.DecoupledAdamW.adamw``, in its order; like that one it waits for the step."""
    step = at.count.item()
    at.param.mul_(1 - HYPER.weight_decay * (HYPER.lr / HYPER.initial_lr))
    at.exp_avg.mul_(HYPER.beta1).add_(at.grad, alpha=1 - HYPER.beta1)
    at.exp_avg_sq.mul_(HYPER.beta2).addcmul_(at.grad, at.grad, value=1 - HYPER.beta2)
    denom = (at.exp_avg_sq.sqrt() / math.sqrt(1 - HYPER.beta2**step)).add_(HYPER.eps)
    at.param.addcdiv_(at.exp_avg, denom, value=-HYPER.lr / (1 - HYPER.beta1**step))


PEERS_OF_AN_UPDATE: dict[str, Callable[[Operands], Callable[[], object]]] = {
    "torch.optim.AdamW(foreach=True), fp32": partial(stepping, "torch.optim", "AdamW", foreach=True),
    "Composer's loop, transcribed, fp32": partial(partial, transcribed_adamw),
    "optimi.AdamW(decouple_lr=True), fp32": partial(stepping, "optimi", "AdamW", decouple_lr=True),
    "torchao.optim._AdamW, fp32": partial(stepping, "torchao.optim", "_AdamW"),
}
"""What makes the update of an fp32 parameter by other means than our kernels ready to be called."""
