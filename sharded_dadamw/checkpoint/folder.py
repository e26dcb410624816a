"""Folders of checkpoints: where they are, whether one is all there, and how one appears whole or not at all.

    root/step_00000100/             complete: it got this name after everything in it was on the disk
        .metadata  __0_0.distcp ... torch.distributed.checkpoint's files
        fingerprint.json            of the optimizer, if it is one of ours
        manifest.json               what they are: size and checksum of each, and a checksum of itself
    root/.step_00000150.5f0c9a1e    being written, or left behind by a save that died

Checksums are CRC-32: three times as fast as the fastest hash of Python's and sure to notice every flipped bit and
every burst of up to 32. They guard against accidents. What is made up to harm is the business of the readers.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sharded_dadamw.state.fingerprint import FORMULA

MANIFEST = "manifest.json"
FINGERPRINT = "fingerprint.json"
FORMAT = 1

_COMPLETE = re.compile(r"step_(\d{8,})")
_MEANT = re.compile(r"step_\d+")
_UNFINISHED = re.compile(r"\.step_\d{8,}\.[0-9a-f]+")
_BLOCK = 1 << 20
_EXPECTED = "expected a checkpoint of save_checkpoint, a folder of them, or one that is empty or not there yet"


@dataclass(frozen=True, slots=True)
class FileSum:
    """The size of a file in bytes, and the CRC-32 of all of them."""

    size: int
    crc32: int

    def wrong(self, path: Path, *, read: bool) -> str | None:
        """Return what is wrong with a file that should be this one: its size or, where it is read, its bytes."""
        crc = 0
        try:
            if (found := size_of(path)) != self.size:
                return f"{path}: expected {self.size} bytes, got {found}; the file has been damaged"
            with path.open("rb", buffering=0) as file:
                block = bytearray(_BLOCK)
                while read and (size := file.readinto(block)):
                    crc = zlib.crc32(memoryview(block)[:size], crc)
        except (OSError, ValueError) as error:
            return f"{path}: expected {self.size} bytes; the file cannot be read: {error}"
        if read and crc != self.crc32:
            return f"{path}: expected checksum {self.crc32:08x}, got {crc:08x}; the file has been damaged"
        return None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a checkpoint, for people and programs that do not want to read it all.

    Attributes:
        step: The step that it was saved as.
        num_ranks: How many ranks wrote it.
        versions: Of what wrote it: `torch` and `sharded_dadamw`.
        aliases: Names of weights that are tied to each other; each weight is stored under all of them, once.
        param_groups: The optimizer's groups: hyperparameters, and the names of parameters as `params`.
        optimizer: What ``name_of`` calls the optimizer; empty where the manifest does not say.
        fingerprint: ``Fingerprint.as_dict`` of the optimizer, in a file of its own, since earlier versions read
            manifests without it; empty where there is none.
        files: By name, all files but this one.
    """

    step: int
    num_ranks: int
    versions: Mapping[str, str]
    aliases: Sequence[Sequence[str]]
    param_groups: Sequence[Mapping[str, Any]]
    optimizer: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileSum] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it to the disk, into a folder that has no manifest."""
        body: dict[str, Any] = {"format": FORMAT, **json.loads(json.dumps(asdict(self), default=str))}
        if fingerprint := body.pop("fingerprint"):
            text = json.dumps(fingerprint, indent=1).encode()
            (folder / FINGERPRINT).write_bytes(text)
            body["files"][FINGERPRINT] = asdict(FileSum(len(text), zlib.crc32(text)))
            sync(folder / FINGERPRINT)
        with (folder / MANIFEST).open("x") as file:
            json.dump({"checksum": _checksum(body), **body}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read what a checkpoint says that it is.

        Raises:
            ValueError: There is no manifest, it is damaged, of another format, or of another folder; names the file.
        """
        path, name = folder / MANIFEST, folder.resolve().name
        if not path.exists():
            got = f"one without {MANIFEST}" if folder.is_dir() else "no folder"
            raise ValueError(f"{folder}: expected a complete checkpoint, got {got}")
        text = read_file(path)
        try:
            body = json.loads(text)
            is_sound = body.pop("checksum") == _checksum(body)
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"{path}: expected a manifest that matches its own checksum; it has been damaged")
        if body.pop("format") != FORMAT:
            raise ValueError(f"{path}: expected format {FORMAT}; load it with the version that wrote it")
        try:
            files = {name: FileSum(**known) for name, known in body.pop("files").items()}
            manifest = cls(**body, fingerprint=_read_fingerprint(folder) if FINGERPRINT in files else {}, files=files)
        except (TypeError, LookupError, AttributeError) as error:  # of entries that are not known here
            raise ValueError(f"{path}: {error}; load it with the version that wrote it") from error
        if step_of(Path(name)) not in (None, manifest.step):
            raise ValueError(f"{path}: expected the manifest of {name}, got that of step {manifest.step}")
        if any(Path(name).name != name for name in files):
            raise ValueError(f"{path}: expected names of files in the folder, got others")
        return manifest

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder; one that says nothing where it has none, as those of others have not.

        Raises:
            ValueError: As in ``read``.
        """
        return cls.read(folder) if (folder / MANIFEST).exists() else cls(0, 0, {}, [], [])

    def damage(self, folder: Path, part: slice = slice(None)) -> Iterator[str]:
        """Yield what is wrong with the files, a sentence for each: with the sizes of all, and the bytes of a part."""
        to_read = set(sorted(self.files)[part])
        for name, known in self.files.items():
            if wrong := known.wrong(folder / name, read=name in to_read):
                yield wrong


def _read_fingerprint(folder: Path) -> dict[str, Any]:
    """Return what a file says; nothing of an earlier formula, or damaged, of which ``Manifest.damage`` tells."""
    try:
        found = json.loads(read_file(folder / FINGERPRINT))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and found.get("formula") == FORMULA else {}


def size_of(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        ValueError: It cannot be read, or is something else.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path}: expected a file, got something else")
    return found.st_size


def read_file(path: Path) -> bytes:
    """Return the bytes of a file; a ValueError as in ``size_of``: reading a pipe would never end."""
    size_of(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _checksum(body: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or is going to be."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a folder's name; None where it is no checkpoint's."""
    match = _COMPLETE.fullmatch(folder.name)
    return None if match is None else int(match[1])


