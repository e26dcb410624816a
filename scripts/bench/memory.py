"""What each contender of a training step holds in memory, at rest and at most, beside its formula."""

import gc
import multiprocessing
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from launch.options import Precision
from scripts.bench.harness import Report, say, start_ranks
from scripts.bench.peers import KINDS, Contest, build
from sharded_dadamw import ShardedDecoupledAdamW

ADDED_UP = re.compile(rb"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Memory(Contest):
    """Measure the memory of each contender in processes of its own.

    Counted is what the kernel says is theirs, anonymous pages and shared ones, the latter divided by the number of
    processes that have them in use; what they held before there was a model, but after a step of ours with a tiny one,
    is taken off. At rest is after a step and zero_grad; at most is the largest of samples taken all through a step,
    activations included. Contenders that put a rank's data into memory that all ranks map are so charged for it once.
    """

    rounds: Annotated[int, typer.Option(min=1, help="Steps; the last one counts.")] = 4
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 32

    def run(self) -> None:
        # Memory that is freed goes back at once, so that what is held is what is in use.
        os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**17)
        os.environ["MALLOC_ARENA_MAX"] = "2"
        rows = []
        results = multiprocessing.get_context("spawn").SimpleQueue()
        for name in self.names:
            start_ranks(self.train, self.ranks, name, results)
            found, *_ = [results.get() for _ in range(self.ranks)]
            computed = {"parameters + gradients + state, computed": f"{self.computed(name):.2f}"}
            rows.append({"contender": name, **computed, **found})
            say(" ".join(rows[-1].values()))
        lines = [
            f"Bytes per parameter and rank. {self.model_in_words}, {self.ranks} ranks (gloo), buckets of "
            f"{self.bucket_cap_mb:g} MiB.",
            "At rest: after zero_grad. At most: samples during a step, activations included.",
        ]
        self.publish(Report(rows, lines))

    def computed(self, name: str) -> float:
        """Bytes per parameter of parameters, gradients and state that stay, without buffers in passing."""
        size = self.torch_dtype.itemsize
        moments = 2 * size
        if KINDS[name].settings is not None:
            main = (2 if self.remainder else 4) if self.dtype is Precision.BF16 else 0
            moments = 8 + main
        elif name.startswith("deepspeed"):
            moments = 12  # and a main parameter in any case
        held = {"p": size, "g": size, "s": moments}
        return sum(num / (self.ranks if kind in KINDS[name].spread else 1) for kind, num in held.items())

    def train(self, number: int, name: str, results: Any, rendezvous: str) -> None:
        """Train with one contender; puts into `results` what it held, the mean over ranks, or why there is none."""
        with self.joined(number, rendezvous):
            batches = [self.batch_of(step) for step in range(self.rounds)]
            warm_up(self.torch_dtype)
            before = bytes_held()
            try:
                contender = build(name, self)
            except ImportError as error:
                results.put({"at rest": "not installed", "at most": str(error)})
                return
            for batch in batches:
                with Peak() as peak:
                    contender.model(*batch).backward()
                    contender.optimizer.step()
                    contender.synchronize()
                contender.zero_grad()
                gc.collect()
                dist.barrier()
                now = torch.tensor([bytes_held() - before, peak.num_bytes - before], dtype=torch.float64)
            dist.all_reduce(now)
            at_rest, at_most = (now / self.ranks / self.num_parameters).tolist()
            results.put({"at rest": f"{at_rest:.2f}", "at most": f"{at_most:.2f}"})


def warm_up(dtype: torch.dtype) -> None:
    """Have everything loaded and compiled that takes memory once: torch's libraries, and our kernel's compiler."""
    linear = torch.nn.Linear(64, 64, dtype=dtype)
    optimizer = ShardedDecoupledAdamW(linear.parameters())
    for _ in range(2):
        linear(torch.randn(8, 64, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    del optimizer, linear
    gc.collect()


def bytes_held() -> int:
    """This process's anonymous memory, and its part of shared memory; files, such as libraries, are left out."""
    return 1024 * sum(map(int, ADDED_UP.findall(Path("/proc/self/smaps_rollup").read_bytes())))


class Peak:
    """While entered, looks at what the process holds, as often as that allows.

    Attributes:
        num_bytes: The largest value so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.num_bytes = max(self.num_bytes, bytes_held())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
