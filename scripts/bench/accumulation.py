"""Steps whose bits do not depend on the number of ranks, beside steps of gradients that autograd adds up."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn

from scripts.bench.harness import OnRanks, Report, ms, seconds_of, spread
from scripts.bench.memory import bytes_held
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig

WIDTH = 512


@dataclass(frozen=True, kw_only=True)
class Accumulation(OnRanks):
    """Time steps with `micro_batches`, and without, at 1, 2 and 4 backward passes on each rank, clipped by the norm.

    The model is square layers on few samples, so that the passes cost little beside what is done with gradients.
    """

    packages = ("numba",)

    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 10
    layers: Annotated[int, typer.Option(min=1, help="Layers of 512 x 512.")] = 32
    samples: Annotated[int, typer.Option(min=1, help="Samples in a pass.")] = 16

    def measure(self) -> Report:
        cases = list(product((1, 2, 4), (False, True)))
        contenders, held = [], []
        Contender(self, 1, True)(0)  # what a process needs once
        for passes, in_tree in cases:
            before = bytes_held()
            contenders.append(Contender(self, passes, in_tree))
            contenders[-1](0)
            held.append(bytes_held() - before)
        seconds = self.interleave(contenders)
        totals = seconds.sum(2)
        rows = [
            {
                "passes": str(passes),
                "": "micro_batches" if in_tree else "without",
                "backward ms": ms(seconds[:, number, 0], 0),
                "step ms": ms(seconds[:, number, 1], 0),
                "/ without": spread(totals[:, number] / totals[:, number - in_tree]),
                "MiB": f"{held[number] / 2**20:.0f}",
            }
            for number, (passes, in_tree) in enumerate(cases)
        ]
        megabytes = self.layers * WIDTH * WIDTH * 4 / 2**20
        return Report(rows, [f"{megabytes:.0f} MiB of fp32 parameters; {self.set_up} MiB: model and optimizer."])


class Contender:
    """A model and its optimizer; called, it takes a step."""

    def __init__(self, options: Accumulation, passes: int, in_tree: bool) -> None:
        torch.manual_seed(0)
        self._model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(options.layers)))
        config = ShardingConfig(micro_batches=passes * dist.get_world_size() if in_tree else None)
        self._optimizer = ShardedDecoupledAdamW(self._model.parameters(), config=config, max_grad_norm=1.0)
        self._passes, self._in_tree = passes, in_tree
        self._x = torch.randn(options.samples, WIDTH) * (1 + dist.get_rank())

    def __call__(self, index: int) -> tuple[float, float]:
        """Seconds of all backward passes, and of the step."""
        backward, _ = seconds_of(self._backward)
        step, _ = seconds_of(self._optimizer.step)
        self._optimizer.zero_grad()
        return backward, step

    def _backward(self) -> None:
        for left in reversed(range(self._passes)):
            with self._optimizer.no_sync() if left and not self._in_tree else nullcontext():
                self._model(self._x).square().mean().backward()
