"""The folder a run writes: config.json, metrics.jsonl, summary.json, loss.png and the final checkpoint."""

import importlib.metadata
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sharded_dadamw
from launch.options import Settings


class RunFolder:
    """Where every rank of a run writes; rank 0 chose the place.

    Attributes:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def create(cls, settings: Settings, num_parameters: int, device: torch.device) -> "RunFolder":
        """Agree on a folder and write the run's configuration into it; a collective."""
        chosen = [settings.run_dir or Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.optimizer}"]
        dist.broadcast_object_list(chosen, src=0)
        folder = cls(chosen[0])
        if dist.get_rank() == 0:
            folder.write_json(
                "config.json",
                {
                    "settings": asdict(settings),
                    "model": asdict(settings.model),
                    "num_parameters": num_parameters,
                    "world_size": dist.get_world_size(),
                    "backend": dist.get_backend(),
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                    "num_threads": torch.get_num_threads(),
                    "versions": versions(),
                },
            )
            (folder.path / "metrics.jsonl").touch()
        return folder

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `content` to the file `name`."""
        (self.path / name).write_text(json.dumps(content, indent=2, default=str) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; whoever reads the file meanwhile sees whole lines."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def save_checkpoint(self, model_state: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
        """Write the model, which is the same everywhere, by rank 0, and this rank's optimizer state."""
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            self._save(model_state, "model.pt")
        self._save(optimizer_state, f"optimizer-rank{rank}-of-{num_ranks}.pt")

    def _save(self, content: dict[str, Any], name: str) -> None:
        """A file of that name is whole, or not there: it is written beside its place and moved into it."""
        beside = self.path / f".{name}.part"
        torch.save(content, beside)
        os.replace(beside, self.path / name)


def versions() -> dict[str, str]:
    """Of everything that can change a run's figures."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    # The modules' own words: torch's says which build it is, and a checkout need not be installed.
    found |= {"torch": str(torch.__version__), "sharded_dadamw": sharded_dadamw.__version__}
    for package in ("fairscale", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
