"""Whoever fails, and wherever: a run ends well, or every rank that is left says who and where.

Real processes, a table of faults and of the points where they strike. Each cell is a short run of its own: two steps in
which all is well, and then each call once. The last rank is the one that fails.
"""

import importlib
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_dadamw import Exchange, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.checkpoint import dcp, load_checkpoint, save_checkpoint
from sharded_dadamw.checkpoint.entries import Entries
from sharded_dadamw.comm.messages import GlooVerbs, MessageVerbs
from sharded_dadamw.comm.shared_memory import SharedMemoryVerbs
from sharded_dadamw.schedule.reducer import Reducer
from tests import forked
from tests.dying_train import Once, after, before
from tests.pool import FORKS

pytestmark = pytest.mark.clients

TIMEOUT_S = 4.0
LIMIT_S = 4 * TIMEOUT_S  # on a machine that may be busy
KIND_OF_VERBS = {
    Exchange.FASTEST: SharedMemoryVerbs,
    Exchange.RANK_ORDER: MessageVerbs,
    Exchange.BACKEND: GlooVerbs,
}

POINTS = (
    *("construction", "backward", "between", "reduction", "update", "gather"),
    *("state_dict", "save", "load", "consolidate", "metrics"),
)
ENDS = ("SIGKILL", "SIGSTOP", "exception")
OTHERS = (
    *(("another model", point) for point in ("construction", "save", "load")),
    *(("another argument", point) for point in ("construction", "between", "update", "save", "load")),
    *(("skipped", point) for point in ("backward", "between", "update", "save", "load", "consolidate", "metrics")),
    *(("once more", point) for point in ("backward", "between", "update", "save", "load", "consolidate", "metrics")),
    ("nan", "backward"),
    ("clip where others step", "update"),
)
CELLS = (*product(ENDS, POINTS), *OTHERS)


def end(fault: str) -> None:
    if fault == "exception":
        raise LookupError("a mistake in this rank's own code")
    os.kill(os.getpid(), signal.SIGKILL if fault == "SIGKILL" else signal.SIGSTOP)


def model_of(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))


class Run:
    """One rank of one cell."""

    def __init__(self, rank: int, num_ranks: int, cell: tuple[str, str], exchange: Exchange, folder: Path) -> None:
        self.fault, self.point = cell
        self.rank, self.exchange, self.folder = rank, exchange, folder
        self.fails = rank == num_ranks - 1
        self.seed = 0
        self.begun = 0.0  # the call that this rank is in
        verbs = KIND_OF_VERBS[exchange]
        self.places: dict[str, tuple[str, Any, Any, str]] = {  # in the middle of which call, and where it strikes
            "backward": ("backward", before, Reducer, "deliver"),
            "reduction": ("backward", after, verbs, "reduce_scatter_mean"),  # it has begun
            "update": ("backward", after, Bucket, "update_"),  # of the first bucket; nobody else knows of it
            "gather": ("backward", after, verbs, "all_gather_"),  # it has begun
            "save": ("save", before, dcp._SummedFile, "write"),
            "load": ("load", before, Entries, "read"),
            "consolidate": ("consolidate", after, verbs, "all_gather_"),
        }

    def does(self, fault: str, point: str) -> bool:
        """Whether this rank has this fault at this point."""
        return self.fails and (self.fault, self.point) == (fault, point)

    def call(self, point: str, function: Callable[..., Any], *args: Any, **named: Any) -> None:
        """One call of the script, as often as this rank makes it."""
        self.begun = time.monotonic()
        if self.fails and self.fault in ENDS:
            due, *place = self.places.get(self.point, ("",))
            if due == point:
                how, owner, name = place
                how(owner, name, Once(lambda: end(self.fault), [0], 0))
            elif point == self.point and not place:
                end(self.fault)
        for _ in range(0 if self.does("skipped", point) else 2 if self.does("once more", point) else 1):
            function(*args, **named)

    def build(self) -> None:
        self.model = model_of(17 if self.does("another model", "construction") else 16)
        self.optimizer = ShardedDecoupledAdamW(
            self.model.named_parameters(),
            lr=2e-2 if self.does("another argument", "construction") else 1e-2,
            config=ShardingConfig(exchange=self.exchange, bucket_cap_mb=0.0003),
        )

    def backward(self) -> None:
        self.seed += 1
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * self.seed + self.rank))
        loss = self.model(x).square().mean()
        (loss * (float("nan") if self.does("nan", "backward") and self.seed == 3 else 1.0)).backward()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def script(self) -> None:
        other, root = model_of(17), self.folder / "checkpoints"
        self.call("construction", self.build)
        self.train()
        self.train()
        self.optimizer.zero_grad()
        self.call("backward", self.backward)
        self.call("between", self.optimizer.clip_grad_norm_, 2.0 if self.does("another argument", "between") else 1.0)
        if self.does("another argument", "update"):
            self.optimizer.param_groups[0]["lr"] = 3e-2
        if self.does("clip where others step", "update"):
            self.optimizer.clip_grad_norm_(1.0)
        self.call("update", self.optimizer.step)
        self.call("state_dict", self.optimizer.state_dict)
        saved, loaded = (other if self.does("another model", point) else self.model for point in ("save", "load"))
        keep = 3 if self.does("another argument", "save") else None
        self.call("save", save_checkpoint, root, step=3, model=saved, optimizer=self.optimizer, keep_last=keep)
        path = self.folder / "elsewhere" if self.does("another argument", "load") else root
        self.call("load", load_checkpoint, path, model=loaded, optimizer=self.optimizer)
        self.call("consolidate", self.optimizer.consolidate_state_dict)
        self.call("metrics", self.optimizer.metrics)
        self.train()


