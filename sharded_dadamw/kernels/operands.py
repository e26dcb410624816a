"""What an update reads and writes, fragment by fragment, as every kernel takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sharded_dadamw.layout.parameters import has_plain_memory
from sharded_dadamw.update.adamw import Step

NORMS = ("grad", "param", "moment", "update")
"""The squared norms that an update yields per fragment, in this order."""


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """One fragment: tensors of one size on one device, each of them dense in memory, all in the same order.

    Attributes:
        param: The model's weights: fp32, bf16, fp16 or fp64. Updated.
        grad: Any of these dtypes. Only read.
        exp_avg: fp32, or another of these dtypes. Updated.
        exp_avg_sq: Dtype of ``exp_avg``. Updated.
        max_exp_avg_sq: Dtype of ``exp_avg``. Updated. None without amsgrad.
        main: fp32: the value that ``param`` is rounded from; int16: what ``param``, in bf16, lacks of its fp32 value.
            Updated. None where ``param`` is all there is.
        count: 0-d fp32 on the same device: the number of this update, counted from 1. Only read.
        first_element: Number of the first element, counted over all parameters: the key of stochastic rounding of bf16
            moments. None: moments are rounded to the nearest.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    main: Tensor | None
    count: Tensor
    first_element: int | None = None

    @property
    def form(self) -> Form:
        """Which kernel it needs."""
        return Form(
            self.param.device,
            self.param.dtype,
            self.grad.dtype,
            self.exp_avg.dtype,
            None if self.main is None else self.main.dtype,
            self.max_exp_avg_sq is not None,
            self.first_element is not None,
            self.is_plain,
        )

    @property
    def is_plain(self) -> bool:
        """Whether addresses tell the truth: memory of one device, in the dtypes of the form, read as it is."""
        there = [tensor for tensor in (*self.tensors, self.count) if tensor is not None]
        squares = [tensor for tensor in (self.exp_avg_sq, self.max_exp_avg_sq) if tensor is not None]
        return (
            self.count.dtype is torch.float32
            and all(tensor.dtype is self.exp_avg.dtype for tensor in squares)
            and all(tensor.device == self.param.device and has_plain_memory(tensor) for tensor in there)
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq and main."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq, self.main

    def addresses(self) -> list[int]:
        """Those of ``tensors`` and of ``count``; 0 for what there is not."""
        return [0 if tensor is None else tensor.data_ptr() for tensor in (*self.tensors, self.count)]


FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""What compiled kernels read and write, beside remainders."""


class Form(NamedTuple):
    """What fragments of one launch have in common."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    main: torch.dtype | None
    amsgrad: bool
    is_stochastic: bool
    is_plain: bool

    @property
    def is_compiled(self) -> bool:
        """Whether compiled kernels know it, on their devices."""
        params = {None: FLOATS, torch.float32: FLOATS - {torch.float32}, torch.int16: {torch.bfloat16}}
        return self.is_plain and self.param in params.get(self.main, ()) and {self.grad, self.moments} <= FLOATS


class Update(Protocol):
    """The update of a list of fragments of one form, made ready once and called every step."""

    keeps_tensors: bool
    """Whether it refers to the operands' tensors, and not to their addresses alone."""
    fuses_norms: bool
    """Whether norms come out of the pass over memory that the update is."""

    def __init__(self, operands: Sequence[Operands]) -> None:
        """Make the update of these fragments ready, for as long as their memory stays where it is."""

    def point_to(self, gradients: Tensor) -> None:
        """Take gradients of the same dtype from these addresses from now on, int64 [num_fragments] on the CPU.

        Not where it ``keeps_tensors``.
        """

    def __call__(self, step: Step, group: int) -> Tensor | None:
        """Apply the rule to every fragment, in place.

        Args:
            step: As for ``adamw_``.
            group: Position of the parameter group that the fragments are of.

        Returns:
            fp64 [num_fragments, 4], the squared norms ``NORMS`` of each fragment: of the gradient (divided), of the
            parameter and of ``exp_avg`` as they are afterwards, and of what was subtracted from the parameter, decay
            included. None where the kernel does not fuse them.
        """
