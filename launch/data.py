"""Text as bytes: the standard library's own sources, or anyone's, and batches that do not depend on the rank count.

The batch of a step is a function of `(seed, step)` alone; a rank takes its rows of it. So one rank and many train on
the same data, and their loss curves can be laid over each other.
"""

import hashlib
import math
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from launch.cluster import local_rank

HELD_OUT_FRACTION = 0.05
END_OF_FILE = b"\0"
# Installed packages and tests differ between machines; encodings and pydoc_data are tables and prose, not code.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as 1-D uint8 tensors.

    Attributes:
        name: where the text came from.
        num_files: how many files were read.
        digest: equal for equal texts.
    """

    name: str
    num_files: int
    digest: str
    training: Tensor
    held_out: Tensor

    @classmethod
    def read(cls, source: Path | None, context: int) -> Self:
        """Read `source`, a file or a folder of them; None reads the standard library's sources.

        Raises:
            ValueError: not enough there to train and to hold out windows of `context` bytes.
        """
        if source is None:
            root = Path(sysconfig.get_paths()["stdlib"])
            name = "Python standard library"
            files = [path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)]
        else:
            root = source if source.is_dir() else source.parent
            name = str(source)
            found = root.rglob("*") if source.is_dir() else [source]
            files = [path for path in found if "/." not in f"/{path.relative_to(root).as_posix()}"]  # not .git
        texts = {path.relative_to(root).as_posix(): path.read_bytes() for path in files if path.is_file()}
        # By digest of the name: an order that is the same everywhere, yet does not put all of one folder at the end,
        # where the held-out text is cut off.
        names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
        text = bytearray(b"".join(texts[name] + END_OF_FILE for name in names))
        num_held_out = int(len(text) * HELD_OUT_FRACTION)
        if num_held_out < context + 1:
            needed = math.ceil((context + 1) / HELD_OUT_FRACTION)
            raise ValueError(
                f"expected at least {needed:,} bytes of text in {name}, got {len(text):,} in {len(names)} files; "
                f"give --data more text, or a smaller --preset"
            )
        tokens = torch.frombuffer(text, dtype=torch.uint8)
        training, held_out = tokens[: len(tokens) - num_held_out], tokens[len(tokens) - num_held_out :]
        return cls(name, len(names), hashlib.sha256(text).hexdigest(), training, held_out)

    @classmethod
    def read_once_per_host(cls, source: Path | None, context: int) -> Self:
        """The same, read by the first rank of each host, and mapped from a file by its others; a collective.

        Raises:
            ValueError: on every rank, that of one.
        """
        everyone: list[Any] = [None] * dist.get_world_size()
        with tempfile.TemporaryDirectory() as folder:
            file, failure = Path(folder) / "text", ""
            if local_rank() == 0:
                try:
                    corpus = cls.read(source, context)
                    torch.save(vars(corpus), file)
                except (OSError, ValueError, RuntimeError) as error:  # the last is torch's, of a full disk
                    failure = str(error)
            dist.all_gather_object(everyone, (file, failure))
            if failures := [failure for _, failure in everyone if failure]:
                raise ValueError(failures[0])
            if local_rank():
                file, _ = everyone[dist.get_rank() - local_rank()]  # ranks of a host follow each other
                corpus = cls(**torch.load(file, mmap=True))
            dist.barrier()  # the file may go: who has mapped it keeps it
        return corpus

    def batch(
        self, seed: int, step: int, rows: range, num_rows: int, context: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rows `rows` of the global batch of `num_rows` that belongs to `(seed, step)`.

        Returns:
            Tokens and targets, each [len(rows), context] int64, on `device`.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.training) - context, (num_rows,), generator=generator)
        return windows(self.training, starts[rows.start : rows.stop], context, device)

    def held_out_batch(self, rows: range, num_rows: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows `rows` of `num_rows` windows spread evenly over the held-out text; shapes as `batch`'s."""
        starts = torch.linspace(0, len(self.held_out) - context - 1, num_rows).long()
        return windows(self.held_out, starts[rows.start : rows.stop], context, device)


def share(rows: range, number: int, of: int) -> range:
    """The part `number` of `of` parts of `rows`, which differ by one row at most."""
    return rows[number * len(rows) // of : (number + 1) * len(rows) // of]


def windows(text: Tensor, starts: Tensor, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cut windows of `context` bytes at `starts` [B], and the bytes that follow each byte of them."""
    cut = text[starts[:, None] + torch.arange(context + 1)].to(device, torch.int64)
    return cut[:, :-1], cut[:, 1:]
