"""Time one training step of the sharded optimizer beside that of its peers, all in one run.

    python -m scripts.bench step                                  starts its own 2 ranks; gloo on CPU, NCCL on GPUs
    python -m scripts.bench step --preset 125m --out bench.json   also writes bench.json and bench.md
    torchrun --nproc-per-node 2 -m scripts.bench step             ranks that something else starts

Peers are those of scripts/test.sh's environment; one that is missing is listed as missing.

Every contender holds its own copy of one model, with the same initial weights, and trains it on the same batches under
the same law. In every round each of them takes a few steps in a row, in an order that rotates from round to round, so
that whatever else the machine is doing falls on all of them alike. What counts are the ratios within a round; absolute
times are this machine's. Whatever a contender still has under way after its last step of a round is waited for on its
own time, though in training it would hide behind the next forward: that is as much as it can lose by being measured.
"""

import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from launch.contenders import Contender, Sharded, contender_for, imported, largest_over_ranks
from launch.data import Corpus
from launch.model import GPT
from launch.options import PRESETS, Choice, GPTConfig, Preset, Settings
from scripts.bench import harness
from scripts.bench.harness import Clock, Spread
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.config import Exchange, GradientResidency


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


DESCRIPTIONS = {
    Name.DDP_ADAMW: "DistributedDataParallel + torch.optim.AdamW(fused=True)",
    Name.SHARDED_ATTACHED: "ShardedDecoupledAdamW, no wrapper, attach(model)",
    Name.SHARDED: "ShardedDecoupledAdamW, no wrapper",
    Name.SHARDED_NO_OVERLAP: "ShardedDecoupledAdamW(overlap=False)",
    Name.SHARDED_MESSAGES: "ShardedDecoupledAdamW(exchange=RANK_ORDER), attach(model)",
    Name.SHARDED_ZERO2: "ShardedDecoupledAdamW(gradient_residency=SHARDED), attach(model)",
    Name.TORCH_ZERO: "DistributedDataParallel + ZeroRedundancyOptimizer(AdamW, fused, parameters_as_bucket_view)",
    Name.FAIRSCALE_OSS: "fairscale ShardedDataParallel + OSS(DecoupledAdamW, whose kernel is torch's fused one)",
    Name.FSDP2: "fully_shard per block, reshard_after_forward=False + AdamW(fused=True)",
    Name.DEEPSPEED_ZERO1: "DeepSpeed, ZeRO stage 1 + AdamW(fused=True)",
    Name.DEEPSPEED_ZERO2: "DeepSpeed, ZeRO stage 2 + AdamW(fused=True)",
    Name.DECOUPLED: "DistributedDataParallel + DecoupledAdamW",
    Name.SHARDED_UNDER_DDP: "DistributedDataParallel + ShardedDecoupledAdamW(reduce_gradients=False)",
}


@dataclass(frozen=True)
class Variant:
    """One way to use our optimizer without a wrapper: its settings, and whether forward waits for gathers."""

    attached: bool
    settings: dict[str, Any] = field(default_factory=dict)


OURS = {
    Name.SHARDED_ATTACHED: Variant(attached=True),
    Name.SHARDED: Variant(attached=False),
    Name.SHARDED_NO_OVERLAP: Variant(attached=False, settings={"overlap": False}),
    Name.SHARDED_MESSAGES: Variant(attached=True, settings={"exchange": Exchange.RANK_ORDER}),
    Name.SHARDED_ZERO2: Variant(attached=True, settings={"gradient_residency": GradientResidency.SHARDED}),
}

DEEPSPEED_STAGES = {Name.DEEPSPEED_ZERO1: 1, Name.DEEPSPEED_ZERO2: 2}

# Bytes that the average rank has to send per parameter, in units of (N - 1) / N * the size of an element: one for a
# reduction to owners, one for sending each owner's parameters to the others, two for an all-reduce.
WIRE_UNITS = {
    Name.DDP_ADAMW: 2,
    **dict.fromkeys(OURS, 2),
    Name.TORCH_ZERO: 3,
    Name.FAIRSCALE_OSS: 2,
    Name.FSDP2: 2,
    **dict.fromkeys(DEEPSPEED_STAGES, 3),
    Name.DECOUPLED: 2,
    Name.SHARDED_UNDER_DDP: 3,
}


