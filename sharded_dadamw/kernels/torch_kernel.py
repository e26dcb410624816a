"""The update rule by torch's own means: its fused kernel where it can do a form, the reference elsewhere.

This is what runs where neither numba nor Triton is at hand, and for fp64. It yields no norms.

Invariant: the result for an element does not depend on where in a tensor it lies. torch's vectorised CPU kernel keeps
that only up to the last few elements of a tensor, which go through a scalar loop that rounds differently; so the ragged
end of a tensor is updated in a padded scratch block instead, and every element meets the vectorised loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_dadamw.kernels.operands import Form, Operands
from sharded_dadamw.layout.bucket_layout import ALIGNMENT
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.precision import image

_Row = tuple[Tensor, ...]
"""What torch's kernel takes per tensor: value, gradient, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq."""
_GRAD = 1

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class Update:
    """See :class:`sharded_dadamw.kernels.operands.Update`."""

    keeps_tensors = True
    fuses_norms = False

    def __init__(self, operands: Sequence[Operands]) -> None:
        """Take at least one fragment, all of one form, and find those that can be updated as one."""
        self._operands = list(operands)
        self._runs = _merge_adjacent(operands)

    def __call__(self, step: Step, group: int) -> None:
        """See :class:`sharded_dadamw.kernels.operands.Update`."""
        if _is_fusible(self._operands[0].form):
            _fused_adamw_(self._runs, step, group)
            return
        for run in self._runs:
            adamw_(
                run.param,
                run.grad,
                run.exp_avg,
                run.exp_avg_sq,
                run.max_exp_avg_sq,
                run.step,
                step,
                group,
                main=run.main,
                first_element=run.first_element,
            )


def _merge_adjacent(operands: Sequence[Operands]) -> list[Operands]:
    """The fewest fragments that cover the same memory: neighbours with equal step counts become one.

    Args:
        operands: Fragments of one form; those with a ``history`` are 1-D views of flat tensors.
    """
    runs: list[list[Operands]] = []
    for fragment in operands:
        if runs and _follows(runs[-1][-1], fragment):
            runs[-1].append(fragment)
        else:
            runs.append([fragment])
    return [_merge(run) for run in runs]


def _follows(before: Operands, after: Operands) -> bool:
    return (
        before.history is not None
        and before.history == after.history
        # Stochastic rounding goes by the number of an element; nothing else does.
        and (before.first_element is None or before.first_element + before.param.numel() == after.first_element)
        and all(
            one is None
            or two is None
            or (
                one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()
                and one.storage_offset() + one.numel() == two.storage_offset()
            )
            for one, two in zip(before.tensors, after.tensors, strict=True)
        )
    )


def _merge(run: Sequence[Operands]) -> Operands:
    if len(run) == 1:
        return run[0]
    numel = sum(fragment.param.numel() for fragment in run)
    first = run[0]

    def joined(tensor: Tensor) -> Tensor:
        return tensor.as_strided((numel,), (1,))

    return Operands(
        param=joined(first.param),
        grad=joined(first.grad),
        exp_avg=joined(first.exp_avg),
        exp_avg_sq=joined(first.exp_avg_sq),
        max_exp_avg_sq=None if first.max_exp_avg_sq is None else joined(first.max_exp_avg_sq),
        main=None if first.main is None else joined(first.main),
        step=first.step,
        first_element=first.first_element,
        history=first.history,
    )


def _value(fragment: Operands) -> Tensor:
    """What the rule acts on."""
    return fragment.param if fragment.main is None else fragment.main


def _is_fusible(form: Form) -> bool:
    """Torch's fused kernel wants one dtype for value and moments (gradients can be cast), and rounds to the nearest."""
    value = form.param if form.main is None else form.main
    is_one_dtype = form.moments == value and not form.is_stochastic
    return form.is_plain and form.device.type in _FUSED_DEVICES and is_one_dtype


def _fused_adamw_(fragments: Sequence[Operands], step: Step, group: int) -> None:
    """Cut ragged ends off, update everything in one call, and put back what was worked on as a copy."""
    aligned: list[_Row] = []
    aligned_counts: list[Tensor] = []
    tails: list[_Row] = []
    tail_counts: list[Tensor] = []
    for fragment in fragments:
        value = _value(fragment)
        grad = fragment.grad.to(value.dtype)
        if step.divisor is not None and grad is fragment.grad:
            grad = grad.clone()  # torch's kernel divides gradients in place
        columns = (value, grad, fragment.exp_avg, fragment.exp_avg_sq, fragment.max_exp_avg_sq)
        numel = value.numel()
        flat = tuple(column.as_strided((numel,), (1,)) for column in columns if column is not None)
        body = numel - numel % ALIGNMENT
        if body:
            aligned.append(tuple(column[:body] for column in flat))
            aligned_counts.append(fragment.step)
        if body < numel:
            tails.append(tuple(column[body:] for column in flat))
            tail_counts.append(fragment.step)
    blocks = _padded(tails)
    _call_fused_(aligned + blocks, aligned_counts + tail_counts, step, group)
    for column, targets in enumerate(zip(*tails, strict=True)):
        if column != _GRAD:
            _copy_(targets, [block[column][: t.numel()] for block, t in zip(blocks, targets, strict=True)])
    for fragment in fragments:
        if fragment.main is not None:
            fragment.param.copy_(image(fragment.main, fragment.param.dtype))


def _padded(tails: Sequence[_Row]) -> list[_Row]:
    """Copies of ragged ends, each in a block of its own that a vectorised loop covers whole."""
    columns = []
    for column in zip(*tails, strict=True):
        blocks = column[0].new_zeros(len(column), ALIGNMENT).unbind()
        _copy_([block[: t.numel()] for block, t in zip(blocks, column, strict=True)], column)
        columns.append(blocks)
    return list(zip(*columns, strict=True))


def _copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def _call_fused_(rows: Sequence[_Row], counts: Sequence[Tensor], step: Step, group: int) -> None:
    if not rows:
        return
    hyper, found_inf = step.hypers[group], step.found_inf
    columns = [list(column) for column in zip(*rows, strict=True)]
    if hyper.reference_lr:
        # torch multiplies weights by 1 - lr * weight_decay; handed weight_decay / reference_lr, that is our decay.
        coupled_weight_decay = hyper.weight_decay / hyper.reference_lr
    else:
        # Full decay whatever lr is: no coupled value expresses that.
        coupled_weight_decay = 0.0
        factor = torch.tensor(1 - hyper.weight_decay, dtype=torch.float64)
        torch._foreach_mul_(columns[0], factor if found_inf is None else torch.where(found_inf != 0, 1.0, factor))
    torch._fused_adamw_(
        columns[0],
        columns[1],
        columns[2],
        columns[3],
        columns[4] if len(columns) > 4 else [],
        [count.to(row[0].device) for row, count in zip(rows, counts, strict=True)],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=coupled_weight_decay,
        eps=hyper.eps,
        amsgrad=len(columns) > 4,
        maximize=False,
        grad_scale=step.divisor,
        found_inf=found_inf,
    )
