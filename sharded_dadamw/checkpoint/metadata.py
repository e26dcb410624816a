"""The `.metadata` file of torch.distributed.checkpoint, read without running anything in it.

It says for every entry what it is, and for every chunk of a tensor where it lies: in which file, from which byte on.
It is a pickle, which is read by an unpickler that knows torch's data classes alone.
"""

import io
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from sharded_dadamw.checkpoint.folder import Manifest, read_file
from sharded_dadamw.checkpoint.pickles import DTYPES, Unpickler

METADATA = ".metadata"
_MOST_KEYS = 64  # in the path of an entry; whoever follows a path recurses once for each

_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
    _StorageInfo,
)


def _strided(name: object) -> None:
    if name != "torch.strided":
        raise ValueError("expected strided tensors, got others")


_KNOWN: dict[str, Any] = {
    **{f"{known.__module__}.{known.__qualname__}": known for known in (*_CLASSES, TensorProperties)},
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": lambda _: None,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _strided,
    **DTYPES,
    **{f"pathlib{where}.PosixPath": PurePosixPath for where in ("", "._local")},  # the folder, as stock torch saves it
    **{f"pathlib{where}.WindowsPath": PureWindowsPath for where in ("", "._local")},
}

_FILLS: dict[type, Any] = {
    **dict.fromkeys(_CLASSES, lambda target, state: target.__dict__.update(**state)),
    TensorProperties: lambda target, state: setattr(target, "dtype", state[0]),  # all else is as always
}


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """Read which entries a folder of torch.distributed.checkpoint has: names, shapes and dtypes, and where they lie.

    It is a ValueError if the file is damaged, holds more than data, or points to files outside of the folder or, where
    the manifest has files, to others.
    """
    path = folder / METADATA
    if not path.exists():
        raise ValueError(f"{folder}: expected a folder of torch.distributed.checkpoint, got one without {METADATA}")
    file = io.BytesIO(read_file(path))
    try:
        metadata = Unpickler(file, table=_KNOWN, fills=_FILLS).load()
    except Exception as error:  # a pickle made up to harm ends in any of them
        raise ValueError(f"{path}: expected the metadata of a checkpoint, got what cannot be read: {error}") from error
    try:
        return _sound(metadata, manifest)
    except (ValueError, TypeError, AttributeError) as error:  # attributes are what the file makes them
        raise ValueError(f"{path}: {error}") from error


def _sound(metadata: object, manifest: Manifest) -> Metadata:
    """Return metadata as they are, if torch could have made them, or raise one of three errors."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"expected the metadata of a checkpoint, got {type(metadata).__name__}")
    if not manifest.files and metadata.planner_data is None:  # of planners that do not flatten
        metadata.planner_data = {}
    for entries in (metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data):
        if not isinstance(entries, dict):
            raise ValueError(f"expected tables of entries, got {type(entries).__name__}")
    for entry, known in metadata.state_dict_metadata.items():
        _require_sound_entry(entry, known, metadata.planner_data.get(entry, (entry,)))
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not isinstance(info, _StorageInfo) or not isinstance(name, str) or info.transform_descriptors:
            raise ValueError("expected entries to lie in files as they are, got others")
        if name not in manifest.files if manifest.files else name in ("", "..") or Path(name).name != name:
            raise ValueError(f"expected entries in the files of the checkpoint, got one in {name!r}")
        if not 0 <= info.offset <= info.offset + info.length:
            raise ValueError(
                f"expected a place in a file, got {name} from byte {info.offset} to {info.offset + info.length}"
            )
    return metadata


def _require_sound_entry(entry: object, known: object, path: object) -> None:
    if not isinstance(entry, str) or not isinstance(path, tuple | list) or not 0 < len(path) <= _MOST_KEYS:
        raise ValueError(f"expected the keys that lead to each entry, got {type(path).__name__}")
    if not all(isinstance(key, str | int) for key in path):
        raise ValueError(f"{entry}: expected keys that are texts or numbers, got others")
    if isinstance(known, BytesStorageMetadata):
        return
    if not isinstance(known, TensorStorageMetadata) or not isinstance(known.properties.dtype, torch.dtype):
        raise ValueError(f"{entry}: expected what a tensor is like, got {type(known).__name__}")
    if not isinstance(known.size, torch.Size):
        raise ValueError(f"{entry}: expected a shape, got {type(known.size).__name__}")
    for chunk in known.chunks:
        if not isinstance(chunk.offsets, torch.Size) or not isinstance(chunk.sizes, torch.Size):
            raise ValueError(f"{entry}: expected chunks, got others")
        reach = zip(chunk.offsets, chunk.sizes, known.size, strict=True)
        if not all(0 <= first <= first + length <= size for first, length, size in reach):
            raise ValueError(f"{entry}: a chunk reaches beyond its tensor")
    expected, held = known.size.numel(), sum(chunk.sizes.numel() for chunk in known.chunks)
    if held != expected:
        raise ValueError(f"{entry}: expected {expected} elements in chunks, got {held}")
