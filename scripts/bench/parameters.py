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

from scripts.bench.harness import Clock, OnDevice, OnRanks, Report, ms, numbers, spread
from sharded_dadamw import DecoupledAdamW

WIDTH = 64
"""Of an FSDP2 layer; a plain parameter has as many elements."""
OPTIMIZERS = {"DecoupledAdamW": DecoupledAdamW, "AdamW(fused=True)": partial(AdamW, fused=True)}
"""Ours, and what it is compared with."""


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
        device = self.torch_device
        cases: dict[str, Callable[[], list[nn.Parameter]]] = {
            f"{count:,} parameters": partial(plain, count, device) for count in numbers(self.counts)
        }
        cases[f"{self.layers:,} FSDP2 layers"] = partial(sharded_layers, self.layers, device)
        contenders = {
            (case, name): Contender(make(), optimizer, device)
            for case, make in cases.items()
            for name, optimizer in OPTIMIZERS.items()
        }
        seconds = self.interleave(list(contenders.values()))
        launches = {", ".join(key): one.launches() for key, one in contenders.items()}
        rows = []
        for number, (title, launched) in enumerate(launches.items()):
            (host, step), (their_host, their_step) = seconds[:, number].T, seconds[:, number | 1].T
            row = {"": title, "host ms": ms(host, 2), "host / torch": spread(host / their_host)}
            row |= {"step ms": ms(step, 2), "step / torch": spread(step / their_step), "launches": str(launched or "-")}
            rows.append(row)
        lines = [f"fp32; {self.set_up}", "Launches: kernels and copies on the GPU in one step, by torch's profiler."]
        return Report(rows, lines, {"contenders": list(launches), "seconds": seconds.tolist(), "launches": launches})


class Contender:
    """An optimizer over parameters of its own; called, it takes a step."""

    def __init__(self, params: list[nn.Parameter], make: Callable[..., Any], device: torch.device) -> None:
        self._params = params
        self._optimizer = make(params)
        self._clock = Clock(device)

    def __call__(self, index: int) -> tuple[float, float]:
        """Seconds until `step` returned, and until the device was done."""
        for param in self._params:
            param.grad = torch.ones_like(param)
        self._clock.settle()
        start = time.perf_counter()
        self._optimizer.step()
        returned = time.perf_counter()
        self._clock.settle()
        return returned - start, time.perf_counter() - start

    def launches(self) -> int | None:
        """Kernels and copies of one step, on a GPU."""
        if not self._clock.on_gpu:
            return None
        self(0)  # gradients, outside of what is counted
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self._optimizer.step()
            torch.cuda.synchronize()
        events = profiler.events() or []
        return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def plain(count: int, device: torch.device) -> list[nn.Parameter]:
    """As many parameters of 4,096 elements."""
    return [nn.Parameter(torch.randn(WIDTH * WIDTH, device=device)) for _ in range(count)]


def sharded_layers(count: int, device: torch.device) -> list[nn.Parameter]:
    """The parameters of a model of as many layers, each under FSDP2."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device=device) for _ in range(count)))
    for layer in (*model, model):
        fully_shard(layer)
    return list(model.parameters())
