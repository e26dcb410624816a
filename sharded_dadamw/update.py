"""The law: decoupled AdamW as one pure function over tensors, and the scalars it needs.

    decay   = weight_decay * lr / reference_lr        (weight_decay where reference_lr is 0)
    param  *= 1 - decay
    exp_avg, exp_avg_sq: moving averages of g and g * g
    max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                                (amsgrad only)
    denom   = sqrt(exp_avg_sq or max_exp_avg_sq) / sqrt(1 - beta2^step) + eps
    param  -= lr / (1 - beta1^step) * exp_avg / denom

This is MosaicML Composer's ``DecoupledAdamW``: the decay follows the learning-rate *schedule*, lr / reference_lr, and
not the learning rate itself. The functions here are the reference. :mod:`sharded_dadamw.kernels` holds the fused twin
that training runs, and falls back to this one where no fused kernel exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_UNSUPPORTED_SWITCHES = ("maximize", "differentiable")


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """The scalars of one parameter group for one step, read once from its dict.

    Attributes:
        lr: Learning rate of this step.
        reference_lr: The schedule's peak; ``lr / reference_lr`` is the schedule's multiplier.
        beta1: Coefficient of ``exp_avg``.
        beta2: Coefficient of ``exp_avg_sq``.
        eps: Added to the denominator.
        weight_decay: Fraction of a weight that decays away per step at the schedule's peak.
        amsgrad: Whether the denominator uses the running maximum of ``exp_avg_sq``.
    """

    lr: float
    reference_lr: float
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
        lr = float(group["lr"])
        beta1, beta2 = group["betas"]
        return cls(
            lr=lr,
            reference_lr=max(float(group.get("initial_lr", lr)), float(group.get("max_lr", 0.0))),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            amsgrad=bool(group["amsgrad"]),
        )

    @property
    def decay(self) -> float:
        """Fraction by which every weight shrinks in this step."""
        return self.weight_decay * (self.lr / self.reference_lr) if self.reference_lr else self.weight_decay


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters outside the law's domain.

    Raises:
        TypeError: ``lr`` is a tensor on an accelerator, whose value the host could read only by waiting for the device.
        ValueError: A value is outside its range, or a switch of torch's AdamW is on that this law does not have.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.device.type != "cpu"):
        raise TypeError(
            f"lr: expected a float or a one-element CPU tensor, got a tensor of {lr.numel()} elements on {lr.device}; "
            "pass float(lr)"
        )
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
    step: Tensor,
    *,
    hyper: Hyperparameters,
    grad_divisor: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Apply the law to one tensor, in place.

    Args:
        param: Any shape; decayed and updated in place.
        grad: Shape of ``param``; only read.
        exp_avg: Shape of ``param``; updated in place.
        exp_avg_sq: Shape of ``param``; updated in place.
        max_exp_avg_sq: Shape of ``param``; updated in place. None without amsgrad.
        step: 0-d; the number of this update, counted from 1.
        hyper: The group's scalars.
        grad_divisor: 0-d fp32; the gradient is divided by it (loss scale, inverse clip coefficient). None means 1.
        found_inf: 0-d fp32; where it is 1 nothing changes. Selected, not multiplied: 0 * nan is nan.
    """
    if found_inf is not None:
        keep = found_inf != 0
        targets = [t for t in (param, exp_avg, exp_avg_sq, max_exp_avg_sq) if t is not None]
        kept = [t.clone() for t in targets]
        adamw_(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, hyper=hyper, grad_divisor=grad_divisor)
        for target, before in zip(targets, kept, strict=True):
            target.copy_(torch.where(keep, before, target))
        return
    if grad_divisor is not None:
        # In fp32: a loss scale is out of fp16's range, and so is what it is there to save.
        grad = grad.to(torch.promote_types(grad.dtype, torch.float32)) / grad_divisor
    bias_correction1 = 1 - hyper.beta1 ** step.double()
    bias_correction2 = 1 - hyper.beta2 ** step.double()
    param.mul_(1 - hyper.decay)
    exp_avg.mul_(hyper.beta1).add_(grad, alpha=1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    second_moment = exp_avg_sq
    if max_exp_avg_sq is not None:
        second_moment = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denom = (second_moment.sqrt() / bias_correction2.sqrt().to(param.dtype)).add_(hyper.eps)
    param.sub_((hyper.lr / bias_correction1).to(param.dtype) * exp_avg / denom)
