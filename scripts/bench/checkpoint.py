"""Saving and loading a run beside writing and reading as many bytes, their memory, and what training feels."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn

from scripts.bench.harness import OnRanks, Report, median, ms, seconds_of, spread
from scripts.bench.memory import Peak, bytes_held
from sharded_dadamw import ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint

WIDTH = 1024
BLOCK = 1 << 22

WRITE, SAVE, READ, LOAD = OF_ALL = ("plain write", "save", "plain read", "load")
RETURNING, ALONE, BESIDE = ("save, returning (thread)", "a step alone", "during a save in a thread")
AGAINST = {SAVE: WRITE, LOAD: READ, BESIDE: ALONE}


@dataclass(frozen=True, kw_only=True)
class Checkpoint(OnRanks):
    """Measure saving and loading, and what training feels of it.

    In every round each rank writes a file as large as its files of the checkpoint and syncs it, saves, reads its file
    back, and loads. Files are dropped from the page cache before they are read, where the system lets us; whatever the
    disk does behind that is in both. Memory is what a rank holds at most during a call over what it held before. Steps
    are timed without a save under way, then while one is, in a thread, a new one as soon as one has ended; and so is
    how long the call itself keeps training waiting.
    """

    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5
    parameters: Annotated[int, typer.Option(min=1, help="Parameters, about.")] = 16_000_000
    steps: Annotated[int, typer.Option(min=1, help="Steps in each state in each round.")] = 10
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; by default the temporary one.")] = None

    def run(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            super(Checkpoint, replace(self, folder=own)).run()
        finally:
            shutil.rmtree(own)

    def measure(self) -> Report:
        run = Run(self)
        seconds: dict[str, list[float]] = {name: [] for name in (*OF_ALL, RETURNING, ALONE, BESIDE)}

        def timed(name: str, work: Callable[[], object]) -> None:
            gc.collect()
            dist.barrier()
            seconds[name].append(largest(seconds_of(work)[0]))

        for number in range(self.rounds):
            run.forget_files()
            timed(WRITE, run.write_plainly)
            timed(SAVE, partial(run.save, number))
            run.forget_files()
            timed(READ, run.read_plainly)
            run.forget_files()
            timed(LOAD, run.load)
            for _ in range(self.steps):
                timed(ALONE, run.step)
            for _ in range(self.steps):
                if not largest(not run.saving.done):
                    timed(RETURNING, partial(run.save, number, asynchronous=True))
                timed(BESIDE, run.step)
            run.saving.wait()
        memory = {SAVE: most_held(lambda: run.save(0)), LOAD: most_held(run.load)}
        memory[RETURNING] = most_held(lambda: run.save(0, asynchronous=True), lambda: run.saving.wait())
        rows = []
        for name, noted in seconds.items():
            values = torch.tensor(noted, dtype=torch.float64)
            row = {"what": name, "ms": ms(values), "longest ms": f"{1e3 * max(noted):.1f}"}
            if name in OF_ALL:
                row["GB/s"] = f"{run.num_bytes / median(values) / 1e9:.2f}"
            if name in AGAINST:
                row["/ plain, or a step alone: median [quartiles]"] = spread(
                    values / torch.tensor(seconds[AGAINST[name]], dtype=torch.float64)
                )
            if name in memory:
                row["memory at most / its share"] = f"{memory[name] / run.num_bytes * self.ranks:.2f}"
            rows.append(row)
        lines = [
            f"{self.parameters / 1e6:.1f} M fp32 parameters, {run.num_bytes / 1e6:.0f} MB per checkpoint, "
            f"{self.steps} steps in each state; {self.set_up}"
        ]
        return Report(rows, lines, {"bytes": run.num_bytes, "seconds": seconds, "memory": memory})


class Run:
    """A model and its optimizer, after a step, and files of this rank.

    Attributes:
        num_bytes: Of a checkpoint.
        saving: The latest save.
    """

    def __init__(self, plan: Checkpoint) -> None:
        torch.manual_seed(0)
        layers = max(1, plan.parameters // (WIDTH * WIDTH))
        self._model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self._optimizer = ShardedDecoupledAdamW(self._model.named_parameters(), lr=1e-4)
        self._batch = torch.randn(16, WIDTH)
        assert plan.folder is not None
        self._folder, self._root = plan.folder, plan.folder / "root"
        self._file = plan.folder / f"plain_{dist.get_rank()}"
        self._share = 0
        self.step()
        self.save(0)
        self.num_bytes = sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())
        self._share = self.num_bytes // plan.ranks

    def step(self) -> None:
        """Take a step."""
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def save(self, step: int, asynchronous: bool = False) -> None:
        """Save it, and keep no other."""
        parts = {"model": self._model, "optimizer": self._optimizer}
        self.saving = save_checkpoint(self._root, step=step, keep_last=1, asynchronous=asynchronous, **parts)

    def load(self) -> None:
        """Load what was saved."""
        assert load_checkpoint(self._root, model=self._model, optimizer=self._optimizer) is not None

    def write_plainly(self) -> None:
        """Write a new file of random bytes, as large as this rank's share, and wait until it is on the disk."""
        block = memoryview(bytearray(os.urandom(BLOCK)))
        with self._file.open("wb", buffering=0) as file:
            left = self._share
            while left:
                left -= file.write(block[: min(left, BLOCK)])
            os.fsync(file.fileno())

    def read_plainly(self) -> None:
        """Read that file into memory of the same size."""
        memory = memoryview(bytearray(self._share))
        with self._file.open("rb", buffering=0) as file:
            while memory and (got := file.readinto(memory[:BLOCK])):
                memory = memory[got:]

    def forget_files(self) -> None:
        """Drop files from the page cache."""
        for path in self._folder.rglob("*") if dist.get_rank() == 0 and hasattr(os, "posix_fadvise") else ():
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def largest(value: float) -> float:
    """The largest over ranks. Collective."""
    values = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return float(values)


def most_held(*calls: Callable[[], object]) -> float:
    """How much more than before a rank holds at most during calls, apart from their times: watching costs time."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed must not serve this one unnoticed
    dist.barrier()
    before = bytes_held()
    with Peak() as peak:
        for call in calls:
            call()
    return largest(peak.num_bytes - before)
