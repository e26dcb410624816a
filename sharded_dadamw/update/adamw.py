"""The update rule: decoupled AdamW as one pure function over tensors.

    decay   = weight_decay * lr / initial_lr        (weight_decay where initial_lr is 0)
    param  *= 1 - decay
    exp_avg, exp_avg_sq: moving averages of g and g * g
    max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                                (amsgrad only)
    denom   = sqrt(exp_avg_sq or max_exp_avg_sq) / sqrt(1 - beta2^step) + eps
    param  -= lr / (1 - beta1^step) * exp_avg / denom

This is MosaicML Composer's ``DecoupledAdamW``: the decay follows the learning-rate *schedule*, lr / initial_lr, and
not the learning rate itself. The functions here are the reference. ``sharded_dadamw.kernels`` holds the fused twin
that training runs, and falls back to this one where no fused kernel exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.precision import join, random_bits, round_stochastically, split, weight_of, without_edits


@dataclass(frozen=True, slots=True)
class Step:
    """What an update is told beside its tensors; the same for everything that one step updates.

    Attributes:
        hypers: Per parameter group its scalars.
        divisor: 0-d fp32 by which gradients are divided (loss scale, inverse clip coefficient). None means 1.
        void: 0-d fp32; where it is not 0 nothing changes. None means 0.
    """

    hypers: Sequence[Hyperparameters]
    divisor: Tensor | None = None
    void: Tensor | None = None


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    count: Tensor,
    step: Step,
    group: int = 0,
    *,
    main: Tensor | None = None,
    first_element: int | None = None,
) -> None:
    """Apply the update rule to one tensor, in place, in fp32 (fp64 where ``param`` is).

    Args:
        param: Any shape; decayed and updated in place.
        grad: Shape of ``param``, any floating dtype; only read.
        exp_avg: Shape of ``param``, any floating dtype; updated in place.
        exp_avg_sq: Shape and dtype of ``exp_avg``; updated in place.
        max_exp_avg_sq: Shape and dtype of ``exp_avg``; updated in place. None without amsgrad.
        count: 0-d; the number of this update, counted from 1.
        step: Scalars of the groups, and what holds for all of them.
        group: Position of the parameter's group.
        main: Shape of ``param``; updated in place. fp32: the value that the rule acts on, which ``param`` becomes
            rounded; where ``param`` was written into since, the rule acts on that. int16: what a bf16 ``param`` lacks
            of that value. None: the rule acts on ``param``.
        first_element: Number of the first element, counted over all parameters: the key of the stochastic rounding of
            bf16 moments. None: moments are rounded to the nearest.
    """
    hyper = step.hypers[group]
    wide = torch.promote_types(param.dtype, torch.float32)
    value = value_of(param, main)
    grad = grad.to(wide)
    if step.divisor is not None:
        grad = grad / step.divisor
    new_exp_avg = hyper.beta1 * exp_avg.to(wide) + (1 - hyper.beta1) * grad
    new_exp_avg_sq = hyper.beta2 * exp_avg_sq.to(wide) + (1 - hyper.beta2) * (grad * grad)
    second_moment = new_exp_avg_sq
    if max_exp_avg_sq is not None:
        second_moment = torch.maximum(max_exp_avg_sq.to(wide), new_exp_avg_sq)
    update = hyper.decay * value + _descent(new_exp_avg, second_moment, count, hyper)
    value = value - update

    # Selected, not multiplied: 0 * nan is nan.
    keep = torch.zeros((), dtype=torch.bool, device=param.device) if step.void is None else step.void != 0
    if first_element is not None:
        elements = torch.arange(first_element, first_element + param.numel(), device=param.device).view(param.shape)
        bits1, bits2 = random_bits(count, elements)
        new_exp_avg = round_stochastically(new_exp_avg, bits1)
        new_exp_avg_sq = round_stochastically(new_exp_avg_sq, bits2)
    _select_(exp_avg, new_exp_avg, keep)
    _select_(exp_avg_sq, new_exp_avg_sq, keep)
    if max_exp_avg_sq is not None:
        _select_(max_exp_avg_sq, torch.maximum(max_exp_avg_sq, new_exp_avg_sq.to(max_exp_avg_sq.dtype)), keep)
    if main is None:
        _select_(param, value.to(param.dtype), keep)
    elif main.dtype is torch.int16:
        new_param, new_main = split(value)
        _select_(param, new_param, keep)
        _select_(main, new_main, keep)
    else:
        _select_(main, value, keep)
        _select_(param, weight_of(value, param.dtype), keep)


def value_of(param: Tensor, main: Tensor | None) -> Tensor:
    """Return what the rule acts on, in fp32 or wider, given what ``adamw_`` is given."""
    if main is None:
        return param.to(torch.promote_types(param.dtype, torch.float32))
    return join(param, main) if main.dtype is torch.int16 else without_edits(main, param)


def applied_update(
    value: Tensor, exp_avg: Tensor, second_moment: Tensor, count: Tensor, *, hyper: Hyperparameters
) -> Tensor:
    """Return what the last update subtracted, told from what it left: ``(decay * value + descent) / (1 - decay)``.

    It is ``decay * before + descent`` with ``before = (value + descent) / (1 - decay)``. All is as it is after that
    update, the number of which, counted from 1, is ``count``; ``second_moment`` is ``max_exp_avg_sq`` with amsgrad,
    else ``exp_avg_sq``. Nothing can be told where the scalars made it forget the value (decay 1). fp32 or wider.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    descent = _descent(exp_avg.to(wide), second_moment.to(wide), count, hyper)
    return (hyper.decay * value + descent) / (1 - hyper.decay)


def _descent(exp_avg: Tensor, second_moment: Tensor, count: Tensor, hyper: Hyperparameters) -> Tensor:
    """What the moments take off a value, decay apart."""
    bias_correction1 = 1 - hyper.beta1 ** count.double()
    bias_correction2 = 1 - hyper.beta2 ** count.double()
    denom = second_moment.sqrt() / bias_correction2.sqrt() + hyper.eps
    descent: Tensor = (hyper.lr / bias_correction1) * (exp_avg / denom)
    return descent


def _select_(target: Tensor, new: Tensor, keep: Tensor) -> None:
    target.copy_(torch.where(keep, target, new.to(target.dtype)))
