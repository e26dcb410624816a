"""Numbers narrower than fp32 that lose nothing: the exact 16-bit remainder, stochastic rounding, and who holds whom.

    fp32 value   s eeeeeeee mmmmmmm|mmmmmmmmmmmmmmmm
                 bf16 parameter    |  int16 remainder = value - parameter, as integers

A bf16 parameter is its fp32 value rounded to the nearest, ties away from zero, on the integer pattern: then what is
left over always fits a signed 16-bit integer. (Ties to even would need a 17th bit; truncation would bias every weight.)

Rounding bf16 moments to the nearest freezes them, once an update is smaller than half a step of the format: at
beta2 > 0.995 a second moment never falls again. Rounding up with a probability equal to the fraction cut off is right
on average. Its random bits are a pure function of (step, element), with ``element`` counted over all parameters,
and integer arithmetic only; so they do not depend on the number of ranks, the buckets, the kernel or the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_CANONICAL_NAN = 0x7FC00000


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 value of a bf16 parameter and its int16 remainder, same shapes."""
    high, low = param.view(torch.int16).to(torch.int32), remainder.to(torch.int32)
    low = torch.where(high & 0x7FFF == 0, low.clamp(min=0), low)  # a weight that was set to 0 since: not nan
    return ((high << 16) + low).view(torch.float32)


def split(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 parameter and the int16 remainder of an fp32 tensor; ``join`` gives the same bits back.

    All values but nan, whose payload becomes the canonical one: there the pattern above would overflow.
    """
    pattern = torch.where(value.isnan(), _CANONICAL_NAN, value.view(torch.int32))
    # In 64 bits, where adding the half cannot overflow.
    high = ((pattern.to(torch.int64) + 0x8000) >> 16).to(torch.int32)
    remainder = (pattern - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), remainder


def remainder_of(value: Tensor, param: Tensor) -> Tensor:
    """The int16 remainder of an fp32 tensor whose bf16 parameter is given; same shapes.

    With the parameter that ``split`` gives, its remainder. Others round ties to even, so that half of what lies between
    two bf16 numbers is theirs from above, one more than fits: then ``join`` gives the fp32 number next to the value.
    A parameter that is neither has been changed since, and its remainder is 0.
    """
    left = value.view(torch.int32).to(torch.int64) - (param.view(torch.int16).to(torch.int64) << 16)
    fits = (left.abs() <= 0x8000) & ~value.isnan()
    return torch.where(fits, left.clamp(max=0x7FFF), 0).to(torch.int16)


def without_edits(value: Tensor, param: Tensor) -> Tensor:
    """What an fp32 main parameter stands for, given the narrower parameter that it was rounded to; same shapes.

    That is itself, or the parameter where somebody has written into that since, as ``model.load_state_dict`` does and
    ``p.data.clamp_``. To round half of what lies between two numbers to either of them is no edit: ``weight_of`` and
    torch, by which others save weights, differ in that.
    """
    if param.dtype is torch.bfloat16:
        left = value.view(torch.int32) - (param.view(torch.int16).to(torch.int32) << 16) + 0x8000  # wraps around
        is_edited = (left < 0) | (left > 0x10000)
    else:
        is_edited = value.to(param.dtype) != param
    return torch.where(is_edited, param.to(value.dtype), value)


def weight_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Round an fp32 main parameter to what the model holds of it: to bf16 as ``split``, to other dtypes as torch."""
    return split(value)[0] if dtype is torch.bfloat16 and value.dtype is torch.float32 else value.to(dtype)


def round_stochastically(value: Tensor, random_bits: Tensor) -> Tensor:
    """Round fp32 to bf16, up with a probability equal to the fraction that is cut off; bits are in [0, 65536)."""
    pattern = value.view(torch.int32).to(torch.int64)
    finite = ((pattern + random_bits) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(value.isfinite(), finite, value.to(torch.bfloat16))


def random_bits(count: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent 16-bit numbers per element, for ``exp_avg`` and ``exp_avg_sq``: a hash of (step, element).

    ``count`` is the number of the update, counted from 1, and ``elements`` are counted over all parameters; all int64.
    """
    key0 = _mix(_mix((count.to(torch.int64) + 0x9E3779B9) & _WORD))
    key1 = _mix((key0 + 0x85EBCA6B) & _WORD)
    low, high = elements & _WORD, elements >> 32
    bits = _mix(((_mix((low + key0) & _WORD) ^ ((high * 0xC2B2AE35) & _WORD)) + key1) & _WORD)
    return bits & 0xFFFF, bits >> 16


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words, in int64, in which every output bit depends on every input bit.

    Source: Wellons, "Prospecting for hash functions" (2018), lowbias32 with its later constants.
    """
    word = word ^ (word >> 16)
    word = (word * 0x21F0AAAD) & _WORD
    word = word ^ (word >> 15)
    word = (word * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether every value of ``other`` is one of ``dtype``, so that a copy rounds nothing; in doubt it is not."""
    try:
        is_wider = torch.promote_types(dtype, other) == dtype
    except RuntimeError:  # of floats in 8 bits
        is_wider = dtype == other
    is_integer = not (other.is_floating_point or other.is_complex or other is torch.bool)
    if is_wider and is_integer and (dtype.is_floating_point or dtype.is_complex):
        return torch.iinfo(other).max * torch.finfo(dtype).eps <= 2  # whole numbers up to 2 / eps
    return is_wider


def takes(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a copy of ``values`` into ``dtype`` rounds nothing.

    That goes by their dtype; of a single number, shape [], by itself too, since others count steps in other dtypes.
    """
    return holds(dtype, values.dtype) or (not values.dim() and values.to(dtype).item() == values.item())
