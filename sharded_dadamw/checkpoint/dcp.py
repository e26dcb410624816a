"""Checkpoints written in torch.distributed.checkpoint's format, whole or not at all; torch's own `load` reads them.

Added are checksums, taken from the very bytes on their way to a file, a manifest, and the new folder's name as the last
act.
"""

from __future__ import annotations

import io
import shutil
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import sharded_dadamw
from sharded_dadamw.checkpoint.folder import FileSum, Manifest, keep, publish
from sharded_dadamw.checkpoint.metadata import METADATA
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import Collectives

_SUMS = MetadataIndex("checksums of files")  # on its way to the coordinator among the results, and never written


def versions() -> dict[str, str]:
    """Return the versions of what writes a checkpoint."""
    return {"torch": torch.__version__, "sharded_dadamw": sharded_dadamw.__version__}


class _SummedFile(io.FileIO):
    """A new file that knows the checksum of what was written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb")
        self.known = FileSum(0, 0)

    def write(self, data: Any) -> int:
        """Write what fits, which may be less than all of it."""
        written = super().write(data)
        crc = zlib.crc32(memoryview(data).cast("B")[:written], self.known.crc32)
        self.known = FileSum(self.known.size + written, crc)
        return written


class _SummedFiles(FileSystem):
    """Files whose checksums are known once they are written."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        """Open a file to write, whose checksum ``sums`` has after it is closed."""
        file = _SummedFile(Path(path))
        with io.BufferedWriter(file, 1 << 20) as stream:
            yield stream
        self.sums[Path(path).name.removesuffix(".tmp")] = file.known  # torch gives metadata their name later


class _Writer(FileSystemWriter):
    """Writes one checkpoint into a folder of its own; after all ranks have, the coordinator gives that its name."""

    def __init__(self, folder: Path, final: Path, manifest: Manifest, keep_last: int | None) -> None:
        super().__init__(folder)
        self.fs = self._files = _SummedFiles()
        self._folder = folder
        self._final = final
        self._manifest = manifest
        self._keep_last = keep_last

    def storage_meta(self) -> StorageMeta:
        """Return the checkpoint's name: a path would be of this machine, and its class of this Python."""
        return StorageMeta(checkpoint_id=self._final.name, save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Check that this rank sees the folder that the coordinator made."""
        if not self._folder.is_dir():
            raise FileNotFoundError(
                f"expected to see {self._folder}, which rank 0 has made; checkpoints need storage that all ranks share"
            )
        return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, and add their checksums to the results."""
        results = super().write_data(plan, planner).value()
        done: Future[list[WriteResult]] = Future()
        done.set_result([*results, WriteResult(_SUMS, 0, self._files.sums)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write metadata and manifest, publish the folder, and remove old checkpoints. On the coordinator alone."""
        items = [item for result in results for item in result]
        written = [item for item in items if item.index != _SUMS]
        others = self._enter_tied(metadata)
        for item in list(written):
            for name in others.get(item.index.fqn, ()):
                written.append(replace(item, index=replace(item.index, fqn=name)))
        super().finish(metadata, [written])
        files = {METADATA: self._files.sums[METADATA]}
        for item in items:
            if item.index == _SUMS:
                files |= item.storage_data
        replace(self._manifest, files=files).write(self._folder)
        publish(self._folder, self._final)
        if self._keep_last is not None:
            keep(self._final, self._keep_last)

    def _enter_tied(self, metadata: Metadata) -> dict[str, list[str]]:
        """Enter tied weights, and their state, into ``metadata`` under their other names; returns these by entry."""
        others = {names[0]: names[1:] for names in self._manifest.aliases}
        also: dict[str, list[str]] = {}
        for entry, path in list(metadata.planner_data.items()):
            at = {"model": 1, "optimizer": 2}.get(path[0])
            if at is None or path[:2] == ("optimizer", "param_groups"):
                continue
            for name in others.get(path[at], []):
                other = (*path[:at], name, *path[at + 1 :])
                key = ".".join(map(str, other))
                also.setdefault(entry, []).append(key)
                metadata.planner_data[key] = other
                metadata.state_dict_metadata[key] = metadata.state_dict_metadata[entry]
        return also


def write(
    state: dict[str, Any],
    folder: Path,
    final: Path,
    manifest: Manifest,
    ranks: Collectives,
    *,
    keep_last: int | None = None,
) -> None:
    """Write nested state into ``folder``, which is called ``final`` once everything is on the disk. Collective.

    The folder is empty, and seen by every rank; it is gone, or has become the checkpoint, when this returns.
    ``manifest`` has all but the files. ``keep_last`` checkpoints are left, this one included; None leaves all. Raises
    an OSError if it could not be written and a RuntimeError if it failed otherwise, on every rank.
    """
    enter("save_checkpoint()")  # here, too, in the thread that writes
    group = ranks.group if ranks.num_ranks > 1 else None
    writer = _Writer(folder, final, manifest, keep_last)
    try:
        with ranks.explaining():  # torch's public `save` is this and a warning where torch.distributed is not in use
            _save_state_dict(state, writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
        message = f"{final} was not written; rank {rank}: {failure}; checkpoints from before are as they were"
        if isinstance(failure, FileNotFoundError):
            message += f"; another job may save into {final.parent}, and two must not"
        if not isinstance(failure, OSError):
            raise RuntimeError(message) from error
        raise (OSError(message) if failure.errno is None else OSError(failure.errno, message)) from error
    finally:
        if group is None or group.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
