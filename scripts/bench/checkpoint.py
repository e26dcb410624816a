"""Measure saving and loading a run beside writing and reading as many bytes, their memory, and what training feels.

    python -m scripts.bench checkpoint                           2 ranks over gloo, 16 million parameters
    python -m scripts.bench checkpoint --parameters 100000000 --folder /mnt/disk --out checkpoint.json

In every round each rank writes a file as large as its files of the checkpoint and syncs it, saves, reads its file back,
and loads. Files are dropped from the page cache before they are read, where the system lets us; whatever the disk does
behind that is in both. Memory is what a rank holds at most during a call over what it held before, largest over rounds.
Steps are timed without a save under way, then while one is, in a thread, a new one as soon as
one has ended; and so is how long the call itself keeps training waiting.
"""

import ctypes
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from torch import nn

from scripts.bench import harness
from scripts.bench.harness import Spread
from scripts.bench.memory import Peak, bytes_held
from sharded_dadamw import ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint

WIDTH = 1024
BLOCK = 1 << 22

CALLS = ("plain write", "save", "plain read", "load", "save, returning (thread)")
STEPS = ("a step alone", "during a save in a thread")


@dataclass(frozen=True)
class Plan:
    """What is measured, the same on every rank."""

    ranks: int
    parameters: int
    rounds: int
    steps: int
    threads: int
    folder: Path
    out: Path | None


class Run:
    """A model and its optimizer, after a step."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(0)
        layers = max(1, plan.parameters // (WIDTH * WIDTH))
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.optimizer = ShardedDecoupledAdamW(self.model.named_parameters(), lr=1e-4)
        self.batch = torch.randn(16, WIDTH)
        self.step()

    def step(self) -> float:
        """Take a step; returns its seconds."""
        start = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def save(self, root: Path, step: int, asynchronous: bool = False) -> Any:
        """Save it, and keep no other."""
        return save_checkpoint(
            root, step=step, model=self.model, optimizer=self.optimizer, keep_last=1, asynchronous=asynchronous
        )

    def load(self, root: Path) -> None:
        """Load what was saved."""
        assert load_checkpoint(root, model=self.model, optimizer=self.optimizer) is not None


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


def forget(folder: Path) -> None:
    """Drop files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Benchmark:
    """Everything on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rank = dist.get_rank()
        self.root = plan.folder / "root"
        self.file = plan.folder / f"plain_{self.rank}"
        self.run_ = Run(plan)
        self.run_.save(self.root, 0)
        self.num_bytes = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        self.seconds: dict[str, list[float]] = {name: [] for name in (*CALLS, *STEPS)}
        self.memory: dict[str, float] = {name: 0.0 for name in CALLS}

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Note the time of the slower rank; and in a pass of its own, since watching costs time, the memory."""
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
        self.memory[name] = max(self.memory[name], most.item())

    def calls(self, number: int) -> None:
        """One round of saving and loading."""
        share = self.num_bytes // self.plan.ranks
        if self.rank == 0:
            forget(self.plan.folder)
        with self.noted("plain write"):
            write_plainly(self.file, share)
        with self.noted("save"):
            self.run_.save(self.root, number)
        if self.rank == 0:
            forget(self.plan.folder)
        with self.noted("plain read"):
            read_plainly(self.file)
        if self.rank == 0:
            forget(self.plan.folder)
        with self.noted("load"):
            self.run_.load(self.root)

    def beside(self, number: int) -> None:
        """Steps while saves are under way."""
        saving = None
        for _ in range(self.plan.steps):
            if saving is None or self._ended(saving):
                with self.noted(CALLS[4]):
                    saving = self.run_.save(self.root, number, asynchronous=True)
            dist.barrier()
            self.seconds[STEPS[1]].append(self.run_.step())
        if saving is not None:
            saving.wait()

    def _ended(self, saving: Any) -> bool:
        ended = torch.tensor(int(saving.done))
        dist.all_reduce(ended, dist.ReduceOp.MIN)
        return bool(ended)

    def run(self, console: Console) -> None:
        """Fill `seconds` and `memory`. Collective."""
        for number in harness.rounds(self.plan.rounds, console):
            self.calls(number)
            for _ in range(self.plan.steps):
                dist.barrier()
                self.seconds[STEPS[0]].append(self.run_.step())
            self.beside(number)
        self.watch("save", lambda: self.run_.save(self.root, 0))
        self.watch("load", lambda: self.run_.load(self.root))
        self.watch(CALLS[4], lambda: self.run_.save(self.root, 0, asynchronous=True).wait())


TITLES = (
    "what",
    "ms",
    "longest ms",
    "GB/s",
    "/ plain, or a step alone: median [quartiles]",
    "memory at most / its share",
)
AGAINST = {"save": "plain write", "load": "plain read", STEPS[1]: STEPS[0]}


def table_rows(plan: Plan, benchmark: Benchmark) -> list[list[str]]:
    """One row of texts per call, and per state that steps were taken in, under TITLES."""
    rows = []
    share = benchmark.num_bytes / plan.ranks
    for name, noted in benchmark.seconds.items():
        values = torch.tensor(noted, dtype=torch.float64)
        reference = torch.tensor(benchmark.seconds[AGAINST.get(name, name)], dtype=torch.float64)
        if name in STEPS:  # as many as came about while saves were under way
            reference = reference.median()
        moves_all = name in CALLS[:4]
        memory = benchmark.memory.get(name)
        rows.append(
            [
                name,
                f"{1e3 * values.median():.1f}",
                f"{1e3 * values.max():.1f}",
                f"{benchmark.num_bytes / values.median() / 1e9:.2f}" if moves_all else "-",
                str(Spread.of(values / reference)) if name in AGAINST else "-",
                f"{memory / share:.2f}" if memory else "-",
            ]
        )
    return rows


def show(plan: Plan, benchmark: Benchmark, console: Console) -> None:
    """Report what was measured."""
    around = harness.surroundings()
    lines = [
        f"{plan.parameters / 1e6:.1f} M fp32 parameters, {benchmark.num_bytes / 1e6:.0f} MB per checkpoint, "
        f"{plan.ranks} ranks over gloo, {plan.threads} threads per rank; {plan.rounds} rounds, {plan.steps} steps in "
        "each state; the slower rank counts.",
        harness.sentence_of(around),
    ]
    record = {
        "plan": asdict(plan) | {"folder": None, "out": None},
        "surroundings": around,
        "bytes": benchmark.num_bytes,
        "seconds": benchmark.seconds,
        "memory": benchmark.memory,
    }
    harness.publish(console, TITLES, table_rows(plan, benchmark), lines, out=plan.out, record=record)


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """One rank, from joining to leaving."""
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads):
        console = harness.console_of(160, quiet=rank != 0)
        benchmark = Benchmark(plan)
        benchmark.run(console)
        if rank == 0:
            show(plan, benchmark, console)


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    parameters: Annotated[int, typer.Option(min=1, help="Parameters, about.")] = 16_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in each state in each round.")] = 10,
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="On the disk to measure; by default the temporary one.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Measure saving and loading, and what training feels of it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder))
    plan = Plan(ranks, parameters, rounds, steps, harness.threads_per_rank(threads, ranks), own, out)
    try:
        harness.start_ranks(work, ranks, plan)
    finally:
        shutil.rmtree(own)
