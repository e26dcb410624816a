"""What benchmarks have in common: options, ranks, interleaved rounds, ratios, and how a result is printed and kept."""

import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property, wraps
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch import Tensor

CHECKOUT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SECONDS_OF_SILENCE = 10


class Device(StrEnum):
    """Where to measure."""

    CPU, CUDA = "cpu", "cuda"


@dataclass(frozen=True)
class Report:
    """What a benchmark has found.

    Attributes:
        rows: Of a table, each its cells by the titles of their columns, of which a row may lack some.
        lines: Without which the table cannot be read.
        record: Everything measured, for the JSON file.
    """

    rows: Sequence[Mapping[str, str]]
    lines: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> list[str]:
        """In markdown, its columns aligned."""
        titles = dict.fromkeys(chain.from_iterable(self.rows))
        rows = [list(titles), *([row.get(title, "") for title in titles] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * max(3, width) for width in widths])
        return [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A command whose options are its fields; a subclass's docstring is its help."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Those whose versions are part of a result, beside torch."""

    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None

    def __post_init__(self) -> None:
        """Raise typer.BadParameter for options that do not fit each other."""

    def run(self) -> None:
        """Measure, and publish what was found."""
        raise NotImplementedError

    @property
    def torch_device(self) -> torch.device:
        """Where this process measures."""
        return CPU

    def publish(self, report: Report) -> None:
        """Print a report; write it where it was asked for."""
        say(*report.table, *report.lines, sentence_of(self.surroundings))
        if self.out is not None:
            self.write(report, self.out)
            say(f"written to {self.out} and {self.out.with_suffix('.md')}")

    def write(self, report: Report, out: Path) -> None:
        """Write a report to a JSON file, and its table beside it, as markdown."""
        record = {
            "benchmark": type(self).__name__.lower(),
            "options": asdict(self) | {"out": None},
            "surroundings": self.surroundings,
            "rows": report.rows,
            "lines": report.lines,
        }
        notes = [f"- {line}" for line in (*report.lines, sentence_of(self.surroundings))]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record | report.record, indent=1, default=str) + "\n")
        out.with_suffix(".md").write_text("\n".join([*report.table, "", *notes]) + "\n")

    @cached_property
    def surroundings(self) -> dict[str, Any]:
        """Machine, versions, date and commit: what a figure is worth nothing without."""
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cpu": cpu_model(),
            "cores": num_cores(),
            "gpu": torch.cuda.get_device_name() if self.torch_device.type == "cuda" else None,
            "system": platform.platform(),
            "python": platform.python_version(),
            "versions": {package: version_of(package) for package in ("torch", *self.packages)},
            "commit": git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(git("status", "--porcelain")),
        }


@dataclass(frozen=True, kw_only=True)
class OnRanks(Benchmark):
    """A benchmark of several ranks, which it starts, unless torchrun has."""

    ranks: Annotated[int, typer.Option(min=1, envvar="WORLD_SIZE", help="Ranks to start.")] = 2
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; in each, every contender has its turn.")] = 20
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 3
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0

    def measure(self) -> Report:
        """Measure on every rank, with a default group of all of them; rank 0's report counts. Collective."""
        raise NotImplementedError

    def run(self) -> None:
        if "RANK" in os.environ:
            self.run_rank(int(os.environ["LOCAL_RANK"]), "env://")
        else:
            start_ranks(self.run_rank, self.ranks)

    def run_rank(self, number: int, rendezvous: str) -> None:
        """Do one rank's part; ``number`` is that of the rank on its host. Collective."""
        with self.joined(number, rendezvous):
            report = self.measure()
            if dist.get_rank() == 0:
                self.publish(report)

    def interleave(self, contenders: Sequence[Callable[[int], Sequence[float]]]) -> Tensor:
        """See the function; for as many rounds as were asked for."""
        return interleave(contenders, self.rounds, self.warmup, self.torch_device)

    @property
    def threads_per_rank(self) -> int:
        """As many as were asked for, or a share of the cores."""
        return self.threads or max(1, num_cores() // self.ranks)

    @property
    def set_up(self) -> str:
        """Ranks, threads and rounds, to be read."""
        return (
            f"{self.ranks} ranks ({dist.get_backend()}), {self.threads_per_rank} threads each; {self.rounds} rounds "
            f"after {self.warmup} of warm-up; medians, ratios within each round with quartiles, the slower rank counts."
        )

    @contextmanager
    def joined(self, number: int, rendezvous: str) -> Iterator[None]:
        """A context for one rank's work, with the default group of all of them there. Collective."""
        warnings.simplefilter("ignore")  # peers warn, once per rank, about their own use of what torch has deprecated
        os.environ.setdefault("LOCAL_RANK", str(number))
        torch.set_num_threads(self.threads_per_rank)
        device = self.torch_device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=rendezvous,
            rank=int(os.environ.get("RANK", number)),
            world_size=self.ranks,
            device_id=device if on_gpu else None,
        )
        try:
            yield
            dist.barrier()
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class OnDevice(Benchmark):
    """A benchmark on GPUs, one for each rank, or on the CPU."""

    device: Annotated[Device | None, typer.Option(help="By default a GPU per rank, if there are so many.")] = None

    @property
    def torch_device(self) -> torch.device:
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", getattr(self, "ranks", 1)))
        has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= num_here
        on_gpu = has_gpus if self.device is None else self.device is Device.CUDA
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else CPU


