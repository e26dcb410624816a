"""Training steps over a TCP link between hosts, whose speed the kernel holds."""

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from launch.cluster import local_rank
from scripts.bench import harness
from scripts.bench.harness import CHECKOUT, CPU, Report
from scripts.bench.hosts import DEVICE, Host, hosts
from scripts.bench.peers import KINDS, Name, OverLinks, build

CONTENDERS = (Name.DDP_ADAMW, Name.SHARDED, Name.SHARDED_ATTACHED, Name.SHARDED_MESH, Name.TORCH_ZERO)
TRANSFER = torch.zeros(16 * 2**20, dtype=torch.uint8)
HOSTS = 2


@dataclass(frozen=True, kw_only=True)
class Links(OverLinks):
    """Time a training step on two hosts against the speed of the link between them.

    The hosts are namespaces of this machine, each with half of the ranks; between them is a bridge, and what a host
    sends goes through a token bucket of the kernel's (tc, tbf). Needs root on Linux. The first row is a plain transfer
    over the link. Both hosts share this machine's cores, also for the network's own work.
    """

    packages = ("numba",)

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

    def measure(self) -> Report:
        contenders = [build(name, self, CPU) for name in self.names]
        turns = [
            partial(self.in_turn, speed, turn)
            for speed in self.all_speeds
            for turn in (transfer, *(partial(self.take_steps, contender) for contender in contenders))
        ]
        samples = harness.interleave(turns, self.rounds, self.warmup).unflatten(1, (-1, 1 + len(contenders)))
        seconds, cpu, sent = samples.unbind(-1)  # [rounds, speeds, turns] each
        rates = TRANSFER.nbytes / seconds[:, :, 0].median(0).values / 1e9
        rows = [["a plain transfer", *(f"{rate:.2f} GB/s" for rate in rates.tolist()), "-", "-"]]
        for column, (name, cells) in enumerate(zip(self.names, self.rows(seconds[:, :, 1:]), strict=True), 1):
            cpu_ms = f"{1e3 * float(cpu[:, :, column].median()):.0f}"
            megabytes = f"{float(sent[:, :, column].median()) / self.steps / 1e6:.1f}"
            rows.append([KINDS[name].description, *cells, cpu_ms, megabytes])
        lines = [
            f"{self.model_in_words}, buckets of ours {self.bucket_cap_mb:g} MiB, {self.steps} steps per round and "
            f"link; {HOSTS} hosts; {self.set_up}"
        ]
        record = {"contenders": self.names, "links": self.titles, "seconds": seconds.tolist()}
        record |= {"cpu": cpu.tolist(), "sent": sent.tolist()}
        columns = ["ms per step (ratio to the first) over", *self.titles, "CPU ms of a rank", "MB that a host sends"]
        return Report(columns, rows, lines, record)

    def in_turn(self, speed: float, turn: partial[list[float]], index: int) -> list[float]:
        """Have a turn over a link of a speed; adds the bytes that this host has sent."""
        if local_rank() == 0:
            discipline = ["pfifo"]
            if not math.isinf(speed):
                discipline = ["tbf", "rate", f"{8e9 * speed:.0f}bit", "burst", "256kb", "latency", "50ms"]
            subprocess.run(["tc", "qdisc", "replace", "dev", DEVICE, "root", *discipline], check=True)
        dist.barrier()
        before = bytes_sent()
        found = turn(index)
        dist.barrier()
        return [*found, bytes_sent() - before]


def bytes_sent() -> int:
    """Bytes that have left this host so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith(f"{DEVICE}:"))


def transfer(index: int) -> list[float]:
    """Seconds that a buffer takes from the first host to the second, and CPU seconds."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    start, cpu_start = time.perf_counter(), time.process_time()
    if rank == 0:
        dist.send(TRANSFER, last)
    elif rank == last:
        dist.recv(TRANSFER, 0)
    return [time.perf_counter() - start, time.process_time() - cpu_start]
