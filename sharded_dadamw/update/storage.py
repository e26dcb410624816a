"""In what dtypes a bucket keeps its state: the settings of a user, applied to one parameter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.config import MainParameter, Moments, ShardingConfig
from sharded_dadamw.layout.bucket_layout import ALIGNMENT

BLOCK_8BIT = 256
"""Elements that share a scale, counted from a parameter's first."""
_SMALLEST_8BIT = 4096
"""As torchao: below that the scales and the loss of precision are not worth it."""
LARGEST_BETA2_FOR_NEAREST = 0.995
"""Up to which a second moment of 16 bits, rounded to the nearest, still follows its gradients."""


Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""Makes a flat buffer of zeros."""


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat buffer in memory of this process alone."""
    return torch.zeros(numel, dtype=dtype, device=device)


@dataclass(frozen=True, slots=True)
class Storage:
    """How the state of some parameters is stored. Parameters of equal storage share buckets.

    Attributes:
        param: Dtype of the parameters.
        main: fp32: an fp32 copy of each parameter. int16: the remainder of its fp32 value. None: neither.
        moments: Dtype of the moments; fp32 where they are in 8 bits.
        in_8_bits: Whether the moments are quantised, in blocks counted from each parameter's first element.
        rounds_to_nearest: Whether moments narrower than fp32 are rounded to the nearest, and not stochastically.
    """

    param: torch.dtype
    main: torch.dtype | None
    moments: torch.dtype
    in_8_bits: bool
    rounds_to_nearest: bool

    @classmethod
    def of(cls, param: Tensor, config: ShardingConfig) -> Storage:
        """Choose for a parameter.

        Raises:
            ImportError: Moments in 8 bits need torchao.
            ValueError: The settings are not for parameters of its dtype.
        """
        wide = torch.promote_types(param.dtype, torch.float32)
        is_narrow = param.dtype != wide
        main = None
        if is_narrow and config.main_parameter is MainParameter.FP32:
            main = torch.float32
        elif is_narrow and config.main_parameter is MainParameter.REMAINDER:
            if param.dtype is not torch.bfloat16:
                raise ValueError(
                    f"main_parameter: expected MainParameter.FP32 or NONE for {param.dtype}, got REMAINDER; only bf16 "
                    "has the exponent of fp32, and is its upper half"
                )
            main = torch.int16
        moments = wide
        if config.moments is Moments.LIKE_PARAMETERS:
            moments = param.dtype
        elif config.moments is Moments.BF16 and wide is torch.float32:
            moments = torch.bfloat16
        in_8_bits = (
            config.moments is Moments.INT8
            and wide is torch.float32
            and param.numel() >= _SMALLEST_8BIT
            and param.numel() % BLOCK_8BIT == 0
        )
        if in_8_bits:
            _torchao_8bit()
        return cls(param.dtype, main, moments, in_8_bits, config.moments is Moments.LIKE_PARAMETERS)

    @property
    def alignment(self) -> int:
        """Elements on a multiple of which shards are cut."""
        return BLOCK_8BIT if self.in_8_bits else ALIGNMENT

    @property
    def is_stochastic(self) -> bool:
        """Whether moments are rounded stochastically."""
        return self.moments is torch.bfloat16 and not self.rounds_to_nearest

    def check_beta2(self, beta2: float) -> None:
        """Refuse what would freeze.

        Raises:
            ValueError: Rounding to the nearest would keep ``exp_avg_sq`` from ever falling.
        """
        if self.rounds_to_nearest and self.moments.itemsize < 4 and beta2 > LARGEST_BETA2_FOR_NEAREST:
            raise ValueError(
                f"betas: expected beta2 <= {LARGEST_BETA2_FOR_NEAREST} with moments in {self.moments} rounded to "
                f"the nearest, got {beta2}: a step of exp_avg_sq is then less than half its last digit, and it never "
                "falls again; use Moments.BF16, which rounds stochastically, or Moments.FP32"
            )

    def zeros(self, numel: int, device: torch.device, *, signed: bool) -> Tensor:
        """A moment of zeros.

        Args:
            numel: A multiple of ``alignment``.
            device: Where.
            signed: Whether it can be negative.
        """
        if self.in_8_bits and numel:
            moment: Tensor = _torchao_8bit().zeros((numel,), signed, BLOCK_8BIT, device, torch.float32)
            return moment
        return torch.zeros(numel, dtype=self.moments, device=device)


def is_in_8_bits(tensor: Tensor) -> bool:
    """Whether a tensor is one of torchao's, of codes and scales."""
    return hasattr(tensor, "codes")


def part_of(moment: Tensor, start: int, stop: int) -> Tensor:
    """A view of a range of a moment; in 8 bits it starts on a block and ends on one."""
    if not is_in_8_bits(moment):
        return moment[start:stop]
    if start == stop:
        return torch.zeros(0, dtype=torch.float32, device=moment.device)
    quantized: Any = moment
    part: Tensor = type(quantized)(
        quantized.codes[start:stop],
        quantized.scale[start // BLOCK_8BIT : stop // BLOCK_8BIT],
        quantized.qmap,
        quantized.signed,
        torch.float32,
    )
    return part


def num_bytes(tensor: Tensor) -> int:
    """Bytes of a moment or main parameter as stored, scales included."""
    quantized: Any = tensor
    return int(quantized.codes.nbytes + quantized.scale.nbytes) if is_in_8_bits(tensor) else tensor.nbytes


def widened(moment: Tensor) -> Tensor:
    """What a kernel can work on: the moment itself or, where it is in 8 bits, its fp32 values."""
    return moment.dequantize() if is_in_8_bits(moment) else moment


def put_back_(moment: Tensor, values: Tensor, found_inf: Tensor | None) -> None:
    """Store what a kernel has left in the result of ``widened``.

    Args:
        moment: What was widened; changed in place.
        values: The result, updated.
        found_inf: Where it is not 0 the moment keeps its bytes: quantising what was dequantised may not restore them.
    """
    quantized: Any = moment
    if values is moment:
        return
    if found_inf is None:
        moment.copy_(values)
        return
    before = [part.clone() for part in (quantized.codes, quantized.scale)]
    moment.copy_(values)
    for part, old in zip((quantized.codes, quantized.scale), before, strict=True):
        part.copy_(torch.where(found_inf != 0, old, part))


@cache
def _torchao_8bit() -> Any:
    """Torchao's 8-bit state.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module("torchao.optim.subclass_8bit").OptimState8bit
    except ImportError as error:
        raise ImportError(
            f"Moments.INT8 needs torchao ({error}); pip install 'sharded_dadamw[8bit]', or choose Moments.BF16"
        ) from error
