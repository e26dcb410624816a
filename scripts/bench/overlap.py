"""Training steps over links of many speeds, to see what hides behind forward and backward."""

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any
from unittest import mock

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from launch.contenders import Contender
from launch.options import Preset
from scripts.bench.harness import Report, ms, seconds_of, spread
from scripts.bench.peers import LAW, Contest, build
from sharded_dadamw.buckets import shards

CONTENDERS = ("ddp-adamw", "sharded-no-overlap", "sharded", "sharded-attached", "sharded-zero2")


@dataclass(frozen=True, kw_only=True)
class OverLinks(Contest):
    """A contest in which each takes a few steps in a row over a link, at several speeds."""

    packages = ("numba",)

    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 8
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 1
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.SMALL
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 2
    speeds: Annotated[str, typer.Option(help="Of the link, 1e9 bytes/s; inf is one that does not matter.")] = (
        "0.1,0.3,1,3,10,inf"
    )

    def set_speed(self, bytes_per_s: float) -> None:
        """Have the link take from now on as long as it says."""
        raise NotImplementedError

    def take_turns(self, turns: Mapping[str, Callable[[int], list[float]]]) -> tuple[list[dict[str, str]], Tensor]:
        """Let everybody have a turn at each speed; the first is compared with. Collective.

        Returns:
            A row for each, and what turns returned, [rounds, speeds, turns, values], of which seconds are the first.
        """
        speeds = [float(speed) for speed in self.speeds.split(",")]
        at_speeds = [partial(self._at_speed, speed, turn) for speed in speeds for turn in turns.values()]
        samples = self.interleave(at_speeds).unflatten(1, (len(speeds), len(turns)))
        rows = []
        for name, times in zip(turns, samples[..., 0].unbind(2), strict=True):
            row = {"contender": name}
            for speed, column, first in zip(speeds, times.T, samples[:, :, 0, 0].T, strict=True):
                ratio = f" ({spread(column / first)})" if rows else ""
                row["any" if math.isinf(speed) else f"{speed:g} GB/s"] = f"{ms(column, 0)}{ratio}"
            rows.append(row)
        return rows, samples

    def _at_speed(self, speed: float, turn: Callable[[int], list[float]], index: int) -> list[float]:
        self.set_speed(1e9 * speed)
        dist.barrier()
        return turn(index)

    def take_steps(self, contender: Contender, index: int) -> list[float]:
        """Seconds per step, and CPU seconds."""
        batch = self.batch_of(index)

        def steps() -> None:
            for _ in range(self.steps):
                contender.model(*batch).backward()
                contender.optimizer.step()
                contender.zero_grad()
            contender.synchronize()

        return [seconds / self.steps for seconds in seconds_of(steps)]


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

    contenders: Annotated[str, typer.Option(help="ddp-adamw and some of ours, separated by commas.")] = ",".join(
        CONTENDERS
    )
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size, DDP's too.")] = 1.0
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 4

    def __post_init__(self) -> None:
        if self.names[0] != CONTENDERS[0] or not set(self.names) <= set(CONTENDERS):
            raise typer.BadParameter(f"expected --contenders to be the first and others of {', '.join(CONTENDERS)}")

    @cached_property
    def link(self) -> "Link":
        """What this rank sends through."""
        return Link()

    def set_speed(self, bytes_per_s: float) -> None:
        self.link.bytes_per_s = bytes_per_s

    def measure(self) -> Report:
        connect = shards.connect
        with mock.patch.object(shards, "connect", lambda *args, **kwargs: over(self.link, connect(*args, **kwargs))):
            contenders = {name: self.contender(name) for name in self.names}
        rows, samples = self.take_turns({name: partial(self.take_steps, one) for name, one in contenders.items()})
        lines = [
            f"Milliseconds per step, and the ratio to the first, by the speed of the link. {self.model_in_words}, "
            f"buckets of {self.bucket_cap_mb:g} MiB, {self.steps} steps per round and link; {self.set_up}",
            "Links are modelled: full duplex, one transfer at a time, no latency.",
        ]
        return Report(rows, lines, {"contenders": self.names, "seconds": samples[..., 0].tolist()})

    def contender(self, name: str) -> Contender:
        """Ours as always; DDP with buckets as large, and the link in its communication hook. Collective."""
        if name != CONTENDERS[0]:
            return build(name, self)
        model = self.new_model()
        ddp = DistributedDataParallel(model, bucket_cap_mb=self.bucket_cap_mb, gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, AllReduceOver(self.link).average)
        return Contender(ddp, AdamW(model.parameters(), **LAW, fused=True))


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
