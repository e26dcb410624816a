"""What an optimizer's step costs the host as the same elements are cut into more parameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn
from torch.optim import AdamW

from scripts.bench.harness import OnRanks, Report, ms, numbers, seconds_of, spread
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "ShardedDecoupledAdamW": ShardedDecoupledAdamW,
    "ShardedDecoupledAdamW(overlap=False)": partial(ShardedDecoupledAdamW, config=ShardingConfig(overlap=False)),
    "torch.optim.AdamW(fused=True)": partial(AdamW, fused=True),
}


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
        if uneven := [count for count in numbers(self.counts) if count < 1 or self.elements % count]:
            raise typer.BadParameter(f"expected --counts to divide {self.elements} elements, got {uneven}")

    def measure(self) -> Report:
        counts = numbers(self.counts)
        keys = [(name, count) for name in OPTIMIZERS for count in counts]
        seconds = self.interleave([Contender(OPTIMIZERS[name], count, self.elements) for name, count in keys])
        rows = []
        for number, (name, count) in enumerate(keys):
            (backward, backward_cpu, step, step_cpu), first = seconds[:, number].T, number - counts.index(count)
            rows.append(
                {
                    "optimizer": name,
                    "parameters": f"{count:,}",
                    "step CPU ms": ms(step_cpu, 2),
                    f"/ with {counts[0]:,}: median [quartiles]": spread(step_cpu / seconds[:, first, 3]),
                    "step ms": ms(step, 2),
                    "backward CPU ms": ms(backward_cpu, 2),
                    "backward ms": ms(backward, 2),
                }
            )
        lines = [
            f"{self.elements / 1e6:.1f} M fp32 elements, {self.set_up}",
            "CPU: of all threads of a rank, which hardly feels a busy machine.",
        ]
        return Report(rows, lines, {"contenders": keys, "seconds": seconds.tolist()})


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
        """Seconds and CPU seconds of backward, and of step."""
        loss = Deliver.apply(self.grads, *self.params)  # type: ignore[no-untyped-call]
        found = [*seconds_of(loss.backward), *seconds_of(self.optimizer.step)]
        self.optimizer.zero_grad()
        return found
