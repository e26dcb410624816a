"""The law again, fused: one pass over memory where the device has a kernel for it, the reference elsewhere.

Invariant: the result for an element does not depend on where in a tensor it lies. torch's vectorised CPU kernel keeps
that only up to the last few elements of a tensor, which go through a scalar loop that rounds differently; so the ragged
end of a tensor is updated in a padded scratch block instead, and every element meets the vectorised loop. Without this
a sharded update could not equal the unsharded one bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_dadamw.layout import ALIGNMENT
from sharded_dadamw.update import Hyperparameters
from sharded_dadamw.update import adamw_ as reference_adamw_

_Row = tuple[Tensor, ...]
"""What one update touches: parameter, gradient, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq."""
_GRAD = 1

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    hyper: Hyperparameters,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Apply the law to each tensor, in place.

    Args:
        params: Tensors of any shape; decayed and updated in place.
        grads: Shapes of ``params``; rewritten (divided) in place where ``grad_divisor`` is given, else only read.
        exp_avgs: Shapes of ``params``; updated in place.
        exp_avg_sqs: Shapes of ``params``; updated in place.
        max_exp_avg_sqs: Shapes of ``params``; updated in place. Empty without amsgrad.
        steps: 0-d fp32, on the device of ``params``: the number of this update, counted from 1.
        hyper: The scalars, the same for all tensors of one call.
        grad_divisor: 0-d fp32; gradients are divided by it in the kernel. None means 1.
        found_inf: 0-d fp32; where it is 1 every byte stays as it was.

    Raises:
        ValueError: The tensors of one update differ in shape. Nothing has then been changed.
    """
    if not params:
        return
    columns = [params, grads, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if hyper.amsgrad else [])]
    rows = list(zip(*columns, strict=True))
    for row in rows:
        # torch's kernel takes the sizes of all from the first, and would write past the end of the others.
        if any(tensor.shape != row[0].shape for tensor in row):
            raise ValueError(f"expected tensors of one shape, got {[list(tensor.shape) for tensor in row]}")
    fusible: dict[torch.dtype, list[tuple[_Row, Tensor]]] = {}
    for row, step in zip(rows, steps, strict=True):
        if _is_fusible(row):
            fusible.setdefault(row[0].dtype, []).append((row, step))
            continue
        param, grad, exp_avg, exp_avg_sq, *maximum = row
        reference_adamw_(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            maximum[0] if maximum else None,
            step,
            hyper=hyper,
            grad_divisor=grad_divisor,
            found_inf=found_inf,
        )
    for alike in fusible.values():
        _fused_adamw_([row for row, _ in alike], [step for _, step in alike], hyper, grad_divisor, found_inf)


def _is_fusible(row: _Row) -> bool:
    """Torch's fused kernel wants one dtype and one device for all tensors of an update."""
    first = row[0]
    return (
        first.device.type in _FUSED_DEVICES
        and first.dtype in _FUSED_DTYPES
        and all(t.dtype == first.dtype and t.device == first.device for t in row)
    )


def _fused_adamw_(
    rows: Sequence[_Row],
    steps: Sequence[Tensor],
    hyper: Hyperparameters,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    aligned: list[_Row] = []
    aligned_steps: list[Tensor] = []
    tails: list[_Row] = []
    tail_steps: list[Tensor] = []
    originals: list[Tensor] = []
    copies: list[Tensor] = []
    for row, step in zip(rows, steps, strict=True):
        flat = tuple(t.contiguous().view(-1) for t in row)
        for column, (original, copy) in enumerate(zip(row, flat, strict=True)):
            if column != _GRAD and original.data_ptr() != copy.data_ptr():
                originals.append(original)
                copies.append(copy.view(original.shape))
        numel = flat[0].numel()
        body = numel - numel % ALIGNMENT
        if body:
            aligned.append(tuple(f[:body] for f in flat))
            aligned_steps.append(step)
        if body < numel:
            tails.append(tuple(f[body:] for f in flat))
            tail_steps.append(step)
    blocks = _padded(tails)
    _call_fused_(aligned + blocks, aligned_steps + tail_steps, hyper, grad_divisor, found_inf)
    # The tails first: they may belong to the copy of a tensor that is not contiguous.
    for column, targets in enumerate(zip(*tails, strict=True)):
        if column != _GRAD:
            _copy_(targets, [block[column][: t.numel()] for block, t in zip(blocks, targets, strict=True)])
    _copy_(originals, copies)


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


def _call_fused_(
    rows: Sequence[_Row],
    steps: Sequence[Tensor],
    hyper: Hyperparameters,
    grad_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Call torch's kernel on contiguous tensors."""
    if not rows:
        return
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
        columns[4] if hyper.amsgrad else [],
        [step.to(row[0].device) for row, step in zip(rows, steps, strict=True)],
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=coupled_weight_decay,
        eps=hyper.eps,
        amsgrad=hyper.amsgrad,
        maximize=False,
        grad_scale=grad_divisor,
        found_inf=found_inf,
    )
