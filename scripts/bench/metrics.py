"""A training step that reports norms beside the same step without."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launch.contenders import under_ddp
from scripts.bench.harness import CPU, Report, ms, seconds_of, spread
from scripts.bench.peers import LAW, WEIGHT_DECAY, Training, composers_optimizer
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW


@dataclass(frozen=True, kw_only=True)
class Metrics(Training):
    """Time a training step that reports norms beside the same step without.

    In every round each contender takes two steps on the same batch: one after which it reports everything it can, as a
    monitor would, and one after which it does not. What counts is their ratio within a round.
    """

    packages = ("numba", "mosaicml")

    def run(self) -> None:
        os.environ["NODE_RANK"] = "0"  # which Composer wants to know
        super().run()

    def measure(self) -> Report:
        contenders = {
            "ShardedDecoupledAdamW, metrics()": self.contender(ShardedDecoupledAdamW, all_metrics),
            "ShardedDecoupledAdamW, a monitor's calls": self.contender(ShardedDecoupledAdamW, a_monitors_calls),
            "DDP + DecoupledAdamW, metrics()": self.contender(DecoupledAdamW, all_metrics),
        }
        missing = []
        theirs = "DDP + Composer's DecoupledAdamW, its monitor's calls"
        try:
            contenders[theirs] = self.contender(composers_optimizer(), a_monitors_calls)
        except ImportError as error:
            missing = [{"contender": theirs, "step ms": f"not installed: {error}"}]
        turns = [partial(take_step, reports) for take_step in contenders.values() for reports in (False, True)]
        seconds = self.interleave(turns)[..., 0].unflatten(1, (len(contenders), 2))
        rows = [
            {"contender": name, "step ms": ms(plain, 0), "reporting / plain: median [quartiles]": spread(both / plain)}
            for name, (plain, both) in zip(contenders, seconds.permute(1, 2, 0), strict=True)
        ]
        lines = [f"{self.model_in_words}, {len(list(self.new_model().parameters()))} tensors; {self.set_up}"]
        return Report([*rows, *missing], lines, {"contenders": list(contenders), "seconds": seconds.tolist()})

    def contender(
        self, make: type[Optimizer], report: Callable[[nn.Module, Any], object]
    ) -> Callable[[bool, int], list[float]]:
        """What takes a step of a model with an optimizer, and reports of it if it is to. Collective."""
        model: nn.Module = self.new_model()
        if make is not ShardedDecoupledAdamW:
            model = under_ddp(model, CPU)
        optimizer = make(model.parameters(), **LAW, weight_decay=WEIGHT_DECAY)

        def take_step(reports: bool, index: int) -> list[float]:
            tokens, targets = self.batch_of(index)

            def step() -> None:
                model(tokens, targets).backward()
                optimizer.step()
                if reports:
                    report(model, optimizer)
                optimizer.zero_grad()

            return seconds_of(step)

        return take_step


def read_all(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Each value on the host, as a logger wants it."""
    return {key: float(value) for key, value in metrics.items()}


def all_metrics(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """Ours, in one call."""
    return read_all(optimizer.metrics())


def a_monitors_calls(model: nn.Module, optimizer: Any) -> dict[str, float]:
    """The calls of Composer's OptimizerMonitor under DistributedDataParallel, its global gradient norm included."""
    metrics: dict[str, Any] = {}
    for name, param in model.named_parameters():
        if param.grad is not None and param.requires_grad:
            metrics.update(optimizer.report_per_parameter_metrics(param, name, metrics))
    norms = [value**2 for key, value in metrics.items() if key.startswith("l2_norm/grad")]
    metrics["l2_norm/grad/global"] = torch.stack(norms).sum() ** 0.5
    return read_all(metrics)