def is_one(path: Path) -> bool:
    """Return whether a path is that of a checkpoint, be it there or not, and not of a folder of them."""
    return _MEANT.fullmatch(path.name) is not None or (path / MANIFEST).exists()


def folders(root: Path) -> list[Path]:
    """Return everything under ``root`` that has the name of a complete checkpoint, in the order of steps."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None]
    found = [(step, path) for step, path in found if path.is_dir() or path.is_symlink()]  # to where it may be again
    return [path for _, path in sorted(found)]


def root_within(path: Path) -> Path | None:
    """Return a folder in a folder that holds checkpoints, which may be the one that was meant; None without one."""
    return next((entry for entry in sorted(path.iterdir()) if folders(entry)), None)


def found_at(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for, newest last: itself, or those in it, or those of a run in it."""
    if not path.is_dir() or (path / MANIFEST).exists():
        return [path]
    return folders(path) or folders(root_within(path) or path) or [path]


def require_root(path: Path) -> None:
    """Refuse what can hold no checkpoints of ours: they go into a folder that is empty, or is not there yet.

    Raises:
        ValueError: It is something else; says what.
    """
    if not path.exists():
        return
    if not path.is_dir():
        inside = f"; give {path.parent}, the checkpoint that it is in" if (path.parent / MANIFEST).exists() else ""
        raise ValueError(f"{path}: {_EXPECTED}, got a file{inside}")
    if (path / ".metadata").exists():
        raise ValueError(f"{path}: {_EXPECTED}, got one of torch.distributed.checkpoint.save, without {MANIFEST}")
    others = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if others:
        hint = "" if (root := root_within(path)) is None else f"; give {root}"
        raise ValueError(f"{path}: {_EXPECTED}, got a folder with {others[0].name} in it{hint}")


def older(folder: Path) -> list[Path]:
    """Return the checkpoints beside one that are of earlier steps, in the order of steps."""
    return [path for path in folders(folder.parent) if (step_of(path) or 0) < (step_of(folder) or 0)]


def checkpoints(root: str | os.PathLike[str]) -> list[Path]:
    """Return the complete checkpoints under a folder, newest last.

    A checkpoint is complete if its manifest is sound and its files are as long as they were. Their bytes are not read.
    """
    return [folder for folder in folders(Path(root)) if _is_complete(folder)]


def _is_complete(folder: Path) -> bool:
    try:
        return not any(Manifest.read(folder).damage(folder, slice(0)))
    except ValueError:
        return False


def begin(final: Path) -> Path:
    """Make an empty folder for what is to be called ``final``."""
    folder = hidden(final)
    folder.mkdir()
    return folder


def clear(root: Path) -> None:
    """Remove what is unfinished. It gets another name first, so that a save that is still under way there fails."""
    for path in root.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError):
                _remove(path.rename(path.with_name(f"{path.name}{uuid.uuid4().hex[:8]}")))


def publish(folder: Path, final: Path) -> None:
    """Give a folder, in which everything is on the disk, its final name. What had that name is removed."""
    sync(folder)
    discarded = _set_aside(final) if os.path.lexists(final) else None
    folder.rename(final)
    sync(final.parent)
    if discarded is not None:
        _remove(discarded)


def keep(newest: Path, count: int) -> None:
    """Remove checkpoints that are older than ``newest``, so that with it ``count`` are left. Later ones stay."""
    before = [path for path in older(newest) if path.is_dir()]  # and no link to what is not there
    for path in before[: max(0, len(before) - (count - 1))]:
        with contextlib.suppress(OSError):  # the new checkpoint is complete whatever becomes of old ones
            _remove(_set_aside(path))


def _set_aside(folder: Path) -> Path:
    """Take its name from a checkpoint first: one that is half removed must not look like one that is damaged."""
    aside = hidden(folder)
    folder.rename(aside)
    return aside


def _remove(folder: Path) -> None:
    """Remove a folder as far as that can be done; of a link the link alone."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def hidden(path: Path) -> Path:
    """Return a new name beside a path, which no checkpoint has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, or the bytes of a file."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
