"""Updates of tensors that belong to others, made ready once and used as long as those stay where they are.

An optimizer of whole parameters meets the same parameters and the same state in each step, and new gradients. So a
step compares where everything lies with what it was, in calls that cost some 50 ns each for a tensor, and tells the
kernel the addresses of the gradients and nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter, is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.operands import Form, Operands, Update
from sharded_dadamw.update.adamw import Step

_MOST_KEPT = 8
"""Sets of parameters for which an update is kept; more than one is in use where gradients are missing by turns."""
_Copies = list[tuple[Tensor, Tensor]]
"""Tensors, each with the copy that was updated in its place."""
_Squares = tuple[Sequence[int], Tensor | None]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_dtype = attrgetter("dtype")


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What an update reads and writes, as ``Operands`` has it but in any memory format: a fragment at each place.

    There are no ``max_exp_avg_sqs`` without amsgrad.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    max_exp_avg_sqs: Sequence[Tensor]
    counts: Sequence[Tensor]

    def kept(self) -> list[Tensor]:
        """Return all tensors but the gradients."""
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.max_exp_avg_sqs, *self.counts]

    def operands(self) -> list[Operands]:
        """Return the fragments."""
        nothing: Sequence[None] = [None] * len(self.params)
        maxima = self.max_exp_avg_sqs or nothing
        columns = (self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, maxima, nothing, self.counts)
        return [Operands(*row) for row in zip(*columns, strict=True)]


class ReadyUpdate:
    """The update of some parameters of one group, for any gradients; ``counts`` hold their step counts."""

    def __init__(self, columns: Columns, captured: list[Update]) -> None:
        """Make ready what a compiled kernel can update where it lies; the rest is made ready in every step.

        While a CUDA graph is captured, ``captured`` gets what its replays read. Tensors of one fragment that differ in
        shape are a ValueError: a kernel would write past the end of the smaller ones.
        """
        operands = columns.operands()
        self._tensors = columns.kept()
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._gradients = _described(columns.grads)
        self._captured = captured
        base = base_of(columns.counts)
        self.counts = list(columns.counts) if base is None or base.numel() != len(columns.counts) else [base]
        self._is_fixed = [_is_contiguous(each) and not kernels.kernel_for(each.form).keeps_tensors for each in operands]
        self._fixed = _prepare(compress(enumerate(operands), self._is_fixed))
        self._others = [place for place, is_fixed in enumerate(self._is_fixed) if not is_fixed]

    def fits(self, columns: Columns) -> bool:
        """Whether it is for these tensors, where they are now, and for gradients like these."""
        tensors = columns.kept()
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and all(map(Tensor.is_contiguous, compress(columns.params, self._is_fixed)))  # p.data = p.data.t()
            and _described(columns.grads) == self._gradients
            and all(map(Tensor.is_contiguous, compress(columns.grads, self._is_fixed)))
            and not any(map(Tensor.is_neg, columns.grads))
        )

    def __call__(self, columns: Columns, step: Step, group: int) -> Sequence[_Squares]:
        """Apply the update rule to columns that it fits.

        Returns:
            Places of fragments, with their squared norms fp64 [num_places, 4] in the order of NORMS if those came out
            of the same pass.
        """
        if self._fixed:
            addresses = torch.frombuffer(array("q", map(Tensor.data_ptr, columns.grads)), dtype=torch.int64)
            for update, places in self._fixed:
                update.point_to(addresses if len(places) == len(addresses) else addresses[places])
        updates, copies = self._fixed, []
        if self._others:
            operands = columns.operands()
            alike = {place: _alike_in_memory(operands[place]) for place in self._others}
            updates = updates + _prepare((place, fragment) for place, (fragment, _) in alike.items())
            copies = [pair for _, pairs in alike.values() for pair in pairs]
        squares = [(places, update(step, group)) for update, places in updates]
        for original, copied in copies:
            original.copy_(copied)
        if _is_captured(columns):
            self._captured += [copy(update) for update, _ in updates]
        return squares


def keep(kept: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    """Keep what is ready for one set of parameters, instead of all others where those are too many; returns it."""
    if len(kept) == _MOST_KEPT:
        kept.clear()
    kept[key] = value
    return value


class ReadyUpdates:
    """The updates of an optimizer's groups."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[tuple[int, ...], ReadyUpdate]] = {}
        self._captured: list[Update] = []

    def find(self, group: int, columns: Columns) -> ReadyUpdate | None:
        """Return what was made ready for these tensors, if they are where they were."""
        ready = self._kept.get(group, {}).get(_key(columns))
        return ready if ready is not None and ready.fits(columns) else None

    def make(self, group: int, columns: Columns) -> ReadyUpdate:
        """Make an update ready, to be found in the next steps."""
        ready, key = ReadyUpdate(columns, self._captured), _key(columns)
        kept = self._kept.setdefault(group, {})
        if key in kept:
            kept.clear()  # what others are for has probably moved as well, or is gone
        if not _is_captured(columns):  # its tables get their contents in a replay
            keep(kept, key, ready)
        return ready

    def forget(self) -> None:
        """Let go of all tensors, but for what captured graphs read."""
        self._kept.clear()


def _key(columns: Columns) -> tuple[int, ...]:
    return tuple(map(id, columns.params))


def _is_captured(columns: Columns) -> bool:
    return bool(columns.params) and columns.params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _described(grads: Sequence[Tensor]) -> list[object]:
    """What a kernel has to know of gradients but their addresses, and whether they are contiguous."""
    return [*map(_dtype, grads), *map(type, grads), *map(Tensor.numel, grads)]


def base_of(counts: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor of which all of these are elements, if there is one."""
    base = counts[0]._base if counts else None
    if base is None:
        return None
    # Where ``count.data`` was assigned, autograd still takes it for a view.
    memory = range(base.data_ptr(), base.data_ptr() + base.nbytes)
    return base if all(count._base is base and count.data_ptr() in memory for count in counts) else None


def _prepare(fragments: Iterable[tuple[int, Operands]]) -> list[tuple[Update, list[int]]]:
    """Updates of fragments of any forms: one for each form, with the places of its fragments."""
    by_form: dict[Form, list[tuple[int, Operands]]] = {}
    for place, fragment in fragments:
        by_form.setdefault(fragment.form, []).append((place, fragment))
    return [
        (kernels.kernel_for(form)([fragment for _, fragment in of_form]), [place for place, _ in of_form])
        for form, of_form in by_form.items()
    ]


def _is_contiguous(fragment: Operands) -> bool:
    """Whether all tensors are contiguous; a ValueError where they differ in shape."""
    tensors = [tensor for tensor in fragment.tensors if tensor is not None]
    if any(tensor.shape != fragment.param.shape for tensor in tensors):
        raise ValueError(f"expected tensors of one shape, got {[list(tensor.shape) for tensor in tensors]}")
    return all(tensor.is_contiguous() for tensor in tensors)


def _alike_in_memory(fragment: Operands) -> tuple[Operands, _Copies]:
    """The same with its elements in one order in memory, which kernels need, and what had to be copied for that."""
    if _is_contiguous(fragment):
        return fragment, []
    param = fragment.param
    model = param if _is_dense(param) else param.contiguous()
    copies: dict[str, Any] = {}
    for name in ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        tensor = getattr(fragment, name)
        if tensor is not None and tensor.stride() != model.stride():
            copies[name] = torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
    to_copy_back = [(getattr(fragment, name), copied) for name, copied in copies.items() if name != "grad"]
    return replace(fragment, **copies), to_copy_back


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
