"""Folders of checkpoints: where they are, whether one is all there, and how one appears whole or not at all.

    root/step_00000100/             complete: it got this name after everything in it was on the disk
        .metadata  __0_0.distcp ... torch.distributed.checkpoint's files
        manifest.json               what they are: size and checksum of each, and a checksum of itself
    root/.step_00000150.5f0c9a1e    being written, or left behind by a save that died

Checksums are CRC-32: three times as fast as the fastest hash of Python's and sure to notice every flipped bit and
every burst of up to 32. They guard against accidents. What is made up to harm is the business of `checkpoint.files`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
FORMAT = 1

IS_DECOUPLED = {"DecoupledAdamW": True, "ShardedDecoupledAdamW": True, "AdamW": False}
"""Optimizers, ours, Composer's and torch's, and whether their weight decay is free of lr."""

_COMPLETE = re.compile(r"step_(\d{8,})")
_UNFINISHED = re.compile(r"\.step_\d{8,}\.[0-9a-f]+")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileSum:
    """What a file is known by.

    Attributes:
        size: In bytes.
        crc32: Of all of them.
    """

    size: int
    crc32: int

    def wrong_size(self, path: Path) -> str | None:
        """What is wrong with the size of a file that should be this one; None if nothing is."""
        try:
            found = path.stat()
        except OSError as error:
            return f"{path}: expected {self.size} bytes; the file cannot be read: {error}"
        if not stat.S_ISREG(found.st_mode):  # of a pipe, say, reading would never end
            return f"{path}: expected a file, got something else"
        size = found.st_size
        return (
            None if size == self.size else f"{path}: expected {self.size} bytes, got {size}; the file has been damaged"
        )

    def wrong_sum(self, path: Path) -> str | None:
        """What is wrong with the bytes of a file that should be this one, all of which are read; None if nothing is."""
        crc = 0
        try:
            with path.open("rb", buffering=0) as file:
                block = bytearray(_BLOCK)
                while size := file.readinto(block):
                    crc = zlib.crc32(memoryview(block)[:size], crc)
        except OSError as error:
            return f"{path}: cannot be read: {error}"
        if crc == self.crc32:
            return None
        return f"{path}: expected checksum {self.crc32:08x}, got {crc:08x}; the file has been damaged"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds, for people and programs that do not want to read it all.

    Attributes:
        step: Which one.
        num_ranks: How many ranks wrote it.
        versions: Of what wrote it: `torch` and `sharded_dadamw`.
        aliases: Names of weights that are tied to each other; each weight is stored under all of them, once.
        param_groups: The optimizer's groups: hyperparameters, and the names of parameters as `params`.
        optimizer: Which one of ``IS_DECOUPLED`` the optimizer was or descended from; else its class; empty where the
            manifest does not say.
        files: By name, all files but this one.
    """

    step: int
    num_ranks: int
    versions: Mapping[str, str]
    aliases: Sequence[Sequence[str]]
    param_groups: Sequence[Mapping[str, Any]]
    optimizer: str = ""
    files: Mapping[str, FileSum] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it to the disk, into a folder that has no manifest."""
        body: dict[str, Any] = {"format": FORMAT, **json.loads(json.dumps(asdict(self), default=str))}
        with (folder / FILE_NAME).open("x") as file:
            json.dump({"checksum": _checksum(body), **body}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """What a checkpoint says that it is.

        Raises:
            ValueError: There is no manifest, it is damaged, of another format, or of another folder; names the file.
        """
        path = folder / FILE_NAME
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: expected a file, got something else")
        try:
            body = json.loads(path.read_bytes())
            checksum = body.pop("checksum")
            is_sound = checksum == _checksum(body)
        except FileNotFoundError:
            raise ValueError(f"{folder}: expected a complete checkpoint, got one without {FILE_NAME}") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"{path}: expected a manifest that matches its own checksum; it has been damaged")
        if body.pop("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}; load it with the version that wrote it")
        name = folder.resolve().name
        if _COMPLETE.fullmatch(name) and step_of(Path(name)) != body["step"]:
            raise ValueError(f"{path}: expected the manifest of {name}, got that of step {body['step']}")
        if any(Path(name).name != name for name in body["files"]):
            raise ValueError(f"{path}: expected names of files in the folder, got others")
        try:
            return cls(**{**body, "files": {name: FileSum(**known) for name, known in body["files"].items()}})
        except TypeError as error:  # of entries that are not known here
            raise ValueError(f"{path}: {error}; load it with the version that wrote it") from error

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """The same, or None where a folder has no manifest, as those of others have not.

        Raises:
            ValueError: As in :meth:`read`.
        """
        return cls.read(folder) if (folder / FILE_NAME).exists() else None

    def require_sizes(self, folder: Path) -> None:
        """Look whether all files are there and as long as they were.

        Raises:
            ValueError: One is not; names it.
        """
        for name, known in self.files.items():
            if wrong := known.wrong_size(folder / name):
                raise ValueError(wrong)

    def require_sums(self, folder: Path, *, part: int = 0, num_parts: int = 1) -> None:
        """Read every ``num_parts``-th file from the ``part``-th on and compare its checksum.

        Raises:
            ValueError: One differs; names the file.
        """
        for name in sorted(self.files)[part::num_parts]:
            if wrong := self.files[name].wrong_sum(folder / name):
                raise ValueError(wrong)

    def damage(self, folder: Path) -> list[str]:
        """What is wrong with its files, a sentence for each; all of them are read."""
        pairs = [(known, folder / name) for name, known in self.files.items()]
        return [wrong for known, path in pairs if (wrong := known.wrong_size(path) or known.wrong_sum(path))]


def _checksum(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or is going to be."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in a folder's name, or None where it is no checkpoint's."""
    match = _COMPLETE.fullmatch(folder.name)
    return None if match is None else int(match[1])


