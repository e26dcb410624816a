"""A step of the optimizers that leave parameters where they are, over many parameters: ours and torch's fused one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torch.autograd import DeviceType
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from scripts.bench import harness
from scripts.bench.harness import Clock, OnDevice, OnRanks, Report, Spread
from sharded_dadamw import DecoupledAdamW

WIDTH = 64
"""Of an FSDP2 layer."""
ELEMENTS = WIDTH * WIDTH
"""Of a plain parameter."""
OPTIMIZERS = {"DecoupledAdamW": DecoupledAdamW, "AdamW(fused=True)": partial(AdamW, fused=True)}
YARDSTICK = 1


@dataclass(frozen=True, kw_only=True)
class Parameters(OnDevice, OnRanks):
    """Time a step over many parameters that stay where they are.

    Plain parameters of 4,096 elements, and FSDP2 layers of as many on one rank. Gradients are given, and new tensors in
    each step, as after `zero_grad()`. Host is the time until `step` returns, step until the device has done its part.
    """

    packages = ("triton", "numba")

    ranks: Annotated[int, typer.Option(min=1, max=1, help="One.")] = 1
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 30
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 5
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1
    counts: Annotated[str, typer.Option(help="Numbers of plain parameters.")] = "1000,5000"
    layers: Annotated[int, typer.Option(min=1, help="FSDP2 layers.")] = 700

    def measure(self) -> Report:
        device = self.torch_device()
        cases: dict[str, Callable[[], list[nn.Parameter]]] = {
            f"{count:,} parameters": partial(plain, count, device) for count in harness.numbers(self.counts)
        }
        cases[f"{self.layers:,} FSDP2 layers"] = partial(sharded_layers, self.layers, device)
        contenders = {
            (case, name): Contender(make(), optimizer, device)
            for case, make in cases.items()
            for name, optimizer in OPTIMIZERS.items()
        }
        seconds = harness.interleave(list(contenders.values()), self.rounds, self.warmup, device)
        launches = {", ".join(key): one.launches() for key, one in contenders.items()}
        rows = []
        for number, (title, launched) in enumerate(launches.items()):
            theirs = seconds[:, number - number % len(OPTIMIZERS) + YARDSTICK]
            host, step = (1e3 * seconds[:, number].median(0).values).tolist()
            of_host, of_step = (str(Spread.of(ratio)) for ratio in (seconds[:, number] / theirs).T)
            rows.append([title, f"{host:.2f}", of_host, f"{step:.2f}", of_step, str(launched or "-")])
        return Report(
            ["", "host ms", "/ torch", "step ms", "/ torch", "launches"],
            rows,
            [f"fp32; {self.set_up}", "Launches: kernels and copies on the GPU in one step, by torch's profiler."],
            {"contenders": list(launches), "seconds": seconds.tolist(), "launches": launches},
        )


class Contender:
    """An optimizer over parameters of its own; called, it takes a step."""

    def __init__(self, params: list[nn.Parameter], make: Callable[..., Any], device: torch.device) -> None:
        self._params = params
        self._optimizer = make(params)
        self._device = device

    def __call__(self, index: int) -> tuple[float, float]:
        """Seconds until `step` returned, and until the device was done."""
        clock = Clock(self._device)
        for param in self._params:
            param.grad = torch.ones_like(param)
        clock.settle()
        start = time.perf_counter()
        self._optimizer.step()
        returned = time.perf_counter()
        clock.settle()
        return returned - start, time.perf_counter() - start

    def launches(self) -> int | None:
        """Kernels and copies of one step, on a GPU."""
        if self._device.type != "cuda":
            return None
        self(0)  # gradients, outside of what is counted
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self._optimizer.step()
            torch.cuda.synchronize()
        events = profiler.events() or []
        return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def plain(count: int, device: torch.device) -> list[nn.Parameter]:
    """As many parameters of 4,096 elements."""
    return [nn.Parameter(torch.randn(ELEMENTS, device=device)) for _ in range(count)]


def sharded_layers(count: int, device: torch.device) -> list[nn.Parameter]:
    """The parameters of a model of as many layers, each under FSDP2."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(count)))
    for layer in (*model, model):
        fully_shard(layer)
    return list(model.parameters())
