"""What the benchmarks beside it share: spreads over rounds, a clock, tables, and where and on what they were run."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parent.parent


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


def surroundings(device: torch.device, **software: Any) -> dict[str, Any]:
    """Machine, versions, date and commit: what a figure is worth nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": num_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **software,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
    }


def commit_in(around: dict[str, Any]) -> str:
    """The commit in such surroundings, to be read."""
    dirty = " with uncommitted changes" if around["uncommitted_changes"] else ""
    return f"commit {(around['commit'] or 'none')[:12]}{dirty}"


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
