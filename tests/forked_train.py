"""Ranks of launch/train.py that start at once, forked from a process that has imported everything already.

An interpreter that imports what training needs computes for more than two seconds, and a run of a tiny model for a
fraction of one.
"""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests import dying_train
from tests.pool import FORKS


@dataclass(frozen=True)
class Ended:
    """Processes that have ended, by rank: how, and what they said."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "".join(self.outputs)


def _run_rank(arguments: Sequence[str], names: dict[str, str], faults: list[dict[str, Any]], output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(names)
    torch.set_num_threads(1)
    dying_train.arm(faults)
    sys.argv = ["train.py", *arguments]
    dying_train.launch.train.main()


def train(
    folder: Path, *options: str, ranks: int, faults: Sequence[dict[str, Any]] = (), start: int | None = None
) -> Ended:
    """Start the ranks and wait for their ends; with `start`, as torchrun would, the how-many-eth time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    address |= {"LOCAL_WORLD_SIZE": str(ranks), "COLUMNS": "200"}
    if start is not None:
        address |= {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": str(start)}
    outputs = [folder.with_name(f"{folder.name}.{rank}.log") for rank in range(ranks)]
    processes = [
        FORKS.Process(
            target=_run_rank,
            args=(
                ["--run-dir", str(folder), *options],
                address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                list(faults),
                outputs[rank],
            ),
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended([process.exitcode for process in processes], [path.read_text() for path in outputs])
