"""The `.metadata` file of torch.distributed.checkpoint, read without running anything in it.

It says for every entry what it is, and for every chunk of a tensor where it lies: in which file, from which byte on.
It is a pickle, and a pickle is a program, so it is read by an unpickler that knows torch's data classes alone.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from sharded_dadamw.checkpoint.folder import Manifest

METADATA = ".metadata"
_MOST_KEYS = 64  # in the path of an entry; whoever follows a path recurses once for each

_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
)


def _layout(name: object) -> torch.layout:
    if name != "torch.strided":
        raise ValueError("expected strided tensors, got others")
    return torch.strided


def _memory_format(number: object) -> _MEM_FORMAT_ENCODING:
    if type(number) is not int:
        raise ValueError("expected the number of a memory format, got something else")
    return _MEM_FORMAT_ENCODING(number)


_KNOWN: dict[str, Any] = {
    **{f"{known.__module__}.{known.__qualname__}": known for known in _CLASSES},
    f"{_MEM_FORMAT_ENCODING.__module__}.{_MEM_FORMAT_ENCODING.__qualname__}": _memory_format,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": _layout,
    **{f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
    **{f"pathlib{where}.PosixPath": PurePosixPath for where in ("", "._local")},  # the folder, as stock torch saves it
    **{f"pathlib{where}.WindowsPath": PureWindowsPath for where in ("", "._local")},
}
"""What a pickle may name. Nothing here hashes what it is given, or puts it into a message; see the unpickler."""

_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.APPEND, pickle.APPENDS),
)

_PythonsUnpickler: Any = pickle._Unpickler  # the one in C makes room for as many objects as a pickle says it has


class _Unpickler(_PythonsUnpickler):  # type: ignore[misc]
    """Reads torch's data classes, and ends in a time that the size of the file bounds.

    Of tuples nested 60 deep, each twice in the next, a hash or a text takes 2**60 steps. So there are no instructions
    that torch does not write, keys are looked at before they are hashed, and so is what a message may hold.
    """

    dispatch: ClassVar[dict[int, Any]] = {code[0]: _PythonsUnpickler.dispatch[code[0]] for code in _OPCODES}

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for, if the table has it."""
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no data")
        return _KNOWN[f"{module}.{name}"]

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is TensorProperties and type(state) is tuple and type(state[3]) is _MEM_FORMAT_ENCODING:
            target.__setstate__(state)
        elif type(target) in _CLASSES and type(state) is dict:
            vars(target).update(state)
        else:
            raise pickle.UnpicklingError(f"it sets up {type(target).__name__}, which is no data")

    def _set_item(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _set_items(self) -> None:
        self._update(self.pop_mark())

    def _update(self, items: list[Any]) -> None:
        for key in items[::2]:
            is_place = type(key) is MetadataIndex and type(key.fqn) is str and isinstance(key.offset, torch.Size | None)
            if type(key) is not str and not is_place:
                raise pickle.UnpicklingError(f"it has {type(key).__name__} as a key")
        dict.update(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    dispatch |= {pickle.BUILD[0]: _build, pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items}


def read_metadata(folder: Path, manifest: Manifest | None = None) -> Metadata:
    """Read which entries a checkpoint has: names, shapes and dtypes, and where they lie.

    Args:
        folder: Anything that ``torch.distributed.checkpoint.save`` wrote.
        manifest: Which files it consists of; None for folders that are not ours.

    Raises:
        ValueError: The file is damaged, holds more than data, or points outside of the checkpoint; names the file.
    """
    path = folder / METADATA
    if path.exists() and not path.is_file():  # of a pipe, reading would never end
        raise ValueError(f"{path}: expected a file, got something else")
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: expected what torch writes, got instruction {error} of pickles") from error
    except Exception as error:  # a pickle made up to harm ends in any of them
        raise ValueError(f"{path}: expected the metadata of a checkpoint, got what cannot be read: {error}") from error
    try:
        return _sound(metadata, manifest)
    except (ValueError, TypeError, AttributeError) as error:  # attributes are what the file makes them
        raise ValueError(f"{path}: {error}") from error


def tree_of(metadata: Metadata, folder: Path) -> dict[Any, Any]:
    """Return the flat names of all entries by the keys that led to them: as dicts in dicts.

    Raises:
        ValueError: An entry stands where another one does, or below it; names ``folder``.
    """
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


def _sound(metadata: object, manifest: Manifest | None) -> Metadata:
    """Return metadata as they are, if torch could have made them.

    Raises:
        ValueError, TypeError, AttributeError: It could not.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError(f"expected the metadata of a checkpoint, got {type(metadata).__name__}")
    if manifest is None and metadata.planner_data is None:  # of planners that do not flatten
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
        if name not in manifest.files if manifest else name in ("", "..") or Path(name).name != name:
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
