"""The scalars of the update rule, as parameter groups have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

FREE_OF_LR = "free of lr"
"""What our groups have as ``decoupled_weight_decay``, which is True in others'. A state dict has nothing else that
tells what its weight decay means, and an entry of our own would be missing where torch's AdamW was saved."""

HIGH_WEIGHT_DECAY = 1e-3
"""Above which a decay per step is probably that of torch's AdamW."""

_ROUNDING = 1e-6
"""By what part of its peak an lr may be below 0."""
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
    def is_in_domain(self) -> bool:
        """Whether the rule makes sense of them. A schedule may end a rounding below 0."""
        lr = 0.0 if isinstance(self.lr, Tensor) else self.lr
        numbers = (lr + _ROUNDING * self.initial_lr, self.initial_lr, self.eps, self.weight_decay)
        return all(0.0 <= x < math.inf for x in numbers) and 0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0

    @property
    def multiplier(self) -> float | Tensor:
        """What the schedule multiplies the decay by; a 0-d tensor where ``lr`` is one."""
        return self.lr / self.initial_lr if self.initial_lr else 1.0

    @property
    def decay(self) -> float | Tensor:
        """Fraction by which every weight shrinks in this step; a 0-d tensor where ``lr`` is one."""
        return self.weight_decay * self.multiplier


def read_groups(groups: Sequence[Mapping[str, Any]]) -> list[Hyperparameters]:
    """Read the scalars of every group, for one step.

    Raises:
        ValueError: A group's decay is 1 or more, or as ``check_group``. An ``lr`` on an accelerator is not looked at.
    """
    for group in groups:
        _refuse_switches(group)
    hypers = [Hyperparameters.from_group(group) for group in groups]
    for index, hyper in enumerate(hypers):
        if not hyper.is_in_domain:
            check_group(groups[index])
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
    _refuse_switches(group)


def _refuse_switches(group: Mapping[str, Any]) -> None:
    for switch in _UNSUPPORTED_SWITCHES:
        if group.get(switch):
            raise ValueError(
                f"{switch}: expected False, got {group[switch]}; decoupled AdamW does not have this switch"
            )
