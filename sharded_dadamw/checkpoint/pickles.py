"""Pickles, and files of `torch.save`, that others wrote: read without running anything in them, in bounded time.

A pickle is a program: it names functions and calls them. `Unpickler` looks each name up in a table of constructors of
plain data. It imports nothing and follows no attribute. `torch.load` does the rest.
"""

from __future__ import annotations

import _compat_pickle
import collections
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex


class Placeholder:
    """Something that a pickle named and that is no plain data. Calling, filling and setting it up do nothing."""

    def __new__(cls, *_: object, **__: object) -> Placeholder:
        """Drop the arguments."""
        return object.__new__(cls)

    def _drop(self, *_: object) -> None: ...

    __setitem__ = append = extend = add = _drop


class _NumberFormat:
    """NumPy's dtype of one number: a code such as `f8`, and a byte order, which comes later."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "<"


_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b"}
_NUMBERS |= {"u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}


def _number(kind: Any, data: Any) -> object:
    """Return a NumPy scalar as a number of Python's, and what is no number as a placeholder."""
    code = _NUMBERS.get(kind.code) if isinstance(kind.code, str) else None
    return Placeholder() if code is None else struct.unpack((">" if kind.order == ">" else "<") + code, data)[0]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Return the bytes that a pickle of protocol 2 has as text. Python would look for other encodings in modules."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("expected latin1 text, got another encoding")
    return text.encode("latin1")


def _listed(items: Any = ()) -> Any:
    """Return what is to be gone through, if it is in the pickle: a tensor's one element may stand for 2**60."""
    if not isinstance(items, list | tuple | dict):
        raise pickle.UnpicklingError(f"expected a list of things, got {type(items).__name__}")
    return items


_MOST_PARTS = 1000


def _hashed(keys: Any) -> Any:
    """Return what is about to be hashed, if that ends soon: of tuples nested 60 deep a hash can take 2**60 steps."""
    for key in keys:
        waiting, num_parts = [key], 0
        while waiting:
            part = waiting.pop()
            parts = vars(part).values() if isinstance(part, MetadataIndex) else part
            if isinstance(part, tuple | frozenset | MetadataIndex):
                num_parts += len(parts)
                if num_parts > _MOST_PARTS:
                    raise pickle.UnpicklingError(f"it has keys like tuples of tuples, of over {_MOST_PARTS} parts")
                waiting.extend(parts)
    return keys


DTYPES: Mapping[str, torch.dtype] = {
    f"torch.{name}": dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)
}

_TABLE: Mapping[str, Any] = {
    "_codecs.encode": _encode,
    "builtins.complex": complex,
    "builtins.set": lambda *items: set(_hashed(_listed(*items))),
    "builtins.frozenset": lambda *items: frozenset(_hashed(_listed(*items))),
    "collections.Counter": lambda *items: collections.Counter(_hashed(_listed(*items))),
    "collections.OrderedDict": lambda *_: collections.OrderedDict(),  # its items come later
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "numpy.dtype": _NumberFormat,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "torch.Size": lambda *items: torch.Size(_listed(*items)),
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    **DTYPES,
    "torch._utils._rebuild_tensor_v2": lambda *given: torch._utils._rebuild_tensor(*given[:4]),
    "torch._utils._rebuild_tensor_v3": lambda *given: torch._utils._rebuild_tensor_v3(
        *[*given[:4], False, {}, given[6]]
    ),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}


def _keep_versions(target: Any, state: Any) -> None:
    """Set of a state dict what `state_dict()` adds to it, and nothing that would hide a method."""
    if isinstance(state, dict) and "_metadata" in state:
        target._metadata = state["_metadata"]


_FILLS: Mapping[type, Callable[[Any, Any], object]] = {
    Placeholder: lambda *_: None,
    _NumberFormat: lambda target, state: setattr(target, "order", state[1]),
    collections.OrderedDict: _keep_versions,
}

# What may be named besides and becomes a placeholder: whatever is not in the standard library, and of that what
# describes and does not act. No data has reason to name os.system or builtins.eval.
_DESCRIPTIVE = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "pathlib", "types"}
_BUILTINS = {"object", "bool", "int", "float", "str", "bytes", "bytearray", "range", "slice", "tuple", "list", "dict"}

_PythonsUnpickler: Any = pickle._Unpickler  # the one in C cannot be asked about keys, and makes room for what is said


