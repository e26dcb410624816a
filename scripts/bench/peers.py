"""The contenders: ours, in several settings, and what others train or update with.

A package that is missing raises ImportError where its contender is built, and the table says so.
"""

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from launch.cluster import ranks_per_host
from launch.contenders import Contender, Sharded, contender_for, imported
from launch.data import Corpus
from launch.model import GPT
from launch.options import PRESETS, Choice, Precision, Preset, Settings
from scripts.bench.harness import CPU, OnRanks, Spread
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.config import Exchange, GradientResidency, MainParameter, StateResidency
from sharded_dadamw.kernels.operands import Operands
from sharded_dadamw.update.hyperparameters import Hyperparameters

# --- of a training step ---


class Name(StrEnum):
    """The contenders, in the order of the table."""

    DDP_ADAMW = "ddp-adamw"
    SHARDED_ATTACHED = "sharded-attached"
    SHARDED = "sharded"
    SHARDED_NO_OVERLAP = "sharded-no-overlap"
    SHARDED_MESSAGES = "sharded-messages"
    SHARDED_ZERO2 = "sharded-zero2"
    TORCH_ZERO = "torch-zero"
    FAIRSCALE_OSS = "fairscale-oss"
    FSDP2 = "fsdp2"
    DEEPSPEED_ZERO1 = "deepspeed-zero1"
    DEEPSPEED_ZERO2 = "deepspeed-zero2"
    DECOUPLED = "decoupled"
    SHARDED_UNDER_DDP = "sharded-under-ddp"
    SHARDED_MESH = "sharded-mesh"
    SHARDED_HOST = "sharded-host"
    ADAMW = "adamw"


ON_REQUEST = (Name.SHARDED_MESH, Name.SHARDED_HOST, Name.ADAMW)


class Kind(NamedTuple):
    """What a contender is, and what it sends.

    Attributes:
        wire_units: Bytes that the average rank has to send per parameter, in units of (N - 1) / N * the size of an
            element: one for a reduction to owners, one for sending each owner's parameters to the others, two for an
            all-reduce.
        settings: Of ours, as ShardingConfig has them; None for others.
        is_attached: Whether forward waits for our gathers.
    """

    description: str
    wire_units: int
    settings: dict[str, Any] | None = None
    is_attached: bool = False


MESSAGES = {"exchange": Exchange.RANK_ORDER}
ZERO2 = {"gradient_residency": GradientResidency.SHARDED}
KINDS = {
    Name.DDP_ADAMW: Kind("DistributedDataParallel + torch.optim.AdamW(fused=True)", 2),
    Name.SHARDED_ATTACHED: Kind("ShardedDecoupledAdamW, attached", 2, {}, True),
    Name.SHARDED: Kind("ShardedDecoupledAdamW", 2, {}),
    Name.SHARDED_NO_OVERLAP: Kind("ShardedDecoupledAdamW, overlap=False", 2, {"overlap": False}),
    Name.SHARDED_MESSAGES: Kind("ShardedDecoupledAdamW, exchange=RANK_ORDER, attached", 2, MESSAGES, True),
    Name.SHARDED_ZERO2: Kind("ShardedDecoupledAdamW, gradient_residency=SHARDED, attached", 2, ZERO2, True),
    Name.TORCH_ZERO: Kind("DDP + ZeroRedundancyOptimizer(AdamW, fused, parameters_as_bucket_view)", 3),
    Name.FAIRSCALE_OSS: Kind("fairscale ShardedDataParallel + OSS(DecoupledAdamW)", 2),
    Name.FSDP2: Kind("fully_shard per block, reshard_after_forward=False + AdamW(fused=True)", 2),
    Name.DEEPSPEED_ZERO1: Kind("DeepSpeed, ZeRO stage 1 + AdamW(fused=True)", 3),
    Name.DEEPSPEED_ZERO2: Kind("DeepSpeed, ZeRO stage 2 + AdamW(fused=True)", 3),
    Name.DECOUPLED: Kind("DDP + DecoupledAdamW", 2),
    Name.SHARDED_UNDER_DDP: Kind("DDP + ShardedDecoupledAdamW, reduce_gradients=False", 3, {"reduce_gradients": False}),
    Name.SHARDED_MESH: Kind("ShardedDecoupledAdamW, sharded within a host", 2, {}),
    Name.SHARDED_HOST: Kind("ShardedDecoupledAdamW, state in host memory", 2, {"state_residency": StateResidency.HOST}),
    Name.ADAMW: Kind("torch.optim.AdamW(fused=True), on one rank", 0),
}
DEEPSPEED_STAGES = {Name.DEEPSPEED_ZERO1: 1, Name.DEEPSPEED_ZERO2: 2}


