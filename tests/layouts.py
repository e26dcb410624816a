"""One model in every layout, and the control: the law and the norms of the whole, in fp64 and plain torch.

What differs between layouts is to be the optimizer and nothing else. So the model keeps its parameters in fp32 but
computes in fp64: the order of sums inside matrix products, which every layout changes, then leaves no trace, and a
gradient carries a rounding to fp32 per rank that contributes to it. Samples resemble each other, so that no mean over
ranks cancels and magnifies those roundings.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW, ShardingConfig
from tests.test_law import NaiveLaw

F32, F64 = torch.float32, torch.float64
WIDTH, HIDDEN, POSITIONS, BATCH = 24, 40, 4, 12

NORMS = ("moment", "param", "update", "grad")
BETAS, EPS = (0.9, 0.95), 1e-8
HYPER: list[dict[str, float]] = [{"lr": 1e-2, "weight_decay": 2e-4}, {"lr": 4e-3, "weight_decay": 9e-4}]
LR_FACTORS = [[0.5, 1.0, 0.8, 0.6, 0.3], [1.0, 0.4, 0.7, 0.9, 0.2]]
"""Per group and step, relative to its lr."""
LOSS_SCALES = [2.0, 3.0, 0.05, 0.3, 1.5]
"""Small in the middle: there nothing is clipped, and AMSGrad's maximum stands above the average."""
MAX_NORM = 1.0
NUM_STEPS = 5


# --- the model and its data ---


class WideLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.double(), self.weight.double(), self.bias.double())


class WideLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(
            x.double(), self.normalized_shape, self.weight.double(), self.bias.double(), self.eps
        )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = WideLayerNorm(WIDTH)
        self.up = WideLinear(WIDTH, HIDDEN)
        self.down = WideLinear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A gain of one element, which some ranks will hold nothing of, and a readout of three rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.full((1,), 1.1))
        self.block = Block()
        self.readout = WideLinear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(x + self.gain.double() * self.block(x))


def samples(step: int) -> Tensor:
    draw = torch.Generator().manual_seed(100 + step)
    typical = torch.randn(POSITIONS, WIDTH, generator=torch.Generator().manual_seed(99), dtype=F64)
    return typical + 0.2 * torch.randn(BATCH, POSITIONS, WIDTH, generator=draw, dtype=F64)


def loss_of(model: nn.Module, step: int, part: int, num_parts: int) -> Tensor:
    """Of one of as many equal parts of the batch; their mean is the loss of the whole."""
    x = samples(step).chunk(num_parts)[part]
    return LOSS_SCALES[step] * (model(x) - 3.0).square().mean()


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """The block's parameters and the others, each with hyperparameters of their own."""
    pairs = list(model.named_parameters())
    members = [[pair for pair in pairs if ("block" in pair[0]) == in_block] for in_block in (True, False)]
    return [{"params": params, **hyper} for params, hyper in zip(members, HYPER, strict=True)]


# --- the control ---


class Control:
    """The law and every norm, of whole parameters, in fp64 and plain torch."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Copies the parameters: groups of (name, tensor) pairs, with all hyperparameters."""
        self.groups = [dict(group) for group in groups]
        for group in self.groups:
            group["params"] = [(name, NaiveLaw(p, group["lr"])) for name, p in group["params"] if p.requires_grad]
        self.laws: dict[str, NaiveLaw] = {name: law for group in self.groups for name, law in group["params"]}
        self.norm = 0.0

    def step(
        self, gradients: Mapping[str, Tensor | None], max_norm: float = math.inf, norm_type: float = 2.0
    ) -> dict[str, float]:
        """One step with gradients clipped by the norm of all, which `norm` then is; returns what `metrics()` should."""
        present = {name: g.double() for name, g in gradients.items() if g is not None}
        flat = torch.cat([torch.zeros(1, dtype=F64), *(g.flatten() for g in present.values())])
        self.norm = float(torch.linalg.vector_norm(flat, norm_type))
        clip = min(1.0, max_norm / (self.norm + 1e-6))
        metrics = {}
        for group in self.groups:
            for name, law in group["params"]:
                grad = clip * present[name] if name in present else None
                before = law.param
                law.step(grad, group)
                zero = torch.zeros((), dtype=F64)
                tensors = (law.m, law.param, before - law.param, zero if grad is None else grad)
                metrics.update({f"l2_norm/{kind}/{name}": norm_of(t) for kind, t in zip(NORMS, tensors, strict=True)})
        return with_globals(metrics, list(self.laws), self.groups)


def norm_of(tensor: Tensor) -> float:
    return math.sqrt(float(tensor.square().sum()))


def root_sum_square(values: Iterable[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))


