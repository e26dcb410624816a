"""Time training steps over links of many speeds, to see what hides behind forward and backward, all in one run.

    python -m scripts.bench overlap                       starts its own 2 ranks, over gloo
    python -m scripts.bench overlap --out overlap.json    also writes overlap.json, overlap.md, overlap.png

Data moves between ranks as it always does, and no result is there before a modelled link would have brought it: every
rank sends through a link of its own that takes one transfer at a time, in the order in which they are started, and
whoever waits for a transfer sleeps until its last byte has arrived. DistributedDataParallel sends what an all-reduce
has to, 2 (N - 1) / N of a bucket, in a communication hook; ours (N - 1) / N of it to average and as much to gather. A
link so fast that it does not matter is the last column; what is left there is the exchange's own cost on this machine.

In every round every contender takes a few steps in a row over each link, in an order that rotates, and what it still
has under way after the last of them is waited for on its own time.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from launch.contenders import Contender, Sharded
from launch.data import Corpus
from launch.model import GPT
from launch.options import PRESETS, GPTConfig, Preset
from scripts.bench import harness
from scripts.bench.harness import Spread
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.buckets import shards
from sharded_dadamw.config import GradientResidency


class Name(StrEnum):
    """The contenders, in the order of the table."""

    DDP = "DDP + AdamW(fused)"
    IN_STEP = "overlap=False"
    BEHIND_BACKWARD = "overlap"
    BEHIND_BOTH = "overlap, attached"
    ZERO2 = "overlap, attached, gradients sharded"


@dataclass(frozen=True)
class Variant:
    """One way to use our optimizer: its settings, and whether forward waits for gathers."""

    attached: bool
    settings: dict[str, Any] = field(default_factory=dict)


OURS = {
    Name.IN_STEP: Variant(attached=False, settings={"overlap": False}),
    Name.BEHIND_BACKWARD: Variant(attached=False),
    Name.BEHIND_BOTH: Variant(attached=True),
    Name.ZERO2: Variant(attached=True, settings={"gradient_residency": GradientResidency.SHARDED}),
}


@dataclass(frozen=True)
class Plan:
    """What is measured, the same on every rank; speeds in 1e9 bytes per second and direction."""

    ranks: int
    preset: Preset
    context: int
    speeds: tuple[float, ...]
    rounds: int
    warmup: int
    steps: int
    bucket_cap_mb: float
    threads: int
    out: Path | None

    @property
    def model(self) -> GPTConfig:
        """The model's shape."""
        return replace(PRESETS[self.preset], context=self.context)


class Link:
    """What a rank sends through: transfers queue up behind each other, each taking its bytes' time.

    Attributes:
        bytes_per_s: Speed of the transfers that begin from now on.
    """

    def __init__(self) -> None:
        self.bytes_per_s = math.inf
        self._free_at = 0.0

    def send(self, num_bytes: float) -> float:
        """Begin a transfer now; returns when, in seconds of `time.perf_counter`, it will have arrived."""
        self._free_at = max(self._free_at, time.perf_counter()) + num_bytes / self.bytes_per_s
        return self._free_at


def sleep_until(moment: float) -> None:
    """Let others have the core until `moment` of `time.perf_counter`."""
    if (seconds := moment - time.perf_counter()) > 0:
        time.sleep(seconds)


class Delivery:
    """The handle of a verb whose data a link has to bring first."""

    def __init__(self, handle: Any, arrival: float) -> None:
        self._handle, self._arrival = handle, arrival

    def wait(self) -> None:
        """Wait for both."""
        sleep_until(self._arrival)
        self._handle.wait()


def over(link: Link, verbs: Any) -> Any:
    """Have the data verbs of a group's ranks go over a link; returns the verbs."""

    def sent(verb: Callable[..., Any]) -> Callable[..., Delivery]:
        def start(buffer: Tensor, *args: Any, **kwargs: Any) -> Delivery:
            num_bytes = buffer.nbytes * (verbs.num_ranks - 1) / verbs.num_ranks
            return Delivery(verb(buffer, *args, **kwargs), link.send(num_bytes))

        return start

    verbs.reduce_scatter_mean = sent(verbs.reduce_scatter_mean)
    verbs.all_gather_ = sent(verbs.all_gather_)
    verbs.gathers_by_itself = True
    return verbs


