"""Checkpoints of other optimizers as files, read into state of ours, and state of ours written as files of theirs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.folder import Manifest, newest, step_of
from sharded_dadamw.checkpoint.run import IS_DECOUPLED, canonical_name
from sharded_dadamw.checkpoint.safe_pickle import load_torch
from sharded_dadamw.interchange.dcp_folder import read_folder, write_folder
from sharded_dadamw.interchange.deepspeed_folder import from_deepspeed
from sharded_dadamw.interchange.safetensors_file import from_safetensors, tensors_of, to_safetensors
from sharded_dadamw.interchange.state_dicts import State, from_composer, from_torch, to_torch, unflattened

log = logging.getLogger("sharded_dadamw")

Weights = dict[str, Tensor]
"""A model's state dict under canonical names."""


class Source(Enum):
    """Which optimizer wrote a checkpoint. A state dict does not tell, and what `weight_decay` means depends on it."""

    TORCH = "torch"
    ZERO_REDUNDANCY = "zero-redundancy"
    FAIRSCALE = "fairscale"
    COMPOSER = "composer"
    DEEPSPEED = "deepspeed"
    OURS = "sharded-dadamw"


def read_state(
    path: str | os.PathLike[str],
    source: Source,
    *,
    weights: str | os.PathLike[str] | None = None,
    names: Sequence[str] | None = None,
    peak_lr: float | None = None,
) -> tuple[State, Weights]:
    """Read a checkpoint of any optimizer that can be imported, and run nothing in it.

    Args:
        path: A file of `torch.save`, whatever the state dict lies in; a folder of ours (of several the newest), of
            torch.distributed.checkpoint or of DeepSpeed; or a `.safetensors` file that `write_state` wrote.
        source: Which optimizer wrote it.
        weights: The model's state dict, in a file or folder of its own, if it is not beside the optimizer's.
        names: The optimizer's parameters, in the order of its groups, where the state dict only numbers them. They can
            be left out where there is one group, which has every parameter of the model, whose state dict is in a file
            of `torch.save`: that alone keeps the order.
        peak_lr: As in `interchange.from_torch`.

    Returns:
        The form in the middle (see `interchange`), where parameters narrower than fp32 whose weights are known have a
        `main_param`; and the weights, empty if there are none.

    Raises:
        ValueError: If it is not that optimizer's checkpoint, is not whole, or holds more than data; or `names` or
            `weights` are needed, or do not fit.
    """
    if peak_lr is not None and source in (Source.COMPOSER, Source.OURS):
        raise ValueError(
            "expected no peak of the schedule, since this state's weight_decay does not scale with lr, got one"
        )
    manifest = Manifest.of(newest(Path(path)))
    _check_law(path, source, "" if manifest is None else manifest.optimizer)
    if source is Source.DEEPSPEED:
        return from_deepspeed(path, peak_lr=peak_lr)
    if _is_safetensors(path):
        if source is not Source.OURS:
            raise ValueError(f"expected a file that {source.value} writes, got {path}; only ours are .safetensors")
        contents: Any = {"optimizer": from_safetensors(path)}
    else:
        contents = _contents(path)
    found = list(optimizers_in(contents))
    if len(found) != 1:
        where = ", ".join(".".join(at) or "the top" for at, _ in found)
        raise ValueError(f"{path}: expected one optimizer's state dict, got {f'those at {where}' if found else 'none'}")
    state_dict = _once(found[0][1], manifest)
    held = _weights(_contents(weights)) if weights is not None else _weights(contents)
    beside = Path(path if weights is None else weights)
    if names is None and not _is_named(state_dict) and beside.is_file() and not _is_safetensors(beside):
        names = _names_by_shape(state_dict, held)
    state = (
        from_composer(state_dict, names)
        if source in (Source.COMPOSER, Source.OURS)
        else from_torch(state_dict, names, peak_lr=peak_lr)
    )
    _check_fit(path, state, held)
    return _with_main_params(state, held), held


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], weights: Weights | None = None) -> None:
    """Write state for another program, or for ours.

    Args:
        path: Ends in `.pt` or `.pth`: the state dict of torch's AdamW, by `torch.save`. Ends in `.safetensors`: tensors
            by name. Otherwise a folder that is new or empty, as `load_checkpoint` and stock
            torch.distributed.checkpoint read it, with the state under `optimizer` and the weights under `model`. Its
            name tells its step, if it is one of a checkpoint, such as `step_00000100`, and else the state does.
        state: The form in the middle (see `interchange`). Only read.
        weights: The model's state dict, in which weights that share memory are tied; only a folder takes it.

    Raises:
        ValueError: If there is something in the folder, or AdamW cannot express the state.
        OSError: If it cannot be written.
        ModuleNotFoundError: If it takes safetensors, which is not installed.
    """
    if _is_safetensors(path):
        to_safetensors(path, state)
    elif Path(path).suffix in (".pt", ".pth"):
        left_out = sum("main_param" in entries or "main_remainder" in entries for entries in state["state"].values())
        if left_out:
            log.warning("torch's AdamW has no main parameters: those of %d parameters are left out", left_out)
        torch.save(to_torch(state), path)
    else:
        aliases = _tied(weights or {}, state["state"])
        once = {name for names in aliases for name in names[1:]}
        contents = {
            "optimizer": {**state, "state": {k: v for k, v in state["state"].items() if k not in once}},
            **({"model": {k: v for k, v in weights.items() if k not in once}} if weights else {}),
        }
        step = step_of(Path(path))
        if step is None:
            step = int(max((float(entries["step"]) for entries in state["state"].values()), default=0))
        write_folder(path, contents, aliases, step)


