"""The entries of a folder of torch.distributed.checkpoint, read without running anything."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import find_state_dict_object

from sharded_dadamw.checkpoint.folder import Manifest, size_of
from sharded_dadamw.checkpoint.metadata import read_metadata
from sharded_dadamw.checkpoint.pickles import load_torch
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.update.precision import holds


class Entries:
    """What a folder holds, by where it stood in the nested state dict that was saved.

    Attributes:
        folder: The folder.
        manifest: What it says that it is.
        metadata: What entries it has.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Read the metadata of a folder; a ValueError if they are damaged, hold more than data, or miss a file."""
        self.folder, self.manifest = folder, manifest
        self.metadata = read_metadata(folder, manifest)
        names = {info.relative_path for info in self.metadata.storage_data.values()}
        self._num_bytes = sum(size_of(folder / name) for name in names)
        self._tree = _tree_of(self.metadata, folder)

    def under(self, *path: Any) -> dict[Any, Any]:
        """Return what stands under a path: entries' flat names, or tables of them."""
        node = self._tree
        for key in path:
            node = node.get(key, {})
        return node

    def target(self, entry: str, live: Tensor) -> Tensor:
        """Make room for an entry in host memory, like a live tensor, if it fits and would not be rounded."""
        known = self.metadata.state_dict_metadata[entry]
        size = live.size()  # the shape of an FSDP1 shard is its own
        expected = f"{live.dtype} {list(size)}"
        if not isinstance(known, TensorStorageMetadata):
            raise ValueError(f"{entry}: expected a tensor {expected}, got something else in {self.folder}")
        dtype = known.properties.dtype
        if known.size != size or not holds(live.dtype, dtype):
            raise ValueError(f"{entry}: expected {expected}, got {dtype} {list(known.size)} in {self.folder}")
        if isinstance(live, FragmentTensor):
            return live  # what is read goes into memory of its own
        if isinstance(live, ShardedTensor):
            return copy.deepcopy(live)
        return torch.empty_like(live) if live.device.type == "cpu" else live.detach().to("cpu")

    def dtype(self, entry: str) -> torch.dtype | None:
        """Return in what an entry is; None where it is no tensor."""
        known = self.metadata.state_dict_metadata[entry]
        return known.properties.dtype if isinstance(known, TensorStorageMetadata) else None

    def whole(self, entry: str) -> Tensor | None:
        """Make room for all of an entry in host memory, if it can be in the files; None where it is no tensor."""
        known = self.metadata.state_dict_metadata[entry]
        if not isinstance(known, TensorStorageMetadata):
            return None
        num_bytes = known.size.numel() * known.properties.dtype.itemsize
        if num_bytes > self._num_bytes:
            raise ValueError(
                f"{self.folder}, {entry}: expected a tensor that is in the files, got one of {num_bytes} bytes"
            )
        return torch.empty(known.size, dtype=known.properties.dtype)

    def wholes(self, node: Any) -> dict[str, Any]:
        """Make room for all entries at or below what ``under`` returned; by flat name."""
        if isinstance(node, str):
            return {node: self.whole(node)}
        return {entry: value for item in node.values() for entry, value in self.wholes(item).items()}

    def read(self, into: dict[str, Any], *, placeholders: bool = False) -> None:
        """Read entries, of tensors the parts that this rank needs. Not collective.

        Args:
            into: By flat name: a tensor or DTensor of the entry's shape, overwritten in place, or replaced where one
                chunk is all of it; or anything where the entry is no tensor, replaced.
            placeholders: Whether what is neither tensor nor plain data is a `Placeholder`, and not a ValueError, as is
                what cannot be read.
        """
        by_file: dict[str, list[ReadItem]] = {}
        for item in create_default_local_load_plan(into, self.metadata).items:
            index = item.storage_index
            if index not in self.metadata.storage_data:
                raise ValueError(f"{self.folder}: {index.fqn}: expected to be told in which file it lies, got nothing")
            by_file.setdefault(self.metadata.storage_data[index].relative_path, []).append(item)
        for name, items in by_file.items():
            with (self.folder / name).open("rb") as file:
                for item in items:
                    self._read(item, file, into, placeholders)

    def _read(self, item: ReadItem, file: IO[bytes], into: dict[str, Any], placeholders: bool) -> None:
        """Read a chunk of a tensor, or a value, each of which is a small file of `torch.save` inside of a file."""
        index = item.storage_index
        info, known = self.metadata.storage_data[index], self.metadata.state_dict_metadata[index.fqn]
        where = f"{self.folder}: an entry cannot be read: {index.fqn} in {info.relative_path}"
        try:
            value = load_torch(_part_of(file, info.offset, info.length), placeholders=placeholders)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(known, TensorStorageMetadata):
            into[index.fqn] = value
            return
        sizes = known.chunks[index.index or 0].sizes
        if not isinstance(value, Tensor) or value.shape != sizes or value.dtype != known.properties.dtype:
            raise ValueError(f"{where}: expected a tensor of {list(sizes)} in a chunk, got another")
        target, held = find_state_dict_object(into, item.dest_index).detach(), into[index.fqn]
        is_whole = value.dtype is target.dtype and value.shape == target.shape == item.lengths
        if is_whole and isinstance(held, FragmentTensor) and value.numel() == held.fragment.numel():
            into[index.fqn] = held.holding(held.fragment, value.reshape(-1))
        elif is_whole and type(held) is Tensor:
            into[index.fqn] = value
        else:
            part = narrow_tensor_by_index(target, item.dest_offsets, item.lengths)
            part.copy_(narrow_tensor_by_index(value, item.storage_offsets, item.lengths))


def _part_of(file: IO[bytes], start: int, length: int) -> IO[bytes]:
    if length > 1 << 20:
        return cast(IO[bytes], _Slice(file, start, length))
    file.seek(start)
    return io.BytesIO(file.read(length))  # of which torch asks for a few bytes at a time


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        size = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])  # type: ignore[attr-defined]
        self._at += size
        return int(size)


def _tree_of(metadata: Metadata, folder: Path) -> dict[Any, Any]:
    """Return the flat names of all entries by the keys that led to them: as dicts in dicts."""
    tree: dict[Any, Any] = {}
    for entry in metadata.state_dict_metadata:
        path, node = metadata.planner_data.get(entry, (entry,)), tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if isinstance(node, str):
                break
        if isinstance(node, str) or path[-1] in node:
            raise ValueError(f"{folder}: expected entries apart from each other, got another one where {entry} is")
        node[path[-1]] = entry
    return tree


def nested(node: Any, values: Mapping[str, Any]) -> Any:
    """Return the values of the entries in a part of a tree; what has 0, 1, 2 and so on for keys is a list."""
    if isinstance(node, str):
        return values[node]
    if node and node.keys() == set(range(len(node))):
        return [nested(node[number], values) for number in range(len(node))]
    return {key: nested(item, values) for key, item in node.items()}