def folders(root: Path) -> list[Path]:
    """Everything under ``root`` that has the name of a complete checkpoint, in the order of steps."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def newest(path: Path) -> Path:
    """Of a root of checkpoints the newest, be it damaged or not; any other path as it is."""
    return (folders(path) or [path])[-1]


def is_complete(folder: Path) -> bool:
    """Whether the manifest is sound and all files are there, as long as they were. Their bytes are not read."""
    try:
        Manifest.read(folder).require_sizes(folder)
    except ValueError:
        return False
    return True


def checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints under a folder, newest last. Their files are there and long enough; nothing is read."""
    return [folder for folder in folders(Path(root)) if is_complete(folder)]


def begin(root: Path, step: int) -> Path:
    """Make an empty folder for a checkpoint to be, after what dead saves have left behind is cleared away."""
    root.mkdir(parents=True, exist_ok=True)
    clear(root)
    return begin_beside(folder_of(root, step))


def begin_beside(final: Path) -> Path:
    """Make an empty folder for what is to be called ``final``."""
    folder = _hidden(final)
    folder.mkdir()
    return folder


def clear(root: Path) -> None:
    """Remove what is unfinished. No save may be under way."""
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            _remove(path)


def publish(folder: Path, final: Path) -> None:
    """Give a folder, in which everything is on the disk, its final name. What had that name is removed."""
    sync(folder)
    discarded = _set_aside(final) if final.exists() else None
    folder.rename(final)
    sync(final.parent)
    if discarded is not None:
        _remove(discarded)


def keep(root: Path, newest: Path, count: int) -> None:
    """Remove older checkpoints than ``newest``, so that with it ``count`` are left. Later ones stay."""
    older = [path for path in folders(root) if (step_of(path) or 0) < (step_of(newest) or 0)]
    for path in older[: max(0, len(older) - (count - 1))]:
        with contextlib.suppress(OSError):  # the new checkpoint is complete whatever becomes of old ones
            _remove(_set_aside(path))


def _set_aside(folder: Path) -> Path:
    """Take its name from a checkpoint first: one that is half removed must not look like one that is damaged."""
    aside = _hidden(folder)
    folder.rename(aside)
    return aside


def _remove(folder: Path) -> None:
    """As far as that can be done; of a link the link alone."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
