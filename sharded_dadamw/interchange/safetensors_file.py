"""Optimizer state in a `.safetensors` file: tensors as `PARAM.exp_avg`, and hyperparameters as JSON beside them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.interchange.state_dicts import State

if importlib.util.find_spec("safetensors"):
    from safetensors import safe_open
    from safetensors.torch import save_file

HYPERPARAMETERS = "sharded_dadamw.param_groups"
"""Under this key the file's metadata hold the parameter groups, in JSON."""


def to_safetensors(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write state into one file, of which any program that knows the format reads the tensors.

    Args:
        path: The file; replaced if there is one.
        state: The form in the middle (see `interchange`). Only read.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """
    _require()
    tensors = {
        f"{name}.{key}": tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, entries in state["state"].items()
        for key, tensor in entries.items()
    }
    save_file(tensors, path, metadata={"format": "pt", HYPERPARAMETERS: json.dumps(state["param_groups"])})


def from_safetensors(path: str | os.PathLike[str]) -> State:
    """Read what `to_safetensors` wrote.

    Args:
        path: The file.

    Returns:
        The form in the middle (see `interchange`).

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If the file holds something else.
    """
    groups = hyperparameters_of(path)
    if groups is None:
        raise ValueError(f"expected a file of optimizer state, got {path} without hyperparameters in its metadata")
    state: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors_of(path).items():
        name, _, key = full.rpartition(".")
        state.setdefault(name, {})[key] = tensor
    order = {name: index for index, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order)))),
        "param_groups": groups,
    }


def hyperparameters_of(path: str | os.PathLike[str]) -> list[dict[str, Any]] | None:
    """The parameter groups of a file of optimizer state; None of any other file of this format.

    Args:
        path: The file, of which only the header is read.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If it is no file of this format.
    """
    with _opened(path) as file:
        text = (file.metadata() or {}).get(HYPERPARAMETERS)
    if text is None:
        return None
    try:
        return [{**group, "betas": tuple(group["betas"])} for group in json.loads(text)]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: expected parameter groups in its metadata, got {text:.80}") from error


def tensors_of(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of any file of this format, on the CPU.

    Args:
        path: The file.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        ValueError: If it is no file of this format.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def steps_of(path: str | os.PathLike[str], most: int = 16) -> list[float]:
    """The number of updates of the first few parameters.

    Args:
        path: A file of optimizer state.
        most: How many to read.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """
    with _opened(path) as file:
        names = [name for name in file.keys() if name.endswith(".step")]  # noqa: SIM118 - no mapping
        return [float(file.get_tensor(name)) for name in names[:most]]


def shapes_of(path: str | os.PathLike[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype, as the format calls it (`F32`), and shape of every tensor; only the header is read.

    Args:
        path: The file.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def _opened(path: str | os.PathLike[str]) -> Any:
    _require()
    if not os.path.isfile(path):
        raise ValueError(f"expected a .safetensors file, got {path}, which is not there")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # its own type, which is none of Python's
        raise ValueError(f"expected a .safetensors file, got {path}: {error}") from error


def _require() -> None:
    if not importlib.util.find_spec("safetensors"):
        raise ModuleNotFoundError(
            "safetensors is not installed; install it with: pip install 'sharded_dadamw[safetensors]'"
        )
