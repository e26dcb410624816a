"""The update rule on the CPU as one compiled loop: every byte is read once and written once.

Invariant: an element's result has the same bits wherever it lies, at any cut, alignment and number of threads. Nothing
has to be arranged for that, as the compiler may not change how an element is computed: no contraction to fused
multiply-adds, no reassociation, so the vectorised body of a loop and its scalar end round alike. Only the sums of
squares may be taken in any order, which lets the loop be vectorised at all; each covers one tile, and tiles do not
depend on the number of threads.

Fragments are known by their addresses, so that ten thousand small ones cost one call.
"""

from __future__ import annotations

import ctypes
import math
import platform
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import carray, config, float32, float64, int64, njit, types, uint32
from numba.extending import intrinsic
from torch import Tensor

from sharded_dadamw.kernels.numba_language import (
    BF16,
    FLOAT,
    FP16,
    FP32,
    INT16,
    NONE,
    STORAGES,
    claim,
    compile_kernel,
    float_of,
    join,
    load,
    pattern_of,
    pointer_at,
    prefetch,
    run_on_threads,
    store,
)
from sharded_dadamw.kernels.operands import NORMS, Form, Operands
from sharded_dadamw.kernels.tiles import plan_tiles
from sharded_dadamw.update.adamw import Step

_TILE = 4096
"""Elements whose squares are summed in fp32."""
_BLOCK = 96
"""Elements whose squares are summed at once in the lanes of a vector."""
_AHEAD = 512
"""How many elements ahead lines are read, where the processor has to be told."""
_CLAIM = 16
"""Tiles that a thread takes at a time."""
_GRAIN = 1 << 16
"""Elements below which a thread is not worth waking."""
_TILE_OVERHEAD = 64
"""What a tile costs beside its elements, in elements."""

# The columns of the table of fragments; the first seven as in Operands.addresses.
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _MAIN, _STEP, _NUMEL, _FIRST_ELEMENT = range(9)


class _Call(ctypes.Structure):
    """All that a kernel is told: addresses of arrays, numbers of things, and the scalars of the rule."""

    _fields_ = (
        *((n, ctypes.c_int64) for n in ("claimed", "table", "fragments", "tile_fragments", "tile_starts", "tiles")),
        *((n, ctypes.c_int64) for n in ("squares", "skip")),
        *((n, ctypes.c_double) for n in ("decay", "lr", "beta1", "beta2", "eps", "factor")),
    )


def supports(form: Form) -> bool:
    """Whether ``Update`` takes fragments of this form."""
    needs_fp16 = torch.float16 in (form.param, form.grad, form.moments)
    return form.is_compiled and form.device.type == "cpu" and (not needs_fp16 or _has_fp16())


