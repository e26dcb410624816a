"""Files of text and of safetensors: read whole, and written whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.folder import hidden, sync
from sharded_dadamw.interchange.state_dicts import State

if importlib.util.find_spec("safetensors"):
    from safetensors import safe_open
    from safetensors.torch import save_file

HYPERPARAMETERS = "sharded_dadamw.param_groups"
"""Under this key the metadata of a `.safetensors` file hold the parameter groups, in JSON."""


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a file of text in UTF-8, or raise a ValueError that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got {error}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a file to write beside `path`, whose name it gets once it is on the disk.

    If it cannot be written, that is an OSError, and what had the name is as it was.
    """
    final = Path(path).resolve()  # of a link, what it leads to
    beside = hidden(final)
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(final)
        sync(final.parent)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # those who write have types of their own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's tells a wrong place
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        beside.unlink(missing_ok=True)


def to_safetensors(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write state into one `.safetensors` file: tensors as `PARAM.exp_avg`, hyperparameters as JSON beside them.

    Args:
        path: The file; replaced if there is one.
        state: The form in the middle (see `interchange`). Only read.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
        OSError: If it cannot be written. What had the name is then as it was.
    """
    _require_safetensors()
    tensors = {
        f"{name}.{key}": tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, entries in state["state"].items()
        for key, tensor in entries.items()
    }
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt", HYPERPARAMETERS: json.dumps(state["param_groups"])})


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
    with _opened(path) as file:
        text = (file.metadata() or {}).get(HYPERPARAMETERS)
    if text is None:
        raise ValueError(f"expected a file of optimizer state, got {path} without hyperparameters in its metadata")
    try:
        groups = [{**group, "betas": tuple(group["betas"])} for group in json.loads(text)]
        order = {name: index for index, name in enumerate(name for group in groups for name in group["params"])}
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{path}: expected parameter groups in its metadata, got {text:.80}") from error
    state: dict[str, dict[str, Tensor]] = {}
    for full, tensor in read_safetensors(path).items():
        name, _, key = full.rpartition(".")
        state.setdefault(name, {})[key] = tensor
    return {
        "state": dict(sorted(state.items(), key=lambda item: order.get(item[0], len(order)))),
        "param_groups": groups,
    }


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of any `.safetensors` file, on the CPU; raises as `from_safetensors`."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _opened(path: str | os.PathLike[str]) -> Any:
    _require_safetensors()
    if not os.path.isfile(path):
        raise ValueError(f"expected a .safetensors file, got {path}, which is not there")
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # its own type, which is none of Python's
        raise ValueError(f"expected a .safetensors file, got {path}: {error}") from error


def _require_safetensors() -> None:
    if not importlib.util.find_spec("safetensors"):
        raise ModuleNotFoundError(
            "safetensors is not installed; install it with: pip install 'sharded_dadamw[safetensors]'"
        )
