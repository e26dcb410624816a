"""Files: text and safetensors read, and any file written whole or not at all."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from sharded_dadamw.checkpoint.folder import hidden, sync

_INDEX = ".safetensors.index.json"


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a file of text in UTF-8, or raise a ValueError that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # as editors on Windows write it
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
    except Exception as error:  # those who write have types of their own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch's tells a wrong place
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            beside.unlink(missing_ok=True)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a path is by its name a file of safetensors, or the index of several, as large models have it."""
    return Path(path).name.endswith((".safetensors", _INDEX))


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors` file, or of those beside a `.safetensors.index.json` that it names.

    They are on the CPU.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: It is no such file, or one that it names is missing.
    """
    if not importlib.util.find_spec("safetensors"):
        raise ModuleNotFoundError(
            "safetensors is not installed; install it with: pip install 'sharded_dadamw[safetensors]'"
        )
    files = [Path(path)]
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
        if Path(path).name.endswith(_INDEX):
            names = json.loads(read_text(path))["weight_map"].values()
            files = [Path(path).parent / Path(name).name for name in dict.fromkeys(names)]
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except Exception as error:  # its own type, which is none of Python's
        raise ValueError(f"expected a .safetensors file, got {path}: {error}") from error
