"""What one of our checkpoints holds, told from its manifest and metadata: names, shapes, dtypes, hyperparameters."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sharded_dadamw.checkpoint.folder import MANIFEST, Manifest, newest, root_within
from sharded_dadamw.checkpoint.metadata import read_metadata

_NUM_LARGEST = 5
"""How many parameters are named."""


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tell what one of our checkpoints holds. Its files are read to compare checksums; its tensors are not loaded.

    Args:
        path: What `save_checkpoint` or `write_state` made; of a folder of several, the newest is taken.

    Returns:
        Types that JSON has, with a tensor that has several names counted once:

        - `path`; `step`; `num_ranks` that wrote it; `optimizer`, its class; `versions` of the packages that wrote it
        - `num_parameters` that have a weight or state here, and `num_elements` of them
        - `param_groups`: hyperparameters of each, with the number of its `params`
        - `aliases`: names of parameters that are tied to each other
        - `sizes`: `kind` (`weight`, `exp_avg` and so on, `other`), `dtype`, `num_tensors` and `num_bytes`
        - `largest`: `name`, `shape` and `num_bytes`, of weight and state, of the parameters with the most bytes
        - `damage`: what is wrong with its files, a sentence for each; empty if their checksums hold

    Raises:
        ValueError: If it is none of our checkpoints, or its manifest or metadata are damaged.
    """
    folder = newest(Path(path))
    if not (folder / MANIFEST).exists():
        hint = "" if folder.exists() else ", which does not exist"
        if folder.is_dir() and (root := root_within(folder)) is not None:
            hint = f"; there are some in {root}"
        raise ValueError(f"expected a checkpoint of ours, a folder with {MANIFEST}, got {path}{hint}")
    manifest = Manifest.read(folder)
    metadata = read_metadata(folder, manifest)
    repeated = {name for names in manifest.aliases for name in names[1:]}
    shapes: dict[str, list[int]] = {}
    of_parameter: Counter[str] = Counter()
    num_tensors: Counter[tuple[str, str]] = Counter()
    num_bytes: Counter[tuple[str, str]] = Counter()
    for entry, known in metadata.state_dict_metadata.items():
        match [str(key) for key in metadata.planner_data.get(entry, (entry,))]:
            case ["model", name]:
                kind = "weight"
            case ["optimizer", "state", name, kind]:
                pass
            case _:
                name, kind = "", "other"
        if name in repeated or not isinstance(known, TensorStorageMetadata):
            continue
        dtype = known.properties.dtype
        size = known.size.numel() * dtype.itemsize
        num_tensors[kind, str(dtype).removeprefix("torch.")] += 1
        num_bytes[kind, str(dtype).removeprefix("torch.")] += size
        if name:
            of_parameter[name] += size
        if name and kind != "step":
            shapes[name] = list(known.size)
    return {
        "path": str(folder),
        "step": manifest.step,
        "num_ranks": manifest.num_ranks,
        "optimizer": manifest.optimizer,
        "versions": dict(manifest.versions),
        "num_parameters": len(shapes),
        "num_elements": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "param_groups": [
            {key: value for key, value in group.items() if key != "param_names"} | {"params": len(group["params"])}
            for group in manifest.param_groups
        ],
        "aliases": [list(names) for names in manifest.aliases],
        "sizes": [
            {"kind": kind, "dtype": dtype, "num_tensors": num_tensors[kind, dtype], "num_bytes": size}
            for (kind, dtype), size in num_bytes.most_common()
        ],
        "largest": [
            {"name": name, "shape": shapes.get(name, []), "num_bytes": size}
            for name, size in of_parameter.most_common(_NUM_LARGEST)
        ],
        "damage": list(manifest.damage(folder)),
    }
