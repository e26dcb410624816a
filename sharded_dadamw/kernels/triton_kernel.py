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

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors.
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
from sharded_dadamw.kernels.triton_language import (
    address_in,
    bias_correction,
    join,
    load,
    mix,
    narrow,
    pattern_of,
    random_bits,
    square_root,
    store,
    upper_half,
    widen,
    without_edits,
)
from sharded_dadamw.kernels.triton_sums import add_up, levels_of_sums
from sharded_dadamw.update.adamw import Step

_DEVICE_TYPE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

# Measured on an H100.
_TILE = 2048
"""Elements that one program updates."""
_NUM_WARPS = 4
_MAX_REGISTERS = 72
"""Per thread. Left alone, the compiler takes so many for some forms that too few warps are left to hide latencies."""
_VECTOR = 4
"""Elements that a thread reads or writes in one access, where tensors are aligned to as many: 16 bytes of fp32."""
_LINE = 64
"""Elements of a multiple of which tiles start, so that accesses do not straddle cache lines: 128 bytes of bf16."""

# The columns of the table of fragments; the first seven are Operands.addresses.
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _MAIN, _STEP = map(tl.constexpr, range(7))
_NUMEL, _FIRST_ELEMENT, _FIRST_TILE, _SHIFT, _BEHIND, _NUM_COLUMNS = map(tl.constexpr, range(7, 13))

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
        levels = levels_of_sums(first_tiles)

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
            return add_up(sums, self._levels)


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
    param_at = address_in(row + _PARAM, start, param_dtype)
    grad_at = address_in(gradients + fragment, start, grad_dtype)
    exp_avg_at = address_in(row + _EXP_AVG, start, moments_dtype)
    exp_avg_sq_at = address_in(row + _EXP_AVG_SQ, start, moments_dtype)
    if amsgrad:
        max_exp_avg_sq_at = address_in(row + _MAX_EXP_AVG_SQ, start, moments_dtype)
    if main_dtype is not None:
        main_at = address_in(row + _MAIN, start, main_dtype)

    step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32)))
    rate = tl.cast(tl.load(lr) if lr_is_tensor else lr, tl.float32)
    decay = decay_per_lr * rate + constant_decay
    step_size = rate / bias_correction(step, log_beta1)
    root_scale = tl.rsqrt(bias_correction(step, log_beta2))
    if divisor is not None:
        divided_by = tl.load(divisor)
    if void is not None:
        goes_on = tl.load(void) == 0
    if is_stochastic:
        key = mix(mix(step.to(tl.int64).to(tl.uint32) + 0x9E3779B9))
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
            grad = widen(load(grad_at, first, places, inside, width), grad_dtype)
            exp_avg = widen(load(exp_avg_at, first, places, inside, width), moments_dtype)
            exp_avg_sq = widen(load(exp_avg_sq_at, first, places, inside, width), moments_dtype)
            if main_dtype == tl.float32:
                stored = load(param_at, first, places, inside, width)
                value = without_edits(load(main_at, first, places, inside, width), stored, param_dtype)
            elif main_dtype == tl.int16:
                stored = load(param_at, first, places, inside, width)
                pattern = join(stored, load(main_at, first, places, inside, width))
                value = pattern.to(tl.float32, bitcast=True)
            else:
                value = widen(load(param_at, first, places, inside, width), param_dtype)
            if amsgrad:
                max_exp_avg_sq = widen(load(max_exp_avg_sq_at, first, places, inside, width), moments_dtype)

            if divisor is not None:
                grad = tl.where(inside, tl.div_rn(grad, divided_by), 0.0)
            new_exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
            new_exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
            second_moment = new_exp_avg_sq
            if amsgrad:
                second_moment = tl.maximum(max_exp_avg_sq, new_exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
            denom = square_root(second_moment) * root_scale + eps
            update = tl.where(is_written, decay * value + step_size * (new_exp_avg / denom), 0.0)
            new_value = value - update

            if is_stochastic:
                bits1, bits2 = random_bits(key, first_element + first, places)
                stored_exp_avg = upper_half(new_exp_avg, bits1)
                stored_exp_avg_sq = upper_half(new_exp_avg_sq, bits2)
            else:
                stored_exp_avg = narrow(new_exp_avg, moments_dtype)
                stored_exp_avg_sq = narrow(new_exp_avg_sq, moments_dtype)
            store(exp_avg_at, first, places, stored_exp_avg, is_written, width)
            store(exp_avg_sq_at, first, places, stored_exp_avg_sq, is_written, width)
            if amsgrad:
                rounded = widen(stored_exp_avg_sq, moments_dtype)
                largest = tl.maximum(max_exp_avg_sq, rounded, propagate_nan=tl.PropagateNan.ALL)
                store(max_exp_avg_sq_at, first, places, narrow(largest, moments_dtype), is_written, width)
            if main_dtype is None:
                stored_value = narrow(new_value, param_dtype)
                store(param_at, first, places, stored_value, is_written, width)
                new_value = widen(stored_value, param_dtype)
            elif main_dtype == tl.int16:
                weight = upper_half(new_value, 0x8000)
                remainder = pattern_of(new_value) - (weight.to(tl.int32) << 16)
                store(param_at, first, places, weight, is_written, width)
                store(main_at, first, places, remainder.to(tl.int16), is_written, width)
            else:
                weight = upper_half(new_value, 0x8000) if param_dtype == tl.bfloat16 else new_value.to(param_dtype)
                store(param_at, first, places, weight, is_written, width)
                store(main_at, first, places, new_value, is_written, width)

            new_exp_avg = widen(stored_exp_avg, moments_dtype)
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