class Precision(StrEnum):
    """Dtype of the model's parameters."""

    FP32 = "float32"
    BF16 = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        return torch.float32 if self is Precision.FP32 else torch.bfloat16


@dataclass(frozen=True)
class Plan:
    """What is measured, the same on every rank."""

    ranks: int
    preset: Preset
    rounds: int
    warmup: int
    steps: int
    batch: int
    context: int
    contenders: tuple[Name, ...]
    at_once: int
    threads: int
    precision: Precision
    bucket_cap_mb: float
    lr: float
    weight_decay: float
    seed: int
    out: Path | None

    @property
    def model(self) -> GPTConfig:
        """The model's shape."""
        return replace(PRESETS[self.preset], context=self.context)

    @property
    def baseline(self) -> Name:
        """Whom the others are compared with."""
        return Name.DDP_ADAMW if Name.DDP_ADAMW in self.contenders else self.contenders[0]

    @property
    def groups(self) -> list[tuple[Name, ...]]:
        """The contenders that are measured, and in memory, at the same time; the baseline is in each group."""
        others = [name for name in self.contenders if name is not self.baseline]
        size = max(1, self.at_once - 1) if self.at_once else len(others)
        return [(self.baseline, *others[at : at + size]) for at in range(0, len(others), size or 1)] or [
            (self.baseline,)
        ]


# What is measured of one contender's steps in one round, per step, in seconds and bytes; over ranks the largest counts.
# cpu_s is what the process's threads used of the cores: the figure that survives a busy machine.
STEP_S, FORWARD_BACKWARD_S, OPTIMIZER_S, REDUCE_S, UPDATE_S, GATHER_S, CPU_S, WIRE_BYTES = range(8)
COLUMNS = ("step_s", "forward_backward_s", "optimizer_s", "reduce_s", "update_s", "gather_s", "cpu_s", "wire_bytes")


class WireSource(StrEnum):
    """Where a figure for bytes on the wire comes from."""

    SOCKETS = "counted at the TCP sockets"
    OPTIMIZER = "counted by the optimizer"
    FORMULA = "computed"


@dataclass(frozen=True)
class Result:
    """One contender's figures, of the rank on which they are largest.

    Attributes:
        spreads: of each of COLUMNS, over the counted rounds.
        ratio: to the baseline's step in the same round.
        tells_parts: whether it knows the parts of its optimizer step (reduce, update, gather); otherwise they are not
            to be read.
        state_bytes: of optimizer state, counted from its tensors; step counters are left out.
        wire_bytes_per_parameter: what a rank sends in a step.
        memory_bytes_per_parameter: what it moves besides, by the optimizer's own count, through memory that ranks
            share.
        loss_difference: largest relative difference to the baseline's loss, warm-up included.
        losses: mean over the ranks, per round, warm-up included.
        rounds: per column the value in each counted round.
    """

    description: str
    spreads: dict[str, Spread]
    ratio: Spread
    tells_parts: bool
    state_bytes: int
    wire_bytes_per_parameter: float
    memory_bytes_per_parameter: float
    wire_source: WireSource
    loss_difference: float
    losses: list[float]
    rounds: dict[str, list[float]]


class FullyShard(Contender):
    """FSDP2: parameters, gradients and state are DTensors, of each of which this rank holds one shard."""

    @property
    def state_bytes(self) -> int:
        """See Contender; a DTensor's own size would be that of all shards together."""
        held = (value for state in self.holder.state.values() for key, value in state.items() if key != "step")
        return sum((value.to_local() if isinstance(value, DTensor) else value).nbytes for value in held)


