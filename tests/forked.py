"""Ranks that start at once, forked from a process that has imported everything already.

An interpreter that imports torch and a training stack computes for seconds, and a run of a tiny model for a fraction
of one. So ranks of launch/train.py are forks of the pool's own fork server, and those of a stack are forks of an
`Importer`, which has imported it once.
"""

import contextlib
import importlib
import multiprocessing
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests import dying_train
from tests.pool import FORKS

ON_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Ended:
    """Processes that have ended, by rank: how, and what they said."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "".join(self.outputs)


def names_for(ranks: int, **more: str) -> list[dict[str, str]]:
    """What torchrun tells each rank of one host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    of_all |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", **more}
    return [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run(
    context: Any,
    function: str,
    arguments: tuple[Any, ...],
    names: Sequence[Mapping[str, str]],
    folder: Path,
    never_end: Sequence[int] = (),
) -> Ended:
    """Call "module:function" in a process for each rank, and wait for their ends. What they say goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank {index}.log" for index in range(len(names))]
    processes = [
        context.Process(target=_run_rank, args=(function, arguments, of_rank, output))
        for of_rank, output in zip(names, outputs, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        for rank, process in enumerate(processes):
            process.join(timeout=0 if rank in never_end else 200)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended([process.exitcode for process in processes], [path.read_text() for path in outputs])


def _run_rank(function: str, arguments: tuple[Any, ...], names: Mapping[str, str], output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(names)
    torch.set_num_threads(1)
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def train(
    folder: Path, *options: str, ranks: int, faults: Sequence[dict[str, Any]] = (), start: int | None = None
) -> Ended:
    """Ranks of launch/train.py; with `start`, as torchrun would start them, the how-many-eth time."""
    again = {} if start is None else {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": str(start)}
    arguments = ([*faults], ["--run-dir", str(folder), *options])
    names = names_for(ranks, COLUMNS="200", **again)
    return run(FORKS, f"{dying_train.__name__}:train", arguments, names, folder.with_name(f"{folder.name} logs"))


class Importer:
    """A process that imports modules once, and then has ranks run in forks of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def run(self, modules: Sequence[str], *request: Any) -> Ended:
        """Import modules if they are not there yet, and call `run` in a fork of what has imported them."""
        self._connection.send((modules, request))
        ended: Ended = self._connection.recv()
        return ended


@contextlib.contextmanager
def importer() -> Iterator[Importer]:
    """A context with an importer."""
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    with ours:
        yield Importer(ours)
    process.join(10)
    process.kill()


def _serve(connection: Connection) -> None:
    os.environ.update(ON_CPU)
    with contextlib.suppress(EOFError):
        while True:
            modules, request = connection.recv()
            for module in modules:
                importlib.import_module(module)
            connection.send(run(multiprocessing.get_context("fork"), *request))
