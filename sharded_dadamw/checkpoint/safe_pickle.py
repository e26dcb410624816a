"""Pickles and torch files that others wrote, read without running anything in them.

A pickle is a program: it names functions and calls them. Here a name is looked up in a table of what is plain data, and
nowhere else: nothing is imported, no attribute is followed, and only what the table holds can be called. A name that is
not in the table either ends the reading with an error that says it, or becomes a `Placeholder`, which remembers the
name, and swallows whatever the pickle does to it. Tensors of a torch file are views of the file mapped into memory, so
what is not looked at is not read.
"""

import _compat_pickle
import collections
import io
import os
import pickle
import reprlib
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Placeholder:
    """Stands where a pickle named something that is not data. Inert: it can be called, filled and set up in vain.

    Args:
        name: What the pickle named, as `module.qualified_name`.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<placeholder for {self.name}>"

    def __call__(self, *_: object, **__: object) -> "Placeholder":
        """Part of the protocol of pickled classes."""
        return Placeholder(self.name)

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, item: object) -> None:
        """Part of the protocol of pickled lists."""

    def extend(self, items: object) -> None:
        """Part of the protocol of pickled lists."""

    def add(self, item: object) -> None:
        """Part of the protocol of pickled sets."""


class _Storage(NamedTuple):
    """Bytes of a torch file.

    Attributes:
        data: [n] uint8.
        dtype: What they are said to be; uint8 where the tensor itself says.
    """

    data: Tensor
    dtype: torch.dtype


def _tensor(storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None) -> Tensor:
    """A view of a storage, once it is known to lie inside."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"expected a storage under a tensor, got {type(storage).__name__}")
    place, sizes, strides = (
        tuple(number for number in numbers) if isinstance(numbers, tuple) else (numbers,)
        for numbers in (offset, size, stride)
    )
    if not all(isinstance(number, int) and number >= 0 for number in (*place, *sizes, *strides)):
        raise pickle.UnpicklingError(f"expected a tensor's shape in whole numbers, got {size!r}")
    data = storage.data
    dtype = dtype or storage.dtype
    data = data[: data.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    if 0 not in sizes:
        end = place[0] + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if end > data.numel():
            raise pickle.UnpicklingError(f"a tensor of shape {sizes} reaches beyond its storage")
    return data[place[0] :].as_strided(sizes, strides)


def _tensor_v2(storage: object, offset: object, size: object, stride: object, *_: object) -> Tensor:
    return _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    *_: object,
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError(f"expected a tensor's dtype, got {dtype!r}")
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(data: object, *_: object) -> object:
    return data


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How pickles of an old protocol write bytes; any other encoding would be looked for among modules."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"expected latin1 text, got {type(text).__name__} and {encoding!r}")
    return text.encode("latin1")


DTYPES: dict[str, torch.dtype] = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}

_BUILTINS = (object, bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, range, slice)

DATA: Mapping[str, object] = {
    **{f"builtins.{kind.__name__}": kind for kind in _BUILTINS},
    "collections.OrderedDict": collections.OrderedDict,
    "_codecs.encode": _encode,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
}

# Parts of the standard library that describe and do not act: a checkpoint may hold them for reasons of its own.
_DESCRIPTIVE = {
    "argparse",
    "collections",
    "copyreg",
    "datetime",
    "decimal",
    "enum",
    "fractions",
    "pathlib",
    "types",
    "uuid",
}


_PythonsUnpickler: Any = pickle._Unpickler  # the one in C does not say what it is about to call


