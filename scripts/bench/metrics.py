"""A training step that reports norms beside the same step without."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from scripts.bench import harness
from scripts.bench.harness import CPU, Report, Spread
from scripts.bench.peers import Training, composers_optimizer
from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW

LAW = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 3e-5}


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
        contenders, missing = self.build()
        turns = [partial(self.take_step, *one, reports) for one in contenders.values() for reports in (False, True)]
        seconds = harness.interleave(turns, self.rounds, self.warmup)[..., 0].unflatten(1, (len(contenders), 2))
        rows = []
        for number, name in enumerate(contenders):
            plain, reporting = seconds[:, number].unbind(1)
            rows.append([name, f"{1e3 * float(plain.median()):.0f}", str(Spread.of(reporting / plain))])
        rows += [[name, "not installed", reason] for name, reason in missing.items()]
        lines = [f"{self.model_in_words}, {len(list(self.new_model().parameters()))} tensors; {self.set_up}"]
        record = {"contenders": list(contenders), "seconds": seconds.tolist()}
        return Report(("contender", "step ms", "reporting / plain: median [quartiles]"), rows, lines, record)

    def build(self) -> tuple[dict[str, tuple[nn.Module, Any, Callable[..., object]]], dict[str, str]]:
        """Models with optimizers and how those report; and those that cannot be had, with the reason. Collective."""
        contenders = {}
        for name, report in (("metrics()", all_metrics), ("a monitor's calls", a_monitors_calls)):
            model: nn.Module = self.new_model()
            sharded = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
            contenders[f"ShardedDecoupledAdamW, {name}"] = (model, sharded, report)
        model = DistributedDataParallel(self.new_model(), gradient_as_bucket_view=True)
        whole = DecoupledAdamW(model.named_parameters(), **LAW)
        contenders["DDP + DecoupledAdamW, metrics()"] = (model, whole, all_metrics)
        theirs = "DDP + Composer's DecoupledAdamW, its monitor's calls"
        try:
            composers = composers_optimizer()
        except ImportError as error:
            return contenders, {theirs: str(error)}
        model = DistributedDataParallel(self.new_model(), gradient_as_bucket_view=True)
        contenders[theirs] = (model, composers(model.parameters(), **LAW), a_monitors_calls)
        return contenders, {}

    def take_step(
        self, model: nn.Module, optimizer: Any, report: Callable[..., object], reports: bool, index: int
    ) -> list[float]:
        """Seconds of a step, and of reporting it."""
        batch = self.batch_of(index, CPU)
        dist.barrier()
        start = time.perf_counter()
        model(*batch).backward()
        optimizer.step()
        if reports:
            report(model, optimizer)
        optimizer.zero_grad()
        return [time.perf_counter() - start]


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
