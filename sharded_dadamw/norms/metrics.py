"""What an optimizer says about its last step: norms per parameter, over all parameters, and Composer's protocol.

    l2_norm/grad/NAME       the gradient as it went into the update: averaged, unscaled, clipped
    l2_norm/moment/NAME     exp_avg after the step
    l2_norm/param/NAME      the parameter after the step (the fp32 main parameter, where there is one)
    l2_norm/update/NAME     what the step subtracted from the parameter, decay included
    l2_norm/.../global      the same over all parameters

The kernel that makes the update yields these squares as it goes, for what this rank holds. Here they are put into one
table with a row per parameter of any rank, and added up over ranks in one all-reduce.

Source of the names and of the protocol: MosaicML Composer, ``composer.optim.DecoupledAdamW`` and
``composer.callbacks.OptimizerMonitor``.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.kernels.operands import NORMS, Operands
from sharded_dadamw.layout.placement import local, shape_of
from sharded_dadamw.norms.global_norm import Roll, call_roll, sums_of_squares
from sharded_dadamw.update.adamw import Hyperparameters, applied_update, value_of

MetricFunction = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""Of this rank's part of a parameter (its ``grad`` is the gradient as it went into the update), of its state, and of
what the step subtracted from it."""


def _moment_norm(param: Tensor, optim_state: Mapping[str, Tensor], step_tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(optim_state["exp_avg"])
    return norm


def _param_norm(param: Tensor, optim_state: Mapping[str, Tensor], step_tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(param.data)
    return norm


def _update_norm(param: Tensor, optim_state: Mapping[str, Tensor], step_tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(step_tensor)
    return norm


def _grad_norm(param: Tensor, optim_state: Mapping[str, Tensor], step_tensor: Tensor) -> Tensor:
    assert param.grad is not None
    norm: Tensor = torch.linalg.vector_norm(param.grad)
    return norm


_MEASURED: Mapping[MetricFunction, str] = {
    _moment_norm: "moment",
    _param_norm: "param",
    _update_norm: "update",
    _grad_norm: "grad",
}
"""Functions that need not be called: the update yields the squares of what they return, under these names of NORMS."""


@dataclass(slots=True)
class LastStep:
    """What is known of the most recent step.

    Attributes:
        hypers: Per group its scalars in that step.
        grad_divisor: 0-d, by which gradients were divided; None means 1.
        found_inf: 0-d; where it is not 0 nothing was changed. None means 0.
        updated: The parameters that had a gradient.
        measured: Parameters, and the squares fp64 [num_params, 4] of this rank's parts of them, which came out of the
            update in the order of NORMS.
        unmeasured: Parameters of which parts of this rank were updated by a kernel that does not measure.
    """

    hypers: Sequence[Hyperparameters] = ()
    grad_divisor: Tensor | None = None
    found_inf: Tensor | None = None
    updated: list[Tensor] = field(default_factory=list)
    measured: list[tuple[Sequence[Tensor], Tensor]] = field(default_factory=list)
    unmeasured: list[Tensor] = field(default_factory=list)

    def note(self, params: Sequence[Tensor], squares: Tensor | None) -> None:
        """Take what an update has measured of these parameters, or that it has not."""
        if squares is None:
            self.unmeasured += params
        else:
            self.measured.append((params, squares))

    def updated_here(self) -> list[Tensor]:
        """The parameters of which this rank has updated parts."""
        return [param for params, _ in self.measured for param in params] + self.unmeasured


class Held(NamedTuple):
    """This rank's part of a parameter."""

    param: Tensor
    name: str
    part: str


class Table(NamedTuple):
    """Metrics of all parameters of all ranks: per metric a row, in which each parameter has its place.

    Attributes:
        place_of: The place of each parameter of this rank, by its id.
        shown: By its place the name of each parameter that is trainable, or was when names were exchanged.
        squares: Per norm fp64 [num_names], the sums of squares.
        values: Per metric num_names 0-d fp32 tensors.
    """

    place_of: Mapping[int, int]
    shown: Mapping[int, str]
    squares: Mapping[str, Tensor]
    values: Mapping[str, Sequence[Tensor]]


class Monitored:
    """Mixed into an optimizer: what it says about its last step.

    ``metric_functions`` may be replaced, for a class or for one optimizer. What its functions return is reported under
    their names. Where a name begins with ``l2_norm`` it is taken for a norm of this rank's part of the parameter, and
    squares are added up over ranks; else the mean over the ranks that have a part is reported.
    """

    metric_functions: Mapping[str, MetricFunction] = {
        "l2_norm/moment": _moment_norm,
        "l2_norm/param": _param_norm,
        "l2_norm/update": _update_norm,
        "l2_norm/grad": _grad_norm,
    }

    param_groups: list[dict[str, Any]]
    state: Any

    def _forget_steps(self) -> None:
        """Start with no step to tell of."""
        self._last = LastStep()
        self._num_skipped: Tensor | None = None
        self._reported: dict[str, Tensor] = {}
        self._known_keys: tuple[str, ...] = ()
        self._values: dict[int, Mapping[str, Tensor]] | None = None
        self._roll: tuple[Sequence[int], Roll, Mapping[int, int]] | None = None

    def _forget_parameters(self) -> None:
        """Let go of parameters that may no longer be here; a new one may have the id of an old one."""
        self._last = LastStep()
        self._reported, self._values, self._roll = {}, None, None

    def _begin_step(
        self, hypers: Sequence[Hyperparameters], grad_divisor: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Note what a step is about to do; what it measures is then added to ``self._last``."""
        self._last = LastStep(hypers, grad_divisor, found_inf)
        self._reported, self._values = {}, None
        if found_inf is not None:
            skipped = (found_inf != 0).to(torch.float64)
            self._num_skipped = skipped if self._num_skipped is None else self._num_skipped + skipped

    @abstractmethod
    def _held_params(self) -> list[Tensor]:
        """The parameters that ``_held`` would list, in any order; cheap."""

    @abstractmethod
    def _held(self) -> list[Held]:
        """This rank's parts of the parameters, in the order of their groups."""

    @abstractmethod
    def _connect_for_norms(self) -> Collectives:
        """The ranks over which norms are added up."""

    @abstractmethod
    def _operands_of(self, param: Tensor, hyper: Hyperparameters) -> Operands:
        """This rank's part of a parameter that was updated with these scalars, its gradient and state, as they are.

        Raises:
            RuntimeError: The gradient is gone.
        """

    @abstractmethod
    def _at_rest(self, param: Tensor) -> tuple[Tensor, Tensor | None]:
        """This rank's part of any parameter: the value that the law acts on, and ``exp_avg`` if there is one."""

    def _call_roll(self) -> tuple[Roll, Mapping[int, int]]:
        """Who counts what, and the index of each parameter in that, by its id. Collective where parameters changed."""
        ids = [id(param) for param in self._held_params()]
        if self._roll is None or self._roll[0] != ids:
            self._roll = None
            held = self._held()
            entries = [(part.name, part.part, part.param.requires_grad, shape_of(part.param)) for part in held]
            roll = call_roll(self._connect_for_norms(), entries)
            self._roll = ids, roll, {id(part.param): index for index, part in enumerate(held)}
        return self._roll[1:]

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Everything about the most recent step. Collective: one all-reduce, and an exchange of names the first time.

        Call it on every rank, after ``step`` and before ``zero_grad``. A parameter that had no gradient in that step
        has gradient and update 0, and before the first step all have.

        Returns:
            0-d fp32 tensors on the parameters' device, the same keys in the same order on every rank:
            ``l2_norm/{moment,param,update,grad}/NAME`` for every trainable parameter of any rank, and the same with
            ``global`` for NAME over all of them; ``effective_decay/group_I``, the fraction by which the step shrank the
            weights of a group; ``skipped_steps``, the number of steps so far that a non-finite gradient made void.

        Raises:
            RuntimeError: The update was made by a kernel that does not measure (in fp64, or without numba or Triton),
                and a gradient that would have to be measured now is gone.
            ValueError: The ranks over which to add up are not known; pass ``norm_group``.
        """
        table = self._add_up()
        found = {
            f"{metric}/{name}": values[place]
            for place, name in table.shown.items()
            for metric, values in table.values.items()
        }
        for metric, squares in table.squares.items():
            found[f"{metric}/global"] = squares.sum().sqrt().to(torch.float32)
        decays = [hyper.decay for hyper in self._last.hypers] or [0.0] * len(self.param_groups)
        for index, value in enumerate(decays):
            decay = torch.as_tensor(value, dtype=torch.float32).to(self._device, non_blocking=True)
            found[f"effective_decay/group_{index}"] = self._unless_skipped(decay)
        skipped = torch.zeros(()) if self._num_skipped is None else self._num_skipped
        found["skipped_steps"] = skipped.to(self._device, torch.float32, non_blocking=True)
        return found

    @torch.no_grad()
    def report_per_parameter_metrics(
        self, param: Tensor, name: str, optimizer_metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """Add what this rank knows of one parameter's last update. Composer's protocol.

        Args:
            param: A parameter.
            name: What to call it.
            optimizer_metrics: Gets ``l2_norm/{moment,param,update,grad}/NAME``, 0-d fp32 tensors: norms of what this
                rank holds of the parameter, which is all of it unless it is sharded. Nothing where the last step has
                not updated it.

        Returns:
            ``optimizer_metrics``.

        Raises:
            RuntimeError: As ``metrics``.
        """
        values = self._values_to_report().get(id(param))
        if values is not None:
            self._reported[name] = param
            optimizer_metrics.update({f"{metric}/{name}": value for metric, value in values.items()})
        return optimizer_metrics

    @torch.no_grad()
    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Turn norms of what this rank holds into squares that can be added up. Composer's protocol.

        Collective the first time: ranks find out who holds the same elements, of which one counts them.

        Args:
            optimizer_metrics: What was reported; changed. Norms (``l2_norm...``) are squared, in fp64, and 0 where
                another rank counts the same elements; others stay as they are.

        Returns:
            ``optimizer_metrics``.
        """
        counts = self._counts_reported()
        not_counted = {name for name, param in self._reported.items() if not counts.get(id(param), True)}
        zeroed = {f"{metric}/{name}" for name in not_counted for metric in self.metric_functions}
        for key, value in optimizer_metrics.items():
            if _is_norm(key):
                square = torch.as_tensor(value).to(torch.float64).square()
                optimizer_metrics[key] = torch.zeros_like(square) if key in zeroed else square
        return optimizer_metrics

    @torch.no_grad()
    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Add up over ranks what ``pre_reduce_metrics`` returned. Composer's protocol.

        Collective: one all-reduce for everything, and an exchange of names where some are new. Waits for the device.

        Args:
            optimizer_metrics: May lack what other ranks have; changed.

        Returns:
            ``optimizer_metrics``, 0-d fp32, sorted, with the same keys on every rank: norms, and of what is not called
            ``l2_norm...`` the mean over the ranks that had it.
        """
        collectives = self._call_roll()[0].collectives
        while True:
            packed = _pack(optimizer_metrics, self._known_keys, self._device)
            collectives.all_reduce_(packed, dist.ReduceOp.SUM).wait()
            if not packed[0]:
                break
            texts = collectives.gather_texts(json.dumps(list(optimizer_metrics)))
            self._known_keys = tuple(sorted({key for text in texts for key in json.loads(text)}))
        totals, counts = packed[1:].view(2, -1)
        optimizer_metrics.clear()
        for key, total, count, num_ranks in zip(self._known_keys, totals, counts, counts.tolist(), strict=True):
            if num_ranks:
                optimizer_metrics[key] = (total.sqrt() if _is_norm(key) else total / count).to(torch.float32)
        return optimizer_metrics

    @property
    def _device(self) -> torch.device:
        """Where norms are computed."""
        return next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))

    def _counts(self) -> Mapping[int, bool]:
        """Whether this rank counts its part of a parameter, by the parameter's id. Collective as ``_call_roll``."""
        roll, index_of = self._call_roll()
        return {param: roll.counts[index] for param, index in index_of.items()}

    def _counts_reported(self) -> Mapping[int, bool]:
        """Whether what this rank reports of a parameter counts, by the parameter's id. Collective as ``_call_roll``."""
        return self._counts()

    def _values_to_report(self) -> Mapping[int, Mapping[str, Tensor]]:
        """Per updated parameter, by its id, its metrics, for the part that is on this rank."""
        if self._values is None:
            self._values = {}
            own = self._own_functions()
            for params, squares in self._squares(self._last.updated_here()):
                norms = squares.sqrt().to(torch.float32).unbind()
                for param, row in zip(params, norms, strict=True):
                    others = self._call_functions(param) if own else {}
                    measured = dict(zip(NORMS, row.unbind(), strict=True))
                    self._values[id(param)] = {
                        metric: others[metric] if metric in own else measured[_MEASURED[function]]
                        for metric, function in self.metric_functions.items()
                        if metric not in own or metric in others
                    }
        return self._values

    def _add_up(self) -> Table:
        """The metrics of all parameters, of all ranks. Collective."""
        roll, index_of = self._call_roll()
        own = self._own_functions()
        squares = torch.zeros(len(roll.names), len(NORMS), dtype=torch.float64, device=self._device)
        others = torch.zeros(len(own), 2, len(roll.names), dtype=torch.float64, device=self._device)
        here = [(param, roll.rows[index_of[id(param)]]) for param in self._held_params()]
        trainable = {row for row, was in enumerate(roll.trainable) if was}
        trainable |= {row for param, row in here if param.requires_grad}
        for params, part in self._squares([param for param, row in here if row in trainable]):
            counted = [
                (row, roll.rows[index_of[id(param)]])
                for row, param in enumerate(params)
                if roll.counts[index_of[id(param)]]
            ]
            if counted:
                rows, places = torch.tensor(counted).to(self._device, non_blocking=True).unbind(1)
                squares[places] = part[rows]
        for param in self._last.updated_here() if own else ():
            if id(param) not in index_of:
                continue
            place = roll.rows[index_of[id(param)]]
            for metric, value in self._call_functions(param).items():
                if roll.counts[index_of[id(param)]]:
                    number = own.index(metric)
                    others[number, 0, place] = value.to(torch.float64).square() if _is_norm(metric) else value
                    others[number, 1, place] = 1.0
        packed = torch.cat([squares.flatten(), others.flatten()])
        roll.collectives.all_reduce_(packed, dist.ReduceOp.SUM).wait()
        sums, counts = packed[squares.numel() :].view_as(others).unbind(1)
        columns = dict(zip(NORMS, packed[: squares.numel()].view_as(squares).unbind(1), strict=True))
        totals = {
            metric: sums[own.index(metric)] if metric in own else columns[_MEASURED[function]]
            for metric, function in self.metric_functions.items()
        }
        values = {
            metric: total.sqrt() if _is_norm(metric) else total / counts[own.index(metric)]
            for metric, total in totals.items()
        }
        return Table(
            {param: roll.rows[index] for param, index in index_of.items()},
            {row: roll.names[row] for row in sorted(trainable)},
            {metric: total for metric, total in totals.items() if _is_norm(metric)},
            {metric: value.to(torch.float32).unbind() for metric, value in values.items()},
        )

    def _squares(self, params: Sequence[Tensor]) -> list[tuple[Sequence[Tensor], Tensor]]:
        """Of these parameters, fp64 [num_params, 4] in the order of NORMS, of this rank's parts after the last step."""
        wanted = {id(param) for param in params}
        found = []
        for measured, squares in self._last.measured:
            rows = [row for row, param in enumerate(measured) if id(param) in wanted]
            wanted.difference_update(id(param) for param in measured)
            if len(rows) < len(measured):
                measured, squares = [measured[row] for row in rows], squares[rows]
            if measured:
                found.append((measured, squares))
        rest = [param for param in params if id(param) in wanted]
        if rest:
            updated = {id(param) for param in self._last.unmeasured}
            found.append((rest, torch.stack([self._measure(param, id(param) in updated) for param in rest])))
        # Where state is in host memory they were measured there.
        return [(params, squares.to(self._device, non_blocking=True)) for params, squares in found]

    def _measure(self, param: Tensor, is_updated: bool) -> Tensor:
        """The squares of a parameter that no update has measured, fp64 [4] in the order of NORMS."""
        value, exp_avg = self._at_rest(param)
        squares = {"param": value} if exp_avg is None else {"param": value, "moment": exp_avg}
        if is_updated:
            operands, hyper = self._as_updated(param)
            squares |= {"grad": self._divided_gradient(operands), "update": self._subtracted(operands, hyper)}
        sums = dict(zip(squares, sums_of_squares(list(squares.values())).unbind(), strict=True))
        zero = torch.zeros((), dtype=torch.float64, device=value.device)
        return torch.stack([sums.get(norm, zero) for norm in NORMS])

    def _own_functions(self) -> list[str]:
        """The metrics whose values do not come out of the update, but of a function."""
        functions = self.metric_functions.items()
        return [metric for metric, function in functions if function not in _MEASURED or not _is_norm(metric)]

    def _call_functions(self, param: Tensor) -> dict[str, Tensor]:
        """What a user's functions return for this rank's part of an updated parameter, if that has elements."""
        operands, hyper = self._as_updated(param)
        if not operands.param.numel():
            return {}
        part = operands.param.detach()
        part.grad = self._divided_gradient(operands).to(part.dtype)
        state = {key: local(value) for key, value in self.state[param].items()}
        step = self._subtracted(operands, hyper)
        return {
            metric: torch.as_tensor(self.metric_functions[metric](part, state, step))
            for metric in self._own_functions()
        }

    def _divided_gradient(self, operands: Operands) -> Tensor:
        divisor = self._last.grad_divisor
        grad = operands.grad.to(torch.promote_types(operands.grad.dtype, torch.float32))
        return grad if divisor is None else grad / divisor.to(grad.device)

    def _as_updated(self, param: Tensor) -> tuple[Operands, Hyperparameters]:
        groups = (index for index, group in enumerate(self.param_groups) if any(param is p for p in group["params"]))
        hyper = self._last.hypers[next(groups)]
        return self._operands_of(param, hyper), hyper

    def _subtracted(self, operands: Operands, hyper: Hyperparameters) -> Tensor:
        """What the last step subtracted from this rank's part of a parameter that it updated."""
        value = value_of(operands.param, operands.main)
        maximum = operands.max_exp_avg_sq
        second_moment = operands.exp_avg_sq if maximum is None else maximum
        hyper = hyper.on(value.device)
        return self._unless_skipped(applied_update(value, operands.exp_avg, second_moment, operands.step, hyper=hyper))

    def _unless_skipped(self, values: Tensor) -> Tensor:
        found_inf = self._last.found_inf
        return values if found_inf is None else torch.where(found_inf.to(values.device) != 0, 0, values)


def _is_norm(metric: str) -> bool:
    return metric.startswith("l2_norm")


def _pack(metrics: Mapping[str, Any], keys: Sequence[str], device: torch.device) -> Tensor:
    """What one rank adds to a sum over ranks, fp64 [1 + 2 * num_keys].

    Returns:
        Whether it has a metric that is not among ``keys``; per key its value, or 0; per key whether it has one.
    """
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = [torch.as_tensor(metrics[key]).to(device, torch.float64) if key in metrics else zero for key in keys]
    flags = [float(not metrics.keys() <= set(keys)), *(float(key in metrics) for key in keys)]
    has_new, *has = torch.tensor(flags, dtype=torch.float64).to(device, non_blocking=True).split([1, len(keys)])
    return torch.cat([has_new, *([torch.stack(values)] if values else []), *has])
