"""The folder a run writes: config.json, metrics.jsonl, checkpoints/, summary.json and loss.png."""

import contextlib
import errno
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
from launch.data import Corpus
from launch.earlier import CONFIG, METRICS, RUNS, job, plain, read_config
from launch.options import Settings, fail


class RunFolder:
    """Where every rank of a run writes; rank 0 chose the place.

    Attributes:
        path: the folder, which exists.
        checkpoints: the folder in it for them, which need not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lines = b""
        path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def open(cls, settings: Settings, corpus: Corpus, num_parameters: int, device: torch.device) -> "RunFolder":
        """Agree on a folder, and write into it how the run begins or goes on; a collective.

        Leaves by SystemExit, on every rank, if some have another text than the run began with, or cannot write there.
        """
        path = settings.run_dir or RUNS / f"{time.strftime('%Y%m%d-%H%M%S')}-{settings.optimizer}"
        agreed: list[Any] = [path, corpus.digest]
        if dist.get_rank() == 0 and settings.resume:
            agreed[1] = read_config(path)["text"]
        dist.broadcast_object_list(agreed, src=0)
        path, text = agreed
        digests = [""] * dist.get_world_size()
        dist.all_gather_object(digests, corpus.digest)
        if others := [rank for rank, digest in enumerate(digests) if digest != text]:
            where = f"the run in {path}" if settings.resume else "rank 0"
            fail(f"expected the text of {where}, got another on ranks {others} of {len(digests)}; name it with --data")
        wrong: list[str | None] = [None] * dist.get_world_size()
        try:
            folder, failure = cls(path), None
            if dist.get_rank() == 0:
                folder._write_config(settings, text, num_parameters, device)
        except OSError as error:
            failure = str(error)
        dist.all_gather_object(wrong, failure)
        if failures := [failure for failure in wrong if failure is not None]:
            fail(
                f"expected --run-dir to be a folder that every rank can write, got {path}: {failures[0]}; name another"
            )
        return folder

    def _write_config(self, settings: Settings, text: str, num_parameters: int, device: torch.device) -> None:
        start: dict[str, Any] = {
            "world_size": dist.get_world_size(),
            "backend": dist.get_backend(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "num_threads": torch.get_num_threads(),
            "versions": versions(),
            "job": job(),
        }
        if settings.resume:
            config = read_config(self.path)
            config["resumed"].append(start)
        else:
            options = {name: plain(value) for name, value in asdict(settings).items()}
            # Whoever resumes may stand elsewhere.
            options["data"] = plain(settings.data and settings.data.resolve())
            options["micro_batches"] = settings.num_micro_batches  # or it would depend on how many ranks there are then
            config = {"settings": options, "model": asdict(settings.model), "num_parameters": num_parameters}
            config |= {"text": text, **start, "resumed": []}
        self.write_json(CONFIG, config)
        (self.path / METRICS).touch()

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `content` to the file `name`."""
        self._write(name, json.dumps(content, indent=2, default=str) + "\n")

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl; whoever reads the file sees whole lines, also after a full disk.

        Raises:
            OSError: it cannot be written, and the file is as it was; the line comes with the next one.
        """
        self._lines += json.dumps(record).encode() + b"\n"
        with (self.path / METRICS).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(self._lines) < len(self._lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / METRICS))
            except OSError:
                file.truncate(end)
                raise
        self._lines = b""

    def sync_metrics(self) -> None:
        """Have metrics.jsonl on the disk, before a checkpoint that counts on it."""
        with (self.path / METRICS).open("a") as file:
            os.fsync(file.fileno())

    def rewind_metrics(self, step: int) -> list[dict[str, Any]]:
        """Leave in metrics.jsonl, and return, the whole lines of steps before `step`."""
        records = []
        for line in (self.path / METRICS).read_text(errors="replace").splitlines():
            # The machine may have stopped in the middle of a line, or before what was written was on the disk.
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("step", step) < step:
                    records.append(record)
        self._write(METRICS, "".join(json.dumps(record) + "\n" for record in records))
        return records

    def _write(self, name: str, text: str) -> None:
        """A file of that name is whole, the old or the new: it is written beside its place and moved into it."""
        beside = self.path / f".{name}.part"
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
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