class Unpickler(_PythonsUnpickler):  # type: ignore[misc]
    """Reads a pickle, in a time that its size bounds; what is damaged or made up to harm ends in any exception.

    Args:
        table: What the names in it stand for. Nothing here hashes what it is given, or puts it into a message.
        fills: By class, what sets up an instance of it, with the state that the pickle has for it.
        placeholders: Whether another name that describes and does not act is `Placeholder`.
        num_bytes: Of each record in the file around it, by name.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonsUnpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # makes room for as many bytes as the pickle says it has

    def __init__(
        self,
        file: IO[bytes],
        *,
        table: Mapping[str, Any] = _TABLE,
        fills: Mapping[type, Callable[[Any, Any], object]] = _FILLS,
        placeholders: bool = False,
        num_bytes: Mapping[str, int] | None = None,
        **how: Any,
    ) -> None:
        super().__init__(file, **how)
        self._table, self._fills = table, fills
        self._placeholders = placeholders
        self._num_bytes = num_bytes or {}

    def find_class(self, module: str, name: str) -> object:
        """Return what the table has for a name, or else `Placeholder`."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in self._table:
            return self._table[full]
        root = module.partition(".")[0]
        describes = name in _BUILTINS if module == "builtins" else root in _DESCRIPTIVE
        acts = not describes and root in sys.stdlib_module_names
        if acts or not self._placeholders:
            raise pickle.UnpicklingError(f"it names {full}, which is no data")
        return Placeholder

    def get_extension(self, code: int) -> None:
        """Refuse a name that only a table of this process could tell."""
        raise pickle.UnpicklingError(f"it names extension {code}, which is no data")

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        fill = next((self._fills[kind] for kind in type(target).__mro__ if kind in self._fills), None)
        if fill is None:
            raise pickle.UnpicklingError(f"it sets up an object of {type(target).__name__}, which is no data")
        fill(target, state)

    def _refer(self) -> None:
        match self.stack[-1]:
            case ("storage", kind, str(key), str(), int(numel)):
                needed = numel * (1 if kind is torch.UntypedStorage else kind.dtype.itemsize)
                there = self._num_bytes.get(f"data/{key}", -1)
                if not 0 <= needed <= there:  # torch.load looks neither in a file that it maps nor in every version
                    raise pickle.UnpicklingError(f"storage {key} should have {needed} bytes and has {max(there, 0)}")
                super().load_binpersid()
            case _:
                raise pickle.UnpicklingError("it refers to something outside of itself")

    dispatch.update({pickle.BUILD[0]: _build, pickle.BINPERSID[0]: _refer})


def _hashing(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    """Wrap a handler that hashes a part of the stack."""

    def checked(unpickler: Any) -> None:
        _hashed(unpickler.stack[keys])
        load(unpickler)

    return checked


for _opcode, _keys in {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}.items():
    Unpickler.dispatch[_opcode[0]] = _hashing(Unpickler.dispatch[_opcode[0]], _keys)


def load_torch(file: str | os.PathLike[str] | IO[bytes], *, placeholders: bool = True) -> Any:
    """Read what `torch.save` wrote without running anything in it.

    Args:
        file: A path, whose tensors are then views of the file mapped privately (changing them leaves the file alone),
            or a file opened for reading in binary, whose tensors are read.
        placeholders: Whether instances of all other classes are each a `Placeholder`. Otherwise they are an error.

    Returns:
        What was saved, with every tensor on the CPU, without gradient. Parameters are plain tensors, and NumPy's
        numbers plain numbers.

    Raises:
        ValueError: If it is no file of torch's (1.6 or later), is damaged, or names something that is no data.
    """
    is_path = isinstance(file, str | os.PathLike)
    where = str(file) if is_path else "the file"
    num_bytes = _num_bytes(file, where)
    try:
        return torch.load(
            file,
            map_location="cpu",
            mmap=is_path,
            weights_only=False,  # torch's own restricted unpickler hashes any key, and knows no placeholder for a dict
            pickle_module=sys.modules[__name__],
            num_bytes=num_bytes,
            placeholders=placeholders,
        )
    except Exception as error:  # a pickle made up to harm can end in any of them
        raise ValueError(f"{where}: expected a file that holds data alone, got what cannot be read: {error}") from error


def _num_bytes(file: str | os.PathLike[str] | IO[bytes], where: str) -> dict[str, int]:
    """Return how many bytes each record of an archive has, if it is one that `torch.save` wrote."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            end = archive.start_dir
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected a file that torch.save of 1.6 or later wrote, got {where}: {error}; load it with the torch that "
            "wrote it, and save it again"
        ) from error
    sizes = {info.filename.partition("/")[2]: info.file_size for info in records}
    if "data.pkl" not in sizes or "constants.pkl" in sizes or len(sizes) < len(records):
        # torch.load would run a script module, and of records with one name read another than was looked at
        raise ValueError(f"expected a file of torch.save, got {where}, which is some other archive")
    if any(info.compress_type != zipfile.ZIP_STORED for info in records) or sum(sizes.values()) > end:
        raise ValueError(f"expected a file of torch.save, got {where}, which is larger inside than outside")
    if not isinstance(file, str | os.PathLike):
        file.seek(0)
        if file.read(4) != b"PK\3\4":  # torch.load would take it for one of its older formats
            raise ValueError(f"expected a file of torch.save, got {where}, which begins with something else")
        file.seek(0)
    return sizes