def with_globals(
    metrics: Mapping[str, float], names: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Adds to norms of parameters what `metrics()` has besides, in its order."""
    of_all = {
        f"l2_norm/{kind}/global": root_sum_square(metrics[f"l2_norm/{kind}/{name}"] for name in names) for kind in NORMS
    }
    decays = {
        f"effective_decay/group_{index}": group["weight_decay"] * group["lr"] / group["initial_lr"]
        for index, group in enumerate(groups)
    }
    return {**metrics, **of_all, **decays, "skipped_steps": 0.0}


def of_parameters(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without what is not about one parameter: what Composer's protocol deals with."""
    return {key: value for key, value in metrics.items() if key.startswith("l2_norm/") and "/global" not in key}


def assert_close(
    found: Mapping[str, float], expected: Mapping[str, float], where: str, rtol: float = 1e-6, atol: float = 0.0
) -> None:
    """The same keys in the same order, and close values. 1e-6 leaves room for a few roundings to fp32 per element."""
    __tracebackhide__ = True
    assert list(found) == list(expected), f"{where}: keys"
    off = {
        key: f"{found[key]:.9g} and not {value:.9g}"
        for key, value in expected.items()
        if not abs(found[key] - value) <= rtol * abs(value) + atol
    }
    assert not off, f"{where}: {off}"


@dataclass
class Record:
    """What a run reports: per step, and in the end."""

    metrics: list[dict[str, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    reported: list[dict[str, float]] = field(default_factory=list)
    reduced: list[dict[str, float]] = field(default_factory=list)
    params: dict[str, Tensor] = field(default_factory=dict)


@cache
def control_of_the_model(amsgrad: bool) -> Record:
    model = Model().double()
    params = dict(model.named_parameters())
    shared = dict(betas=BETAS, eps=EPS, amsgrad=amsgrad)
    control = Control([{**group, **shared, "initial_lr": group["lr"]} for group in groups_of(model)])
    record = Record()
    for step in range(NUM_STEPS):
        for group, peak, factors in zip(control.groups, HYPER, LR_FACTORS, strict=True):
            group["lr"] = peak["lr"] * factors[step]
        gradients = torch.autograd.grad(loss_of(model, step, 0, 1), list(params.values()))
        record.metrics.append(control.step(dict(zip(params, gradients, strict=True)), MAX_NORM))
        record.norms.append(control.norm)
        for name, law in control.laws.items():
            params[name].data = law.param
    record.params = {name: law.param for name, law in control.laws.items()}
    return record


FLAT_PARAMETERS = ("block._flat_param", "_flat_param")


def in_flat_parameters(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same where FSDP1 has made one parameter of the block and one of the others."""
    of_each = of_parameters(metrics)
    flat = {
        f"l2_norm/{kind}/{name}": root_sum_square(
            value
            for key, value in of_each.items()
            if key.startswith(f"l2_norm/{kind}/") and ("/block." in key) == name.startswith("block.")
        )
        for name in FLAT_PARAMETERS
        for kind in NORMS
    }
    return flat | {key: value for key, value in metrics.items() if key not in of_each}


# --- the layouts ---


class Placed(NamedTuple):
    """A model spread over ranks, and the optimizer of this rank."""

    model: nn.Module
    optimizer: DecoupledAdamW
    part: int  # which part of the batch this rank sees,
    num_parts: int  # of how many
    after_backward: Callable[[], None] = lambda: None


Hyper = dict[str, Any]


def placed(
    group: Any, hyper: Hyper, model: nn.Module, cls: type[DecoupledAdamW] = DecoupledAdamW, **options: Any
) -> Placed:
    """With data that is split over all ranks."""
    return Placed(model, cls(groups_of(model), **hyper, **options), group.rank(), group.size())


def alone(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, Model())


def under_ddp(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, DistributedDataParallel(Model(), process_group=group))


def sharded(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, Model(), ShardedDecoupledAdamW, process_group=group)


def sharded_under_ddp(group: Any, hyper: Hyper) -> Placed:
    model = DistributedDataParallel(Model(), process_group=group)
    config = ShardingConfig(reduce_gradients=False, bucket_cap_mb=1e-3)
    return placed(group, hyper, model, ShardedDecoupledAdamW, process_group=group, config=config)


def under_fsdp1(group: Any, hyper: Hyper, use_orig_params: bool, strategy: ShardingStrategy) -> Placed:
    where: dict[str, Any] = {"process_group": group}
    if strategy is ShardingStrategy.HYBRID_SHARD:
        where = {"device_mesh": grid("replicate", "shard")}
    wrapping = dict(where, use_orig_params=use_orig_params, sharding_strategy=strategy, device_id=torch.device("cpu"))
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated, and says of each strategy what it thinks of it
        model.block = FullyShardedDataParallel(model.block, **wrapping)  # type: ignore[assignment]
        fsdp = FullyShardedDataParallel(model, **wrapping)
    return placed(group, hyper, fsdp, norm_group=fsdp.process_group)


def fsdp1(strategy: str, use_orig_params: bool) -> Callable[[Any, Hyper], Placed]:
    return partial(under_fsdp1, use_orig_params=use_orig_params, strategy=ShardingStrategy[strategy])


def line(group: Any) -> DeviceMesh:
    # Named after its group: torch's caches would take it for an equal mesh whose group a failed case has destroyed.
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,))


def grid(*names: str) -> DeviceMesh:
    """All four ranks as a square."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def fsdp2_over(mesh: DeviceMesh, model: Model) -> nn.Module:
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def under_fsdp2(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, fsdp2_over(line(group), Model()))


def fsdp2_and_plain(group: Any, hyper: Hyper) -> Placed:
    """The block is sharded; the others are whole on each rank, and the loop averages their gradients."""
    model = Model()
    fully_shard(model.block, mesh=line(group))
    plain = [p for p in model.parameters() if not isinstance(p, DTensor)]

    def average() -> None:
        for p in plain:
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
            p.grad /= group.size()

    return placed(group, hyper, model)._replace(after_backward=average)


def under_hsdp(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, fsdp2_over(grid("replicate", "shard"), Model()))


def sharded_under_hsdp(group: Any, hyper: Hyper, axis: str | None = None, **options: Any) -> Placed:
    mesh = grid("replicate", "shard")
    if axis is not None:
        options["process_group"] = mesh[axis]
    return placed(group, hyper, fsdp2_over(mesh, Model()), ShardedDecoupledAdamW, **options)


def tensor_parallel(mesh: DeviceMesh) -> Model:
    """Sharded by columns and by rows, replicated with partial gradients (norm), and a plain gain."""
    plan = {
        "block": PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
        "block.norm": SequenceParallel(),
        "block.up": ColwiseParallel(input_layouts=Shard(1)),
        "block.down": RowwiseParallel(),
        "readout": ColwiseParallel(output_layouts=Replicate()),
    }
    model = Model()
    parallelize_module(model, mesh, plan)
    return model


def under_tp(group: Any, hyper: Hyper) -> Placed:
    return placed(group, hyper, tensor_parallel(line(group)))._replace(part=0, num_parts=1)


def sharded_under_tp(group: Any, hyper: Hyper) -> Placed:
    mesh = grid("dp", "tp")
    data = mesh["dp"].get_group()
    return placed(data, hyper, tensor_parallel(mesh["tp"]), ShardedDecoupledAdamW, process_group=mesh["dp"])


def under_fsdp2_and_tp(group: Any, hyper: Hyper, with_norm_group: bool = False) -> Placed:
    mesh = grid("dp", "tp")
    model = fsdp2_over(mesh["dp"], tensor_parallel(mesh["tp"]))
    return placed(mesh["dp"].get_group(), hyper, model, **({"norm_group": group} if with_norm_group else {}))


@dataclass(frozen=True)
class Layout:
    num_ranks: int
    place: Callable[[Any, Hyper], Placed]
    exact: bool = False
    """Where every rank sees the same batch, the mean over ranks is exact, and gradients are those of one process."""
    flat: bool = False


LAYOUTS = {
    "single process": Layout(1, alone, exact=True),
    "DDP": Layout(2, under_ddp, exact=True),
    "sharded on 2": Layout(2, sharded, exact=True),
    "sharded on 3": Layout(3, sharded),
    "sharded on 4": Layout(4, sharded),
    "sharded under DDP": Layout(2, sharded_under_ddp, exact=True),
    "FSDP1": Layout(2, fsdp1("FULL_SHARD", True), exact=True),
    "FSDP1 on 3": Layout(3, fsdp1("FULL_SHARD", True)),
    "FSDP1 flat": Layout(2, fsdp1("FULL_SHARD", False), exact=True, flat=True),
    "FSDP1 NO_SHARD flat": Layout(2, fsdp1("NO_SHARD", False), exact=True, flat=True),
    "FSDP1 HYBRID_SHARD 2x2": Layout(4, fsdp1("HYBRID_SHARD", True), exact=True),
    "FSDP2": Layout(2, under_fsdp2, exact=True),
    "FSDP2 on 3": Layout(3, under_fsdp2),
    "FSDP2 and plain parameters": Layout(2, fsdp2_and_plain, exact=True),
    "HSDP 2x2": Layout(4, under_hsdp, exact=True),
    "HSDP 2x2, sharded": Layout(4, sharded_under_hsdp, exact=True),
    "HSDP 2x2, sharded, state in host memory": Layout(
        4, partial(sharded_under_hsdp, config={"state_residency": "host", "bucket_cap_mb": 1e-3}), exact=True
    ),
    "HSDP 2x2, sharded over the replicate axis": Layout(4, partial(sharded_under_hsdp, axis="replicate"), exact=True),
    "TP": Layout(2, under_tp),
    "TP x data-parallel 2x2, sharded": Layout(4, sharded_under_tp),
    "FSDP2 x TP 2x2": Layout(4, under_fsdp2_and_tp),
    "FSDP2 x TP 2x2 with norm_group": Layout(4, partial(under_fsdp2_and_tp, with_norm_group=True)),
}
