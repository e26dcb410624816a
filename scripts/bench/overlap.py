"""Training steps over links of many speeds, to see what hides behind forward and backward."""

import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from launch.contenders import Contender
from scripts.bench import harness
from scripts.bench.harness import CPU, Report
from scripts.bench.peers import Name, OverLinks, build
from sharded_dadamw.buckets import shards

CONTENDERS = (Name.DDP_ADAMW, Name.SHARDED_NO_OVERLAP, Name.SHARDED, Name.SHARDED_ATTACHED, Name.SHARDED_ZERO2)


@dataclass(frozen=True, kw_only=True)
class Overlap(OverLinks):
    """Time a training step against the speed of the link, with and without overlap.

    Data moves between ranks as it always does, and no result is there before a modelled link would have brought it:
    every rank sends through a link of its own that takes one transfer at a time, in the order in which they are
    started, and whoever waits for a transfer sleeps until its last byte has arrived. DistributedDataParallel sends what
    an all-reduce has to, 2 (N - 1) / N of a bucket, in a communication hook; ours (N - 1) / N of it to average and as
    much to gather. The last column is a link so fast that it does not matter: what is left is the exchange's own cost.
    What a contender still has under way after its last step of a round is waited for on its own time.
    """

    packages = ("numba",)

    contenders: Annotated[str, typer.Option(help="ddp-adamw and some of ours, separated by commas.")] = ",".join(
        CONTENDERS
    )
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size, DDP's too.")] = 1.0
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 4

    def __post_init__(self) -> None:
        if wrong := [speed for speed in self.all_speeds if not speed > 0]:
            raise typer.BadParameter(f"expected --speeds above 0, got {wrong}")
        if self.names[0] is not Name.DDP_ADAMW or not set(self.names) <= set(CONTENDERS):
            raise typer.BadParameter(f"expected --contenders to be the first and others of {', '.join(CONTENDERS)}")

    def measure(self) -> Report:
        link, connect = Link(), shards.connect
        with mock.patch.object(shards, "connect", lambda *args, **kwargs: over(link, connect(*args, **kwargs))):
            contenders = [self.contender(name, link) for name in self.names]
        turns = [
            partial(self.take_steps_over, link, speed, contender)
            for speed in self.all_speeds
            for contender in contenders
        ]
        samples = harness.interleave(turns, self.rounds, self.warmup)
        seconds = samples.unflatten(1, (-1, len(contenders)))[..., 0]  # [rounds, speeds, contenders]
        rows = [[name, *cells] for name, cells in zip(self.names, self.rows(seconds), strict=True)]
        lines = [
            f"{self.model_in_words}, buckets of {self.bucket_cap_mb:g} MiB, {self.steps} steps per round and link; "
            f"{self.set_up}",
            "Links are modelled: full duplex, one transfer at a time, no latency.",
        ]
        record = {"contenders": self.names, "links": self.titles, "seconds": seconds.tolist()}
        return Report(["ms per step (ratio to DDP) over", *self.titles], rows, lines, record)

    def contender(self, name: Name, link: "Link") -> Contender:
        """Ours as always; DDP with buckets as large, and the link in its communication hook. Collective."""
        if name is not Name.DDP_ADAMW:
            return build(name, self, CPU)
        model = self.new_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=self.bucket_cap_mb, gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, AllReduceOver(link).average)
        return Contender(ddp, AdamW(model.parameters(), lr=self.lr, betas=(0.9, 0.95), fused=True))

    def take_steps_over(self, link: "Link", speed: float, contender: Contender, index: int) -> list[float]:
        """Seconds per step over a link."""
        link.bytes_per_s = 1e9 * speed
        dist.barrier()
        return self.take_steps(contender, index)


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