def run_rank(cell: tuple[str, str], exchange: Exchange, port: int, folder: Path) -> None:
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    importlib.import_module("tests.preloaded")  # which may take longer than the timeout
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    store.add("ready", 1)
    while store.add("ready", 0) < num_ranks:  # on a busy machine longer than the timeout
        time.sleep(0.02)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    run = Run(rank, num_ranks, cell, exchange, folder)
    try:
        run.script()
    except Exception as error:
        said = type(error).__name__, str(error), time.monotonic() - run.begun
        (folder / f"{rank}.json").write_text(json.dumps(said))
        raise


@dataclass(frozen=True)
class Ended:
    """What one rank has come to.

    Attributes:
        code: The exit code of its process; None where it had to be ended.
        kind: Of its error; empty where all went well.
        said: What that says.
        seconds: How long its last call has taken.
    """

    code: int | None
    kind: str = ""
    said: str = ""
    seconds: float = 0.0


def run_cell(num_ranks: int, cell: tuple[str, str], exchange: Exchange) -> list[Ended]:
    """Run one cell, and return how each rank ended."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)  # as torchrun serves it
        arguments = cell, exchange, store.port, folder
        names = forked.names_for(num_ranks, GLOO_SOCKET_IFNAME="lo")
        stops = [num_ranks - 1] if cell[0] == "SIGSTOP" else []
        ended = forked.run(FORKS, f"{__name__}:run_rank", arguments, names, folder / "logs", never_end=stops)
        told = [folder / f"{rank}.json" for rank in range(num_ranks)]
        return [
            Ended(code, *(json.loads(path.read_text()) if path.exists() else ()))
            for code, path in zip(ended.codes, told, strict=True)
        ]


NAMES_RANK = re.compile(r"\branks? \d")
NAMES_CALL = re.compile(r"\w+\(\)|backward|was not written|param_groups|parameter \d|path|keep_last|optimizer\.")


def faults_of(cell: tuple[str, str], ended: list[Ended]) -> list[str]:
    """What is wrong with the end of a run; nothing if it is as it should be."""
    wrong = []
    of_victim = ended[-1]
    if cell[0] in ("SIGKILL", "SIGSTOP") or of_victim.kind == "LookupError":
        ended = ended[:-1]
    if all(each.code == 0 for each in ended):
        return []
    for rank, each in enumerate(ended):
        if not each.kind:
            wrong.append(f"rank {rank} ended with {each.code} and said nothing")
        elif each is not of_victim and not (NAMES_RANK.search(each.said) and NAMES_CALL.search(each.said)):
            wrong.append(f"rank {rank} does not say who or where: {each.kind}: {each.said}")
        if each.seconds > LIMIT_S:
            wrong.append(f"rank {rank} took {each.seconds:.1f} s")
    return wrong


RUNS = list(zip(cycle([(2, Exchange.FASTEST), (4, Exchange.RANK_ORDER), (2, Exchange.BACKEND)]), CELLS[::2]))
"""Every second cell: each way to end at every second point, and each point with one way to end or two."""


def wrong(run: tuple[tuple[int, Exchange], tuple[str, str]]) -> list[str]:
    (num_ranks, exchange), cell = run
    return faults_of(cell, run_cell(num_ranks, cell, exchange))


def test_every_rank_that_is_left_says_who_and_where() -> None:
    with ThreadPoolExecutor(6) as pool:  # most of the time they wait
        doubtful = [run for run, what in zip(RUNS, pool.map(wrong, RUNS), strict=True) if what]
    # Where the machine is busy a rank may have come too late: once more, one at a time.
    assert not {run: what for run in doubtful if (what := wrong(run))}