class Main(StrEnum):
    """What ours keeps beside a parameter in bfloat16: MainParameter by name."""

    FP32, REMAINDER, NONE = "fp32", "remainder", "none"


@dataclass(frozen=True, kw_only=True)
class Training(OnRanks):
    """A benchmark that trains the GPT of launch/."""

    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.MEDIUM
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank and step.")] = 1
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the batches.")] = 0
    dtype: Annotated[Precision, typer.Option(help="Of the model's parameters.")] = Precision.FP32

    def new_model(self) -> GPT:
        """A fresh copy of the model."""
        return GPT(replace(PRESETS[self.preset], context=self.context), self.seed).to(self.torch_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @cached_property
    def num_parameters(self) -> int:
        """Of the model."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.new_model().parameters())

    @property
    def model_in_words(self) -> str:
        """Its size, and that of a batch."""
        size = f"{self.num_parameters / 1e6:.1f} M {self.dtype} parameters"
        return f"{size}, {self.batch} x {self.context} tokens per rank and step"

    @cached_property
    def corpus(self) -> Corpus:
        """What it trains on."""
        return Corpus.read(None, self.context)

    def batch_of(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """This rank's tokens and targets [batch, context]."""
        rank = dist.get_rank()
        rows = range(rank * self.batch, (rank + 1) * self.batch)
        return self.corpus.batch(self.seed, step, rows, self.ranks * self.batch, self.context, device)


@dataclass(frozen=True, kw_only=True)
class Contest(Training):
    """A benchmark in which several optimizers train it."""

    contenders: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(
        name for name in Name if name not in ON_REQUEST
    )
    main_parameter: Annotated[Main, typer.Option(help="What ours keeps beside bfloat16.")] = Main.FP32
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size of ours.")] = ShardingConfig().bucket_cap_mb
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = 3e-4
    weight_decay: Annotated[float, typer.Option(min=0, help="Share of a matrix that decays per step.")] = 3e-5

    def __post_init__(self) -> None:
        if unknown := [name for name in self.contenders.split(",") if name not in tuple(Name)]:
            raise typer.BadParameter(f"expected --contenders to be of {', '.join(Name)}, got {', '.join(unknown)}")

    @property
    def names(self) -> tuple[Name, ...]:
        """Whom to measure."""
        return tuple(dict.fromkeys(map(Name, self.contenders.split(","))))


@dataclass(frozen=True, kw_only=True)
class OverLinks(Contest):
    """A contest in which each takes a few steps in a row over a link, at several speeds."""

    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 8
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 1
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.SMALL
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 2
    speeds: Annotated[str, typer.Option(help="Of the links, 1e9 bytes/s; inf is one that does not matter.")] = (
        "0.1,0.3,1,3,10,inf"
    )

    @cached_property
    def all_speeds(self) -> list[float]:
        """One after the other."""
        return [float(speed) for speed in self.speeds.split(",")]

    @property
    def titles(self) -> list[str]:
        """Of a column for each speed."""
        return ["any" if math.isinf(speed) else f"{speed:g} GB/s" for speed in self.all_speeds]

    def rows(self, seconds: Tensor) -> list[list[str]]:
        """A cell for each contender and speed, of seconds [rounds, speeds, contenders]; the first is compared with."""
        rows = []
        for column in range(len(self.names)):
            of_one, ratios = seconds[:, :, column], seconds[:, :, column] / seconds[:, :, 0]
            cells = [f"{1e3 * float(each.median()):.0f}" for each in of_one.T]
            if column:
                cells = [f"{cell} ({Spread.of(ratio)})" for cell, ratio in zip(cells, ratios.T, strict=True)]
            rows.append(cells)
        return rows

    def take_steps(self, contender: Contender, index: int) -> list[float]:
        """Seconds per step on a CPU, and CPU seconds of all threads, which hardly feel a busy machine."""
        tokens, targets = self.batch_of(index, CPU)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            contender.model(tokens, targets).backward()
            contender.optimizer.step()
            contender.zero_grad()
        contender.synchronize()
        return [(time.perf_counter() - start) / self.steps, (time.process_time() - cpu_start) / self.steps]


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


def build(name: Name, plan: Contest, device: torch.device, clip: float = 0.0) -> Contender:
    """Make a contender around a fresh copy of the model. Collective.

    Raises:
        ImportError: It needs a package that is not installed.
    """
    kind = KINDS[name]
    model = plan.new_model().to(device)
    law: dict[str, Any] = {"lr": plan.lr, "betas": (0.9, 0.95)}
    if kind.settings is not None:
        main = MainParameter[plan.main_parameter.name]
        config = ShardingConfig(bucket_cap_mb=plan.bucket_cap_mb, main_parameter=main, **kind.settings)
        group = None
        if name is Name.SHARDED_MESH:
            shape = (plan.ranks // ranks_per_host(), ranks_per_host())
            group = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        groups = groups_of(model, plan.weight_decay)
        optimizer = ShardedDecoupledAdamW(groups, **law, config=config, process_group=group)
        if kind.is_attached:
            optimizer.attach(model)
        if config.reduce_gradients:
            return Sharded(model, optimizer)
        on_gpu = [device] if device.type == "cuda" else None
        return Sharded(DistributedDataParallel(model, on_gpu, gradient_as_bucket_view=True), optimizer)
    if name in tuple(Choice):
        settings = Settings(optimizer=Choice(name), lr=plan.lr, weight_decay=plan.weight_decay)
        return contender_for(settings, model, device)
    if name is Name.FSDP2:
        mesh = init_device_mesh(device.type, (plan.ranks,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh, reshard_after_forward=False)
    # What torch's rule, decay = lr * weight_decay, needs to decay as much as ours.
    adamw = AdamW(groups_of(model, plan.weight_decay / plan.lr), **law, fused=True)
    if name is Name.FSDP2:
        return FullyShard(model, adamw)
    return Contender(model, adamw) if name is Name.ADAMW else deepspeed_engine(name, model, adamw, plan, clip)


def deepspeed_engine(name: Name, model: nn.Module, optimizer: Optimizer, plan: Contest, clip: float) -> Contender:
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
            "zero_optimization": {"stage": DEEPSPEED_STAGES[name], "reduce_bucket_size": elements},
        },
    )
    return DeepSpeed(engine, engine, wrapped.optimizer)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def composers_optimizer() -> Any:
    """Composer's own class.

    Raises:
        ImportError: It is not installed.
    """
    client = importlib.import_module("tests.composer_client")  # it knows what Composer's imports need
    return client.composer.optim.DecoupledAdamW


# --- of an update ---

LAW = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-5}
HYPER = Hyperparameters(**LAW, initial_lr=1e-5, amsgrad=False)
BETAS = (HYPER.beta1, HYPER.beta2)
STEP = 10.0


