"""How the values of several ranks become their mean: in rank order, or in the order of ``tree``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PIECE_BYTES = 1 << 20
"""Bytes that are averaged at a time on a CPU: small enough to be summed out of its cache."""


def sent_dtype(dtype: torch.dtype, wire_dtype: torch.dtype | None) -> torch.dtype:
    """In what dtype local values go into a mean: ``wire_dtype`` where that is narrower than their own."""
    return dtype if wire_dtype is None or wire_dtype.itemsize >= dtype.itemsize else wire_dtype


def sum_dtype(sent: torch.dtype, out: torch.dtype) -> torch.dtype:
    """In what dtype they are added: fp32, or the wider of the two."""
    return torch.promote_types(torch.promote_types(sent, out), torch.float32)


def average(
    parts: Sequence[Tensor], *, sent: torch.dtype, out: Tensor, total: Tensor, add: bool, divisor: int | None
) -> None:
    """Put the mean of ``parts``, [n] of each rank, into ``out`` [n], which may be one of them; ``add`` increases that.

    They are summed in rank order, each first rounded to ``sent``, in scratch memory ``total``, at least [n] and in the
    dtype of the sum. The mean is rounded once. With ``divisor`` all is as in ``mean_in_tree``.
    """
    if divisor is not None:
        mean_in_tree(parts, divisor=divisor, out=out, add=add)
        return
    total = total[: out.numel()]
    first, *rest = (part.to(sent) for part in parts)
    if rest and sent == total.dtype:
        torch.add(first, rest.pop(0), out=total)  # one pass less than copying the first
    else:
        total.copy_(first)
    for part in rest:
        total.add_(part)
    if add:
        out.add_(total.div_(len(parts)).to(out.dtype))
    elif out.dtype == total.dtype:
        torch.div(total, len(parts), out=out)
    else:
        out.copy_(total.div_(len(parts)))


def mean_in_tree(parts: Sequence[Tensor], *, divisor: int, out: Tensor, add: bool) -> None:
    """Put the sum of ``parts``, [n] of each rank, by ``divisor`` into ``out`` [n], which may be one of them.

    Added in the tree, in their dtype; divided in fp32 or wider, and rounded once. With ``add`` it increases ``out``.
    """
    total, _ = _sum_in_tree(parts)
    mean = total.to(torch.promote_types(total.dtype, torch.float32)).div(divisor)
    if add:
        out.add_(mean.to(out.dtype))
    else:
        out.copy_(mean)


def _sum_in_tree(parts: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The sum, and whether it is memory of our own."""
    if len(parts) == 1:
        return parts[0], False
    half = 1 << (len(parts) - 1).bit_length() - 1
    (left, left_is_own), (right, right_is_own) = _sum_in_tree(parts[:half]), _sum_in_tree(parts[half:])
    out = left if left_is_own else right if right_is_own else torch.empty_like(left)
    return torch.add(left, right, out=out), True
