"""What an optimizer's step costs the host as the same elements are cut into more parameters."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from scripts.bench import harness
from scripts.bench.harness import OnRanks, Report, Spread
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW, ShardingConfig

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Host(OnRanks):
    """Time the host's part of an optimizer step as parameters become many and small.

    Every contender holds as many elements, in more or fewer parameters, and gets its gradients from backward through a
    graph of one node. An optimizer whose work per parameter is nothing beside its work per element takes as long for
    10,000 as for 100.
    """

    packages = ("numba",)

    elements: Annotated[int, typer.Option(min=1, help="Elements of all parameters together.")] = 8_000_000
    counts: Annotated[str, typer.Option(help="Numbers of parameters; the first is compared with.")] = "100,1000,10000"

    def __post_init__(self) -> None:
        if uneven := [count for count in harness.numbers(self.counts) if count < 1 or self.elements % count]:
            raise typer.BadParameter(f"expected --counts to divide {self.elements} elements, got {uneven}")

    def measure(self) -> Report:
        counts, in_step = harness.numbers(self.counts), ShardingConfig(overlap=False)
        optimizers: dict[str, Callable[..., Any]] = {
            "ShardedDecoupledAdamW": ShardedDecoupledAdamW,
            "ShardedDecoupledAdamW(overlap=False)": partial(ShardedDecoupledAdamW, config=in_step),
            "DecoupledAdamW": DecoupledAdamW,
            "torch.optim.AdamW(fused=True)": partial(AdamW, fused=True),
            NONE: partial(SGD, lr=0.0),  # whose step is not shown: what backward takes without ours
        }
        keys = [(name, count) for name in optimizers for count in counts]
        contenders = [Contender(optimizers[name], count, self.elements) for name, count in keys]
        seconds = harness.interleave(contenders, self.rounds, self.warmup).unflatten(-1, (2, 3))
        rows = []
        medians = 1e3 * seconds.median(0).values
        for number, (name, count) in enumerate(keys):
            clock, cpu = (seconds[:, number, :, 1] / seconds[:, keys.index((name, counts[0])), :, 1]).T
            (backward, step, _), (backward_cpu, step_cpu, zero_grad_cpu) = medians[number].tolist()
            of_step = [f"{step:.2f}", str(Spread.of(clock)), f"{step_cpu:.2f}", str(Spread.of(cpu))]
            if name == NONE:
                of_step = ["-"] * len(of_step)
            of_backward = [f"{backward:.2f}", f"{backward_cpu:.2f}"]
            rows.append([name, f"{count:,}", *of_step, *of_backward, f"{zero_grad_cpu:.2f}"])
        fewest = f"/ with {counts[0]:,}"
        return Report(
            [
                *("optimizer", "parameters", "step ms", f"{fewest}: median [quartiles]", "step CPU ms", fewest),
                *("backward ms", "CPU ms", "zero_grad CPU ms"),
            ],
            rows,
            [
                f"{self.elements / 1e6:.1f} M fp32 elements, {self.set_up}",
                "CPU: of all threads of a rank, which hardly feels a busy machine.",
            ],
            {"contenders": keys, "seconds": seconds.tolist()},
        )


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
    """One optimizer around as many parameters as it is given; called, it takes a step."""

    def __init__(self, make: Callable[..., Any], count: int, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        size = elements // count
        self.params = [nn.Parameter(torch.randn(size, generator=generator)) for _ in range(count)]
        # Those of every rank are its own: where they are equal, ours takes them for averages, and does not overlap.
        generator.manual_seed(1 + dist.get_rank())
        self.grads = torch.randn(elements, generator=generator).split(size)
        self.optimizer = make(self.params)

    def __call__(self, index: int) -> list[float]:
        """Seconds of backward, step and zero_grad; and CPU seconds of the same."""
        loss = Deliver.apply(self.grads, *self.params)  # type: ignore[no-untyped-call]
        marks = [(time.perf_counter(), time.process_time())]
        for part in (loss.backward, self.optimizer.step, self.optimizer.zero_grad):
            part()
            marks.append((time.perf_counter(), time.process_time()))
        seconds: list[float] = torch.tensor(marks, dtype=torch.float64).T.diff().flatten().tolist()
        return seconds
