"""Time a training step that reports norms beside the same step without, all in one run.

    python -m scripts.bench metrics                     starts its own 2 ranks, on CPU over gloo
    python -m scripts.bench metrics --ranks 1 --out metrics.json

Every contender holds its own copy of one model and trains it on the same batches. In every round each of them takes two
steps on the same batch, one after which it reports everything it can, as a monitor would, and one after which it does
not; which of the two comes first changes from round to round. What counts is their ratio within a round.
"""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.data import Corpus
from launch.model import GPT
from launch.options import PRESETS, GPTConfig, Preset
from scripts.bench import harness
from scripts.bench.harness import Spread
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW

LAW = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 3e-5}


@dataclass(frozen=True)
class Plan:
    """What is measured, the same on every rank."""

    ranks: int
    preset: Preset
    rounds: int
    warmup: int
    context: int
    threads: int
    out: Path | None

    @property
    def model(self) -> GPTConfig:
        """The model's shape."""
        return replace(PRESETS[self.preset], context=self.context)


@dataclass(frozen=True)
class Contender:
    """One optimizer around its own copy of the model.

    Attributes:
        model: What forward goes through.
        optimizer: What steps.
        report: Reports everything about the last step, and reads it on the host.
    """

    model: nn.Module
    optimizer: Any
    report: Callable[[], object]


def read_all(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Each value on the host, as a logger wants it."""
    return {key: float(value) for key, value in metrics.items()}


def as_a_monitor(model: nn.Module, optimizer: Any) -> Callable[[], object]:
    """The calls of Composer's OptimizerMonitor under DistributedDataParallel, its global gradient norm included."""

    def report() -> dict[str, float]:
        metrics: dict[str, Any] = {}
        for name, param in model.named_parameters():
            if param.grad is not None and param.requires_grad:
                metrics.update(optimizer.report_per_parameter_metrics(param, name, metrics))
        norms = [value**2 for key, value in metrics.items() if key.startswith("l2_norm/grad")]
        metrics["l2_norm/grad/global"] = torch.stack(norms).sum() ** 0.5
        return read_all(metrics)

    return report


def build(plan: Plan) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders, and those that cannot be had, with the reason."""
    contenders, missing = {}, {}

    def copy_of_model(wrapped: bool) -> nn.Module:
        model = GPT(plan.model, 0)
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if wrapped else model

    model = copy_of_model(False)
    sharded = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
    contenders["ShardedDecoupledAdamW, metrics()"] = Contender(model, sharded, lambda: read_all(sharded.metrics()))
    model = copy_of_model(False)
    monitored = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
    contenders["ShardedDecoupledAdamW, a monitor's calls"] = Contender(model, monitored, as_a_monitor(model, monitored))
    model = copy_of_model(True)
    whole = DecoupledAdamW(model.named_parameters(), **LAW)
    contenders["DDP + DecoupledAdamW, metrics()"] = Contender(model, whole, lambda: read_all(whole.metrics()))
    try:
        composer = composers_optimizer()
    except ImportError as error:
        missing["DDP + Composer's DecoupledAdamW, its monitor's calls"] = str(error)
    else:
        model = copy_of_model(True)
        theirs = composer(model.parameters(), **LAW)
        name = "DDP + Composer's DecoupledAdamW, its monitor's calls"
        contenders[name] = Contender(model, theirs, as_a_monitor(model, theirs))
    return contenders, missing


def composers_optimizer() -> Any:
    """Composer's own class.

    Raises:
        ImportError: It is not installed.
    """
    client = importlib.import_module("tests.composer_client")  # it knows what Composer's imports need
    return client.composer.optim.DecoupledAdamW


class Benchmark:
    """The contenders on this rank, and their steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.contenders, self.missing = build(plan)
        self._corpus = Corpus(None, plan.context)

    def run(self, console: Any) -> Tensor:
        """Seconds [rounds, contenders, (plain, reporting)], the slower rank's. Collective."""
        rounds = self.plan.warmup + self.plan.rounds
        seconds = torch.zeros(rounds, len(self.contenders), 2, dtype=torch.float64)
        for index in harness.rounds(rounds, console):
            rank, ranks = dist.get_rank(), self.plan.ranks
            batch = self._corpus.batch(0, index, range(rank, rank + 1), ranks, self.plan.context, torch.device("cpu"))
            for column, contender in enumerate(self.contenders.values()):
                for kind in harness.in_turn(range(2), index):
                    seconds[index, column, kind] = self._step(contender, batch, reports=kind == 1)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds[self.plan.warmup :]

    def _step(self, contender: Contender, batch: tuple[Tensor, Tensor], *, reports: bool) -> float:
        dist.barrier()
        start = time.perf_counter()
        contender.model(*batch).backward()
        contender.optimizer.step()
        if reports:
            contender.report()
        contender.optimizer.zero_grad()
        return time.perf_counter() - start


def show(plan: Plan, benchmark: Benchmark, seconds: Tensor, console: Any) -> None:
    """Report what was measured."""
    model = GPT(plan.model)
    params = list(model.parameters())
    titles = ("contender", "step ms", "reporting / plain: median [quartiles]")
    rows = []
    for column, name in enumerate(benchmark.contenders):
        plain, reporting = seconds[:, column].unbind(1)
        rows.append([name, f"{1e3 * float(plain.median()):.0f}", str(Spread.of(reporting / plain))])
    rows += [[name, "not installed", reason] for name, reason in benchmark.missing.items()]
    around = harness.surroundings("numba", "mosaicml")
    lines = [
        f"{sum(p.numel() for p in params) / 1e6:.1f} M fp32 parameters in {len(params)} tensors, {plan.ranks} ranks "
        f"over gloo, 1 x {plan.context} tokens per rank and step, {plan.threads} threads per rank; "
        f"{plan.rounds} rounds after {plan.warmup} of warm-up.",
        harness.sentence_of(around),
    ]
    record = {
        "plan": asdict(plan) | {"out": None},
        "surroundings": around,
        "contenders": list(benchmark.contenders),
        "seconds": seconds.tolist(),
    }
    harness.publish(console, titles, rows, lines, out=plan.out, record=record)


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """One rank, from joining to leaving."""
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads):
        console = harness.console_of(160, quiet=rank != 0)
        benchmark = Benchmark(plan)
        seconds = benchmark.run(console)
        if rank == 0:
            show(plan, benchmark, seconds, console)


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.MEDIUM,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3,
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 128,
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Time a training step that reports norms beside the same step without."""
    plan = Plan(ranks, preset, rounds, warmup, context, harness.threads_per_rank(threads, ranks), out)
    os.environ["NODE_RANK"] = "0"  # which Composer wants to know
    harness.start_ranks(work, ranks, plan)