def optimizers_in(contents: object) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The state dicts of optimizers in what was saved, however deep in dicts, with the keys that lead to them.

    Args:
        contents: What was saved.
    """
    for at, found, goes_on in _dicts_in(contents):
        groups = found.get("param_groups")
        if isinstance(groups, list) and isinstance(found.get("state"), Mapping | list):
            if not all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups):
                raise ValueError(f"{'.'.join(at)}: expected groups with params, got others")
            yield at, found
        elif is_flattened(found):
            yield at, unflattened(found)
        else:
            goes_on()


def is_flattened(contents: Mapping[Any, Any]) -> bool:
    """Whether this is an optimizer's state dict with every entry under a name of its own."""
    parts = {key.partition(".")[0] for key in contents if isinstance(key, str) and "." in key}
    return len(contents) > 0 and "param_groups" in parts <= {"state", "param_groups"}


def models_in(contents: object) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """The state dicts of models in what was saved: dicts of nothing but tensors, floating-point ones among them.

    Args:
        contents: What was saved.
    """
    for at, found, goes_on in _dicts_in(contents):
        if {"param_groups", "state"} <= found.keys():
            continue
        if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()):
            goes_on()
        elif any(tensor.is_floating_point() for tensor in found.values()):
            yield at, found


def _dicts_in(contents: object) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any], Callable[[], None]]]:
    """Dicts in what was saved, each once, the keys that lead to them, and what has those inside come next."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), contents)]
    while waiting:
        at, found = waiting.pop()
        if isinstance(found, Mapping) and id(found) not in seen:
            seen.add(id(found))

            def goes_on(at: tuple[str, ...] = at, found: Mapping[Any, Any] = found) -> None:
                waiting.extend(((*at, str(key)), value) for key, value in reversed(list(found.items())))

            yield at, found, goes_on


def _contents(path: str | os.PathLike[str]) -> object:
    if Path(path).is_dir():
        folder = newest(Path(path))
        contents = read_folder(folder)
        manifest, model = Manifest.of(folder), contents.get("model")
        if manifest is not None and isinstance(model, dict):
            for first, *others in manifest.aliases:
                model.update({name: model[first] for name in others if {first, name} <= model.keys()})
        return contents
    if not Path(path).is_file():
        raise ValueError(f"expected a file or a folder, got {path}, which is not there")
    if _is_safetensors(path):
        return tensors_of(path)
    return load_torch(path, placeholders=True)


def _check_law(path: str | os.PathLike[str], source: Source, name: str) -> None:
    """Of what a manifest names it is known what weight decay means, or that it is not."""
    if IS_DECOUPLED.get(name):
        fits, hint = source in (Source.COMPOSER, Source.OURS), f"it is from {Source.OURS.value}"
    elif name in ("AdamW", "torch.optim.adam.Adam"):  # which may decouple it too, and says so in its groups
        fits, hint = source not in (Source.COMPOSER, Source.OURS), f"it is from {Source.TORCH.value}"
    else:
        fits, hint = name == "", "nothing is known of how that compares"
    if not fits:
        raise ValueError(
            f"{path}: expected a checkpoint of {source.value}, got one of {name}, whose weight decay means something "
            f"else; {hint}"
        )


def _once(state_dict: Mapping[str, Any], manifest: Manifest | None) -> Mapping[str, Any]:
    """Without the state that our checkpoints hold of tied weights under their other names as well."""
    aliases = manifest.aliases if manifest else []
    owners = {name for group in state_dict["param_groups"] for name in group["params"]}
    others = {name for names in aliases if owners & set(names) for name in names} - owners
    if not others:
        return state_dict
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key not in others}}


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".safetensors"


def _weights(contents: object) -> Weights:
    """The model's state dict, which is the largest one; others would be of generators, metrics and the like."""
    found = [model for _, model in models_in(contents)]
    largest = max(found, key=lambda model: sum(tensor.numel() for tensor in model.values()), default={})
    return {canonical_name(name): tensor for name, tensor in largest.items()}


