"""The update rule by torch's own means: its fused kernel where it can do a form, the reference elsewhere.

This is what runs where neither numba nor Triton is at hand, and for fp64. It yields no norms.

Invariant: the result for an element does not depend on where in a tensor it lies. torch's vectorised CPU kernel keeps
that only up to the last few elements of a tensor, which go through a scalar loop that rounds differently; so the ragged
end of a tensor is updated in a padded scratch block instead, and every element meets the vectorised loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from sharded_dadamw.kernels.operands import Form, Operands
from sharded_dadamw.layout.bucket_layout import ALIGNMENT
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.precision import weight_of, without_edits

_Columns = list[list[Tensor]]
"""Per argument of torch's kernel a tensor of each fragment: value, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq (none
without amsgrad), and the number of the update."""
_GRAD = 1


class Update:
    """See ``sharded_dadamw.kernels.operands.Update``."""

    keeps_tensors = True
    fuses_norms = False

    def __init__(self, operands: Sequence[Operands]) -> None:
        self._operands = list(operands)
        self._is_fusible = _is_fusible(operands[0].form)
        if self._is_fusible:
            self._bodies, self._ends = _split(operands)

    def point_to(self, gradients: Tensor) -> NoReturn:
        """See ``sharded_dadamw.kernels.operands.Update``; this one has tensors."""
        raise NotImplementedError

    def __call__(self, step: Step, group: int) -> None:
        if self._is_fusible:
            self._call_fused(step, group)
            return
        for each in self._operands:
            adamw_(
                each.param,
                each.grad,
                each.exp_avg,
                each.exp_avg_sq,
                each.max_exp_avg_sq,
                each.count,
                step,
                group,
                main=each.main,
                first_element=each.first_element,
            )

    def _call_fused(self, step: Step, group: int) -> None:
        """Update everything in one call, and put back what was worked on as a copy."""
        for each in self._operands:
            if each.main is not None:
                each.main.copy_(without_edits(each.main, each.param))
        *ends, counts = self._ends
        dtype = self._operands[0].exp_avg.dtype
        blocks = [_padded(column, dtype) for column in ends]
        bodies = list(self._bodies)
        # torch's kernel divides gradients in place.
        bodies[_GRAD] = [grad.to(dtype, copy=step.divisor is not None) for grad in bodies[_GRAD]]
        _fused_adamw_([body + end for body, end in zip(bodies, [*blocks, counts], strict=True)], step, group)
        for column, (targets, updated) in enumerate(zip(ends, blocks, strict=True)):
            if column != _GRAD:
                _copy_(targets, [block[: t.numel()] for block, t in zip(updated, targets, strict=True)])
        for each in self._operands:
            if each.main is not None:
                each.param.copy_(weight_of(each.main, each.param.dtype))


def _is_fusible(form: Form) -> bool:
    """Torch's fused kernel wants one dtype for value and moments (gradients can be cast), and rounds to the nearest."""
    value = form.param if form.main is None else form.main
    is_one_dtype = form.moments == value and not form.is_stochastic
    return form.is_plain and form.device.type in ("cpu", "cuda") and is_one_dtype


def _split(operands: Sequence[Operands]) -> tuple[_Columns, _Columns]:
    """Cut fragments into what fills whole vectors, and their ragged ends; views, and nothing of what is empty."""
    bodies: list[list[Tensor]] = []
    ends: list[list[Tensor]] = []
    for each in operands:
        value = each.param if each.main is None else each.main
        tensors = (value, each.grad, each.exp_avg, each.exp_avg_sq, each.max_exp_avg_sq)
        flat = [tensor.as_strided((value.numel(),), (1,)) for tensor in tensors if tensor is not None]
        body = value.numel() // ALIGNMENT * ALIGNMENT
        for rows, part in ((bodies, slice(body)), (ends, slice(body, None))):
            if flat[0][part].numel():
                rows.append([*(tensor[part] for tensor in flat), each.count])
    num_columns = 6 if operands[0].max_exp_avg_sq is not None else 5
    of_bodies, of_ends = ([[row[i] for row in rows] for i in range(num_columns)] for rows in (bodies, ends))
    return of_bodies, of_ends


def _padded(ends: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of ragged ends, each in a block of its own that a vectorised loop covers whole."""
    if not ends:
        return []
    blocks = ends[0].new_zeros(len(ends), ALIGNMENT, dtype=dtype).unbind()
    _copy_([block[: end.numel()] for block, end in zip(blocks, ends, strict=True)], ends)
    return list(blocks)


def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _fused_adamw_(columns: _Columns, step: Step, group: int) -> None:
    values, grads, exp_avgs, exp_avg_sqs, *maxima, counts = columns
    if not values:
        return
    hyper, void = step.hypers[group], step.void
    if hyper.initial_lr:
        # torch multiplies weights by 1 - lr * weight_decay; handed weight_decay / initial_lr, that is our decay.
        coupled_weight_decay = hyper.weight_decay / hyper.initial_lr
    else:
        # Full decay whatever lr is: no coupled value expresses that.
        coupled_weight_decay = 0.0
        factor = torch.tensor(1 - hyper.weight_decay, dtype=torch.float64)
        torch._foreach_mul_(values, factor if void is None else torch.where(void != 0, 1.0, factor))
    torch._fused_adamw_(
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        maxima[0] if maxima else [],
        counts,
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=coupled_weight_decay,
        eps=hyper.eps,
        amsgrad=bool(maxima),
        maximize=False,
        grad_scale=step.divisor,
        found_inf=void,
    )
