"""Clipping by the global norm, applied by the update: gradients stay as they are, and a step divides by one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import ref

import torch
from torch import Tensor

from sharded_dadamw.buckets.gradients import version_of, warn_of_forgotten_clip


def checked_max_grad_norm(max_grad_norm: float | None) -> float | None:
    """Return the norm to which every step clips, a float, or None for none; a ValueError if it is not above 0."""
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"max_grad_norm: expected a number > 0, or None for no clipping, got {max_grad_norm}")
    return None if max_grad_norm is None else float(max_grad_norm)


def check_clip(max_norm: float, norm_type: float) -> None:
    """Refuse what no gradient can be clipped by."""
    if not max_norm >= 0.0:
        raise ValueError(f"max_norm: expected a number >= 0, got {max_norm}")
    if norm_type not in (2.0, math.inf):
        raise ValueError(f"norm_type: expected 2 or inf, got {norm_type}")


class PendingClip:
    """The clips that wait for the next step, as one number; gradients stay as they are.

    It is changed in place and never replaced, since proxies of an optimizer share it.

    Attributes:
        coefficient: 0-d fp32, what gradients are to be multiplied by.
        norm: 0-d fp32, the norm of the gradients as they are, without any clip.
    """

    coefficient: Tensor
    norm: Tensor

    def __init__(self) -> None:
        self._waits = False

    def __bool__(self) -> bool:
        """Whether there is a clip that no step has used."""
        return self._waits

    def add(self, norm: Tensor, *, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip gradients that may have been clipped before, without touching them.

        ``norm`` is that of the gradients as they are, 0-d fp32, of order ``norm_type``. With ``error_if_nonfinite``
        this waits for it, and raises a RuntimeError if it is nan or infinite. Returns, 0-d fp32, the norm before this
        clip and after earlier ones.
        """
        before = norm * self.coefficient if self._waits else norm
        if error_if_nonfinite and not torch.isfinite(before):
            raise RuntimeError(
                f"the norm of order {norm_type} of the gradients is {float(before)}; to clip by it anyway, "
                "pass error_if_nonfinite=False"
            )
        coefficient = torch.clamp(max_norm / (before + 1e-6), max=1.0)  # the formula of torch's clip_grad_norm_
        self.coefficient = self.coefficient * coefficient if self._waits else coefficient
        self.norm = norm
        self._waits = True
        return before

    def use(self) -> Tensor:
        """What a step divides the gradients by."""
        return 1.0 / self.coefficient

    def clear(self) -> None:
        """Forget the clip, once a step has used it or its gradients are gone."""
        self._waits = False


class ClipOf(PendingClip):
    """A clip that waits for the step that uses it, and the gradients that it is for, which others own."""

    def __init__(self) -> None:
        super().__init__()
        self._clipped: list[tuple[ref[Tensor], int]] = []
        self._is_used = False

    def remember(self, grads: Sequence[Tensor]) -> None:
        """Take note of which gradients are clipped; they are referred to weakly."""
        self._clipped = [(ref(grad), version_of(grad)) for grad in grads]
        self._is_used = False

    def use(self) -> Tensor:
        """What a step divides the gradients by; it may use them again, as in torch."""
        self._is_used = True
        return super().use()

    def keep_for(self, grads: Sequence[Tensor], *, to_clip: bool) -> None:
        """Keep the clip where these are gradients that were clipped, as they were then, and else forget it.

        Clipped ones that have changed before any step are refused. With ``to_clip`` they are about to be clipped again,
        perhaps after others have cleared them: warn then.
        """
        clipped = {id(grad): version for reference, version in self._clipped if (grad := reference()) is not None}
        if all(clipped.get(id(grad)) == version_of(grad) for grad in grads):
            return
        if not self._is_used and any(id(grad) in clipped for grad in grads):
            if not to_clip:
                raise RuntimeError(
                    "gradients were changed between clip_grad_norm_() and step(); change them before clipping, or "
                    "drop them by optimizer.zero_grad()"
                )
            warn_of_forgotten_clip()
        self.clear()
