"""Which kernel runs an update: numba's on a CPU, Triton's on CUDA, torch's own where those are missing or do not fit.

They all compute ``sharded_dadamw.update.adamw`` in fp32, and differ in rounding alone; so the sharded and the
unsharded optimizer, which choose here, get the same bits. The choice depends on the form of the tensors and on what is
installed, and on nothing else.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

from sharded_dadamw.kernels import torch_kernel
from sharded_dadamw.kernels.operands import Form, Update

log = logging.getLogger("sharded_dadamw")

COMPILERS = {"cpu": "numba", "cuda": "triton"}
"""By device type the package that compiles. Our modules begin with its name; the extra is called after the device."""


def kernel_for(form: Form) -> type[Update]:
    """What updates fragments of this form."""
    compiled = compiled_kernel(form.device.type)
    kernel: type[Update] = (compiled if compiled is not None and compiled.supports(form) else torch_kernel).Update
    return kernel


@cache
def compiled_kernel(device_type: str) -> ModuleType | None:
    """The compiled kernel for a device; None where there is none, or what compiles it is missing."""
    package = COMPILERS.get(device_type)
    if package is None:
        return None
    try:
        return importlib.import_module(f"sharded_dadamw.kernels.{package}_kernel")
    except (ImportError, OSError) as error:  # OSError: a library of the compiler does not load
        log.warning(
            "updates on %s run in torch's own kernels, which are slower where norms are asked for or dtypes differ: "
            "%s is missing (%s); pip install 'sharded_dadamw[%s]'",
            device_type,
            package,
            error,
            device_type,
        )
        return None