class AllReduceOver:
    """A communication hook for DistributedDataParallel, whose all-reduces go over a link."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._arrivals: queue.SimpleQueue[tuple[float, Any, torch.futures.Future[Tensor], Tensor]] = queue.SimpleQueue()
        threading.Thread(target=self._deliver, daemon=True).start()

    def average(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """The hook: averages a bucket over the default group."""
        ranks = dist.get_world_size()
        buffer = bucket.buffer().div_(ranks)
        work = dist.all_reduce(buffer, async_op=True)
        result: torch.futures.Future[Tensor] = torch.futures.Future()
        self._arrivals.put((self._link.send(2 * buffer.nbytes * (ranks - 1) / ranks), work, result, buffer))
        return result

    def _deliver(self) -> None:
        while True:
            arrival, work, result, buffer = self._arrivals.get()
            sleep_until(arrival)
            work.wait()
            result.set_result(buffer)


def build(name: Name, plan: Plan, link: Link) -> Contender:
    """Make a contender around a fresh copy of the model. Collective."""
    model = GPT(plan.model)
    if name is Name.DDP:
        ddp = DistributedDataParallel(model, bucket_cap_mb=plan.bucket_cap_mb, gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, AllReduceOver(link).average)
        return Contender(ddp, AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True))
    variant = OURS[name]
    config = ShardingConfig(bucket_cap_mb=plan.bucket_cap_mb, **variant.settings)
    contender = Sharded(model, ShardedDecoupledAdamW(model.named_parameters(), lr=3e-4, config=config))
    if variant.attached:
        contender.optimizer.attach(model)
    return contender


class Benchmark:
    """The contenders on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._link = Link()
        connect = shards.connect
        with mock.patch.object(shards, "connect", lambda *args, **kwargs: over(self._link, connect(*args, **kwargs))):
            self._contenders = [build(name, plan, self._link) for name in Name]
        self._corpus = Corpus(None, plan.context)

    def run(self, console: Console) -> Tensor:
        """Seconds per step [rounds, speeds, contenders], the slower rank's. Collective."""
        plan = self.plan
        rounds = plan.warmup + plan.rounds
        seconds = torch.zeros(rounds, len(plan.speeds), len(self._contenders), dtype=torch.float64)
        for index in harness.rounds(rounds, console):
            for row, speed in enumerate(plan.speeds):
                self._link.bytes_per_s = 1e9 * speed
                for column in harness.in_turn(range(len(self._contenders)), index + row):
                    seconds[index, row, column] = self._steps(self._contenders[column], index)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return seconds[plan.warmup :]

    def _steps(self, contender: Contender, number: int) -> float:
        plan, rank = self.plan, dist.get_rank()
        tokens, targets = self._corpus.batch(
            0, number, range(rank, rank + 1), plan.ranks, plan.context, torch.device("cpu")
        )
        dist.barrier()
        start = time.perf_counter()
        for _ in range(plan.steps):
            contender.model(tokens, targets).backward()
            contender.optimizer.step()
            contender.zero_grad()
        contender.synchronize()
        return (time.perf_counter() - start) / plan.steps


def speed_title(speed: float) -> str:
    """The speed of a link, to be read."""
    return "any" if math.isinf(speed) else f"{speed:g} GB/s"


def table_rows(plan: Plan, seconds: Tensor) -> list[list[str]]:
    """One row of texts per contender: milliseconds per step, and the ratio to DDP over the same link."""
    rows = []
    for column, name in enumerate(Name):
        cells = []
        for row in range(len(plan.speeds)):
            cell = f"{1e3 * float(seconds[:, row, column].median()):.0f}"
            if name is not Name.DDP:
                ratio = Spread.of(seconds[:, row, column] / seconds[:, row, list(Name).index(Name.DDP)])
                cell += f" ({ratio})"
            cells.append(cell)
        rows.append([name, *cells])
    return rows


