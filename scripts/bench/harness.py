"""What the benchmarks beside it share: ranks, rounds, spreads, a clock, reports, and on what they were run."""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
_T = TypeVar("_T")


def run_command(main: Callable[..., None]) -> None:
    """Run a script's `main` with the arguments it was called with."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(main)
    app()


def start_ranks(work: Callable[..., None], num_ranks: int, *args: Any) -> None:
    """Call `work(rank, *args, rendezvous)` in a process per rank, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (*args, f"file://{folder}/rendezvous"), nprocs=num_ranks)  # type: ignore[attr-defined, no-untyped-call]


@contextmanager
def joined(rank: int, num_ranks: int, rendezvous: str, *, threads: int, device: torch.device = CPU) -> Iterator[None]:
    """A context for one rank's work, with the default group of all of them there. Collective."""
    warnings.simplefilter("ignore")  # peers warn, once per rank, about their own use of what torch has deprecated
    torch.set_num_threads(threads)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=num_ranks,
        device_id=device if on_gpu else None,
    )
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def threads_per_rank(asked_for: int, num_ranks: int) -> int:
    """torch's threads per rank: as many as were asked for, or where that is 0 a share of the cores."""
    return asked_for or max(1, num_cores() // num_ranks)


def rounds(number: int, console: Console) -> Iterator[int]:
    """Count rounds, and say now and then how far it is.

    Garbage is collected between them: in the middle of a step that would be counted as that contender's.
    """
    gc.collect()
    gc.disable()
    try:
        for index in range(number):
            yield index
            gc.collect()
            if (index + 1) * 10 // number > index * 10 // number:
                console.print(f"round {index + 1} of {number}")
    finally:
        gc.enable()


def in_turn(contenders: Sequence[_T], index: int) -> list[_T]:
    """An order that rotates from round to round.

    Every other time around it goes backwards, so that nobody always runs in the wake of the same neighbour.
    """
    first = index % len(contenders)
    order = [*contenders[first:], *contenders[:first]]
    return order if index // len(order) % 2 == 0 else order[::-1]


@dataclass(frozen=True)
class Spread:
    """Quartiles and range of a quantity over the rounds."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        """The spread of 1-D `values`."""
        at = torch.tensor([0.5, 0.25, 0.75, 0.0, 1.0], dtype=values.dtype)
        return cls(*torch.quantile(values, at).tolist())

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.q1:.2f}-{self.q3:.2f}]"


class Clock:
    """Times work on one device without waiting for it in between."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def settle(self) -> None:
        """Wait until the device has done all it was given."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in the device's work."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that the device has passed."""
        return float(start.elapsed_time(end)) / 1e3 if self._on_gpu else float(end - start)


def surroundings(*packages: str, device: torch.device = CPU) -> dict[str, Any]:
    """Machine, versions of torch and other `packages`, date and commit: what a figure is worth nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in ("torch", *packages)},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def sentence_of(around: dict[str, Any]) -> str:
    """Such surroundings, to be read."""
    hardware = around["gpu"] or f"{around['cpu']}, {around['cores']} cores"
    versions = "".join(f", {package} {version}" for package, version in around["versions"].items() if version)
    dirty = " with uncommitted changes" if around["uncommitted_changes"] else ""
    commit = f"commit {(around['commit'] or 'none')[:12]}{dirty}"
    return f"{around['date'][:10]}, {hardware}; Python {around['python']}{versions}; {commit}."


def git(*arguments: str) -> str | None:
    """What git says about this checkout, if anything."""
    try:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def cpu_model() -> str:
    """The processor's name as Linux knows it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def console_of(width: int, *, quiet: bool = False) -> Console:
    """Prints texts as they are, so wide if it is not on a terminal."""
    return Console(quiet=quiet, markup=False, highlight=False, width=None if sys.stdout.isatty() else width)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print them, none of them broken."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_table(console: Console, titles: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table of texts."""
    table = Table(*titles, title=title or None)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of texts, for a README."""
    return ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows)]


def publish(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    lines: Sequence[str],
    *,
    out: Path | None,
    record: dict[str, Any],
) -> None:
    """Print a table, and the lines without which it cannot be read.

    Args:
        console: Where to.
        titles: Of the table's columns.
        rows: Of the table.
        lines: Below it.
        out: A file to write `record` to, as JSON, with what was printed beside it, as markdown; or None.
        record: Everything measured.
    """
    print_table(console, titles, rows)
    print_lines(console, lines)
    if out is not None:
        beside = out.with_suffix(".md")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
        beside.write_text("\n".join([*markdown_table(titles, rows), "", *lines]) + "\n")
        console.print(f"written to {out} and {beside}")
