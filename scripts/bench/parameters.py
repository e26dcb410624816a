"""Time a step of the optimizers that leave parameters where they are, over many parameters: ours and torch's fused one.

    python -m scripts.bench parameters                        on the GPU if there is one, else on the CPU
    python -m scripts.bench parameters --out results/parameters.json

Plain parameters of 4,096 elements, and FSDP2 layers on one rank. Gradients are given, and new tensors in each step, as
after `zero_grad()`. In each round every contender takes one step, in an order that rotates; ratios are taken within a
round. "host" is the time until `step` returns, "step" until the device has done its part.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from scripts.bench import harness
from scripts.bench.harness import Spread
from sharded_dadamw import DecoupledAdamW

ELEMENTS = 4096
WIDTH = 64
"""Of an FSDP2 layer, which thus has 4,096 elements too."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    counts: tuple[int, ...]
    layers: int
    rounds: int
    warmup: int
    threads: int
    out: Path | None


class Contender:
    """An optimizer over parameters of its own."""

    def __init__(self, title: str, params: list[nn.Parameter], optimizer: Any) -> None:
        self.title = title
        self._params = params
        self._optimizer = optimizer

    def step(self, device: torch.device) -> tuple[float, float]:
        """Seconds until `step` returned, and until the device was done."""
        for param in self._params:
            param.grad = torch.ones_like(param)
        _settle(device)
        start = time.perf_counter()
        self._optimizer.step()
        returned = time.perf_counter()
        _settle(device)
        return returned - start, time.perf_counter() - start


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def plain(count: int, device: torch.device) -> list[nn.Parameter]:
    """As many parameters of 4,096 elements."""
    return [nn.Parameter(torch.randn(ELEMENTS, device=device)) for _ in range(count)]


def sharded_layers(count: int, device: torch.device) -> list[nn.Parameter]:
    """The parameters of a model of as many layers, each under FSDP2."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(count)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    return list(model.parameters())


def contenders(plan: Plan, device: torch.device) -> list[Contender]:
    """Ours beside torch's, case by case."""
    makers = {"DecoupledAdamW": DecoupledAdamW, "AdamW(fused=True)": lambda params: AdamW(params, fused=True)}
    cases = {f"{count:,} parameters": (plain, count) for count in plan.counts}
    cases[f"{plan.layers:,} FSDP2 layers"] = (sharded_layers, plan.layers)
    return [
        Contender(f"{case}, {name}", params, make(params))
        for case, (build, count) in cases.items()
        for name, make in makers.items()
        for params in [build(count, device)]
    ]


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """The only rank, from joining to leaving."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else harness.CPU
    with harness.joined(rank, 1, rendezvous, threads=plan.threads, device=device):
        console = harness.console_of(120)
        of_case = contenders(plan, device)
        samples = torch.zeros(plan.warmup + plan.rounds, len(of_case), 2, dtype=torch.float64)
        for index in harness.rounds(len(samples), console):
            for column in harness.in_turn(range(len(of_case)), index):
                samples[index, column] = torch.tensor(of_case[column].step(device), dtype=torch.float64)
        show(plan, [one.title for one in of_case], samples[plan.warmup :], device, console)


def show(plan: Plan, titles: list[str], samples: Tensor, device: torch.device, console: Any) -> None:
    """Report what was measured."""
    rows = []
    for column, title in enumerate(titles):
        yardstick = column // 2 * 2 + 1  # torch's, of the same case
        host, step = (1e3 * samples[:, column].median(0).values).tolist()
        ratios = [str(Spread.of(samples[:, column, kind] / samples[:, yardstick, kind])) for kind in range(2)]
        rows.append([title, f"{host:.2f}", ratios[0], f"{step:.2f}", ratios[1]])
    around = harness.surroundings("triton", "numba", device=device)
    lines = [
        f"fp32, {plan.rounds} rounds after {plan.warmup} of warm-up, {plan.threads} threads; "
        "medians, ratios within each round with quartiles.",
        harness.sentence_of(around),
    ]
    record = {"surroundings": around, "contenders": titles, "seconds": samples.tolist()}
    harness.publish(console, ["", "host ms", "/ torch", "step ms", "/ torch"], rows, lines, out=plan.out, record=record)


def main(
    counts: Annotated[str, typer.Option(help="Numbers of plain parameters.")] = "1000,5000",
    layers: Annotated[int, typer.Option(min=1, help="FSDP2 layers.")] = 700,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Time a step over many parameters that stay where they are."""
    numbers = tuple(int(count) for count in counts.split(","))
    harness.start_ranks(work, 1, Plan(numbers, layers, rounds, warmup, threads, out))
