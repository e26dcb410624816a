"""Folders of torch.distributed.checkpoint as one process reads and writes them, without running anything in them.

`.metadata` says for every key what it is, and for every chunk of a tensor where it lies: in which file, from which byte
on. It is a pickle of a handful of dataclasses, and every chunk a file of `torch.save` in small; see `safe_pickle`.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from sharded_dadamw.safe_pickle import load, load_torch


def _layout(name: object) -> torch.layout:
    """How a layout is pickled; anything but the usual one has no chunks."""
    if name != "torch.strided":
        raise ValueError(f"expected strided tensors, got {name}")
    return torch.strided


_METADATA: dict[str, object] = {
    **{
        f"torch.distributed.checkpoint.metadata.{kind.__qualname__}": kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
    "torch.serialization._get_layout": _layout,
    "pathlib.PosixPath": Path,
    "pathlib.WindowsPath": Path,
}


def is_dcp_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint's."""
    return (Path(path) / ".metadata").is_file()


def newest(path: str | os.PathLike[str]) -> Path:
    """Of a folder with one folder of ours per step the newest; any other path as it is."""
    steps = [found for found in Path(path).glob("step_*") if found.name[5:].isdigit() and is_dcp_folder(found)]
    return max(steps, key=lambda found: int(found.name[5:]), default=Path(path))


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What one of our checkpoints says of itself; empty for any other folder.

    Args:
        path: The folder.

    Raises:
        ValueError: If it cannot be read.
    """
    file = Path(path) / "manifest.json"
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON: {error}; the file has been damaged") from error
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What a folder holds, and where.

    Args:
        path: The folder.

    Raises:
        ValueError: If it is no such folder, or its `.metadata` is cut short or names anything but what belongs there.
    """
    if not is_dcp_folder(path):
        raise ValueError(f"expected a folder of torch.distributed.checkpoint, got {path}, which has no .metadata")
    with (Path(path) / ".metadata").open("rb") as file:
        try:
            found = load(file, allowed=_METADATA)
        except ValueError as error:
            raise ValueError(f"{path}, .metadata: {error}") from error.__cause__
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, Mapping):
        raise ValueError(f"{path}, .metadata: expected what torch.distributed.checkpoint writes, got something else")
    return found


def read_values(path: str | os.PathLike[str], found: Metadata, keys: Iterator[str] | list[str]) -> dict[str, Any]:
    """The values of some keys, whole tensors on the CPU; chunks are read one after the other.

    Args:
        path: The folder.
        found: Its metadata.
        keys: Which of those in `found.state_dict_metadata` to read.

    Raises:
        ValueError: If a file is missing or cut short, a chunk is not where it should be, or holds more than data.
    """
    values: dict[str, Any] = {}
    for key in keys:
        entry = found.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):
            values[key] = _read_item(path, found, MetadataIndex(key), placeholders=True)
            continue
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            part = _read_item(path, found, MetadataIndex(key, chunk.offsets), placeholders=False)
            if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != whole.dtype:
                raise ValueError(f"{path}, {key}: expected a chunk of {list(chunk.sizes)}, got {part!r:.80}")
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box].copy_(part)
            covered += part.numel()
        if covered != whole.numel():
            raise ValueError(f"{path}, {key}: expected {whole.numel()} elements in chunks, got {covered}")
        values[key] = whole
    return values


def read_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a folder, nested as it was when it was saved.

    Args:
        path: The folder.

    Returns:
        Dicts and lists of values; whole tensors, on the CPU. What is neither tensor nor plain data is a `Placeholder`.

    Raises:
        ValueError: As in `read_metadata` and `read_values`.
    """
    found = read_metadata(path)
    values = read_values(path, found, list(found.state_dict_metadata))
    return nested({path_of(found, key): value for key, value in values.items()})


def path_of(found: Metadata, key: str) -> tuple[str | int, ...]:
    """Where a value stood before keys were joined with dots; the key itself where nobody wrote that down."""
    paths = found.planner_data
    return tuple(paths[key]) if isinstance(paths, Mapping) and key in paths else (key,)


def nested(values: Mapping[tuple[str | int, ...], Any]) -> dict[str, Any]:
    """Values by path as dicts in dicts, and lists where paths go on with 0, 1, 2 and so on.

    Args:
        values: Values by path; paths that begin alike belong together.
    """
    below: dict[Any, dict[tuple[str | int, ...], Any]] = {}
    result: dict[Any, Any] = {}
    for (first, *rest), value in values.items():
        if rest:
            below.setdefault(first, {})[tuple(rest)] = value
        else:
            result[first] = value
    for key, inner in below.items():
        inside = nested(inner)
        numbers: list[Any] = list(range(len(inside)))
        result[key] = [inside[number] for number in numbers] if set(inside) == set(numbers) else inside
    return result


def write_folder(path: str | os.PathLike[str], contents: dict[str, Any]) -> None:
    """Save from one process into a folder that stock torch.distributed.checkpoint loads.

    Args:
        path: The folder, made if it is not there.
        contents: State dicts by name.

    Raises:
        ValueError: If there is something in the folder already.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"expected a folder that is new or empty, got {folder}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        save(contents, checkpoint_id=folder, no_dist=True)


def _read_item(path: str | os.PathLike[str], found: Metadata, index: MetadataIndex, *, placeholders: bool) -> object:
    """One chunk or value, as it was saved."""
    info = found.storage_data.get(index)
    if not isinstance(info, filesystem._StorageInfo):
        raise ValueError(f"{path}, {index.fqn}: expected to be told where it lies, got {info!r}")
    if info.transform_descriptors:
        raise ValueError(f"{path}, {index.fqn}: expected plain bytes, got bytes under {info.transform_descriptors}")
    if os.path.basename(info.relative_path) != info.relative_path:
        raise ValueError(f"{path}, {index.fqn}: expected a file in the folder, got {info.relative_path}")
    try:
        with (Path(path) / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
    except OSError as error:
        raise ValueError(f"{path}, {index.fqn}: {info.relative_path} cannot be read: {error}") from error
    try:
        return load_torch(io.BytesIO(data), placeholders=placeholders)
    except ValueError as error:
        raise ValueError(f"{path}, {index.fqn} in {info.relative_path}: {error}") from error
