"""The entries of a checkpoint by where they stood in the nested state dict, and what to read them into."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sharded_dadamw.checkpoint.manifest import Manifest
from sharded_dadamw.layout.placement import local
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.update.precision import holds


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, 1-D; of a fragment that was read, what was read."""
    if isinstance(tensor, FragmentTensor):
        return tensor.fragment if tensor.loaded is None else tensor.loaded
    if isinstance(tensor, ShardedTensor):
        return torch.cat([shard.tensor.reshape(-1) for shard in tensor.local_shards()] or [torch.empty(0)])
    return local(tensor).reshape(-1)


class SavedEntries:
    """The entries of a checkpoint, by where they stood in the nested state dict."""

    def __init__(self, folder: Path, manifest: Manifest, metadata: Metadata) -> None:
        self.folder = folder
        self.groups = [list(group["params"]) for group in manifest.param_groups]
        self.decays = any(group.get("weight_decay") for group in manifest.param_groups)
        self.optimizer = manifest.optimizer
        self._first = {name: names[0] for names in manifest.aliases for name in names}
        self._twins: list[tuple[str, str]] = []
        self._metadata = metadata
        self._num_bytes = sum(known.size for known in manifest.files.values())
        self._tree: dict[Any, Any] = {}
        for entry in metadata.state_dict_metadata:
            node, path = self._tree, metadata.planner_data.get(entry, (entry,))
            for key in path[:-1]:
                node = node.setdefault(key, {})
                if isinstance(node, str):
                    break
            if isinstance(node, str) or path[-1] in node:
                raise ValueError(f"{folder}: expected entries apart from each other, got another one where {entry} is")
            node[path[-1]] = entry

    def first(self, name: str) -> str:
        """The name under which a weight was stored first, of those that are tied to it."""
        return self._first.get(name, name)

    def tie(self, names: list[str]) -> None:
        """Take weights that were stored apart for one, as which they have to turn out when they are read.

        Args:
            names: Under which they are stored.
        """
        has_state = self.under("optimizer", "state")
        first, *others = sorted(names, key=lambda name: name not in has_state)
        self._first |= {name: first for name in self._first if self._first[name] in others}
        self._first |= dict.fromkeys(others, first)
        self._twins += [(first, other) for other in others]

    def require_ties(self, entries: Mapping[str, Any]) -> None:
        """Look whether weights that are one here are equal there.

        Raises:
            ValueError: They are not; names them.
        """
        for one, other in self._twins:
            nodes = self.under("model")
            if not torch.equal(part_of(entries[nodes[one]]), part_of(entries[nodes[other]])):
                raise ValueError(f"model: {one} and {other} are tied, and two different weights in {self.folder}")

    def under(self, *path: Any) -> dict[Any, Any]:
        """What stands under a path: entries' flat names, or tables of them."""
        node = self._tree
        for key in path:
            node = node.get(key, {})
        return node

    def placeholder(self, entry: str) -> Tensor | None:
        """Something to read an entry into."""
        known = self._metadata.state_dict_metadata[entry]
        if not isinstance(known, TensorStorageMetadata):
            return None
        num_bytes = known.size.numel() * known.properties.dtype.itemsize
        if num_bytes > self._num_bytes:
            raise ValueError(f"{entry}: expected a tensor that is in the files, got one of {num_bytes} bytes")
        return torch.empty(known.size, dtype=known.properties.dtype)

    def target(self, entry: str, live: Tensor) -> Tensor:
        """Host memory like a live tensor, to read an entry into, if it fits.

        Raises:
            ValueError: It does not, or would be rounded; names the entry.
        """
        known = self._metadata.state_dict_metadata[entry]
        size = live.size()  # the shape of an FSDP1 shard is its own
        expected = f"{live.dtype} {list(size)}"
        if not isinstance(known, TensorStorageMetadata):
            raise ValueError(f"{entry}: expected a tensor {expected}, got something else in {self.folder}")
        dtype = known.properties.dtype
        if known.size != size or not holds(live.dtype, dtype):
            raise ValueError(f"{entry}: expected {expected}, got {dtype} {list(known.size)} in {self.folder}")
        if sum(math.prod(chunk.sizes) for chunk in known.chunks) != math.prod(known.size):
            raise ValueError(f"{entry}: expected all of it in {self.folder}, got parts that are not the whole")
        if isinstance(live, FragmentTensor):
            return live  # what is read goes into memory of its own
        if isinstance(live, ShardedTensor):
            return copy.deepcopy(live)
        return torch.empty_like(live) if live.device.type == "cpu" else live.detach().to("cpu")

    def collect(self, entries: Mapping[str, Any], *path: Any) -> Any:
        """Put what was read under a path together again."""

        def build(node: Any) -> Any:
            if isinstance(node, str):
                return entries[node]
            if all(isinstance(key, int) for key in node):
                return [build(node[key]) for key in sorted(node)]
            return {key: build(item) for key, item in node.items()}

        *parents, last = path
        return build(self.under(*parents)[last])


def placeholders(saved: SavedEntries, node: Any) -> dict[str, Any]:
    """Something to read each of the entries into that stand below a node."""
    if isinstance(node, str):
        return {node: saved.placeholder(node)}
    return {entry: value for item in node.values() for entry, value in placeholders(saved, item).items()}