class DeepSpeed(Contender):
    """A DeepSpeed engine, which is called, stepped and cleared itself."""

    def zero_grad(self) -> None:
        """See Contender; the engine's step has done it."""

    @property
    def state_bytes(self) -> int:
        """See Contender; what the inner optimizer takes for parameters is an fp32 copy of this rank's shard."""
        copies: list[Tensor] = [param for group in self.holder.param_groups for param in group["params"]]
        return super().state_bytes + sum(copy.nbytes for copy in copies)


LAW: dict[str, Any] = {"betas": (0.9, 0.95), "fused": True}


def build(name: Name, plan: Plan, device: torch.device) -> Contender:
    """Make a contender around a fresh copy of the model; called on every rank.

    Raises:
        ImportError: It needs a package that is not installed.
    """
    model = GPT(plan.model, plan.seed).to(device, plan.precision.dtype)
    # What torch's law, decay = lr * weight_decay, needs to decay as much as ours.
    coupled = plan.weight_decay / plan.lr
    if name is Name.FSDP2:
        mesh = init_device_mesh(device.type, (plan.ranks,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return FullyShard(model, AdamW(groups_of(model, coupled), lr=plan.lr, **LAW))
    if name in DEEPSPEED_STAGES:
        return deepspeed_engine(
            DEEPSPEED_STAGES[name], model, AdamW(groups_of(model, coupled), lr=plan.lr, **LAW), plan
        )
    if name in OURS or name is Name.SHARDED_UNDER_DDP:
        variant = OURS.get(name, Variant(attached=False, settings={"reduce_gradients": False}))
        config = ShardingConfig(bucket_cap_mb=plan.bucket_cap_mb, **variant.settings)
        groups = groups_of(model, plan.weight_decay)
        optimizer = ShardedDecoupledAdamW(groups, lr=plan.lr, betas=(0.9, 0.95), config=config)
        ours = Sharded(model, optimizer)
        if variant.attached:
            ours.optimizer.attach(model)
        if name is Name.SHARDED_UNDER_DDP:
            on_gpu = [device] if device.type == "cuda" else None
            ours.model = DistributedDataParallel(model, on_gpu, gradient_as_bucket_view=True)
        return ours
    settings = Settings(
        ranks=plan.ranks,
        optimizer=Choice(name.value),
        preset=plan.preset,
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        global_batch=plan.batch * plan.ranks,
        bucket_cap_mb=plan.bucket_cap_mb,
        seed=plan.seed,
    )
    return contender_for(settings, model, device)


def deepspeed_engine(stage: int, model: nn.Module, optimizer: Optimizer, plan: Plan) -> Contender:
    """DeepSpeed's ZeRO around a model and an optimizer.

    Raises:
        ImportError: It is not installed.
    """
    imported("deepspeed.utils", "logger").setLevel("ERROR")
    elements = int(plan.bucket_cap_mb * 2**20) // plan.precision.dtype.itemsize
    engine, wrapped, *_ = imported("deepspeed", "initialize")(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": plan.batch,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # by default it clips
            "bf16": {"enabled": plan.precision is Precision.BF16},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": elements},
        },
    )
    return DeepSpeed(engine, engine, wrapped.optimizer)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups as the other contenders have them: matrices decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


# In struct tcp_info (linux/tcp.h): where tcpi_bytes_sent and, behind it, tcpi_bytes_retrans lie, and where they end.
TCP_INFO_BYTES_SENT = 200
TCP_INFO_SIZE = 216


def bytes_sent_by_sockets() -> int | None:
    """Data bytes that this process has sent over the TCP connections it holds open; None where that is not known.

    The kernel counts them, whichever library sends, so the measure is the same for everybody. It includes the headers
    of gloo's messages.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
        except OSError:
            continue  # closed since it was listed
        if len(info) < TCP_INFO_SIZE:
            return None  # Linux before 4.19
        sent, resent = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
        total += sent - resent
    return total


class Benchmark:
    """A group of contenders on this rank, and what has been measured of them so far.

    Attributes:
        contenders: Those that could be built.
        missing: Those that could not, and why.
    """

    def __init__(self, plan: Plan, names: Sequence[Name], device: torch.device) -> None:
        self.plan = plan
        self.device = device
        self.contenders: dict[Name, Contender] = {}
        self.missing: dict[Name, str] = {}
        for name in names:
            try:
                self.contenders[name] = build(name, plan, device)
            except ImportError as error:
                self.missing[name] = str(error)
        self._num_parameters = num_parameters(plan)
        self._clock = Clock(device)
        self._corpus = Corpus(None, plan.context)
        self._wire_source = WireSource.FORMULA
        if device.type == "cpu" and bytes_sent_by_sockets() is not None:
            self._wire_source = WireSource.SOCKETS
        num_rounds = plan.warmup + plan.rounds
        # [rounds, contenders, columns] and [rounds * steps, contenders]
        self._samples = torch.zeros(num_rounds, len(self.contenders), len(COLUMNS), dtype=torch.float64)
        self._losses = torch.zeros(num_rounds * plan.steps, len(self.contenders), dtype=torch.float64)

    def run(self, console: Console) -> dict[Name, Result]:
        """Take all rounds, and return what every rank agrees on. Collective."""
        num_rounds, steps = len(self._samples), self.plan.steps
        contenders = list(enumerate(self.contenders.values()))
        console.print(f"contenders: {', '.join(self.contenders)}")
        for index in harness.rounds(num_rounds, console):
            span = slice(index * steps, (index + 1) * steps)
            batches = [self._batch(number) for number in range(span.start, span.stop)]
            for column, contender in harness.in_turn(contenders, index):
                self._losses[span, column] = self._steps(contender, batches, self._samples[index, column])
        dist.all_reduce(samples := self._samples.to(self.device), dist.ReduceOp.MAX)
        dist.all_reduce(losses := self._losses.to(self.device))
        return self._results(samples.cpu(), losses.cpu() / self.plan.ranks)

    def _batch(self, number: int) -> tuple[Tensor, Tensor]:
        plan, rank = self.plan, dist.get_rank()
        rows = range(rank * plan.batch, (rank + 1) * plan.batch)
        return self._corpus.batch(plan.seed, number, rows, plan.ranks * plan.batch, plan.context, self.device)

    def _steps(self, contender: Contender, batches: Sequence[tuple[Tensor, Tensor]], sample: Tensor) -> Tensor:
        """Take one step per batch, note in `sample` [columns] what one cost, and return the losses [steps]."""
        clock = self._clock
        sent_before = self._bytes_sent()
        clock.settle()
        dist.barrier()
        started, cpu_before = time.perf_counter(), time.process_time()
        losses, laps = [], []
        for tokens, targets in batches:
            start = clock.mark()
            loss = contender.model(tokens, targets)
            loss.backward()
            after_backward = clock.mark()
            contender.optimizer.step()
            laps.append((start, after_backward, clock.mark()))
            if isinstance(contender, Sharded):
                cost = contender.optimizer.last_step
                for column, seconds in (
                    (REDUCE_S, cost.reduce_s),
                    (UPDATE_S, cost.update_s),
                    (GATHER_S, cost.gather_s),
                ):
                    sample[column] += seconds
            contender.zero_grad()
            losses.append(loss.detach())
        contender.synchronize()
        clock.settle()
        sample[STEP_S] = time.perf_counter() - started
        sample[CPU_S] = time.process_time() - cpu_before
        for start, after_backward, after_step in laps:
            sample[FORWARD_BACKWARD_S] += clock.seconds(start, after_backward)
            sample[OPTIMIZER_S] += clock.seconds(after_backward, after_step)
        sample[WIRE_BYTES] = self._bytes_sent() - sent_before
        sample /= len(batches)
        return torch.stack(losses).double().cpu()

    def _bytes_sent(self) -> int:
        if self._wire_source is not WireSource.SOCKETS:
            return 0
        dist.barrier()  # until then a rank may still be draining what it has handed to the kernel
        return bytes_sent_by_sockets() or 0

    def _results(self, samples: Tensor, losses: Tensor) -> dict[Name, Result]:
        names = list(self.contenders)
        baseline = names.index(self.plan.baseline)
        counted = samples[self.plan.warmup :]
        results = {}
        for column, (name, contender) in enumerate(self.contenders.items()):
            rounds = counted[:, column]
            spreads = {title: Spread.of(rounds[:, index]) for index, title in enumerate(COLUMNS)}
            difference = (losses[:, column] - losses[:, baseline]).abs() / losses[:, baseline].abs()
            wire, shared, wire_source = self._wire(name, contender, spreads["wire_bytes"].median)
            results[name] = Result(
                description=DESCRIPTIONS[name],
                spreads=spreads,
                ratio=Spread.of(rounds[:, STEP_S] / counted[:, baseline, STEP_S]),
                tells_parts=isinstance(contender, Sharded),
                state_bytes=largest_over_ranks(contender.state_bytes, self.device),
                wire_bytes_per_parameter=wire / self._num_parameters,
                memory_bytes_per_parameter=shared / self._num_parameters,
                wire_source=wire_source,
                loss_difference=float(difference.max()),
                losses=losses[:, column].tolist(),
                rounds={title: rounds[:, index].tolist() for index, title in enumerate(COLUMNS)},
            )
        return results

    def _wire(self, name: Name, contender: Contender, at_sockets: float) -> tuple[float, float, WireSource]:
        """Bytes sent, bytes moved through shared memory, and who says so of the former."""
        share = (self.plan.ranks - 1) / self.plan.ranks
        expected = WIRE_UNITS[name] * share * self.plan.precision.dtype.itemsize * self._num_parameters
        counted = float(contender.wire_bytes or 0)
        if self._wire_source is not WireSource.SOCKETS:
            return (counted, 0.0, WireSource.OPTIMIZER) if name in OURS else (expected, 0.0, WireSource.FORMULA)
        # What the optimizer moved, and the sockets have not seen.
        is_shared = counted > 0 and expected - at_sockets > counted / 2
        return at_sockets, counted if is_shared else 0.0, WireSource.SOCKETS


def num_parameters(plan: Plan) -> int:
    """Of the model."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(plan.model).parameters())


TITLES = (
    "contender",
    "step ms",
    "ratio to {baseline}: median [quartiles] (range)",
    "forward+backward ms",
    "optimizer ms",
    "CPU ms",
    "state MB per rank",
    "sent B per parameter",
    "largest loss difference",
)


def table_rows(plan: Plan, results: dict[Name, Result], missing: dict[Name, str]) -> list[list[str]]:
    """One row of texts per contender asked for, under TITLES."""
    rows = []
    for name in plan.contenders:
        if name in missing:
            rows.append([name, "not installed", missing[name], *[""] * (len(TITLES) - 3)])
            continue
        result = results[name]
        ratio, spreads = result.ratio, result.spreads
        wire = f"{result.wire_bytes_per_parameter:.2f}"
        if result.memory_bytes_per_parameter:
            wire += f" + {result.memory_bytes_per_parameter:.2f} in memory"
        optimizer = f"{1e3 * spreads['optimizer_s'].median:.0f}"
        if result.tells_parts:
            parts = "+".join(f"{1e3 * spreads[part].median:.0f}" for part in ("reduce_s", "update_s", "gather_s"))
            optimizer += f" ({parts})"
        rows.append(
            [
                name,
                f"{1e3 * spreads['step_s'].median:.0f}",
                f"{ratio} ({ratio.min:.2f}-{ratio.max:.2f})",
                f"{1e3 * spreads['forward_backward_s'].median:.0f}",
                optimizer,
                f"{1e3 * spreads['cpu_s'].median:.0f}",
                f"{result.state_bytes / 1e6:.1f}",
                wire if result.wire_source is not WireSource.FORMULA else f"{wire} (computed)",
                "-" if name is plan.baseline else f"{result.loss_difference:.1e}" if result.loss_difference else "0",
            ]
        )
    return rows


def notes(plan: Plan, around: dict[str, Any]) -> list[str]:
    """What the table's reader has to know."""
    return [
        f"{num_parameters(plan) / 1e6:.1f} M {plan.precision} parameters, {plan.ranks} ranks ({dist.get_backend()}), "
        f"{plan.batch} x {plan.context} tokens per rank and step, {plan.threads} threads per rank; "
        f"{plan.rounds} rounds of {plan.steps} steps after {plan.warmup} of warm-up"
        + (f", {plan.at_once} contenders in memory at a time, the baseline among them." if plan.at_once else "."),
        harness.sentence_of(around),
        "Medians over the rounds; the ratio is taken within each round. The slower rank counts. Wrappers reduce "
        "gradients within backward, and so do ours unless there is no overlap. In brackets, what is left for step() of "
        "reduction + update + gather; attached, gathers end in the next forward. CPU: what all threads of the rank "
        "used of the cores in a step; it hardly feels a busy machine.",
        "Sent: data bytes of this rank's TCP connections. In memory: counted by the optimizer, since ranks of one host "
        "read each other's memory and no socket sees it.",
    ]


def show(
    plan: Plan, device: torch.device, results: dict[Name, Result], missing: dict[Name, str], console: Console
) -> None:
    """Report what was measured."""
    around = harness.surroundings("numba", "fairscale", "deepspeed", device=device)
    rows = table_rows(plan, results, missing)
    titles = [title.format(baseline=plan.baseline) for title in TITLES]
    record = {
        "config": asdict(plan) | {"out": None},
        "model": asdict(plan.model) | {"num_parameters": num_parameters(plan)},
        "surroundings": around,
        "backend": dist.get_backend(),
        "baseline": plan.baseline,
        "contenders": {name: asdict(result) for name, result in results.items()},
        "not_installed": missing,
    }
    harness.publish(console, titles, rows, notes(plan, around), out=plan.out, record=record)


def work(local_rank: int, plan: Plan, rendezvous: str) -> None:
    """One rank, from joining to leaving."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # which DeepSpeed wants to know
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", plan.ranks)):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    rank = int(os.environ.get("RANK", local_rank))
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads, device=device):
        console = harness.console_of(200, quiet=rank != 0)
        results: dict[Name, Result] = {}
        missing: dict[Name, str] = {}
        for names in plan.groups:
            benchmark = Benchmark(plan, names, device)
            results = benchmark.run(console) | results  # the baseline's of the first group
            missing |= benchmark.missing
            del benchmark
            gc.collect()  # models and their hooks refer to each other
        if rank == 0:
            show(plan, device, results, missing, console)


def main(
    ranks: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE", help="Ranks to start.")] = 2,
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.MEDIUM,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; in each, every contender has its turn.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per rank and step.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    contenders: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(Name),
    at_once: Annotated[int, typer.Option(min=0, help="Contenders in memory at a time; 0 is all of them.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0,
    dtype: Annotated[Precision, typer.Option(help="Of the model's parameters.")] = Precision.FP32,
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size of ours.")] = ShardingConfig().bucket_cap_mb,
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="Share of a matrix that decays per step.")] = 3e-5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and the batches.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Time a training step of the sharded optimizer and of its peers, interleaved in one run."""
    asked_for = tuple(dict.fromkeys(name.strip() for name in contenders.split(",")))
    if unknown := [name for name in asked_for if name not in tuple(Name)]:
        raise typer.BadParameter(f"expected --contenders to name some of {', '.join(Name)}, got {', '.join(unknown)}")
    plan = Plan(
        ranks=ranks,
        preset=preset,
        rounds=rounds,
        warmup=warmup,
        steps=steps,
        batch=batch,
        context=context,
        contenders=tuple(Name(name) for name in asked_for),
        at_once=at_once,
        threads=harness.threads_per_rank(threads, ranks),
        precision=dtype,
        bucket_cap_mb=bucket_cap_mb,
        lr=lr,
        weight_decay=weight_decay,
        seed=seed,
        out=out,
    )
    if "RANK" in os.environ:
        work(int(os.environ["LOCAL_RANK"]), plan, "env://")
        return
    harness.start_ranks(work, ranks, plan)
