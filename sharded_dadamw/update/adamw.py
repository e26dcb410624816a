"""The update rule: decoupled AdamW as one pure function over tensors, and the scalars it needs.

    decay   = weight_decay * lr / initial_lr        (weight_decay where initial_lr is 0)
    param  *= 1 - decay
    exp_avg, exp_avg_sq: moving averages of g and g * g
    max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                                (amsgrad only)
    denom   = sqrt(exp_avg_sq or max_exp_avg_sq) / sqrt(1 - beta2^step) + eps
    param  -= lr / (1 - beta1^step) * exp_avg / denom

This is MosaicML Composer's ``DecoupledAdamW``: the decay follows the learning-rate *schedule*, lr / initial_lr, and
not the learning rate itself. The functions here are the reference. :mod:`sharded_dadamw.kernels` holds the fused twin
that training runs, and falls back to this one where no fused kernel exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.update.precision import join, random_bits, round_stochastically, split, weight_of

FREE_OF_LR = "free of lr"
"""What our groups have as ``decoupled_weight_decay``, which is True in others'. A state dict has nothing else that
tells what its weight decay means, and an entry of our own would be missing where torch's AdamW was saved."""

_UNSUPPORTED_SWITCHES = ("maximize", "differentiable")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The scalars of one parameter group for one step, read once from its dict.

    Attributes:
        lr: Learning rate of this step. A tensor where the group's is one on an accelerator: the host never reads it.
        initial_lr: The schedule's peak; ``lr / initial_lr`` is the schedule's multiplier.
        beta1: Coefficient of ``exp_avg``.
        beta2: Coefficient of ``exp_avg_sq``.
        eps: Added to the denominator.
        weight_decay: Fraction of a weight that decays away per step at the schedule's peak.
        amsgrad: Whether the denominator uses the running maximum of ``exp_avg_sq``.
    """

    lr: float | Tensor
    initial_lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Read a parameter group.

        ``OneCycleLR`` overwrites ``initial_lr`` with ``max_lr / div_factor``, which would let the decay climb to
        ``div_factor`` times ``weight_decay``; it also writes ``max_lr``. The reference is the larger of the two, so the
        schedule's multiplier, and with it the decay, never exceeds its peak value.
        """
        lr = group["lr"]
        if not (isinstance(lr, Tensor) and lr.device.type != "cpu"):
            lr = float(lr)
        beta1, beta2 = group["betas"]
        return cls(
            lr=lr,
            initial_lr=max(float(group.get("initial_lr", lr)), float(group.get("max_lr", 0.0))),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            amsgrad=bool(group["amsgrad"]),
        )

    def on(self, device: torch.device) -> Hyperparameters:
        """The same for tensors on a device: on a CPU ``lr`` is a number. Waits where it is a tensor elsewhere."""
        is_to_be_read = device.type == "cpu" and isinstance(self.lr, Tensor)
        return replace(self, lr=float(self.lr)) if is_to_be_read else self

    @property
    def multiplier(self) -> float | Tensor:
        """What the schedule multiplies the decay by; a 0-d tensor where ``lr`` is one."""
        return self.lr / self.initial_lr if self.initial_lr else 1.0

    @property
    def decay(self) -> float | Tensor:
        """Fraction by which every weight shrinks in this step; a 0-d tensor where ``lr`` is one."""
        return self.weight_decay * self.multiplier


@dataclass(frozen=True, slots=True)
class Step:
    """What an update is told beside its tensors; the same for everything that one step updates.

    Attributes:
        hypers: Per parameter group its scalars.
        divisor: 0-d fp32 by which gradients are divided (loss scale, inverse clip coefficient). None means 1.
        found_inf: 0-d fp32; where it is not 0 nothing changes. None means 0.
    """

    hypers: Sequence[Hyperparameters]
    divisor: Tensor | None = None
    found_inf: Tensor | None = None


def read_groups(groups: Sequence[Mapping[str, Any]]) -> list[Hyperparameters]:
    """Read the scalars of every group, for one step.

    Raises:
        ValueError: A group's decay, which is not looked at where ``lr`` is on an accelerator, is 1 or more.
    """
    hypers = [Hyperparameters.from_group(group) for group in groups]
    for index, hyper in enumerate(hypers):
        if not isinstance(hyper.decay, Tensor) and hyper.decay >= 1.0:
            raise ValueError(
                f"param_groups[{index}]: expected a decay per step below 1, got {hyper.decay:g}, which is weight_decay "
                f"{hyper.weight_decay:g} times lr {hyper.lr:g} over initial_lr {hyper.initial_lr:g}; set the group's "
                "initial_lr to the peak of the schedule, or for a search of learning rates its weight_decay to 0"
            )
    return hypers


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside the rule's domain. Waits for the device where ``lr`` is a tensor on one.

    Raises:
        TypeError: ``lr`` is a tensor of more than one element.
        ValueError: A value is outside its range, or a switch of torch's AdamW is on that this rule does not have.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise TypeError(f"lr: expected a float or a tensor of one element, got one of {lr.numel()} elements")
    for name in ("lr", "eps", "weight_decay"):
        value = float(group[name])
        if not (value >= 0.0 and math.isfinite(value)):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0.0 <= float(beta) < 1.0 for beta in betas):
        raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
    initial_lr = float(group.get("initial_lr", 0.0))
    if not (initial_lr >= 0.0 and math.isfinite(initial_lr)):
        raise ValueError(f"initial_lr: expected a finite number >= 0, got {initial_lr}")
    for switch in _UNSUPPORTED_SWITCHES:
        if group.get(switch):
            raise ValueError(
                f"{switch}: expected False, got {group[switch]}; decoupled AdamW does not have this switch"
            )


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
            rounded. int16: what a bf16 ``param`` lacks of that value. None: the rule acts on ``param``.
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
    keep = torch.zeros((), dtype=torch.bool, device=param.device) if step.found_inf is None else step.found_inf != 0
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
    """Return what the rule acts on, in fp32 or wider, given what :func:`adamw_` is given."""
    if main is None:
        return param.to(torch.promote_types(param.dtype, torch.float32))
    return join(param, main) if main.dtype is torch.int16 else main


def applied_update(
    value: Tensor, exp_avg: Tensor, second_moment: Tensor, count: Tensor, *, hyper: Hyperparameters
) -> Tensor:
    """Return what the last update subtracted, told from what it left: ``(decay * value + descent) / (1 - decay)``.

    It is ``decay * before + descent`` with ``before = (value + descent) / (1 - decay)``.

    Args:
        value: What the rule acted on, as it is after that update.
        exp_avg: Shape of ``value``, after the update.
        second_moment: Shape of ``value``: ``exp_avg_sq``, or with amsgrad ``max_exp_avg_sq``, after the update.
        count: 0-d; the number of that update, counted from 1.
        hyper: The scalars that it had; nothing can be told where they made it forget the value (decay 1).

    Returns:
        Shape of ``value``, fp32 or wider.
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
