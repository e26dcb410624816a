"""Folders of torch.distributed.checkpoint as one process reads and writes them, without running anything in them.

`.metadata` says for every key what it is, and for every chunk of a tensor where it lies: in which file, from which byte
on. It is a pickle of a handful of dataclasses, and every chunk a file of `torch.save` in small; see `safe_pickle`, and
`checkpoint.dcp`, which serves ranks that read only their parts.
"""

from __future__ import annotations

import io
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sharded_dadamw.checkpoint.dcp import Writer, versions, write
from sharded_dadamw.checkpoint.folder import Manifest, begin_beside
from sharded_dadamw.checkpoint.metadata import METADATA, read_metadata
from sharded_dadamw.checkpoint.safe_pickle import load_torch


def is_dcp_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is one of torch.distributed.checkpoint's."""
    return (Path(path) / METADATA).is_file()


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
        covered = sum(chunk.sizes.numel() for chunk in entry.chunks)
        if covered != entry.size.numel():
            raise ValueError(f"{path}, {key}: expected {entry.size.numel()} elements in chunks, got {covered}")
        try:
            whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        except RuntimeError as error:  # of more elements than there is memory
            raise ValueError(f"{path}, {key}: {error}") from error
        for chunk in entry.chunks:
            part = _read_item(path, found, MetadataIndex(key, chunk.offsets), placeholders=False)
            if not isinstance(part, Tensor) or part.shape != chunk.sizes or part.dtype != whole.dtype:
                raise ValueError(f"{path}, {key}: expected a chunk of {list(chunk.sizes)}, got {reprlib.repr(part)}")
            box = tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[box].copy_(part)
        values[key] = whole
    return values


def read_folder(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything in a folder, nested as it was when it was saved.

    Args:
        path: The folder.

    Returns:
        Dicts and lists of values; whole tensors, on the CPU. What is neither tensor nor plain data is a `Placeholder`.

    Raises:
        ValueError: As in `checkpoint.metadata.read_metadata` and `read_values`.
    """
    found = read_metadata(Path(path))
    values = read_values(path, found, list(found.state_dict_metadata))
    return nested({path_of(found, key): value for key, value in values.items()})


def path_of(found: Metadata, key: str) -> tuple[str | int, ...]:
    """Where a value stood before keys were joined with dots; the key itself where nobody wrote that down."""
    return tuple(found.planner_data.get(key, (key,)))


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


def write_folder(
    path: str | os.PathLike[str], contents: dict[str, Any], aliases: Sequence[Sequence[str]], step: int
) -> None:
    """Save from one process into a folder that stock torch.distributed.checkpoint loads, and `load_checkpoint` too.

    Args:
        path: The folder, which appears whole or not at all; those above it are made.
        contents: The form in the middle (see `interchange`) under `optimizer`, and perhaps weights under `model`.
        aliases: Names of weights that are tied to each other, of which `contents` have the first: all get it.
        step: Which one to call it in the manifest.

    Raises:
        ValueError: If there is something in the folder already.
        OSError: If it cannot be written.
    """
    final = Path(path).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ValueError(f"expected a folder that is new or empty, got {path}")
    final.parent.mkdir(parents=True, exist_ok=True)
    groups = contents["optimizer"]["param_groups"]
    manifest = Manifest(step, 1, versions(), aliases, groups, optimizer="DecoupledAdamW")
    write(contents, Writer(begin_beside(final), final, manifest, None), None, tidies_up=True)


def _read_item(path: str | os.PathLike[str], found: Metadata, index: MetadataIndex, *, placeholders: bool) -> object:
    """One chunk or value, as it was saved."""
    info = found.storage_data.get(index)
    if not isinstance(info, _StorageInfo):
        raise ValueError(f"{path}, {index.fqn}: expected to be told where it lies, got {reprlib.repr(info)}")
    where = f"{path}, {index.fqn} in {info.relative_path}"
    file_path = Path(path) / info.relative_path
    if file_path.exists() and not file_path.is_file():  # of a pipe, say, reading would never end
        raise ValueError(f"{where}: expected a file, got something else")
    try:
        with file_path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(min(info.length, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise ValueError(f"{path}, {index.fqn}: {info.relative_path} cannot be read: {error}") from error
    try:
        value = load_torch(io.BytesIO(data), placeholders=placeholders)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if isinstance(value, Tensor) and value.nbytes > len(data):  # one element may stand for any number of them
        raise ValueError(f"{where}: expected a tensor that is in the file, got one of {value.nbytes} bytes")
    return value
