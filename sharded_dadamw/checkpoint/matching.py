"""Whether what was saved fits a run, and what was read as the run takes it.

Everything that is compared here is compared before anything is read, and raises by name. Parameters, and groups of
them, are found by name, in whatever order they were saved; a main parameter changes its form where it has to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.manifest import IS_DECOUPLED, Manifest
from sharded_dadamw.checkpoint.named_state import name_of, tied
from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.fragment_tensor import FragmentTensor
from sharded_dadamw.placement import like_parameter, local
from sharded_dadamw.precision import join, remainder_of


def _holds_nothing(value: Any) -> bool:
    """Whether it has no entry in a checkpoint, such as the extra state of a module that has none."""
    return isinstance(value, Mapping) and all(map(_holds_nothing, value.values()))


class SavedEntries:
    """The entries of a checkpoint, by where they stood in the nested state dict."""

    def __init__(self, folder: Path, manifest: Manifest, metadata: Metadata) -> None:
        self.folder = folder
        self.groups = [list(group["params"]) for group in manifest.param_groups]
        self.decays = any(group.get("weight_decay") for group in manifest.param_groups)
        self.optimizer = manifest.optimizer
        self._first = {name: names[0] for names in manifest.aliases for name in names}
        self._metadata = metadata
        self._num_bytes = sum(known.size for known in manifest.files.values())
        self._tree: dict[Any, Any] = {}
        for entry, path in metadata.planner_data.items():
            node = self._tree
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
        if known.size != size or torch.promote_types(dtype, live.dtype) != live.dtype:
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


def _placeholders(saved: SavedEntries, node: Any) -> dict[str, Any]:
    if isinstance(node, str):
        return {node: saved.placeholder(node)}
    return {entry: value for item in node.values() for entry, value in _placeholders(saved, item).items()}


def _match_names(live: Iterable[str], saved: Iterable[str], folder: Path) -> dict[str, str]:
    """Which saved name every live one has: the same, or the same without what wrappers add."""
    saved = list(saved)
    canonical = {canonical_name(name): name for name in saved}
    names = {name: name if name in saved else canonical.get(canonical_name(name)) for name in live}
    missing = [name for name, found in names.items() if found is None]
    left_over = sorted(set(saved) - set(names.values()))
    if missing or left_over:
        raise ValueError(
            f"model: expected {folder} to have what the model has; "
            + "; ".join(
                f"{len(some)} {what}, the first is {some[0]}"
                for some, what in ((missing, "missing"), (left_over, "left over"))
                if some
            )
        )
    return {name: found for name, found in names.items() if found is not None}


def match_model(
    saved: SavedEntries, model: nn.Module, state: Mapping[str, Any], entries: dict[str, Any]
) -> dict[str, str]:
    """Add what to read of a model to ``entries``; returns by live name the one under which it is stored.

    Args:
        saved: What there is.
        model: Whose ties count.
        state: Its live state, by name.
        entries: By flat name, what to read each entry into.

    Raises:
        ValueError: A name is missing or left over, a tensor does not fit, or ties differ; names it.
    """
    held = [name for name, value in state.items() if name in saved.under("model") or not _holds_nothing(value)]
    names = _match_names(held, saved.under("model"), saved.folder)
    names = {live: saved.first(name) for live, name in names.items()}
    for same in tied(model):
        stored = {names[name]: name for name in reversed(same) if name in names}
        if len(stored) > 1:
            one, other = list(stored.values())[-2:][::-1]
            raise ValueError(f"model: {one} and {other} are tied, and two different weights in {saved.folder}")
    for live in held:
        value, node = state[live], saved.under("model")[names[live]]
        if not isinstance(value, Tensor):
            entries.update(_placeholders(saved, node))
        elif not isinstance(node, str):
            raise ValueError(f"model.{live}: expected a tensor, got something else in {saved.folder}")
        elif node not in entries:
            entries[node] = saved.target(node, value)
    return names


_TWINS = {"main_param": ("main_remainder", torch.int16), "main_remainder": ("main_param", torch.float32)}
"""The two forms of a main parameter, and the dtype of the other one."""


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    """Values of this rank's part of a tensor as that is: a fragment, a DTensor or whole."""
    if isinstance(tensor, FragmentTensor):
        return tensor.holding(values)
    return like_parameter(values.view(local(tensor).shape), tensor)


def _part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, 1-D; of a fragment that was read, what was read."""
    if isinstance(tensor, FragmentTensor):
        return tensor.fragment if tensor.loaded is None else tensor.loaded
    return local(tensor).reshape(-1)


def _in_other_form(own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where to read what was saved of a main parameter in the form that it does not have here."""
    found = {}
    for key, (other, dtype) in _TWINS.items():
        if key in own:
            found[other] = _like(own[key], torch.empty_like(_part_of(own[key]), dtype=dtype, device="cpu"))
    return found


