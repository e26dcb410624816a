"""A fingerprint beside a plain read of the same bytes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor

from scripts.bench import harness
from scripts.bench.harness import Clock, OnDevice, Report, Spread
from sharded_dadamw.kernels import fingerprint
from sharded_dadamw.kernels.fingerprint import Span, sums_of
from sharded_dadamw.layout.indices import Rows


@dataclass(frozen=True, kw_only=True)
class Fingerprint(OnDevice):
    """Time the 64-bit sum of a tensor that is larger than the caches, against its maximum, which torch reads it for."""

    packages = ("numba", "triton")

    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 20
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1
    mib: Annotated[int, typer.Option(min=1, help="MiB of the tensor.")] = 256

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        device = self.torch_device()
        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.randn(self.mib * 2**20 // dtype.itemsize, device=device).to(dtype)
            span = Span(values, None, Rows(0, values.numel(), values.numel(), 0, values.numel(), 0))
            contenders: dict[str, Callable[[], Tensor]] = {
                "a plain read": values.view(torch.int32).max,
                "fingerprint": partial(sums_of, [span]),
                "fingerprint by torch's operations": partial(fingerprint.sum_by_torch, span),
            }
            turns = [partial(seconds_of, work, Clock(device)) for work in contenders.values()]
            seconds = harness.interleave(turns, self.rounds, self.warmup)[:, :, 0]
            for number, name in enumerate(contenders):
                of_one, ratio = seconds[:, number], Spread.of(seconds[:, number] / seconds[:, 0])
                speed = f"{values.nbytes / 1e9 / float(of_one.median()):.1f}"
                rows.append([f"{dtype}"[6:], name, f"{1e3 * float(of_one.median()):.1f}", speed, str(ratio)])
        notes = f"{self.mib} MiB, {self.threads} threads; {self.rounds} rounds after {self.warmup} of warm-up; medians"
        self.publish(Report(["dtype", "", "ms", "GB/s", "/ a plain read"], rows, [notes], {}))


def seconds_of(work: Callable[[], Tensor], clock: Clock, index: int) -> list[float]:
    """What it takes until the device is done."""
    clock.settle()
    start = time.perf_counter()
    work()
    clock.settle()
    return [time.perf_counter() - start]