def command_of(benchmark: type[Benchmark]) -> Callable[..., None]:
    """A function for typer, whose options are a benchmark's fields."""

    @wraps(benchmark, updated=())
    def command(**chosen: Any) -> None:
        benchmark(**chosen).run()

    command.__annotations__ = typing.get_type_hints(benchmark, include_extras=True)
    return command


def numbers(texts: str) -> list[int]:
    """Those in a text that separates them by commas."""
    return [int(text) for text in texts.split(",")]


def start_ranks(work: Callable[..., None], num_ranks: int, *args: Any) -> None:
    """Call `work(rank, *args, rendezvous)` in a process per rank, and wait for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (*args, f"file://{folder}/rendezvous"), nprocs=num_ranks)  # type: ignore[attr-defined, no-untyped-call]


def interleave(
    contenders: Sequence[Callable[[int], Sequence[float]]], rounds: int, warmup: int = 0, device: torch.device = CPU
) -> Tensor:
    """Let all contenders have their turn in every round. Collective where there is a default group.

    Args:
        contenders: Called with the number of the round; each returns as many values, such as seconds.
        rounds: Those that count.
        warmup: Rounds before those.
        device: Of the group.

    Returns:
        The values [rounds, contenders, values], the largest over the ranks.
    """
    found: list[list[Sequence[float]]] = []
    said = time.monotonic()
    gc.collect()
    gc.disable()  # in the middle of a step it would be counted as that contender's
    try:
        for index in range(warmup + rounds):
            # Rotated every other round, and turned round in between: nobody always follows the same neighbour.
            order = sorted(range(len(contenders)), key=lambda number: (number - index // 2) % len(contenders))
            values: dict[int, Sequence[float]] = {}
            for number in order if index % 2 == 0 else reversed(order):
                if dist.is_initialized():
                    dist.barrier()
                values[number] = contenders[number](index)
            found.append([values[number] for number in range(len(contenders))])
            gc.collect()
            if time.monotonic() > said + SECONDS_OF_SILENCE:
                said = time.monotonic()
                say(f"round {index + 1} of {warmup + rounds}")
    finally:
        gc.enable()
    samples = torch.tensor(found[warmup:], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(samples, dist.ReduceOp.MAX)
    return samples.cpu()


def median(values: Tensor) -> float:
    """Of 1-D values."""
    return float(values.quantile(0.5))


def ms(seconds: Tensor, digits: int = 1) -> str:
    """The median of 1-D seconds, to be read."""
    return f"{1e3 * median(seconds):.{digits}f}"


def spread(ratios: Tensor) -> str:
    """Median and quartiles of 1-D values, to be read."""
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=ratios.dtype)).tolist()
    return f"{middle:.2f} [{low:.2f}-{high:.2f}]"


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> list[float]:
    """Seconds until work is done, and CPU seconds of all threads meanwhile, which hardly feel a busy machine."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    Clock(device).settle()
    return [time.perf_counter() - start, time.process_time() - cpu_start]


class Clock:
    """Times work on one device without waiting for it in between.

    Attributes:
        on_gpu: Whether that is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def settle(self) -> None:
        """Wait until the device has done all it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in the device's work."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks that the device has passed."""
        return float(start.elapsed_time(end)) / 1e3 if self.on_gpu else float(end - start)


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
    known = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", known.read_text(), re.MULTILINE) if known.exists() else None
    return found[1].strip() if found else platform.machine()


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def version_of(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def say(*lines: str) -> None:
    """Print lines on one rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)
