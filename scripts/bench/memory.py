"""Measure what each contender of scripts/bench/step.py holds in memory, at rest and at most, beside its formula.

    python -m scripts.bench memory                         starts 2 ranks per contender, one contender after the other
    python -m scripts.bench memory --dtype bfloat16 --out memory.json

Processes of its own train with each contender, so that nothing is shared with another. Counted is what the kernel says
is theirs, anonymous pages and shared ones, the latter divided by the number of processes that have them in use; what
they held before there was a model, but after a step of ours with a tiny one, is taken off. At rest is after a step and
zero_grad; at most is the largest of samples taken all through a step, activations included. Contenders that put a
rank's data into memory that all ranks map are so charged for it once.
"""

import gc
import multiprocessing
import os
import re
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from launch.data import Corpus
from launch.options import Preset
from scripts.bench import harness
from scripts.bench.step import DEEPSPEED_STAGES, Name, Plan, Precision, build, num_parameters
from sharded_dadamw import ShardedDecoupledAdamW, ShardingConfig

ADDED_UP = re.compile(rb"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


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


@dataclass(frozen=True)
class Held:
    """Bytes per parameter, the mean over ranks.

    Attributes:
        at_rest: Between steps, without gradients.
        at_most: During a step.
    """

    at_rest: float
    at_most: float


def work(rank: int, name: Name, plan: Plan, results: Any, rendezvous: str) -> None:
    """One rank with one contender, from joining to leaving; puts a Held, or why there is none, into `results`."""
    os.environ.setdefault("LOCAL_RANK", str(rank))
    device = torch.device("cpu")
    with harness.joined(rank, plan.ranks, rendezvous, threads=plan.threads):
        corpus = Corpus(None, plan.context)
        warm_up(plan.precision.dtype)
        before = bytes_held()
        try:
            contender = build(name, plan, device)
        except ImportError as error:
            results.put(str(error))
            return
        for step in range(plan.warmup + plan.rounds):
            batch = corpus.batch(plan.seed, step, range(rank, rank + 1), plan.ranks, plan.context, device)
            with Peak() as peak:
                contender.model(*batch).backward()
                contender.optimizer.step()
                contender.synchronize()
            contender.zero_grad()
            gc.collect()
            dist.barrier()
            now = torch.tensor([bytes_held() - before, peak.num_bytes - before], dtype=torch.float64)
        dist.all_reduce(now)
        at_rest, at_most = (now / plan.ranks / num_parameters(plan)).tolist()
        if rank == 0:
            results.put(Held(at_rest, at_most))


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


def expected(name: Name, plan: Plan) -> float:
    """Bytes per parameter of parameters, gradients and state that stay, by the method; without buffers in passing."""
    size, ranks = plan.precision.dtype.itemsize, plan.ranks
    narrow = plan.precision is Precision.BF16
    main = 4 if narrow else 0
    match name:
        case Name.DDP_ADAMW | Name.DECOUPLED:
            return size + size + 2 * size
        case Name.TORCH_ZERO | Name.FAIRSCALE_OSS:
            return size + size + 2 * size / ranks
        case Name.FSDP2:
            return (size + size + 2 * size) / ranks
        case Name.SHARDED_ZERO2:
            return size + (size + main + 8) / ranks
        case _ if name in DEEPSPEED_STAGES:
            return size + size / (ranks if DEEPSPEED_STAGES[name] == 2 else 1) + 12 / ranks
        case _:
            return size + size + (main + 8) / ranks


TITLES = ("contender", "parameters + gradients + state, computed", "at rest", "at most")


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to start.")] = 2,
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.MEDIUM,
    context: Annotated[int, typer.Option(min=1, help="Tokens per rank and step; one sequence.")] = 32,
    contenders: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(Name),
    dtype: Annotated[Precision, typer.Option(help="Of the model's parameters.")] = Precision.FP32,
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size of ours.")] = ShardingConfig().bucket_cap_mb,
    out: Annotated[Path | None, typer.Option(help="JSON file to write; a markdown table goes beside it.")] = None,
) -> None:
    """Measure the memory of each contender in processes of its own."""
    names = [Name(name.strip()) for name in contenders.split(",")]
    plan = Plan(
        ranks=ranks,
        preset=preset,
        rounds=2,
        warmup=2,
        steps=1,
        batch=1,
        context=context,
        contenders=tuple(names),
        at_once=1,
        threads=harness.threads_per_rank(0, ranks),
        precision=dtype,
        bucket_cap_mb=bucket_cap_mb,
        lr=3e-4,
        weight_decay=3e-5,
        seed=0,
        out=out,
    )
    # Memory that is freed goes back at once, so that what is held is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**17)
    os.environ["MALLOC_ARENA_MAX"] = "2"
    console = harness.console_of(120)
    rows, record = [], {}
    results = multiprocessing.get_context("spawn").SimpleQueue()
    for name in names:
        harness.start_ranks(work, ranks, name, plan, results)
        found = results.get()
        if isinstance(found, Held):
            record[name] = asdict(found)
            rows.append([name, f"{expected(name, plan):.2f}", f"{found.at_rest:.2f}", f"{found.at_most:.2f}"])
        else:
            rows.append([name, "not installed", found, ""])
            while not results.empty():  # the other ranks'
                results.get()
        console.print(" ".join(rows[-1]))
    around = harness.surroundings()
    lines = [
        f"Bytes per parameter and rank. {num_parameters(plan) / 1e6:.1f} M {plan.precision} parameters, {ranks} ranks "
        f"over gloo, 1 x {context} tokens per rank and step, buckets of {bucket_cap_mb:g} MiB.",
        "At rest: after zero_grad. At most: samples during a step, activations included.",
        harness.sentence_of(around),
    ]
    found_out = {"surroundings": around, "bytes_per_parameter": record}
    harness.publish(console, TITLES, rows, lines, out=out, record=found_out)