@cache
def _has_fp16() -> bool:
    """Whether the processor itself converts fp16: a compiled kernel has no library to call."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return False  # the user chose another processor to compile for
    return platform.machine() in ("aarch64", "arm64") or bool(get_host_cpu_features().get("f16c"))


class Update:
    """The update of fragments of one form that ``supports`` accepts, prepared once and applied at every step.

    Their memory, and not the tensors, has to outlive every call.
    """

    keeps_tensors = False
    fuses_norms = True

    def __init__(self, operands: Sequence[Operands]) -> None:
        self._form = operands[0].form
        rows = [(*each.addresses(), each.param.numel(), each.first_element or 0) for each in operands]
        self._table = np.array(rows, dtype=np.int64).reshape(len(rows), _FIRST_ELEMENT + 1)
        tiles = plan_tiles(tuple(self._table[:, _NUMEL].tolist()), _TILE)
        self._tile_fragments, self._tile_starts, offsets = (column.numpy() for column in tiles)
        self._num_tiles = len(self._tile_starts)
        self._filled = np.flatnonzero(np.diff(offsets))
        self._first_tiles = offsets[self._filled]
        table, *of_tiles = (a.ctypes.data for a in (self._table, self._tile_fragments, self._tile_starts))
        self._arrays = (table, len(rows), *of_tiles, self._num_tiles)
        self._max_threads = max(1, (int(self._table[:, _NUMEL].sum()) + self._num_tiles * _TILE_OVERHEAD) // _GRAIN)

    def point_to(self, gradients: Tensor) -> None:
        self._table[:, _GRAD] = gradients.numpy()

    def __call__(self, step: Step, group: int) -> Tensor:
        norms = np.zeros((len(self._table), len(NORMS)))
        if self._num_tiles:
            squares = np.empty((self._num_tiles, len(NORMS)))
            hyper, is_void = step.hypers[group], step.void is not None and bool(step.void)
            divisor = 1.0 if step.divisor is None else float(step.divisor)
            # Division costs a quarter of the arithmetic, and by a power of two it is a multiplication, bit for bit.
            is_power_of_two = math.frexp(divisor)[0] == 0.5 and divisor >= 2.0**-126
            factor = 1.0 / divisor if is_power_of_two else divisor
            scalars = (hyper.decay, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, factor)
            call = _Call(0, *self._arrays, squares.ctypes.data, is_void, *scalars)
            kernel = _compile(self._form, divide=not is_power_of_two)
            run_on_threads(kernel, call, min(self._max_threads, torch.get_num_threads()))
            norms[self._filled] = np.add.reduceat(squares, self._first_tiles)
        return torch.from_numpy(norms)


@intrinsic
def _round_to_fp16(typing: Any, value: Any) -> Any:
    """The nearest number of fp16, ties to even."""
    half = ir.HalfType()
    return types.float32(types.float32), lambda _, make, __, args: make.fpext(make.fptrunc(args[0], half), FLOAT)


@intrinsic
def _add(typing: Any, total: Any, term: Any) -> Any:
    """An addition that may be taken out of order, so that a sum can be taken in the lanes of a vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments, flags=("reassoc", "nsz"))

    return types.float32(types.float32, types.float32), generate


@njit(forceinline=True)
def _read_ahead(address: int, itemsize: int, first: int) -> None:
    """Begin to read a block of an array."""
    for line in range(0, _BLOCK * itemsize, 64):
        prefetch(address + first * itemsize + line)


@njit(forceinline=True)
def _larger(a: Any, b: Any) -> Any:
    """The larger number, or nan if one is."""
    return a if a > b or a != a else b


@njit(forceinline=True)
def _canonical(value: Any) -> Any:
    """The pattern of an fp32, in which all nan are one."""
    return pattern_of(value) if value == value else uint32(0x7FC00000)


@njit(forceinline=True)
def _cut(word: Any) -> Any:
    """The bf16 whose pattern is the upper half of this."""
    return float_of(uint32(word & uint32(0xFFFF0000)))


@njit(forceinline=True)
def _round(value: Any, storage: int) -> Any:
    """The nearest number of a storage, ties to even."""
    if storage == FP32:
        return value
    if storage == FP16:
        return _round_to_fp16(value)
    word = _canonical(value)
    return _cut(uint32(word + uint32(0x7FFF) + (uint32(word >> uint32(16)) & uint32(1))))


@njit(forceinline=True)
def _without_edits(value: Any, param: Any, storage: int) -> Any:
    """As ``sharded_dadamw.update.precision.without_edits``."""
    if storage == BF16:
        left = uint32(pattern_of(value) - pattern_of(param) + uint32(0x8000))
        return param if left > uint32(0x10000) else value
    return value if _round(value, storage) == param else param


@njit(forceinline=True)
def _weight_of(value: Any, storage: int) -> Any:
    """As ``sharded_dadamw.update.precision.weight_of``."""
    return _cut(uint32(_canonical(value) + uint32(0x8000))) if storage == BF16 else _round(value, storage)


@njit(forceinline=True)
def _round_stochastically(value: Any, random_bits: Any) -> Any:
    """As ``sharded_dadamw.update.precision.round_stochastically``."""
    return _cut(uint32(_canonical(value) + random_bits))


