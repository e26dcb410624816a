"""Updates of tensors that belong to others, made ready once, and used again as long as those stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.operands import Form, Operands, Update
from sharded_dadamw.update.adamw import Step

_Place = tuple[Any, ...]
"""The form of tensors, their size and where they lie: an update made ready for some does for others in their place."""
_Ready = tuple[Update, Sequence[int]]
"""An update, and the positions of what it updates among its fragments."""
_Copies = list[tuple[Tensor, Tensor]]
"""Tensors, each with the copy that was updated in its place."""


class ReadyUpdates:
    """The updates of an optimizer's groups, as the last step has left them."""

    def __init__(self) -> None:
        """Start with none."""
        self._ready: dict[int, tuple[list[_Place], list[_Ready]]] = {}
        self._captured: list[list[_Ready]] = []

    def apply_(
        self, fragments: Sequence[Operands], step: Step, group: int
    ) -> list[tuple[Sequence[int], Tensor | None]]:
        """Apply the update rule to the fragments of a group, in any forms and memory layouts.

        Args:
            fragments: Tensors of any shape; updated as :func:`sharded_dadamw.update.adamw.adamw_` does.
            step: As there.
            group: As there.

        Returns:
            Positions of fragments, with their squared norms fp64 [num_positions, 4] in the order of NORMS if those came
            out of the same pass.

        Raises:
            ValueError: Tensors of one fragment differ in shape.
        """
        alike = [_alike_in_memory(fragment) for fragment in fragments]
        places = [_place(fragment) for fragment, _ in alike]
        ready_places, updates = self._ready.get(group, ([], []))
        if ready_places != places:
            updates = _prepare([fragment for fragment, _ in alike], places)
            # What refers to tensors would keep gradients in memory that zero_grad() is to free.
            if not any(update.keeps_tensors for update, _ in updates):
                self._ready[group] = places, updates
        squares = [update(step, group) for update, _ in updates]
        for _, copies in alike:
            for original, copy in copies:
                original.copy_(copy)
        if fragments and fragments[0].param.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured.append(updates)  # a graph's replays read what these hold on the device
        return [(positions, norms) for (_, positions), norms in zip(updates, squares, strict=True)]


def _prepare(fragments: Sequence[Operands], places: Sequence[_Place]) -> list[_Ready]:
    """Updates of fragments of any forms: one for each form, with the positions of its fragments."""
    by_form: dict[Form, list[int]] = {}
    for position, (form, *_) in enumerate(places):
        by_form.setdefault(form, []).append(position)
    return [(kernels.prepare([fragments[i] for i in positions]), positions) for positions in by_form.values()]


def _alike_in_memory(fragment: Operands) -> tuple[Operands, _Copies]:
    """The same with its elements in one order in memory, which kernels need, and what had to be copied for that.

    Raises:
        ValueError: The tensors differ in shape; torch's kernel would write past the end of the smaller ones.
    """
    param, shape, all_contiguous = fragment.param, fragment.param.shape, True
    for tensor in fragment.tensors:
        if tensor is not None:
            if tensor.shape != shape:
                shapes = [list(each.shape) for each in fragment.tensors if each is not None]
                raise ValueError(f"expected tensors of one shape, got {shapes}")
            all_contiguous = all_contiguous and tensor.is_contiguous()
    if all_contiguous:
        return fragment, []
    model = param if _is_dense(param) else param.contiguous()
    copies: _Copies = []

    def alike(tensor: Tensor) -> Tensor:
        if tensor.stride() == model.stride():
            return tensor
        copies.append((tensor, torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)))
        return copies[-1][1]

    maximum = fragment.max_exp_avg_sq
    laid_out = replace(
        fragment,
        param=alike(fragment.param),
        grad=alike(fragment.grad),
        exp_avg=alike(fragment.exp_avg),
        exp_avg_sq=alike(fragment.exp_avg_sq),
        max_exp_avg_sq=None if maximum is None else alike(maximum),
    )
    return laid_out, [(original, copy) for original, copy in copies if original is not fragment.grad]


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _place(fragment: Operands) -> _Place:
    return fragment.form, fragment.param.numel(), *fragment.addresses()
