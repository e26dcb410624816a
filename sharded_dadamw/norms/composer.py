"""Composer's protocol for what an optimizer reports, over a ``StepReport``.

Its ``OptimizerMonitor`` calls ``report_per_parameter_metrics`` for each parameter that has a gradient, and under FSDP
then ``pre_reduce_metrics`` and ``dist_reduce_metrics`` for all that was collected.

Source: MosaicML Composer, ``composer.optim.DecoupledAdamW`` and ``composer.callbacks.OptimizerMonitor``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.norms.step_report import METRICS, StepReport

MetricFunction = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""Of a parameter with its gradient, of its state, and of what the step subtracted from it."""

_NORM = torch.linalg.vector_norm
_FUNCTIONS: Mapping[str, MetricFunction] = MappingProxyType(
    {
        "l2_norm/moment": lambda param, optim_state, step_tensor: _NORM(optim_state["exp_avg"]),
        "l2_norm/param": lambda param, optim_state, step_tensor: _NORM(param.data),
        "l2_norm/update": lambda param, optim_state, step_tensor: _NORM(step_tensor),
        "l2_norm/grad": lambda param, optim_state, step_tensor: _NORM(param.grad),
    }
)


class MetricFunctions:
    """The attribute ``metric_functions`` of Composer's optimizer, to be read only: what each metric is."""

    def __get__(self, instance: object, owner: type) -> Mapping[str, MetricFunction]:
        """Return the function of every metric."""
        return _FUNCTIONS

    def __set__(self, instance: object, value: object) -> NoReturn:
        """Refuse other functions; says what to do instead."""
        raise cannot_replace()


def cannot_replace() -> AttributeError:
    """The error of giving an optimizer, or a class of them, other metric functions."""
    return AttributeError(
        "metric_functions cannot be replaced: norms come out of the update, which calls no function; compute what else "
        "you want from param, param.grad and optimizer.state[param] after step()"
    )


class ComposerProtocol:
    """What Composer's monitor asks of an optimizer, whose methods say what they take; ``metrics`` is changed."""

    def __init__(self) -> None:
        self._keys: Sequence[str] = ()

    def report(self, report: StepReport, param: Tensor, name: str, metrics: dict[str, Any]) -> dict[str, Any]:
        """Add the norms of one parameter, if the step of the report, which has its ``values``, has updated it."""
        assert report.values is not None
        row = report.values.get(id(param))
        if row is not None:
            report.names[name] = id(param)
            norms = row.unbind()
            metrics.update({f"{key}/{name}": norms[column] for key, column in METRICS.items()})
        return metrics

    def pre_reduce(self, report: StepReport, counted: Collection[int], metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms into squares that can be added up over ranks; ``counted`` are ids of what this rank counts."""
        others = {name for name, key in report.names.items() if key not in counted}
        zeroed = {f"{key}/{name}" for name in others for key in METRICS}
        for key, value in metrics.items():
            if _is_norm(key):
                square = torch.as_tensor(value).to(torch.float64).square()
                metrics[key] = torch.zeros_like(square) if key in zeroed else square
        return metrics

    def dist_reduce(self, collectives: Collectives, device: torch.device, metrics: dict[str, Any]) -> dict[str, Any]:
        """Add up squares over ranks, and average whatever is no norm over those that have it."""
        while True:
            packed = _pack(metrics, self._keys, device)
            collectives.all_reduce_(packed, dist.ReduceOp.SUM)
            if not packed[0]:
                break
            texts = collectives.gather_texts(json.dumps(list(metrics)))
            self._keys = sorted({key for text in texts for key in json.loads(text)})
        totals, counts = packed[1:].view(2, -1)
        metrics.clear()
        for key, total, count, num_ranks in zip(self._keys, totals, counts, counts.tolist(), strict=True):
            if num_ranks:
                metrics[key] = (total.sqrt() if _is_norm(key) else total / count).to(torch.float32)
        return metrics


def _is_norm(metric: str) -> bool:
    return metric.startswith("l2_norm")


def _pack(metrics: Mapping[str, Any], keys: Sequence[str], device: torch.device) -> Tensor:
    """What one rank adds to a sum over ranks, fp64 [1 + 2 * num_keys].

    It is whether there is a metric that is not among ``keys``; per key its value, or 0; per key whether there is one.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = [torch.as_tensor(metrics[key]).to(device, torch.float64) if key in metrics else zero for key in keys]
    flags = [float(not metrics.keys() <= set(keys)), *(float(key in metrics) for key in keys)]
    has_new, *has = torch.tensor(flags, dtype=torch.float64).to(device, non_blocking=True).split([1, len(keys)])
    return torch.cat([has_new, *([torch.stack(values)] if values else []), *has])