@njit(forceinline=True)
def _mix(word: Any) -> Any:
    """As in ``sharded_dadamw.update.precision``."""
    word = uint32(word ^ (word >> uint32(16)))
    word = uint32(word * uint32(0x21F0AAAD))
    word = uint32(word ^ (word >> uint32(15)))
    word = uint32(word * uint32(0x735A2D97))
    return uint32(word ^ (word >> uint32(15)))


@cache
def _compile(form: Form, *, divide: bool) -> Any:
    """The kernel of a form: a C function that claims tiles and applies the rule to them, until there are none."""
    param_as, grad_as, moments_as, main_as = (
        STORAGES[dtype] for dtype in (form.param, form.grad, form.moments, form.main)
    )
    value_column, value_as = (_MAIN, FP32) if main_as == FP32 else (_PARAM, param_as)
    amsgrad = form.amsgrad
    stochastic = form.is_stochastic
    # Measured: reading ahead takes this form to 0.9 of its time; forms with fewer or narrower arrays get slower by it.
    reads_ahead = main_as == INT16 and moments_as == FP32

    def run(pointer: Any) -> None:
        call = carray(pointer, 1)[0]
        table = carray(pointer_at(call.table), (call.fragments, _FIRST_ELEMENT + 1), np.int64)
        tile_fragments = carray(pointer_at(call.tile_fragments), call.tiles, np.int32)
        tile_starts = carray(pointer_at(call.tile_starts), call.tiles, np.int64)
        squares = carray(pointer_at(call.squares), (call.tiles, 4), np.float64)
        decay, beta1, beta2, eps = float32(call.decay), float32(call.beta1), float32(call.beta2), float32(call.eps)
        rest1, rest2, factor = float32(1.0 - call.beta1), float32(1.0 - call.beta2), float32(call.factor)
        step, rate, scale, key0, key1 = -1.0, float32(0.0), float32(0.0), uint32(0), uint32(0)
        first_tile = claim(pointer, _CLAIM)
        while first_tile < call.tiles:
            for tile in range(first_tile, min(first_tile + _CLAIM, call.tiles)):
                row = table[tile_fragments[tile]]
                param_at, grad_at, main_at, value_at = row[_PARAM], row[_GRAD], row[_MAIN], row[value_column]
                exp_avg_at, exp_avg_sq_at, maximum_at = row[_EXP_AVG], row[_EXP_AVG_SQ], row[_MAX_EXP_AVG_SQ]
                start = tile_starts[tile]
                stop = min(start + _TILE, row[_NUMEL])
                sum_grad = sum_param = sum_moment = sum_update = float32(0.0)
                if call.skip:
                    for i in range(start, stop):
                        grad = load(grad_at, _GRAD, grad_as, i)
                        grad = grad / factor if divide else grad * factor
                        value = load(value_at, value_column, value_as, i)
                        if main_as == INT16:
                            value = join(value, load(main_at, _MAIN, INT16, i))
                        elif main_as == FP32:
                            value = _without_edits(value, load(param_at, _PARAM, param_as, i), param_as)
                        exp_avg = load(exp_avg_at, _EXP_AVG, moments_as, i)
                        sum_grad = _add(sum_grad, grad * grad)
                        sum_param = _add(sum_param, value * value)
                        sum_moment = _add(sum_moment, exp_avg * exp_avg)
                    stop = start
                new_step = float64(load(row[_STEP], _STEP, FP32, 0))
                if new_step != step:
                    step = new_step
                    rate = float32(call.lr / (1.0 - call.beta1**step))
                    scale = float32(1.0 / math.sqrt(1.0 - call.beta2**step))
                    key0 = _mix(_mix(uint32(int64(step) + 0x9E3779B9)))
                    key1 = _mix(uint32(key0 + uint32(0x85EBCA6B)))
                for block in range(start, stop, _BLOCK):
                    if reads_ahead and block + _AHEAD < row[_NUMEL]:
                        _read_ahead(param_at, 2, block + _AHEAD)
                        _read_ahead(grad_at, 4 if grad_as == FP32 else 2, block + _AHEAD)
                        _read_ahead(exp_avg_at, 4, block + _AHEAD)
                        _read_ahead(exp_avg_sq_at, 4, block + _AHEAD)
                        _read_ahead(main_at, 2, block + _AHEAD)
                    first_element = row[_FIRST_ELEMENT] + block
                    first_low = uint32(first_element)
                    key_high = uint32(uint32(first_element >> 32) * uint32(0xC2B2AE35))
                    next_key_high = uint32(key_high + uint32(0xC2B2AE35))
                    for i in range(block, min(block + _BLOCK, stop)):
                        grad = load(grad_at, _GRAD, grad_as, i)
                        grad = grad / factor if divide else grad * factor
                        value = load(value_at, value_column, value_as, i)
                        if main_as == INT16:
                            value = join(value, load(main_at, _MAIN, INT16, i))
                        elif main_as == FP32:
                            value = _without_edits(value, load(param_at, _PARAM, param_as, i), param_as)
                        exp_avg = load(exp_avg_at, _EXP_AVG, moments_as, i)
                        exp_avg_sq = load(exp_avg_sq_at, _EXP_AVG_SQ, moments_as, i)
                        exp_avg = beta1 * exp_avg + rest1 * grad
                        exp_avg_sq = beta2 * exp_avg_sq + rest2 * (grad * grad)
                        second_moment = exp_avg_sq
                        if amsgrad:
                            maximum = load(maximum_at, _MAX_EXP_AVG_SQ, moments_as, i)
                            second_moment = _larger(maximum, exp_avg_sq)
                        update = decay * value + rate * (exp_avg / (math.sqrt(second_moment) * scale + eps))
                        value = value - update

                        if stochastic:
                            low = uint32(first_low + uint32(i - block))
                            word = _mix(uint32(low + key0)) ^ (key_high if low >= first_low else next_key_high)
                            word = _mix(uint32(word + key1))
                            exp_avg = _round_stochastically(exp_avg, uint32(word & uint32(0xFFFF)))
                            exp_avg_sq = _round_stochastically(exp_avg_sq, uint32(word >> uint32(16)))
                        else:
                            exp_avg = _round(exp_avg, moments_as)
                            exp_avg_sq = _round(exp_avg_sq, moments_as)
                        store(exp_avg_at, _EXP_AVG, moments_as, i, exp_avg)
                        store(exp_avg_sq_at, _EXP_AVG_SQ, moments_as, i, exp_avg_sq)
                        if amsgrad:
                            store(maximum_at, _MAX_EXP_AVG_SQ, moments_as, i, _larger(maximum, exp_avg_sq))

                        if main_as == NONE:
                            value = _round(value, param_as)
                            store(param_at, _PARAM, param_as, i, value)
                        else:
                            weight = _weight_of(value, param_as)
                            store(param_at, _PARAM, param_as, i, weight)
                            if main_as == FP32:
                                store(main_at, _MAIN, FP32, i, value)
                            else:
                                remainder = uint32(_canonical(value) - pattern_of(weight))
                                store(main_at, _MAIN, INT16, i, remainder)

                        sum_grad = _add(sum_grad, grad * grad)
                        sum_param = _add(sum_param, value * value)
                        sum_moment = _add(sum_moment, exp_avg * exp_avg)
                        sum_update = _add(sum_update, update * update)
                squares[tile, 0] = sum_grad
                squares[tile, 1] = sum_param
                squares[tile, 2] = sum_moment
                squares[tile, 3] = sum_update
            first_tile = claim(pointer, _CLAIM)

    return compile_kernel(run, _Call, "_".join(str(part).rpartition(".")[2] for part in (*form[1:7], divide)))
