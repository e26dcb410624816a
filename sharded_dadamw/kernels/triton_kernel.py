"""The update rule on CUDA in one launch of one Triton kernel: every byte is read once and written once.

    table      one row per fragment: where its tensors lie, how many elements, how they lie to vectors of elements
    gradients  one address per fragment, apart since those of whole parameters are new in every step
    tiles      each program updates one; it looks up which fragment that belongs to
    partials   fp32 [num_tiles, 4]: squared norms of each tile; further launches add up those of a fragment in fp64

Invariant: an element's result has the same bits wherever it lies, at any cut and alignment.
Elements of vectors and the others around them go through the same lines, and the compiler may not contract products
and sums, which it might do for the ones and not for the others; nothing else could tell them apart.

Moments are those of the reference to the bit. The update differs by a few units in its last place: its square root and
its quotient are the GPU's own, which are that much off, because exact ones made the kernel wait for arithmetic.

No value of a step makes the host wait or the compiler run: it is passed as a number, or lies on the device. In a
captured CUDA graph numbers stay what they were at capture; step counts, ``void``, ``divisor`` and an ``lr``
that is a tensor are read anew in each replay.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors. What Triton's interpreter lacks or gets
wrong (libdevice, conversions from and to bf16) is not used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sharded_dadamw.kernels.operands import NORMS, Form, Operands
from sharded_dadamw.kernels.tiles import plan_tiles
from sharded_dadamw.update.adamw import Step

_DEVICE_TYPE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Measured on an H100.
_TILE = 2048
"""Elements that one program updates."""
_NUM_WARPS = 4
_MAX_REGISTERS = 72
"""Per thread. Left alone, the compiler takes so many for some forms that too few warps are left to hide latencies."""
_SUMMANDS = 256
"""Rows of squared norms that one program adds up."""
_VECTOR = 4
"""Elements that a thread reads or writes in one access, where tensors are aligned to as many: 16 bytes of fp32."""
_LINE = 64
"""Elements of a multiple of which tiles start, so that accesses do not straddle cache lines: 128 bytes of bf16."""

# The columns of the table of fragments; the first seven are Operands.addresses.
_PARAM = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)
_MAX_EXP_AVG_SQ = tl.constexpr(4)
_MAIN = tl.constexpr(5)
_STEP = tl.constexpr(6)
_NUMEL = tl.constexpr(7)
_FIRST_ELEMENT = tl.constexpr(8)
_FIRST_TILE = tl.constexpr(9)
_SHIFT = tl.constexpr(10)
_BEHIND = tl.constexpr(11)
_NUM_COLUMNS = tl.constexpr(12)

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    None: None,
}


def supports(form: Form) -> bool:
    """Whether ``Update`` takes fragments of this form."""
    is_nvidia = torch.version.hip is None  # maxnreg and the number of warps are for its compiler
    return form.is_compiled and form.device.type == _DEVICE_TYPE and is_nvidia


class Update:
    """See ``sharded_dadamw.kernels.operands.Update``."""

    keeps_tensors = False
    fuses_norms = True

    def __init__(self, operands: Sequence[Operands]) -> None:
        """Put the addresses of fragments of one form on their device, without waiting for it."""
        self._form = operands[0].form
        device = self._form.device
        numels = [each.param.numel() for each in operands]
        addresses = torch.tensor([each.addresses() for each in operands])
        shifts, behind = _alignment(addresses, operands[0])
        shifted_numels = (torch.tensor(numels) + shifts).tolist()
        first_tiles = plan_tiles(tuple(shifted_numels), _TILE).offsets
        first_elements = torch.tensor([each.first_element or 0 for each in operands])
        columns = [torch.tensor(numels), first_elements, first_tiles[:-1], shifts, behind]
        table = torch.cat([addresses, torch.stack(columns, dim=1)], dim=1)
        levels = _levels_of_sums(first_tiles)

        parts = [table.flatten(), first_tiles, *levels]
        self._host = torch.cat(parts)
        if device.type == "cuda":
            # In a graph that is being captured each replay copies from this memory, which is why it is kept.
            self._host = self._host.pin_memory()
        on_device = self._host.to(device, non_blocking=True)
        parts_on_device: Sequence[Tensor] = on_device.split([len(part) for part in parts])
        self._table, self._levels = parts_on_device[0], parts_on_device[2:]
        num_tiles_each = parts_on_device[1].diff().to(torch.int32)
        self._num_tiles = int(first_tiles[-1])
        self._fragment_of_tile = torch.repeat_interleave(num_tiles_each, output_size=self._num_tiles)
        self.point_to(addresses[:, _GRAD.value].contiguous())

    def point_to(self, gradients: Tensor) -> None:
        """See ``sharded_dadamw.kernels.operands.Update``; does not wait for the device."""
        self._host_gradients = gradients.pin_memory() if self._form.device.type == "cuda" else gradients
        self._gradients = self._host_gradients.to(self._form.device, non_blocking=True)

    def __call__(self, step: Step, group: int) -> Tensor:
        form, hyper = self._form, step.hypers[group]
        with torch.cuda.device_of(self._table):
            sums = self._table.new_empty(self._num_tiles, len(NORMS), dtype=torch.float32)
            if self._num_tiles:
                _update_kernel[(self._num_tiles,)](
                    self._table,
                    self._gradients,
                    self._fragment_of_tile,
                    sums,
                    step.divisor,
                    step.void,
                    hyper.lr,
                    hyper.weight_decay / hyper.initial_lr if hyper.initial_lr else 0.0,
                    0.0 if hyper.initial_lr else hyper.weight_decay,
                    hyper.eps,
                    hyper.beta1,
                    1 - hyper.beta1,
                    _log(hyper.beta1),
                    hyper.beta2,
                    1 - hyper.beta2,
                    _log(hyper.beta2),
                    lr_is_tensor=isinstance(hyper.lr, Tensor),
                    is_stochastic=form.is_stochastic,
                    param_dtype=_TRITON_DTYPES[form.param],
                    grad_dtype=_TRITON_DTYPES[form.grad],
                    moments_dtype=_TRITON_DTYPES[form.moments],
                    main_dtype=_TRITON_DTYPES[form.main],
                    amsgrad=form.amsgrad,
                    tile_size=_TILE,
                    vector_size=_VECTOR,
                    num_threads=32 * _NUM_WARPS,
                    num_warps=_NUM_WARPS,
                    maxnreg=_MAX_REGISTERS,
                    enable_fp_fusion=False,
                )
            for bounds in self._levels:
                summands, sums = sums, sums.new_empty(len(bounds) - 1, len(NORMS), dtype=torch.float64)
                _sum_kernel[(len(sums),)](summands, bounds, sums, num_summands=_SUMMANDS, num_warps=1)
        return sums


def _alignment(addresses: Tensor, example: Operands) -> tuple[Tensor, Tensor]:
    """Per fragment, int64, how its tensors at ``addresses`` lie to the boundaries of memory.

    By how many elements its parameter's first one is behind the boundary of a line; and by how many all of its tensors
    but the gradient are behind that of a vector, or -1 where they differ.
    """
    sizes = {column: tensor.element_size() for column, tensor in enumerate(example.tensors) if tensor is not None}
    del sizes[_GRAD.value]
    elements = addresses[:, list(sizes)] // torch.tensor(list(sizes.values()))
    behind = elements % _VECTOR
    return elements[:, 0] % _LINE, torch.where((behind == behind[:, :1]).all(dim=1), behind[:, 0], -1)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def _levels_of_sums(first_rows: Tensor) -> list[Tensor]:
    """How to add up rows that belong to fragments, in launches whose programs add up few rows each.

    A fragment's sum does not depend on the others: it passes unchanged through levels that only they need. Per launch
    there is the first row that each program adds up, and the end, as ``first_rows`` has it of the fragments. A program
    makes a row of the next level, and the last level's rows are the fragments.
    """
    counts = first_rows.diff()
    if int(counts.max()) <= _SUMMANDS:
        return [first_rows]
    chunks = plan_tiles(tuple(counts.tolist()), _SUMMANDS)
    first_of_chunks = first_rows[chunks.fragment] + chunks.start
    return [torch.cat([first_of_chunks, first_rows[-1:]]), *_levels_of_sums(chunks.offsets)]


@triton.jit(do_not_specialize_on_alignment=["divisor", "void", "lr"])
def _update_kernel(
    table: tl.tensor,
    gradients: tl.tensor,
    fragment_of_tile: tl.tensor,
    partials: tl.tensor,
    divisor: tl.tensor,  # or None
    void: tl.tensor,  # or None
    lr: tl.tensor,  # or a number
    decay_per_lr: tl.float32,
    constant_decay: tl.float32,
    eps: tl.float32,
    beta1: tl.float32,
    one_minus_beta1: tl.float32,
    log_beta1: tl.float32,
    beta2: tl.float32,
    one_minus_beta2: tl.float32,
    log_beta2: tl.float32,
    lr_is_tensor: tl.constexpr,
    is_stochastic: tl.constexpr,
    param_dtype: tl.constexpr,
    grad_dtype: tl.constexpr,
    moments_dtype: tl.constexpr,
    main_dtype: tl.constexpr,
    amsgrad: tl.constexpr,
    tile_size: tl.constexpr,
    vector_size: tl.constexpr,
    num_threads: tl.constexpr,
) -> None:
    """Update one tile: what can be read and written in vectors block by block, then the rest element by element."""
    tile = tl.program_id(0).to(tl.int64)
    fragment = tl.load(fragment_of_tile + tile)
    row = table + fragment * _NUM_COLUMNS
    # Tiles start at boundaries of lines, the first of them before the fragment if need be.
    boundary = (tile - tl.load(row + _FIRST_TILE)) * tile_size - tl.load(row + _SHIFT)
    start = tl.maximum(boundary, 0)
    count = (tl.minimum(boundary + tile_size, tl.load(row + _NUMEL)) - start).to(tl.int32)
    lead = tl.minimum((boundary - start).to(tl.int32) & (vector_size - 1), count)
    grad_behind = (tl.load(gradients + fragment) // (grad_dtype.primitive_bitwidth // 8)) & (vector_size - 1)
    lead = tl.where(tl.load(row + _BEHIND) == grad_behind, lead, count)
    in_vectors = (count - lead) // vector_size * vector_size
    param_at = _address(row + _PARAM, start, param_dtype)
    grad_at = _address(gradients + fragment, start, grad_dtype)
    exp_avg_at = _address(row + _EXP_AVG, start, moments_dtype)
    exp_avg_sq_at = _address(row + _EXP_AVG_SQ, start, moments_dtype)
    if amsgrad:
        max_exp_avg_sq_at = _address(row + _MAX_EXP_AVG_SQ, start, moments_dtype)
    if main_dtype is not None:
        main_at = _address(row + _MAIN, start, main_dtype)

    step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32)))
    rate = tl.cast(tl.load(lr) if lr_is_tensor else lr, tl.float32)
    decay = decay_per_lr * rate + constant_decay
    step_size = rate / _bias_correction(step, log_beta1)
    root_scale = tl.rsqrt(_bias_correction(step, log_beta2))
    if divisor is not None:
        divided_by = tl.load(divisor)
    if void is not None:
        goes_on = tl.load(void) == 0
    if is_stochastic:
        key = _mix(_mix(step.to(tl.int64).to(tl.uint32) + 0x9E3779B9))
        first_element = tl.load(row + _FIRST_ELEMENT) + start
    norms = tl.zeros([2, 2], tl.float32)

    for width in tl.static_range(vector_size, 0, 1 - vector_size):  # vector_size, then 1
        offsets = tl.arange(0, num_threads * width)
        done = 0
        end = in_vectors if width > 1 else count - in_vectors
        written_end = tl.where(goes_on, end, 0) if void is not None else end
        grad_squares = tl.zeros([num_threads * width], tl.float32)
        value_squares = tl.zeros([num_threads * width], tl.float32)
        exp_avg_squares = tl.zeros([num_threads * width], tl.float32)
        update_squares = tl.zeros([num_threads * width], tl.float32)
        while done < end:
            inside = done + offsets < end
            is_written = done + offsets < written_end
            # Vectors come after the lead; the rest are the lead and what comes after the vectors.
            first = lead + done if width > 1 else done
            places = offsets if width > 1 else tl.where(done + offsets < lead, offsets, offsets + in_vectors)
            grad = _widen(_load(grad_at, first, places, inside, width), grad_dtype)
            exp_avg = _widen(_load(exp_avg_at, first, places, inside, width), moments_dtype)
            exp_avg_sq = _widen(_load(exp_avg_sq_at, first, places, inside, width), moments_dtype)
            if main_dtype == tl.float32:
                value = _load(main_at, first, places, inside, width)
            elif main_dtype == tl.int16:
                high = _load(param_at, first, places, inside, width).to(tl.int32) << 16
                low = _load(main_at, first, places, inside, width).to(tl.int32)
                low = tl.where((high & 0x7FFFFFFF) == 0, tl.maximum(low, 0), low)
                value = (high + low).to(tl.float32, bitcast=True)
            else:
                value = _widen(_load(param_at, first, places, inside, width), param_dtype)
            if amsgrad:
                max_exp_avg_sq = _widen(_load(max_exp_avg_sq_at, first, places, inside, width), moments_dtype)

            if divisor is not None:
                grad = tl.where(inside, tl.div_rn(grad, divided_by), 0.0)
            new_exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
            new_exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
            second_moment = new_exp_avg_sq
            if amsgrad:
                second_moment = tl.maximum(max_exp_avg_sq, new_exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
            denom = _sqrt(second_moment) * root_scale + eps
            update = tl.where(is_written, decay * value + step_size * (new_exp_avg / denom), 0.0)
            new_value = value - update

            if is_stochastic:
                bits1, bits2 = _random_bits(key, first_element + first, places)
                stored_exp_avg = _bf16(new_exp_avg, bits1)
                stored_exp_avg_sq = _bf16(new_exp_avg_sq, bits2)
            else:
                stored_exp_avg = _narrow(new_exp_avg, moments_dtype)
                stored_exp_avg_sq = _narrow(new_exp_avg_sq, moments_dtype)
            _store(exp_avg_at, first, places, stored_exp_avg, is_written, width)
            _store(exp_avg_sq_at, first, places, stored_exp_avg_sq, is_written, width)
            if amsgrad:
                rounded = _widen(stored_exp_avg_sq, moments_dtype)
                largest = tl.maximum(max_exp_avg_sq, rounded, propagate_nan=tl.PropagateNan.ALL)
                _store(max_exp_avg_sq_at, first, places, _narrow(largest, moments_dtype), is_written, width)
            if main_dtype is None:
                stored_value = _narrow(new_value, param_dtype)
                _store(param_at, first, places, stored_value, is_written, width)
                new_value = _widen(stored_value, param_dtype)
            elif main_dtype == tl.int16:
                weight = _bf16(new_value, 0x8000)
                remainder = _pattern(new_value) - (weight.to(tl.int32) << 16)
                _store(param_at, first, places, weight, is_written, width)
                _store(main_at, first, places, remainder.to(tl.int16), is_written, width)
            else:
                weight = _bf16(new_value, 0x8000) if param_dtype == tl.bfloat16 else new_value.to(param_dtype)
                _store(param_at, first, places, weight, is_written, width)
                _store(main_at, first, places, new_value, is_written, width)

            new_exp_avg = _widen(stored_exp_avg, moments_dtype)
            if void is not None:
                new_exp_avg = tl.where(goes_on, new_exp_avg, exp_avg)
            grad_squares = tl.fma(grad, grad, grad_squares)
            value_squares = tl.fma(new_value, new_value, value_squares)
            exp_avg_squares = tl.fma(new_exp_avg, new_exp_avg, exp_avg_squares)
            update_squares = tl.fma(update, update, update_squares)
            done += num_threads * width
        if (width > 1) | (in_vectors < count):
            # All four in one reduction.
            squares = tl.join(tl.join(grad_squares, exp_avg_squares), tl.join(value_squares, update_squares))
            norms += tl.sum(squares, axis=0)
    places = 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]
    tl.store(partials + 4 * tile + places, norms)


@triton.jit
def _address(cell: tl.tensor, start: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
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
def _load(address: tl.tensor, first: tl.tensor, places: tl.tensor, inside: tl.tensor, width: tl.constexpr) -> tl.tensor:
    return tl.load(_pointers(address, first, places, width), inside, other=0)


@triton.jit
def _store(
    address: tl.tensor,
    first: tl.tensor,
    places: tl.tensor,
    stored: tl.tensor,
    inside: tl.tensor,
    width: tl.constexpr,
) -> None:
    tl.store(_pointers(address, first, places, width), stored, inside)


@triton.jit
def _widen(stored: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """What is stored, as fp32."""
    is_bf16: tl.constexpr = dtype == tl.bfloat16
    return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True) if is_bf16 else stored.to(tl.float32)


@triton.jit
def _narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """An fp32 as it is stored, rounded to the nearest, ties to even."""
    is_bf16: tl.constexpr = dtype == tl.bfloat16
    return _bf16(value, 0x7FFF + ((_pattern(value) >> 16) & 1)) if is_bf16 else value.to(dtype)


@triton.jit
def _bf16(value: tl.tensor, increment: tl.tensor) -> tl.tensor:
    """The upper half of an fp32, as int16, after adding to the lower one; infinities and nan stay what they are."""
    return ((_pattern(value) + increment) >> 16).to(tl.int16)


@triton.jit
def _pattern(value: tl.tensor) -> tl.tensor:
    """The bits of an fp32 as an int32; nan as precision.split has it, to which 16 bits can be added."""
    return tl.where(value != value, 0x7FC00000, value.to(tl.int32, bitcast=True))


@triton.jit
def _random_bits(key: tl.tensor, first_element: tl.tensor, places: tl.tensor) -> tl.tensor:
    """See precision.random_bits, for the elements from ``first_element``; ``key`` is its first one."""
    first_low = first_element.to(tl.uint32)
    first_high = (first_element >> 32).to(tl.uint32)
    places = places.to(tl.uint32)
    carries = places > 0xFFFFFFFF - first_low
    high_hash = tl.where(carries, (first_high + 1) * 0xC2B2AE35, first_high * 0xC2B2AE35)
    bits = _mix((_mix(places + (first_low + key)) ^ high_hash) + _mix(key + 0x85EBCA6B))
    return (bits & 0xFFFF).to(tl.int32), (bits >> 16).to(tl.int32)


@triton.jit
def _mix(word: tl.tensor) -> tl.tensor:
    word = word ^ (word >> 16)
    word = word * 0x21F0AAAD
    word = word ^ (word >> 15)
    word = word * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def _sqrt(x: tl.tensor) -> tl.tensor:
    """To a unit in the last place, also where the approximate instruction takes a denormal for 0."""
    is_tiny = x < 1.1754943508222875e-38  # 2**-126
    root = tl.sqrt(tl.where(is_tiny, x * 16777216.0, x))  # 2**24
    return tl.where(is_tiny, root * 0.000244140625, root)  # 2**-12


@triton.jit
def _bias_correction(step: tl.tensor, log_beta: tl.tensor) -> tl.tensor:
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


@triton.jit(do_not_specialize_on_alignment=["first_rows"])
def _sum_kernel(rows: tl.tensor, first_rows: tl.tensor, sums: tl.tensor, num_summands: tl.constexpr) -> None:
    """Add up the rows between two of ``first_rows`` in fp64."""
    program = tl.program_id(0)
    begin = tl.load(first_rows + program)
    count = tl.load(first_rows + program + 1) - begin
    summands = tl.arange(0, num_summands)[:, None]
    norms = tl.arange(0, 4)[None, :]
    values = tl.load(rows + (begin + summands) * 4 + norms, summands < count, other=0)
    tl.store(sums + program * 4 + tl.arange(0, 4), tl.sum(values.to(tl.float64), axis=0))
