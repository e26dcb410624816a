"""What compiled loops on the CPU are written in: arrays known by address, in any storage, and torch's own threads.

A loop is a C function of a pointer to a call, a structure of numbers. Several threads may run it; each then claims
what it does.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, from_dtype, njit, types, uint32
from numba.extending import intrinsic

FLOAT, WORD = ir.FloatType(), ir.IntType(32)

NUM_COLUMNS = 7
"""Arrays, at most, of which the compiler knows that they do not overlap."""

# How an array holds its numbers.
FP32, BF16, FP16, INT16, NONE = range(5)
_HELD_AS = {FP32: (FLOAT, 4), BF16: (ir.IntType(16), 2), FP16: (ir.HalfType(), 2), INT16: (ir.IntType(16), 2)}
STORAGES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.int16: INT16, None: NONE}


def _find_openmp() -> Any:
    """Return what starts a function on torch's own threads; None where their OpenMP lacks GNU's entry point."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"))
        start = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    start.restype = None
    return start


_openmp = _find_openmp()


def _forget_openmp() -> None:
    """In a forked child, which has none of its parent's threads; OpenMP would wait for them for ever."""
    global _openmp
    _openmp = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_openmp)


def run_on_threads(kernel: Any, call: ctypes.Structure, num_threads: int) -> None:
    """Run a kernel on so many threads at once, of which this is one; each claims what it does.

    On torch's threads, and where they cannot be had on this one alone: they busy-wait for a while after each operation
    of torch, and threads beside them would have to share the processors with them.
    """
    address = ctypes.addressof(call)
    if num_threads > 1 and _openmp is not None:
        _openmp(kernel.address, address, num_threads, 0)
    else:
        kernel.ctypes(address)


_OWN_SOURCE = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()


def compile_kernel(run: Callable[[Any], None], call: type[ctypes.Structure], name: str) -> Any:
    """A C function of a pointer to a call; compiled once per machine, where there is a folder to keep the result in.

    What is kept goes by ``name``, in a file of its own: processes that write kernels to one file at once can mix them
    up. numba compiles anew where the file of ``run`` has changed, and the name has to say where this one has.
    """
    run.__qualname__ = f"{name}_{_OWN_SOURCE}"
    signature = types.void(types.CPointer(from_dtype(np.dtype(call))))
    try:
        return cfunc(signature, error_model="numpy", cache=True)(run)
    except Exception:  # nowhere to keep it, no room, or what was kept is damaged; what is wrong itself fails again
        return cfunc(signature, error_model="numpy")(run)


@intrinsic(prefer_literal=True)
def load(typing: Any, address: Any, column: Any, storage: Any, index: Any) -> Any:
    """Element ``index`` of the array at ``address``, as fp32; of an int16 array as uint32, sign included."""
    storage_value = storage.literal_value
    result = types.uint32 if storage_value == INT16 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # Where vectors have 512 bits the compiler would rather use half of them. llvmlite has no name for this wish.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        number, size = _HELD_AS[storage_value]
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        held = builder.load(builder.gep(pointer, [arguments[3]]), align=size)
        _keep_apart(builder, held, column.literal_value)
        if storage_value == BF16:
            return builder.bitcast(builder.shl(builder.zext(held, WORD), WORD(16)), FLOAT)
        if storage_value == FP16:
            return builder.fpext(held, FLOAT)
        return builder.sext(held, WORD) if storage_value == INT16 else held

    return result(types.int64, column, storage, types.int64), generate


@intrinsic(prefer_literal=True)
def store(typing: Any, address: Any, column: Any, storage: Any, index: Any, value: Any) -> Any:
    """Write element ``index`` of the array at ``address``; ``value`` is one that the storage can hold."""
    storage_value = storage.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, size = _HELD_AS[storage_value]
        held = arguments[4]
        if storage_value == BF16:
            held = builder.trunc(builder.lshr(builder.bitcast(held, WORD), WORD(16)), number)
        elif storage_value == FP16:
            held = builder.fptrunc(held, number)
        elif storage_value == INT16:
            held = builder.trunc(held, number)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        stored = builder.store(held, builder.gep(pointer, [arguments[3]]), align=size)
        _keep_apart(builder, stored, column.literal_value)

    result = types.uint32 if storage_value == INT16 else types.float32
    return types.void(types.int64, column, storage, types.int64, result), generate


def _keep_apart(builder: Any, access: Any, column: int) -> None:
    """Tell the compiler that the arrays of different columns do not overlap; else it would check, or not vectorise."""
    add = builder.module.add_metadata
    domain = add(["sharded_dadamw"])
    scopes = [add([str(each), domain]) for each in range(NUM_COLUMNS)]
    access.set_metadata("alias.scope", add([scopes[column]]))
    access.set_metadata("noalias", add(scopes[:column] + scopes[column + 1 :]))


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Begin to read the cache line at ``address``, which need not be valid."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = ir.FunctionType(ir.VoidType(), [pointer, WORD, WORD, WORD])
        begin = builder.module.declare_intrinsic("llvm.prefetch", [pointer], function)
        builder.call(begin, [builder.inttoptr(arguments[0], pointer), WORD(0), WORD(3), WORD(1)])  # data, to be kept

    return types.void(types.int64), generate


@intrinsic
def pointer_at(typing: Any, address: Any) -> Any:
    """``address`` as a pointer."""
    pointer = ir.IntType(8).as_pointer()
    return types.voidptr(types.int64), lambda _, builder, __, arguments: builder.inttoptr(arguments[0], pointer)


@intrinsic
def claim(typing: Any, call: Any, count: Any) -> Any:
    """Add to the first number of a call, atomically; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        claimed = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", claimed, arguments[1], "monotonic")

    return types.int64(call, types.int64), generate


@intrinsic
def float_of(typing: Any, word: Any) -> Any:
    """The fp32 with this pattern."""
    return types.float32(types.uint32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], FLOAT)


@intrinsic
def pattern_of(typing: Any, value: Any) -> Any:
    """The pattern of an fp32."""
    return types.uint32(types.float32), lambda _, builder, __, arguments: builder.bitcast(arguments[0], WORD)


@njit(forceinline=True)
def join(value: Any, remainder: Any) -> Any:
    """As ``sharded_dadamw.update.precision.join``."""
    word = pattern_of(value)
    wraps = uint32(word & uint32(0x7FFFFFFF)) == uint32(0) and remainder >= uint32(0x80000000)
    return float_of(uint32(word + (uint32(0) if wraps else remainder)))
