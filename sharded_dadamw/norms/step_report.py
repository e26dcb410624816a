"""What an optimizer says about its last step: norms per parameter and over all parameters.

    l2_norm/grad/NAME       the gradient as it went into the update: averaged, unscaled, clipped
    l2_norm/moment/NAME     exp_avg after the step
    l2_norm/param/NAME      the parameter after the step (the fp32 main parameter, where there is one)
    l2_norm/update/NAME     what the step subtracted from the parameter, decay included
    l2_norm/.../global      the same over all parameters

The kernel that makes an update yields these squares for what this rank holds, and the step leaves them in a
``StepReport``. Who asks for metrics has them put into one table with a row per parameter of any rank, and added
up over ranks in one all-reduce.

Source of the names: MosaicML Composer, ``composer.optim.DecoupledAdamW``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_dadamw.kernels.operands import NORMS, Operands
from sharded_dadamw.norms.global_norm import sums_of_squares
from sharded_dadamw.update.adamw import Step, applied_update, value_of
from sharded_dadamw.update.hyperparameters import Hyperparameters

METRICS = {f"l2_norm/{norm}": NORMS.index(norm) for norm in ("moment", "param", "update", "grad")}
"""Every metric of a parameter, in the order of reporting, and where in NORMS it is."""


_NO_STEP = Step(())


@dataclass(slots=True)
class StepReport:
    """What is known of the most recent step; a step fills it, and nothing is computed until somebody asks.

    Attributes:
        step: What its updates were told.
        clip: 0-d fp32 each, the norm of the gradients before a clip within the step, and what all clips together
            multiplied them by; None where steps do not clip.
        num_skipped: 0-d fp64, the number of steps so far that changed nothing; None means 0.
        updated: The parameters that had a gradient, on any rank.
        table: Norms of all parameters of all ranks, where the step has added them up.
        values: Per updated parameter, by its id, fp32 [4] in the order of NORMS, once they were asked for.
        names: What somebody called the parameters that were reported to him; their ids.
        unmeasured: The parameters of which this rank has updated parts without squaring them, and by what scalars.
    """

    step: Step = _NO_STEP
    num_skipped: Tensor | None = None
    clip: tuple[Tensor, Tensor] | None = None
    updated: list[Tensor] = field(default_factory=list)
    table: Table | None = None
    values: Mapping[int, Tensor] | None = None
    names: dict[str, int] = field(default_factory=dict)
    unmeasured: list[tuple[Tensor, Hyperparameters]] = field(default_factory=list)
    _measured: list[tuple[Sequence[Tensor], Tensor]] = field(default_factory=list)

    def next(self, step: Step, clip: tuple[Tensor, Tensor] | None = None) -> StepReport:
        """Begin the report of the step after this one, given what is known of it at once."""
        skipped = self.num_skipped
        if step.void is not None:
            void = (step.void != 0).to(torch.float64)
            skipped = void if skipped is None else skipped + void
        return StepReport(step, skipped, clip)

    def add(self, params: Sequence[Tensor], squares: Tensor | None, hyper: Hyperparameters) -> None:
        """Take the parameters of which an update of one group has updated parts of this rank.

        ``squares`` are their squared norms, fp64 [num_params, 4] in the order of NORMS; None where the kernel yields
        none.
        """
        if squares is None:
            self.unmeasured += [(param, hyper) for param in params]
        elif params:
            self._measured.append((params, squares))

    def updated_here(self) -> list[Tensor]:
        """The parameters of which this rank has updated parts."""
        of_measured = [param for params, _ in self._measured for param in params]
        return of_measured + [param for param, _ in self.unmeasured]

    def squares_of(
        self, params: Sequence[Tensor], look: Callable[[Tensor], Operands], device: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        """Square and sum this rank's parts of parameters, where the update has not done so.

        ``look`` shows those that no update has measured, see ``Held``. Returns the parameters in another order, and
        fp64 [num_params, 4] on ``device`` in the order of NORMS.
        """
        left = {id(param): param for param in params}
        found: list[Tensor] = []
        chunks = [torch.zeros(0, len(NORMS), dtype=torch.float64, device=device)]
        for measured, squares in self._measured:
            rows = [row for row, param in enumerate(measured) if left.pop(id(param), None) is not None]
            found += [measured[row] for row in rows]
            chunks.append((squares if len(rows) == len(measured) else squares[rows]).to(device, non_blocking=True))
        hypers = {id(param): hyper for param, hyper in self.unmeasured}
        for key, param in left.items():
            found.append(param)
            chunks.append(self._measure(look(param), hypers.get(key))[None].to(device, non_blocking=True))
        return found, torch.cat(chunks)

    def _measure(self, now: Operands, hyper: Hyperparameters | None) -> Tensor:
        """The squares of a part, fp64 [4] in the order of NORMS; without ``hyper`` the step has not updated it."""
        value = value_of(now.param, now.main)
        tensors = {"param": value, "moment": now.exp_avg}
        if hyper is not None:
            second_moment = now.max_exp_avg_sq if hyper.amsgrad else now.exp_avg_sq
            assert second_moment is not None
            grad = now.grad.to(torch.promote_types(now.grad.dtype, torch.float32))
            tensors["grad"] = grad if self.step.divisor is None else grad / self.step.divisor.to(grad.device)
            update = applied_update(value, now.exp_avg, second_moment, now.count, hyper=hyper.on(value.device))
            tensors["update"] = self.unless_skipped(update)
        sums = dict(zip(tensors, sums_of_squares(list(tensors.values())).unbind(), strict=True))
        zero = torch.zeros((), dtype=torch.float64, device=value.device)
        return torch.stack([sums.get(norm, zero) for norm in NORMS])

    def unless_skipped(self, values: Tensor) -> Tensor:
        """Return the values, or zeros where the step has changed nothing."""
        void = self.step.void
        return values if void is None else torch.where(void.to(values.device) != 0, 0, values)


class Table(NamedTuple):
    """Norms of all parameters of all ranks.

    Attributes:
        squares: fp64 [num_names, 4], the sums of squares, in the order of NORMS.
        rows: Those of parameters that are trainable, or were when names were exchanged.
        names: The parameter of each row.
        row_of: The row of each parameter of this rank, by its id.
    """

    squares: Tensor
    rows: list[int]
    names: Sequence[str]
    row_of: Mapping[int, int]


def named_values(report: StepReport, table: Table, num_groups: int) -> dict[str, Tensor]:
    """Name everything that is known of the last step; see ``DecoupledAdamW.metrics``."""
    device = table.squares.device
    norms = [row.unbind() for row in table.squares.sqrt().to(torch.float32).unbind()]
    found = {f"{key}/{table.names[row]}": norms[row][column] for row in table.rows for key, column in METRICS.items()}
    totals = table.squares.sum(0).sqrt().to(torch.float32)
    found.update({f"{key}/global": totals[column] for key, column in METRICS.items()})
    decays = [hyper.decay for hyper in report.step.hypers] or [0.0] * num_groups
    for index, value in enumerate(decays):
        decay = torch.as_tensor(value, dtype=torch.float32).to(device, non_blocking=True)
        found[f"effective_decay/group_{index}"] = report.unless_skipped(decay)
    skipped = torch.zeros(()) if report.num_skipped is None else report.num_skipped
    if report.clip is not None:
        found["grad_norm"], found["clip_coefficient"] = report.clip
    found["skipped_steps"] = skipped.to(device, torch.float32, non_blocking=True)
    return found


def gone() -> RuntimeError:
    """The error of asking for norms of gradients that were dropped."""
    return RuntimeError("a gradient of the last step is gone; ask for metrics between step() and zero_grad()")
