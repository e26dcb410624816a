"""Saving and loading a run beside writing and reading as many bytes, their memory, and what training feels."""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn

from scripts.bench.harness import OnRanks, Report, Spread
from scripts.bench.memory import Peak, bytes_held
from sharded_dadamw import ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint

WIDTH = 1024
BLOCK = 1 << 22

WRITE, SAVE, READ, LOAD, RETURNING = CALLS = ("plain write", "save", "plain read", "load", "save, returning (thread)")
ALONE, BESIDE = STEPS = ("a step alone", "during a save in a thread")
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
        for number in range(self.rounds):
            run.save_and_load(number)
            run.train(number)
        run.watch(SAVE, lambda: run.save(0))
        run.watch(LOAD, run.load)
        run.watch(RETURNING, lambda: run.save(0, asynchronous=True).wait())
        rows = []
        share = run.num_bytes / self.ranks
        for name, noted in run.seconds.items():
            values = torch.tensor(noted, dtype=torch.float64)
            reference = torch.tensor(run.seconds[AGAINST.get(name, name)], dtype=torch.float64)
            if name in STEPS:  # as many as came about while saves were under way
                reference = reference.median()
            moves_all = name in (WRITE, SAVE, READ, LOAD)
            cells = [f"{1e3 * values.median():.1f}", f"{1e3 * values.max():.1f}"]
            cells.append(f"{run.num_bytes / values.median() / 1e9:.2f}" if moves_all else "-")
            cells.append(str(Spread.of(values / reference)) if name in AGAINST else "-")
            cells.append(f"{run.memory[name] / share:.2f}" if name in run.memory else "-")
            rows.append([name, *cells])
        against = "/ plain, or a step alone: median [quartiles]"
        titles = ["what", "ms", "longest ms", "GB/s", against, "memory at most / its share"]
        lines = [
            f"{self.parameters / 1e6:.1f} M fp32 parameters, {run.num_bytes / 1e6:.0f} MB per checkpoint, {self.ranks} "
            f"ranks over gloo, {self.threads_per_rank} threads each; {self.rounds} rounds, {self.steps} steps in each "
            "state; the slower rank counts."
        ]
        record = {"bytes": run.num_bytes, "seconds": run.seconds, "memory": run.memory}
        return Report(titles, rows, lines, record)


class Run:
    """A model and its optimizer, after a step, and what has been measured of them on this rank.

    Attributes:
        num_bytes: Of a checkpoint.
        seconds: By what took them.
        memory: Bytes at most over what was held before, by call.
    """

    def __init__(self, plan: Checkpoint) -> None:
        torch.manual_seed(0)
        layers = max(1, plan.parameters // (WIDTH * WIDTH))
        self._model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self._optimizer = ShardedDecoupledAdamW(self._model.named_parameters(), lr=1e-4)
        self._batch = torch.randn(16, WIDTH)
        self._plan = plan
        self._rank = dist.get_rank()
        assert plan.folder is not None
        self._folder, self._root = plan.folder, plan.folder / "root"
        self._file = plan.folder / f"plain_{self._rank}"
        self.step()
        self.save(0)
        self.num_bytes = sum(path.stat().st_size for path in self._root.rglob("*") if path.is_file())
        self.seconds: dict[str, list[float]] = {name: [] for name in (*CALLS, *STEPS)}
        self.memory: dict[str, float] = {}

    def step(self) -> float:
        """Take a step; returns its seconds."""
        dist.barrier()
        start = time.perf_counter()
        self._model(self._batch).square().mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - start

    def save(self, step: int, asynchronous: bool = False) -> Any:
        """Save it, and keep no other."""
        parts = {"model": self._model, "optimizer": self._optimizer}
        return save_checkpoint(self._root, step=step, keep_last=1, asynchronous=asynchronous, **parts)

    def load(self) -> None:
        """Load what was saved."""
        assert load_checkpoint(self._root, model=self._model, optimizer=self._optimizer) is not None

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Note the time of the slower rank; memory is watched in a pass of its own, since watching costs time."""
        gc.collect()
        dist.barrier()
        start = time.perf_counter()
        yield
        seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.seconds[name].append(seconds.item())

    def watch(self, name: str, call: Callable[[], Any]) -> None:
        """Note how much more than before this rank holds at most."""
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have freed must not serve this one unnoticed
        dist.barrier()
        before = bytes_held()
        with Peak() as peak:
            call()
        most = torch.tensor(float(peak.num_bytes - before))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        self.memory[name] = most.item()

    def save_and_load(self, number: int) -> None:
        """One round of saving and loading."""
        self._forget_files()
        with self.noted(WRITE):
            write_plainly(self._file, self.num_bytes // self._plan.ranks)
        with self.noted(SAVE):
            self.save(number)
        self._forget_files()
        with self.noted(READ):
            read_plainly(self._file)
        self._forget_files()
        with self.noted(LOAD):
            self.load()

    def train(self, number: int) -> None:
        """Steps alone, and steps while saves are under way."""
        self.seconds[ALONE] += [self.step() for _ in range(self._plan.steps)]
        saving = None
        for _ in range(self._plan.steps):
            if saving is None or self._ended(saving):
                with self.noted(RETURNING):
                    saving = self.save(number, asynchronous=True)
            self.seconds[BESIDE].append(self.step())
        saving.wait()

    def _ended(self, saving: Any) -> bool:
        ended = torch.tensor(int(saving.done))
        dist.all_reduce(ended, dist.ReduceOp.MIN)
        return bool(ended)

    def _forget_files(self) -> None:
        """Drop files from the page cache."""
        for path in self._folder.rglob("*") if self._rank == 0 and hasattr(os, "posix_fadvise") else ():
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def write_plainly(path: Path, num_bytes: int) -> None:
    """Write a new file of random bytes and wait until it is on the disk."""
    block = memoryview(bytearray(os.urandom(BLOCK)))
    with path.open("wb", buffering=0) as file:
        left = num_bytes
        while left:
            left -= file.write(block[: min(left, BLOCK)])
        os.fsync(file.fileno())


def read_plainly(path: Path) -> None:
    """Read a file into memory of the same size."""
    memory = memoryview(bytearray(path.stat().st_size))
    with path.open("rb", buffering=0) as file:
        while memory and (got := file.readinto(memory[:BLOCK])):
            memory = memory[got:]
