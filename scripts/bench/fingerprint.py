"""A fingerprint beside a plain read of the same bytes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor

from scripts.bench import harness
from scripts.bench.harness import Benchmark, Clock, Device, Report, Spread
from sharded_dadamw.kernels import fingerprint
from sharded_dadamw.kernels.fingerprint import Span, sums_of
from sharded_dadamw.layout.indices import Rows


@dataclass(frozen=True, kw_only=True)
class Fingerprint(Benchmark):
    """Time the 64-bit sum of a tensor that is larger than the caches, against its maximum, which torch reads it for."""

    packages = ("numba", "triton")

    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 20
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1
    mib: Annotated[int, typer.Option(min=1, help="MiB of the tensor.")] = 256
    device: Annotated[Device | None, typer.Option(help="By default a GPU, if there is one.")] = None

    def torch_device(self, local_rank: int = 0) -> torch.device:
        return harness.device_of(self.device)

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        device = self.torch_device()
        rows = []
        for dtype in (torch.float32, torch.bfloat16):
            values = torch.randn(self.mib * 2**20 // dtype.itemsize, device=device).to(dtype)
            span = Span(values, None, Rows(0, values.numel(), values.numel(), 0, values.numel(), 0))
            integers = values.view(torch.int32)
            contenders: dict[str, Callable[[], Tensor]] = {
                "a plain read": integers.max,
                "fingerprint": lambda span=span: sums_of([span]),  # type: ignore[misc]
                "fingerprint by torch's operations": lambda span=span: fingerprint.sum_by_torch(span),  # type: ignore[misc]
            }
            turns = [self._turn(work, Clock(device)) for work in contenders.values()]
            seconds = harness.interleave(turns, self.rounds, self.warmup)[:, :, 0]
            for number, name in enumerate(contenders):
                of_one, ratio = seconds[:, number], Spread.of(seconds[:, number] / seconds[:, 0])
                speed = f"{values.nbytes / 1e9 / float(of_one.median()):.1f}"
                rows.append([f"{dtype}"[6:], name, f"{1e3 * float(of_one.median()):.1f}", speed, str(ratio)])
        notes = f"{self.mib} MiB, {self.threads} threads; {self.rounds} rounds after {self.warmup} of warm-up; medians"
        self.publish(Report(["dtype", "", "ms", "GB/s", "/ a plain read"], rows, [notes], {}))

    @staticmethod
    def _turn(work: Callable[[], Tensor], clock: Clock) -> Callable[[int], tuple[float]]:
        def turn(index: int) -> tuple[float]:
            clock.settle()
            start = time.perf_counter()
            work()
            clock.settle()
            return (time.perf_counter() - start,)

        return turn
