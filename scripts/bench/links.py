"""Training steps over a TCP link between hosts, whose speed the kernel holds."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from launch.cluster import local_rank
from scripts.bench.harness import CHECKOUT, Report, median, ms, seconds_of
from scripts.bench.namespaces import DEVICE, Host, hosts
from scripts.bench.overlap import OverLinks
from scripts.bench.peers import KINDS, build

CONTENDERS = ("ddp-adamw", "sharded", "sharded-attached", "sharded-mesh", "torch-zero")
TRANSFER = torch.zeros(16 * 2**20, dtype=torch.uint8)
HOSTS = 2


@dataclass(frozen=True, kw_only=True)
class Links(OverLinks):
    """Time a training step on two hosts against the speed of the link between them.

    The hosts are namespaces of this machine, each with half of the ranks; between them is a bridge, and what a host
    sends goes through a token bucket of the kernel's (tc, tbf). Needs root on Linux. The first row is a plain transfer
    over the link. Both hosts share this machine's cores, also for the network's own work.
    """

    ranks: Annotated[int, typer.Option(min=2, envvar="WORLD_SIZE", help="Ranks of both hosts.")] = 4
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence; few, since hosts share cores.")] = 32
    contenders: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(CONTENDERS)
    bucket_cap_mb: Annotated[float, typer.Option(help="Bucket size of ours.")] = 4.0
    speeds: Annotated[str, typer.Option(help="Of the link, 1e9 bytes/s; inf does not hold it.")] = "0.3,1,inf"

    def run(self) -> None:
        if "RANK" in os.environ:
            return super().run()
        with hosts(HOSTS) as made:
            started = [subprocess.Popen(self.command(made, node), cwd=CHECKOUT) for node in range(HOSTS)]
            if any([process.wait() for process in started]):
                raise typer.Exit(1)

    def command(self, made: list[Host], node: int) -> list[str]:
        """One that starts a host's ranks, by torchrun."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(HOSTS), "--node-rank", str(node)]
        torchrun += ["--nproc-per-node", str(self.ranks // HOSTS), "--master-addr", made[0].address]
        return made[node].command([*torchrun, "--master-port", "29400", "-m", "scripts.bench", *sys.argv[1:]])

    def set_speed(self, bytes_per_s: float) -> None:
        if local_rank() == 0:
            discipline = ["pfifo"]
            if not math.isinf(bytes_per_s):
                discipline = ["tbf", "rate", f"{8 * bytes_per_s:.0f}bit", "burst", "256kb", "latency", "50ms"]
            subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *discipline], check=True)

    def measure(self) -> Report:
        turns = {name: partial(self.take_steps, build(name, self)) for name in self.names}
        rows, samples = self.take_turns({name: partial(with_bytes, turn) for name, turn in turns.items()})
        for number, row in enumerate(rows):
            _, cpu, sent = samples[:, :, number].flatten(0, 1).T
            row |= {"contender": KINDS[row["contender"]].description, "CPU ms of a rank": ms(cpu, 0)}
            row["MB that a host sends"] = f"{median(sent) / self.steps / 1e6:.1f}"
        plain, transfers = self.take_turns({"a plain transfer": transfer})
        rates = TRANSFER.nbytes / transfers[:, :, 0, 0].T / 1e9
        cells = dict(zip(list(plain[0])[1:], (f"{median(rate):.2f} GB/s" for rate in rates), strict=True))
        lines = [
            f"Milliseconds per step, and the ratio to the first, by the speed of the link. {self.model_in_words}, "
            f"buckets of ours {self.bucket_cap_mb:g} MiB, {self.steps} steps per round and link; {HOSTS} hosts; "
            f"{self.set_up}"
        ]
        record = {"contenders": self.names, "samples": samples.tolist(), "transfers": transfers.tolist()}
        return Report([plain[0] | cells, *rows], lines, record)


def with_bytes(turn: Callable[[int], list[float]], index: int) -> list[float]:
    """What a turn returns, and the bytes that this host has sent meanwhile."""
    before = bytes_sent()
    found = turn(index)
    dist.barrier()
    return [*found, bytes_sent() - before]


def bytes_sent() -> int:
    """Bytes that have left this host so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith(f"{DEVICE}:"))


def transfer(index: int) -> list[float]:
    """Seconds that a buffer takes from the first host to the second."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    send_or_receive = {0: partial(dist.send, TRANSFER, last), last: partial(dist.recv, TRANSFER, 0)}
    return seconds_of(send_or_receive.get(rank, dist.get_rank))