def draw(path: Path, plan: Plan, seconds: Tensor, title: str) -> None:
    """Draw step time against the link's speed, a line per contender, bars from quartile to quartile."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    finite = [row for row, speed in enumerate(plan.speeds) if not math.isinf(speed)]
    speeds = [plan.speeds[row] for row in finite]
    for column, name in enumerate(Name):
        spreads = [Spread.of(1e3 * seconds[:, row, column]) for row in finite]
        medians = [spread.median for spread in spreads]
        bars = [[s.median - s.q1 for s in spreads], [s.q3 - s.median for s in spreads]]
        axes.errorbar(speeds, medians, yerr=bars, marker="o", capsize=3, label=name)
    for row in set(range(len(plan.speeds))) - set(finite):
        alone = 1e3 * float(seconds[:, row].median(0).values.min())
        axes.axhline(alone, linestyle=":", color="gray", label="fastest over any link")
    axes.set(xscale="log", yscale="log", xlabel="link, GB/s per rank and direction", ylabel="ms per step", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(plan: Plan, seconds: Tensor, console: Console) -> None:
    """Report what was measured, with a picture where it is written to files."""
    around = harness.surroundings("numba")
    titles = ["ms per step (ratio to DDP) over", *(speed_title(speed) for speed in plan.speeds)]
    rows = table_rows(plan, seconds)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in GPT(plan.model).parameters())
    size = f"{num_parameters / 1e6:.1f} M fp32 parameters, {plan.ranks} ranks"
    lines = [
        f"{size}, 1 x {plan.context} tokens per rank and step, buckets of {plan.bucket_cap_mb:g} MiB, {plan.threads} "
        f"threads per rank; {plan.rounds} rounds of {plan.steps} steps per link after {plan.warmup} of warm-up.",
        "Links are modelled: full duplex, one transfer at a time, no latency. Medians; ratios within each round.",
        harness.sentence_of(around),
    ]
    record = {
        "plan": asdict(plan) | {"out": None, "speeds": [speed_title(speed) for speed in plan.speeds]},
        "surroundings": around,
        "contenders": list(Name),
        "seconds": seconds.tolist(),
    }
    harness.publish(console, titles, rows, lines, out=plan.out, record=record)
    if plan.out is not None:
        draw(plan.out.with_suffix(".png"), plan, seconds, size)


def work(rank: int, plan: Plan, rendezvous: str) -> None:
    """One rank, from joining to leaving."""
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads):
        console = harness.console_of(180, quiet=rank != 0)
        seconds = Benchmark(plan).run(console)
        if rank == 0:
            show(plan, seconds, console)


def main(
    ranks: Annotated[int, typer.Option(min=2, help="Ranks to start.")] = 2,
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.SMALL,
    context: Annotated[int, typer.Option(min=1, help="Tokens per rank and step.")] = 128,
    speeds: Annotated[str, typer.Option(help="Of the links, 1e9 bytes/s; inf is one that does not matter.")] = (
        "0.1,0.3,1,3,10,inf"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 4,
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size, DDP's too.")] = 1.0,
    threads: Annotated[int, typer.Option(min=0, help="torch's threads per rank; 0 shares out the cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; table and picture go beside it.")] = None,
) -> None:
    """Time a training step against the speed of the link, with and without overlap."""
    links: Sequence[float] = [float(speed) for speed in speeds.split(",")]
    if wrong := [speed for speed in links if not speed > 0]:
        raise typer.BadParameter(f"expected --speeds above 0, got {wrong}")
    threads = harness.threads_per_rank(threads, ranks)
    plan = Plan(ranks, preset, context, tuple(links), rounds, warmup, steps, bucket_cap_mb, threads, out)
    harness.start_ranks(work, ranks, plan)
