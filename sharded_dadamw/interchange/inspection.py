"""What a checkpoint holds, told from its metadata: names, shapes, dtypes, hyperparameters. Tensors are not read."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sharded_dadamw.checkpoint.folder import Manifest, folders, newest
from sharded_dadamw.checkpoint.metadata import read_metadata
from sharded_dadamw.checkpoint.run import canonical_name
from sharded_dadamw.checkpoint.safe_pickle import DTYPES, Placeholder, load_torch
from sharded_dadamw.interchange.convert import models_in, optimizers_in
from sharded_dadamw.interchange.dcp_folder import is_dcp_folder, nested, path_of, read_values
from sharded_dadamw.interchange.deepspeed_folder import DeepSpeedFolder, is_deepspeed_folder, open_deepspeed
from sharded_dadamw.interchange.safetensors_file import hyperparameters_of, shapes_of, steps_of
from sharded_dadamw.interchange.state_dicts import MAIN, MOMENTS, unflattened

STATE = ("step", *MOMENTS, *MAIN)

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor in a checkpoint.

    Attributes:
        name: Canonical name of its parameter, or its key where it belongs to none.
        kind: `weight`, one of a parameter's state (`exp_avg` and so on), or `other`.
        dtype: As torch calls it, without `torch.`.
        shape: Of the whole tensor.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def has_its_shape(self) -> bool:
        """Whether the shape is the parameter's."""
        return self.kind not in ("other", "step") and not self.kind.endswith("_scale")

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return torch.Size(self.shape).numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        path: Where it is.
        format: What wrote it, as far as that can be told.
        step: Updates so far, the largest of any parameter; None if there is no state.
        groups: Hyperparameters of every group, as they are in the file, with the number of its `params`.
        tensors: All of them, each once, whatever the number of its names.
        num_ranks: How many ranks wrote it; None where it does not say.
        aliases: Names of parameters that are tied to each other.
        versions: Of what wrote it.
        optimizer: Which optimizer it is of; empty where it does not say.
        damage: What is wrong with its files, empty if their checksums hold; None if it has no checksums.
    """

    path: str
    format: str
    step: float | None
    groups: list[dict[str, Any]]
    tensors: list[Held]
    num_ranks: int | None = None
    aliases: list[list[str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    optimizer: str = ""
    damage: list[str] | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters that have weights or state here."""
        return len({held.name for held in self.tensors if held.kind != "other"})

    @property
    def num_elements(self) -> int:
        """Elements of these parameters."""
        return sum({held.name: held.numel for held in self.tensors if held.has_its_shape}.values())

    def sizes(self) -> list[tuple[str, str, int, int]]:
        """Per kind and dtype: how many tensors, and how many bytes they have; the largest first."""
        found: dict[tuple[str, str], list[int]] = defaultdict(list)
        for held in self.tensors:
            found[held.kind, held.dtype].append(held.num_bytes)
        rows = [(kind, dtype, len(sizes), sum(sizes)) for (kind, dtype), sizes in found.items()]
        return sorted(rows, key=lambda row: -row[-1])

    def largest(self, count: int) -> list[tuple[str, tuple[int, ...], int]]:
        """The parameters with the most bytes here: name, shape, and bytes of weight and state together."""
        sizes: dict[str, int] = defaultdict(int)
        shapes: dict[str, tuple[int, ...]] = {}
        for held in self.tensors:
            if held.kind != "other":
                sizes[held.name] += held.num_bytes
                if held.has_its_shape:
                    shapes[held.name] = held.shape
        names = sorted(sizes, key=lambda name: -sizes[name])[:count]
        return [(name, shapes.get(name, ()), sizes[name]) for name in names]

    def as_json(self) -> dict[str, Any]:
        """The same in types that JSON has, with sums instead of every tensor."""
        return {
            "path": self.path,
            "format": self.format,
            "step": self.step,
            "num_ranks": self.num_ranks,
            "num_parameters": self.num_parameters,
            "num_elements": self.num_elements,
            "sizes": [
                {"kind": kind, "dtype": dtype, "num_tensors": count, "num_bytes": size}
                for kind, dtype, count, size in self.sizes()
            ],
            "largest": [{"name": name, "shape": shape, "num_bytes": size} for name, shape, size in self.largest(5)],
            "param_groups": [{key: _plain(value) for key, value in group.items()} for group in self.groups],
            "aliases": self.aliases,
            "versions": self.versions,
            "optimizer": self.optimizer,
            "damage": self.damage,
        }


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Look into a checkpoint: a file, or a folder of ours, of torch.distributed.checkpoint or of DeepSpeed.

    Tensors are not read, but for a few `step`s; files that have checksums are read through to compare them.

    Args:
        path: A folder (of several of ours in it the newest is taken), a `.safetensors` file, or one of `torch.save`.

    Raises:
        ValueError: If it is none of these, or cannot be read without running something in it.
        ModuleNotFoundError: If it takes safetensors, which is not installed.
    """
    where = newest(Path(path))
    if where.suffix == ".safetensors":
        return _inspect_safetensors(where)
    if where.is_file():
        return _inspect_file(where)
    if is_dcp_folder(where):
        return _inspect_dcp(where)
    if is_deepspeed_folder(where):
        return _inspect_deepspeed(open_deepspeed(where))
    hint = "" if where.exists() else ", which does not exist"
    if where.is_dir() and (roots := [child for child in where.iterdir() if folders(child)]):
        hint = f"; there are some in {roots[0]}"
    raise ValueError(
        f"expected a checkpoint: a file, or a folder of torch.distributed.checkpoint or DeepSpeed, got {path}{hint}"
    )


def _inspect_safetensors(path: Path) -> Contents:
    groups = hyperparameters_of(path)
    tensors = []
    for name, (dtype, shape) in shapes_of(path).items():
        owner, _, kind = name.rpartition(".")
        held = (owner, kind) if groups is not None and kind in STATE else (name, "weight")
        tensors.append(Held(*held, _SAFETENSORS_DTYPES.get(dtype, "uint8"), shape))
    step = max(steps_of(path), default=None) if groups is not None else None
    return Contents(str(path), "safetensors", step, _counted(groups or []), tensors)


def _inspect_file(path: Path) -> Contents:
    contents = load_torch(path, placeholders=True)
    tensors: list[Held] = []
    groups: list[dict[str, Any]] = []
    steps: list[float] = []
    aliases: list[list[str]] = []
    for _, model in models_in(contents):
        by_place: dict[tuple[int, torch.Size], list[str]] = defaultdict(list)
        for name, tensor in model.items():
            by_place[tensor.data_ptr() if tensor.numel() else id(tensor), tensor.shape].append(canonical_name(name))
        aliases += [names for names in by_place.values() if len(names) > 1]
        tensors += [_held(names[0], "weight", model[name]) for name, names in _first_names(model, by_place)]
    for _, optimizer in optimizers_in(contents):
        groups += _counted(optimizer["param_groups"])
        names = _names_of(optimizer["param_groups"])
        state = optimizer["state"]
        for key, entries in state.items() if isinstance(state, Mapping) else enumerate(state):
            if not isinstance(entries, Mapping):
                continue
            for kind, value in entries.items():
                if isinstance(value, Tensor):
                    tensors.append(_held(names.get(key, str(key)), kind, value))
                if kind == "step" and isinstance(value, Tensor | int | float):
                    steps.append(float(value))
    return Contents(str(path), "torch.save", max(steps, default=None), groups, tensors, aliases=aliases)


def _inspect_deepspeed(folder: DeepSpeedFolder) -> Contents:
    weights = {canonical_name(n): t for n, t in folder.model["module"].items() if isinstance(t, Tensor)}
    shared = folder.model.get("shared_params") or {}
    aliases: dict[str, list[str]] = {owner: [owner] for owner in shared.values()}
    for alias, owner in shared.items():
        aliases[owner].append(alias)
    tensors = [_held(name, "weight", t) for name, t in weights.items() if name not in shared]
    step: float | None = None
    for index, shapes in enumerate(folder.shapes):
        entries = folder.entries(index)
        step = max(float(entries.get("step", 0)), step or 0.0)
        kinds = {key: value for key, value in entries.items() if key != "step" and isinstance(value, Tensor)}
        for name, shape in shapes.items():
            tensors += [Held(canonical_name(name), kind, _dtype(value), shape) for kind, value in kinds.items()]
            tensors.append(Held(canonical_name(name), "main_param", "float32", shape))
    return Contents(
        str(folder.path),
        f"DeepSpeed, ZeRO stage {folder.stage}",
        step,
        [{**group, "params": len(shapes)} for group, shapes in zip(folder.groups, folder.shapes, strict=True)],
        tensors,
        num_ranks=len(folder.partitions),
        aliases=list(aliases.values()),
        versions={"deepspeed": str(folder.model["ds_version"])} if "ds_version" in folder.model else {},
    )


def _inspect_dcp(path: Path) -> Contents:
    manifest = Manifest.of(path)
    found = read_metadata(path, manifest)
    aliases = [list(names) for names in manifest.aliases] if manifest else []
    also = {name for names in aliases for name in names[1:]}
    tensors = []
    for key, entry in found.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            name, kind = _role(path_of(found, key))
            if name not in also:
                tensors.append(Held(name, kind, str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size)))
    return Contents(
        str(path),
        "sharded_dadamw" if manifest else "torch.distributed.checkpoint",
        _step_of(path, found),
        _groups_of(path, found),
        tensors,
        num_ranks=manifest.num_ranks if manifest else _ranks_of(found),
        aliases=aliases,
        versions=dict(manifest.versions) if manifest else {},
        optimizer=manifest.optimizer if manifest else "",
        damage=list(manifest.damage(path)) if manifest else None,
    )


def _role(at: Sequence[str | int]) -> tuple[str, str]:
    """Whose tensor it is, and which: from the path to it, or from names that were joined with dots."""
    *before, last = (str(part) for part in at)
    owner, _, kind = last.rpartition(".")
    if owner and kind in STATE:
        before, last = [owner.removeprefix("optimizer.").removeprefix("optim.").removeprefix("state.")], kind
    if last in STATE and before:
        return canonical_name(before[-1]), last
    if "model" in before or not before:
        return canonical_name(last.removeprefix("model.")), "weight"
    return ".".join((*before, last)), "other"


def _step_of(path: Path, found: Metadata, most: int = 16) -> float | None:
    keys = [key for key in found.state_dict_metadata if path_of(found, key)[-1] == "step" or key.endswith(".step")]
    values = read_values(path, found, keys[:most]).values()
    return max((float(value) for value in values if isinstance(value, Tensor | int | float)), default=None)


def _groups_of(path: Path, found: Metadata) -> list[dict[str, Any]]:
    keys = [key for key in found.state_dict_metadata if "param_groups" in key]
    by_path: dict[tuple[str | int, ...], Any] = {}
    flat: dict[str, Any] = {}
    for key, value in read_values(path, found, keys).items():
        at = path_of(found, key)
        if "param_groups" in at:
            by_path[at[at.index("param_groups") :]] = value
        else:
            flat[key[key.index("param_groups") :]] = value
    listed = nested(by_path).get("param_groups")
    groups = (listed if isinstance(listed, list) else []) + unflattened(flat)["param_groups"]
    return _counted([group for group in groups if isinstance(group, Mapping)])


def _ranks_of(found: Metadata) -> int | None:
    """One more than the last rank that wrote something."""
    files = {info.relative_path for info in found.storage_data.values()}
    ranks = [int(match.group(1)) for name in files if (match := re.match(r"__(\d+)_", name))]
    return max(ranks) + 1 if ranks else None


def _first_names(
    model: Mapping[str, Tensor], by_place: Mapping[tuple[int, torch.Size], Sequence[str]]
) -> Iterable[tuple[str, Sequence[str]]]:
    """Of every tensor one key, and all its names."""
    by_name = {canonical_name(name): name for name in model}
    return [(by_name[names[0]], names) for names in by_place.values()]


def _names_of(groups: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    """What to call the parameters that the keys of a state dict stand for."""
    return {
        key: canonical_name(str(name))
        for group in groups
        for key, name in zip(group["params"], group.get("param_names", group["params"]), strict=False)
    }


def _counted(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key != "param_names"} | {"params": len(group.get("params", ()))}
        for group in groups
    ]


def _held(name: str, kind: str, tensor: Tensor) -> Held:
    return Held(name, kind, _dtype(tensor), tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return value.name if isinstance(value, Placeholder) else str(value)
