"""What Triton's kernels are written in: elements loaded and stored in any dtype, rounding, and the rule's arithmetic.

What Triton's interpreter lacks or gets wrong (libdevice, conversions from and to bf16) is not used.
"""

import triton
import triton.language as tl


@triton.jit
def address_in(cell: tl.tensor, start: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Of the first element of a tile, in the tensor whose address is in this cell of the table; bf16 as int16."""
    stored_dtype: tl.constexpr = tl.int16 if dtype == tl.bfloat16 else dtype
    return tl.load(cell).to(tl.pointer_type(stored_dtype)) + start


@triton.jit
def _pointers(address: tl.tensor, first: tl.tensor, places: tl.tensor, width: tl.constexpr) -> tl.tensor:
    address += first
    if width > 1:
        address = tl.multiple_of(address, width * (address.dtype.element_ty.primitive_bitwidth // 8))
    return address + places


@triton.jit
def load(address: tl.tensor, first: tl.tensor, places: tl.tensor, inside: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """Of the elements at these places after the first, those inside; the first begins a vector where ``width`` > 1."""
    return tl.load(_pointers(address, first, places, width), inside, other=0)


@triton.jit
def store(
    address: tl.tensor,
    first: tl.tensor,
    places: tl.tensor,
    stored: tl.tensor,
    inside: tl.tensor,
    width: tl.constexpr,
) -> None:
    """As ``load``."""
    tl.store(_pointers(address, first, places, width), stored, inside)


@triton.jit
def widen(stored: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What is stored, as fp32."""
    is_bf16: tl.constexpr = dtype == tl.bfloat16
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True) if is_bf16 else stored.to(tl.float32)


@triton.jit
def join(param: tl.tensor, remainder: tl.tensor) -> tl.tensor:
    """As ``sharded_dadamw.update.precision.join``, of a bf16's pattern and an int16; the pattern of the fp32."""
    high, low = param.to(tl.int32) << 16, remainder.to(tl.int32)
    return high + tl.where((high & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)


@triton.jit
def without_edits(value: tl.tensor, stored: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """As ``sharded_dadamw.update.precision.without_edits``, of an fp32 and its parameter as it is stored."""
    if dtype == tl.bfloat16:
        left = value.to(tl.int32, bitcast=True) - (stored.to(tl.int32) << 16) + 0x8000  # wraps around
        is_edited = (left < 0) | (left > 0x10000)
    else:
        is_edited = value.to(dtype) != stored
    return tl.where(is_edited, widen(stored, dtype), value)


@triton.jit
def narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """An fp32 as it is stored, rounded to the nearest, ties to even."""
    is_bf16: tl.constexpr = dtype == tl.bfloat16
    return upper_half(value, 0x7FFF + ((pattern_of(value) >> 16) & 1)) if is_bf16 else value.to(dtype)


@triton.jit
def upper_half(value: tl.tensor, increment: tl.tensor) -> tl.tensor:
    """The upper half of an fp32, as int16, after adding to the lower one; infinities and nan stay what they are."""
    return ((pattern_of(value) + increment) >> 16).to(tl.int16)


@triton.jit
def pattern_of(value: tl.tensor) -> tl.tensor:
    """The bits of an fp32 as an int32; nan as precision.split has it, to which 16 bits can be added."""
    return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))


@triton.jit
def random_bits(key: tl.tensor, first_element: tl.tensor, places: tl.tensor) -> tl.tensor:
    """See precision.random_bits, for the elements from ``first_element``; ``key`` is its first one."""
    first_low = first_element.to(tl.uint32)
    first_high = (first_element >> 32).to(tl.uint32)
    places = places.to(tl.uint32)
    carries = places > 0xFFFFFFFF - first_low
    high_hash = tl.where(carries, (first_high + 1) * 0xC2B2AE35, first_high * 0xC2B2AE35)
    bits = mix((mix(places + (first_low + key)) ^ high_hash) + mix(key + 0x85EBCA6B))
    return (bits & 0xFFFF).to(tl.int32), (bits >> 16).to(tl.int32)


@triton.jit
def mix(word: tl.tensor) -> tl.tensor:
    """As in ``sharded_dadamw.update.precision``."""
    word = word ^ (word >> 16)
    word = word * 0x21F0AAAD
    word = word ^ (word >> 15)
    word = word * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """To a unit in the last place, also where the approximate instruction takes a denormal for 0."""
    is_tiny = x < 1.1754943508222875e-38  # 2**-126
    root = tl.sqrt(tl.where(is_tiny, x * 16777216.0, x))  # 2**24
    return tl.where(is_tiny, root * 0.000244140625, root)  # 2**-12


@triton.jit
def bias_correction(step: tl.tensor, log_beta: tl.tensor) -> tl.tensor:
    """1 - beta**step to a few units in the last place, where the power itself would cancel."""
    exponent = tl.maximum(step * log_beta, -100.0)
    # expm1(x) / x on [-1, 0]: interpolated at Chebyshev nodes, off by 3e-9 at most.
    series = 0.000129076310222 * exponent + 0.00130077495802
    series = series * exponent + 0.00827550484369
    series = series * exponent + 0.0416468493134
    series = series * exponent + 0.166663403115
    series = series * exponent + 0.499999797252
    series = series * exponent + 0.999999997934
    return tl.where(exponent > -1.0, -exponent * series, 1.0 - tl.exp(exponent))
