"""A fingerprint beside a plain read of the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from scripts.bench.harness import OnDevice, OnRanks, Report, median, ms, seconds_of, spread
from sharded_dadamw.kernels import fingerprint
from sharded_dadamw.kernels.fingerprint import Span, sums_of
from sharded_dadamw.layout.indices import Rows


@dataclass(frozen=True, kw_only=True)
class Fingerprint(OnDevice, OnRanks):
    """Time the 64-bit sum of a tensor that is larger than the caches, against its maximum, which torch reads it for."""

    packages = ("numba", "triton")

    ranks: Annotated[int, typer.Option(min=1, max=1, help="One.")] = 1
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1
    mib: Annotated[int, typer.Option(min=1, help="MiB of the tensor.")] = 256

    def measure(self) -> Report:
        device = self.torch_device
        rows = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = torch.randn(self.mib * 2**20 // dtype.itemsize, device=device).to(dtype)
            span = Span(values, None, Rows(0, values.numel(), values.numel(), 0, values.numel(), 0))
            contenders: dict[str, Callable[[], Tensor]] = {
                "a plain read": values.view(torch.int32).max,
                "fingerprint": partial(sums_of, [span]),
                "fingerprint by torch's operations": partial(fingerprint.sum_by_torch, span),
            }
            turns = [lambda index, work=work: seconds_of(work, device) for work in contenders.values()]
            seconds, cpu = self.interleave(turns).permute(2, 1, 0)
            own = seconds if device.type == "cuda" else cpu
            for name, one, its_own in zip(contenders, seconds, own, strict=True):
                row = {"dtype": f"{dtype}"[6:], "": name, "ms": ms(one)}
                row["GB/s"] = f"{values.nbytes / 1e9 / median(one):.1f}"
                rows.append(row | {"/ a plain read": spread(its_own / own[0])})
        return Report(rows, [f"{self.mib} MiB; {self.set_up}", "Ratios are of a CPU's own seconds, or a GPU's time."])