def _is_named(state_dict: Mapping[str, Any]) -> bool:
    groups = state_dict["param_groups"]
    return all("param_names" in group or all(isinstance(key, str) for key in group["params"]) for group in groups)


def _names_by_shape(state_dict: Mapping[str, Any], weights: Weights) -> list[str] | None:
    """Names from the model's state dict, in the order of its parameters, if there are as many and shapes agree."""
    distinct = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(weights.items())}  # tied ones once
    names = [name for name in reversed(distinct.values()) if weights[name].is_floating_point()]
    groups = state_dict["param_groups"]
    if len(groups) != 1 or len(names) != len(groups[0]["params"]):
        return None
    state = state_dict["state"]
    by_key = dict(enumerate(state)) if isinstance(state, list) else state
    for key, name in zip(groups[0]["params"], names, strict=True):
        moment = (by_key.get(key) or {}).get("exp_avg")
        if isinstance(moment, Tensor) and moment.shape != weights[name].shape:
            return None
    return names


def _tied(weights: Weights, state: Mapping[str, Any]) -> list[list[str]]:
    """Names of weights that share memory, first the one that has state."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        names.setdefault(place, []).append(name)
    return [sorted(same, key=lambda name: name not in state) for same in names.values() if len(same) > 1]


def _check_fit(path: str | os.PathLike[str], state: State, weights: Weights) -> None:
    for name, entries in state["state"].items():
        if weights and name not in weights:
            raise ValueError(f"{path}: expected the weights of every parameter with state, got none of {name}")
        if weights and weights[name].shape != entries["exp_avg"].shape:
            expected, got = list(weights[name].shape), list(entries["exp_avg"].shape)
            raise ValueError(f"{path}: expected state of {name} in its shape, {expected}, got {got}")
    without = [name for group in state["param_groups"] for name in group["params"] if name not in state["state"]]
    if without:
        log.warning("%d parameters have no state, being frozen or never stepped, such as %s", len(without), without[0])


def _with_main_params(state: State, weights: Weights) -> State:
    """Main parameters of those that have none yet: the fp32 value of a narrow weight is the weight."""
    return {
        **state,
        "state": {
            name: entries
            if name not in weights
            or weights[name].dtype.itemsize >= 4
            or {"main_param", "main_remainder"} & entries.keys()
            else {**entries, "main_param": weights[name].float()}
            for name, entries in state["state"].items()
        },
    }
