"""Time what an optimizer's step costs the host as the same elements are cut into more parameters, all in one run.

    python -m scripts.bench host                                 2 ranks over gloo, 8 million elements
    python -m scripts.bench host --ranks 1 --elements 30000000 --out host.json

Every contender holds as many elements, in 100, 1,000 or 10,000 parameters, and gets its gradients from backward through
a graph of one node. In every round each of them takes one step, in an order that rotates. An optimizer whose work per
parameter is nothing beside its work per element takes as long for 10,000 as for 100.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW

from scripts.bench import harness
from scripts.bench.harness import Spread
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW, ShardingConfig


class Name(StrEnum):
    """The optimizers, in the order of the table."""

    SHARDED = "ShardedDecoupledAdamW"
    NO_OVERLAP = "ShardedDecoupledAdamW(overlap=False)"
    DECOUPLED = "DecoupledAdamW"
    ADAMW = "torch.optim.AdamW(fused=True)"
    NONE = "none"


@dataclass(frozen=True)
class Plan:
    """What is measured, the same on every rank."""

    ranks: int
    elements: int
    counts: tuple[int, ...]
    rounds: int
    warmup: int
    threads: int
    out: Path | None


class Deliver(torch.autograd.Function):
    """A node whose inputs are all parameters, and whose backward hands each the gradient it has for it."""

    @staticmethod
    def forward(ctx: Any, grads: Sequence[Tensor], *params: Tensor) -> Tensor:
        ctx.grads = grads
        return params[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.grads


class Contender:
    """One optimizer around as many parameters as it is given."""

    def __init__(self, name: Name, count: int, elements: int) -> None:
        assert elements % count == 0
        generator = torch.Generator().manual_seed(0)
        size = elements // count
        self.params = [nn.Parameter(torch.randn(size, generator=generator)) for _ in range(count)]
        self.grads = torch.randn(elements, generator=generator).split(size)
        makers: dict[Name, Callable[[list[nn.Parameter]], Any]] = {
            Name.SHARDED: ShardedDecoupledAdamW,
            Name.NO_OVERLAP: lambda params: ShardedDecoupledAdamW(params, config=ShardingConfig(overlap=False)),
            Name.DECOUPLED: DecoupledAdamW,
            Name.ADAMW: lambda params: AdamW(params, fused=True),
            Name.NONE: _NoOptimizer,
        }
        self.optimizer = makers[name](self.params)

    def step(self, sample: Tensor) -> None:
        """Take a step; note in `sample` [2, 3] the seconds, and CPU seconds, of backward, step and zero_grad."""
        loss = Deliver.apply(self.grads, *self.params)  # type: ignore[no-untyped-call]
        marks = [(time.perf_counter(), time.process_time())]
        for part in (loss.backward, self.optimizer.step, self.optimizer.zero_grad):
            part()
            marks.append((time.perf_counter(), time.process_time()))
        sample.copy_(torch.tensor(marks, dtype=torch.float64).T.diff())


class _NoOptimizer:
    """Backward with no optimizer there, of which a step consists otherwise."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self._params = params

    def step(self) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        """As torch's."""
        for param in self._params:
            param.grad = None


class Benchmark:
    """All contenders on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.keys = [(name, count) for name in Name for count in plan.counts]
        self.contenders = [Contender(name, count, plan.elements) for name, count in self.keys]

    def run(self, console: Console) -> Tensor:
        """Seconds [rounds, contenders, (of the clock, of the CPU), (backward, step, zero_grad)]. Collective.

        Those of the slower rank; the CPU's are of all threads of a rank, and hardly feel a busy machine.
        """
        rounds = self.plan.warmup + self.plan.rounds
        samples = torch.zeros(rounds, len(self.contenders), 2, 3, dtype=torch.float64)
        for index in harness.rounds(rounds, console):
            for column in harness.in_turn(range(len(self.contenders)), index):
                dist.barrier()
                self.contenders[column].step(samples[index, column])
        dist.all_reduce(samples, dist.ReduceOp.MAX)
        return samples[self.plan.warmup :]


TITLES = (
    "optimizer",
    "parameters",
    "step ms",
    "/ with {fewest}: median [quartiles]",
    "step CPU ms",
    "/ with {fewest}",
    "backward ms",
    "CPU ms",
    "zero_grad CPU ms",
)


def table_rows(plan: Plan, keys: Sequence[tuple[Name, int]], samples: Tensor) -> list[list[str]]:
    """One row of texts per contender, under TITLES."""
    rows = []
    medians = 1e3 * samples.median(0).values
    for column, (name, count) in enumerate(keys):
        fewest = keys.index((name, plan.counts[0]))
        clock, cpu = (samples[:, column, kind, 1] / samples[:, fewest, kind, 1] for kind in range(2))
        (backward, step, _), (backward_cpu, step_cpu, zero_grad_cpu) = medians[column].tolist()
        of_step = [f"{step:.2f}", str(Spread.of(clock)), f"{step_cpu:.2f}", str(Spread.of(cpu))]
        if name is Name.NONE:
            of_step = ["-"] * len(of_step)
        rows.append([name, f"{count:,}", *of_step, f"{backward:.2f}", f"{backward_cpu:.2f}", f"{zero_grad_cpu:.2f}"])
    return rows


def show(plan: Plan, keys: Sequence[tuple[Name, int]], samples: Tensor, console: Console) -> None:
    """Report what was measured."""
    around = harness.surroundings("numba")
    titles = [title.format(fewest=f"{plan.counts[0]:,}") for title in TITLES]
    rows = table_rows(plan, keys, samples)
    lines = [
        f"{plan.elements / 1e6:.1f} M fp32 elements, {plan.ranks} ranks over gloo, {plan.threads} threads per rank; "
        f"{plan.rounds} rounds after {plan.warmup} of warm-up, ratios within each round, the slower rank counts.",
        harness.sentence_of(around),
    ]
    record = {
        "plan": asdict(plan) | {"out": None},
        "surroundings": around,
        "contenders": keys,
        "seconds": samples.tolist(),
    }
    harness.publish(console, titles, rows, lines, out=plan.out, record=record)


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """One rank, from joining to leaving."""
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads):
        console = harness.console_of(160, quiet=rank != 0)
        benchmark = Benchmark(plan)
        samples = benchmark.run(console)
        if rank == 0:
            show(plan, benchmark.keys, samples, console)


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    elements: Annotated[int, typer.Option(min=1, help="Elements of all parameters together.")] = 8_000_000,
    counts: Annotated[str, typer.Option(help="Numbers of parameters; the first is compared with.")] = "100,1000,10000",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Time the host's part of an optimizer step as parameters become many and small."""
    numbers = tuple(int(count) for count in counts.split(","))
    if uneven := [count for count in numbers if count < 1 or elements % count]:
        raise typer.BadParameter(f"expected --counts to divide {elements} elements, got {uneven}")
    plan = Plan(ranks, elements, numbers, rounds, warmup, harness.threads_per_rank(threads, ranks), out)
    harness.start_ranks(work, ranks, plan)