def _into_own_form(own: Mapping[str, Any], entries: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """The entries of a parameter, with its main parameter in the form that it has here. No bit is lost.

    Args:
        own: Its live entries.
        entries: What was read.
        weight: The weight that was read.
    """
    for key, (other, _) in _TWINS.items():
        if key in own and other in entries:
            live, saved = own[key], _part_of(entries.pop(other))
            part = _part_of(weight)
            if isinstance(live, FragmentTensor):
                _, start, stop = live.span
                part = part[start:stop]
            entries[key] = _like(live, remainder_of(saved, part) if key == "main_remainder" else join(part, saved))
    return entries


def _match_laws(saved: SavedEntries, live: str) -> None:
    """Look whether weight decay means the same: the entry has one name and the numbers differ by a factor of lr."""
    was, now = IS_DECOUPLED.get(saved.optimizer), IS_DECOUPLED.get(live)
    if saved.decays and None not in (was, now) and was != now:
        target = "NEW --from torch" if now else "NEW.pt --from sharded-dadamw"
        raise ValueError(
            f"weight_decay: expected that of {live}, which {'does not scale' if now else 'scales'} with lr, got that "
            f"of {saved.optimizer} in {saved.folder}; convert it: sharded-dadamw convert {saved.folder} {target}"
        )


def _match_groups(saved: SavedEntries, groups: Iterable[Mapping[str, Any]], names: Mapping[str, str]) -> list[int]:
    """Which saved group every live one is: that with the same parameters."""
    ours = [{names[name] for name in group["params"]} for group in groups]
    theirs = [{saved.first(name) for name in group} for group in saved.groups]
    if len(ours) != len(theirs):
        raise ValueError(f"param_groups: expected {len(ours)}, got {len(theirs)} in {saved.folder}")
    left, numbers = list(range(len(theirs))), []
    for index, group in enumerate(ours):
        number = max(left, key=lambda number: (len(group & theirs[number]), number == index))
        if differing := sorted(group ^ theirs[number]):
            is_ours = differing[0] in group
            raise ValueError(
                f"param_groups[{index}]: {differing[0]} is {'not ' * is_ours}in this group in {saved.folder}, and "
                f"{'not ' * (not is_ours)}here; build the optimizer with the groups of the saved one"
            )
        left.remove(number)
        numbers.append(number)
    return numbers


def match_optimizer(
    saved: SavedEntries,
    model: nn.Module,
    optimizer: Optimizer,
    live: Mapping[str, Any],
    names: Mapping[str, str],
    entries: dict[str, Any],
) -> None:
    """Add what to read of an optimizer to ``entries``.

    Args:
        saved: What there is.
        model: Whose parameters it updates.
        optimizer: Itself.
        live: Its live state and groups, by names.
        names: What :func:`match_model` returned.
        entries: By flat name, what to read each entry into.

    Raises:
        ValueError: Groups or the entries of a parameter differ, weight decay means something else, or a tensor does not
            fit; names it.
    """
    _match_laws(saved, name_of(optimizer))
    groups: list[dict[str, Any]] = live["param_groups"]
    for number in _match_groups(saved, groups, names):
        for node in saved.under("optimizer", "param_groups", number).values():
            entries.update(_placeholders(saved, node))
    params = {name: param for raw, param in model.named_parameters() for name in _get_fqns(model, raw)}
    for group in groups:
        for name in group["params"]:
            known, own = saved.under("optimizer", "state", names[name]), live["state"].get(name, {})
            needed = [key for key in own if not key.startswith("main_")]  # the weight itself will do
            own = {**_in_other_form(own), **own}
            if known and own and (any(key not in known for key in needed) or any(key not in own for key in known)):
                raise ValueError(
                    f"optimizer state of {name}: expected entries {sorted(own)}, got {sorted(known)} in {saved.folder}"
                )
            for key, entry in known.items():
                value = own.get(key)
                if value is None and isinstance(empty := saved.placeholder(entry), Tensor):
                    value = (
                        torch.empty_like(params[name], dtype=empty.dtype)
                        if empty.shape == params[name].shape
                        else empty
                    )
                entries[entry] = saved.target(entry, value) if isinstance(value, Tensor) else None


def collect_optimizer(
    saved: SavedEntries, live: Mapping[str, Any], names: Mapping[str, str], entries: Mapping[str, Any]
) -> dict[str, Any]:
    """The state dict that ``set_optimizer_state_dict`` takes, of what was read.

    Args:
        saved: What there was.
        live: The optimizer's live state and groups, by names.
        names: What :func:`match_model` returned.
        entries: By flat name, what each entry was read into.
    """
    state, merged = {}, []
    numbers = _match_groups(saved, live["param_groups"], names)
    for number, group in zip(numbers, live["param_groups"], strict=True):
        own = {key: group[key] for key in ("params", "param_names") if key in group}
        merged.append({**group, **saved.collect(entries, "optimizer", "param_groups", number), **own})
        for name in group["params"]:
            if known := saved.under("optimizer", "state", names[name]):
                read = {key: entries[entry] for key, entry in known.items()}
                weight: str = saved.under("model")[names[name]]
                state[name] = _into_own_form(live["state"].get(name, {}), read, entries[weight])
    return {"state": state, "param_groups": merged}