class Peer(NamedTuple):
    """An update of one flat fp32 parameter, by other means than our kernels.

    Attributes:
        build: Makes it ready to be called, for a place.
        package: What to install where that raises ImportError.
    """

    title: str
    build: Callable[[Operands], Callable[[], object]]
    package: str = "torch"


def peers_of_an_update() -> list[Peer]:
    """Those that may be installed."""
    optimi = partial(installed, "optimi", "AdamW", decouple_lr=True)
    torchao = partial(installed, "torchao.optim", "_AdamW")
    return [
        Peer("torch.optim.AdamW(foreach=True), fp32", torch_foreach),
        Peer("Composer's loop, transcribed, fp32", lambda at: partial(transcribed_adamw, at)),
        Peer("optimi.AdamW(decouple_lr=True), fp32", optimi, "torch-optimi"),
        Peer("torchao.optim._AdamW, fp32", torchao, "torchao"),
    ]


def torch_foreach(at: Operands) -> Callable[[], object]:
    """torch.optim.AdamW in its foreach flavour."""
    optimizer = torch.optim.AdamW([at.param], HYPER.lr, BETAS, HYPER.eps, HYPER.weight_decay, foreach=True)
    optimizer.state[at.param] = {"step": torch.tensor(STEP), "exp_avg": at.exp_avg, "exp_avg_sq": at.exp_avg_sq}
    at.param.grad = at.grad
    return optimizer.step


def installed(module: str, name: str, at: Operands, **options: Any) -> Callable[[], object]:
    """An optimizer of another package; keeps moments of its own."""
    make = imported(module, name)
    optimizer = make([at.param], lr=HYPER.lr, betas=BETAS, eps=HYPER.eps, weight_decay=HYPER.weight_decay, **options)
    at.param.grad = at.grad
    step: Callable[[], object] = optimizer.step
    return step


def transcribed_adamw(at: Operands) -> None:
    """The operations of ``composer.optim.DecoupledAdamW.adamw``, in its order; like that one it waits for the step."""
    step = at.count.item()
    at.param.mul_(1 - HYPER.weight_decay * (HYPER.lr / HYPER.initial_lr))
    at.exp_avg.mul_(HYPER.beta1).add_(at.grad, alpha=1 - HYPER.beta1)
    at.exp_avg_sq.mul_(HYPER.beta2).addcmul_(at.grad, at.grad, value=1 - HYPER.beta2)
    denom = (at.exp_avg_sq.sqrt() / math.sqrt(1 - HYPER.beta2**step)).add_(HYPER.eps)
    at.param.addcdiv_(at.exp_avg, denom, value=-HYPER.lr / (1 - HYPER.beta1**step))
