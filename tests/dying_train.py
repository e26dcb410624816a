"""launch/train.py for ranks that are to die, or to find the disk full.

A fault has a `point` of POINTS, the `step` in which it strikes, as records count them, the `ranks` that it strikes and
the `start` of these ranks: 0 for the first, 1 after torchrun has started them again once.
"""

import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import launch.train
from launch.train import Training
from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.checkpoint import dcp as checkpoint_dcp
from sharded_dadamw.checkpoint.save import wait_for_latest
from sharded_dadamw.comm.shared_memory import SharedMemoryVerbs
from sharded_dadamw.schedule.reducer import Reducer

SMALL_DISK = 100_000  # bytes of a file: enough for metrics and too little for a checkpoint


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_alone() -> None:
    wait_for_latest()  # so that it is known what is there
    die()


def before(owner: Any, name: str, strike: Callable[[], None], then: bool = False) -> None:
    original = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if not then:
            strike()
        result = original(*args, **kwargs)
        if then:
            strike()
        return result

    setattr(owner, name, struck)


after = partial(before, then=True)


def ask(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signal.Signals[name])


def fill_disk() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_DISK, most))


def empty_disk() -> None:
    wait_for_latest()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


# Where each strikes: a place in the code, whether before or after what happens there, and what happens instead.
POINTS: dict[str, tuple[Callable[[Any, str, Callable[[], None]], None], Any, str, Callable[[], None]]] = {
    "backward": (before, Reducer, "deliver", die_alone),
    "reduction": (after, SharedMemoryVerbs, "reduce_scatter_mean", die_alone),  # it has begun
    "update": (after, Bucket, "update_", die_alone),  # of the first bucket; nobody else knows of it
    "gather": (after, SharedMemoryVerbs, "all_gather_", die_alone),  # it has begun
    "save": (after, checkpoint_dcp._SummedFile, "write", die),  # part of a file is there
    "rename": (before, checkpoint_dcp, "publish", die),  # everything is there but the name
    "step": (before, Training, "train_step", die_alone),
    "TERM": (before, Training, "train_step", ask("SIGTERM")),
    "USR1": (before, Training, "train_step", ask("SIGUSR1")),
    "disk is full": (before, Training, "train_step", fill_disk),
    "disk has room": (before, Training, "train_step", empty_disk),
}


class Once:
    """Strikes the first time that it is called in a step, or after it: saving goes on beside later ones."""

    def __init__(self, strike: Callable[[], None], now: list[int], step: int) -> None:
        self.strike, self.now, self.step = strike, now, step
        self.has_struck = False

    def __call__(self) -> None:
        if self.now[0] >= self.step and not self.has_struck:
            self.has_struck = True
            self.strike()


def arm(faults: list[dict[str, Any]]) -> None:
    """Have the faults strike in this process that are meant for it."""
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    rank = int(os.environ["RANK"])
    now = [-1]
    for fault in faults:
        if rank in fault["ranks"] and start == fault["start"]:
            how, owner, name, strike = POINTS[fault["point"]]
            how(owner, name, Once(strike, now, fault["step"]))
    original = Training.train_step

    def train_step(self: Training, step: int) -> Any:
        now[0] = step
        return original(self, step)

    Training.train_step = train_step  # type: ignore[method-assign]


def train(faults: list[dict[str, Any]], options: list[str]) -> None:
    """Train as one rank, with faults."""
    arm(faults)
    sys.argv = ["train.py", *options]
    launch.train.main()