class _Unpickler(_PythonsUnpickler):  # type: ignore[misc]
    """Reads one pickle; see `load`."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonsUnpickler.dispatch)

    def __init__(
        self, file: IO[bytes], allowed: Mapping[str, object], placeholders: bool, storage: Callable[..., object] | None
    ) -> None:
        super().__init__(file)
        self._allowed = {**DATA, **allowed}
        self._callable = {id(value) for value in self._allowed.values() if callable(value)}
        self._placeholders = placeholders
        self._storage = storage

    def find_class(self, module: str, name: str) -> object:
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if full in self._allowed:
            return self._allowed[full]
        root = module.partition(".")[0]
        if self._placeholders and (root in _DESCRIPTIVE or root not in sys.stdlib_module_names):
            return Placeholder(full)
        raise pickle.UnpicklingError(f"it names {full}, which is no data")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"it names extension {code}, which is no data")

    def persistent_load(self, pid: object) -> object:
        if self._storage is None or not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something outside of itself")
        return self._storage(*pid[1:])

    def _check(self, target: Any) -> None:
        if not isinstance(target, Placeholder) and id(target) not in self._callable:
            raise pickle.UnpicklingError(f"it calls {reprlib.repr(target)}, which is no constructor of data")

    def _check_call(self, target: Any, args: Any) -> None:
        """A number, or two, must not become as many bytes or elements."""
        self._check(target)
        if target is not range and any(isinstance(arg, range) for arg in args):
            raise pickle.UnpicklingError(f"it fills {target!r} with a range")
        if target is str and any(not isinstance(arg, str | bytes) for arg in args):
            raise pickle.UnpicklingError("it makes a text of something else")  # which may stand in itself many times
        if target in (bytes, bytearray) and any(isinstance(arg, int) for arg in args):
            raise pickle.UnpicklingError(f"it makes {target!r} of a number")

    def _instantiate(self, target: Any, args: list[object]) -> None:
        self._check_call(target, args)
        self.append(target(*args))

    def _reduce(self) -> None:
        self._check_call(self.stack[-2], self.stack[-1])
        super().load_reduce()

    def _newobj(self) -> None:
        args = self.stack.pop()
        self._new(self.stack.pop(), args, {})

    def _newobj_ex(self) -> None:
        kwargs, args = self.stack.pop(), self.stack.pop()
        self._new(self.stack.pop(), args, kwargs)

    def _new(self, target: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._check_call(target, args)
        self.append(target.__new__(target, *args, **kwargs) if isinstance(target, type) else target(*args, **kwargs))

    def _build(self) -> None:
        target = self.stack[-2]
        if isinstance(target, Placeholder):
            self.stack.pop()
        elif id(type(target)) not in self._callable:
            raise pickle.UnpicklingError(f"it sets up {reprlib.repr(target)}, which is no data")
        else:
            super().load_build()

    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce,
            pickle.NEWOBJ[0]: _newobj,
            pickle.NEWOBJ_EX[0]: _newobj_ex,
            pickle.BUILD[0]: _build,
        }
    )


def load(
    file: IO[bytes],
    *,
    allowed: Mapping[str, object] | None = None,
    placeholders: bool = False,
    storage: Callable[..., object] | None = None,
) -> object:
    """Read one pickle without running anything in it.

    Args:
        file: Opened for reading in binary; left behind the pickle.
        allowed: What may be named beside plain containers, numbers, dtypes and tensors: `module.qualified_name` to the
            object to take for it. Callable ones may be called, and instances of classes among them set up from a
            state, so put only constructors there that do nothing else.
        placeholders: Put a `Placeholder` for any other name, unless it is one from the standard library's acting parts
            (`os.system`, `builtins.eval`), which no data has reason to name.
        storage: Answers references to storages, as `(kind, key, location, numel)`.

    Returns:
        What was pickled.

    Raises:
        ValueError: If the pickle names or calls something else, is cut short, or is none.
    """
    try:
        return _Unpickler(file, allowed or {}, placeholders, storage).load()
    except Exception as error:  # a stream made up to harm can end in any of them
        raise ValueError(f"expected a pickle that holds data alone, got one that cannot be read: {error}") from error


def load_torch(
    file: str | os.PathLike[str] | IO[bytes],
    *,
    allowed: Mapping[str, object] | None = None,
    placeholders: bool = False,
) -> object:
    """Read what `torch.save` wrote without running anything in it.

    Args:
        file: A path, whose tensors are then views of the file mapped privately (changing them leaves the file alone),
            or a file opened for reading in binary, whose tensors are read.
        allowed: As in `load`.
        placeholders: As in `load`.

    Returns:
        What was saved, with every tensor on the CPU, without gradient, and parameters as plain tensors.

    Raises:
        ValueError: If it is no file of torch's (1.6 or later), or one that holds more than data.
    """
    where, size = "the file", 0
    if isinstance(file, str | os.PathLike):
        where, size = str(file), os.path.getsize(file)
    else:
        size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"expected a file that torch.save of 1.6 or later wrote, got {where}: {error}; load it with the torch that "
            "wrote it, and save it again"
        ) from error
    with archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in records or "constants.pkl" in records:
            raise ValueError(f"expected a file of torch.save, got {where}, which is some other archive")
        held = archive.infolist()
        if (
            any(info.compress_type != zipfile.ZIP_STORED for info in held)
            or sum(info.file_size for info in held) > size
        ):
            raise ValueError(f"expected a file of torch.save, got {where}, which is larger inside than outside")
        order = _read(archive, records["byteorder"]).decode() if "byteorder" in records else "little"
        if order != sys.byteorder:
            raise ValueError(f"expected a file of a machine with {sys.byteorder} byte order, got {where} in {order}")
        mapped: Tensor | None = None
        if isinstance(file, str | os.PathLike):
            mapped = torch.from_file(os.fspath(file), shared=False, size=size, dtype=torch.uint8)
        storages: dict[str, Tensor] = {}

        def storage(kind: object, key: str, location: object, numel: int) -> _Storage:
            if not isinstance(kind, torch.dtype) or f"data/{key}" not in records:
                raise pickle.UnpicklingError(f"storage {key!r} is not in the file")
            if key not in storages:
                storages[key] = _record(archive, records[f"data/{key}"], mapped)
            if numel * kind.itemsize > storages[key].numel():
                raise pickle.UnpicklingError(f"storage {key!r} is shorter than it says")
            return _Storage(storages[key], kind)

        try:
            return load(
                io.BytesIO(_read(archive, records["data.pkl"])),
                allowed={**_STORAGES, **(allowed or {})},
                placeholders=placeholders,
                storage=storage,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error.__cause__


_ALIGNMENT = 16  # bytes of the widest number, complex128; torch aligns records to 64


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{info.filename} cannot be read: {error}") from error


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, mapped: Tensor | None) -> Tensor:
    """The bytes of a record, [n] uint8, in the mapped file if there is one and they lie in it as they are."""
    if mapped is None:
        read = bytearray(_read(archive, info))
        return torch.frombuffer(read, dtype=torch.uint8) if read else torch.empty(0, dtype=torch.uint8)
    header = bytes(mapped[info.header_offset : info.header_offset + 30].tolist())
    name, extra = struct.unpack_from("<HH", header, 26)
    begin = info.header_offset + 30 + name + extra
    if begin + info.file_size > mapped.numel():
        raise pickle.UnpicklingError(f"{info.filename} reaches beyond the file")
    data = mapped[begin : begin + info.file_size]
    return data if begin % _ALIGNMENT == 0 else data.clone()
