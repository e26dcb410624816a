"""Checkpoints of other optimizers, read into state of ours, and state of ours written for others."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.dcp import versions, write
from sharded_dadamw.checkpoint.entries import Entries, nested
from sharded_dadamw.checkpoint.folder import Manifest, begin, found_at, step_of
from sharded_dadamw.checkpoint.names import IS_DECOUPLED
from sharded_dadamw.checkpoint.pickles import load_torch
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.interchange.contents import State, models_in, names_by_shape, optimizers_in, own_names
from sharded_dadamw.interchange.deepspeed import from_deepspeed
from sharded_dadamw.interchange.files import is_safetensors, read_safetensors, replacing
from sharded_dadamw.interchange.state_dicts import from_composer, from_torch, has_main, is_ours, to_torch

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

    @property
    def is_decoupled(self) -> bool:
        """Whether its weight decay is free of lr."""
        return self in (Source.COMPOSER, Source.OURS)


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
            torch.distributed.checkpoint or of DeepSpeed.
        source: Which optimizer wrote it.
        weights: The model's state dict, in a file or folder of its own, which may be a `.safetensors` file, or the
            `.safetensors.index.json` of several; needed if it is not beside the optimizer's, or if others that fit the
            state are there too, such as an average.
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
    if peak_lr is not None and source.is_decoupled:
        raise ValueError(
            "expected no peak of the schedule, since this state's weight_decay does not scale with lr, got one"
        )
    manifest = Manifest.of(found_at(Path(path))[-1])
    _check_optimizer(path, source, manifest.optimizer)
    if source is Source.DEEPSPEED:
        return from_deepspeed(path, peak_lr=peak_lr)
    contents = _contents(path)
    found = optimizers_in(contents)
    if len(found) != 1:
        where = ", ".join(at or "the top" for at, _ in found)
        got = f"those at {where}; save the right one in a file of its own" if found else "none"
        raise ValueError(f"{path}: expected one optimizer's state dict, got {got}")
    state_dict = _once(found[0][1], manifest)
    is_marked, decays = is_ours(state_dict), any(group.get("weight_decay") for group in state_dict["param_groups"])
    if is_marked is not (source is Source.OURS) and (is_marked or decays):
        got = "ours; it is from sharded-dadamw" if is_marked else "one without its mark; it is from torch or composer"
        raise ValueError(f"{path}: expected a checkpoint of {source.value}, got {got}")
    beside = Path(path if weights is None else weights)
    models = models_in(contents if weights is None else _contents(weights))
    if names is None and own_names(state_dict) is None and beside.is_file() and not is_safetensors(beside):
        alike = [(at, model) for at, model in models if names_by_shape(state_dict, model) is not None]
        names = names_by_shape(state_dict, _the_one(beside, alike)) if alike else None
    state = from_composer(state_dict, names) if source.is_decoupled else from_torch(state_dict, names, peak_lr=peak_lr)
    fitting = [(at, model) for at, model in models if not _misfit(state, model)]
    if models and not fitting:
        _, largest = max(models, key=lambda item: sum(tensor.numel() for tensor in item[1].values()))
        raise ValueError(f"{path}: {_misfit(state, largest)}")
    if weights is not None and not models:
        raise ValueError(f"{weights}: expected a model's state dict, got none")
    held = _the_one(beside, fitting)
    without = [name for group in state["param_groups"] for name in group["params"] if name not in state["state"]]
    if without:
        log.warning("%d parameters have no state, being frozen or never stepped, such as %s", len(without), without[0])
    for name, entries in state["state"].items():
        if name in held and held[name].dtype.itemsize < 4 and not has_main(entries):
            entries["main_param"] = held[name].float()  # of a narrow weight its fp32 value is itself
    return state, held


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any], weights: Weights | None = None) -> None:
    """Write state for another program, or for ours. What has the name is as it was until all is written.

    Args:
        path: Ends in `.pt` or `.pth`: the state dict of torch's AdamW, by `torch.save`. Otherwise a folder that is new
            or empty, as `load_checkpoint` and stock torch.distributed.checkpoint read it, with the state under
            `optimizer` and the weights under `model`. Its name tells its step, if it is one of a checkpoint, such as
            `step_00000100`, and else the state does.
        state: The form in the middle (see `interchange`). Only read.
        weights: The model's state dict, in which weights that share memory are tied; only a folder takes it.

    Raises:
        ValueError: If it is neither, there is something in the folder, or AdamW cannot express the state.
        OSError: If it cannot be written.
    """
    if Path(path).suffix in (".pt", ".pth"):
        left_out = sum(has_main(entries) for entries in state["state"].values())
        if left_out:
            log.warning("torch's AdamW has no main parameters: those of %d parameters are left out", left_out)
        theirs = to_torch(state)
        with replacing(path) as beside, beside.open("wb") as file:
            torch.save(theirs, file)
    else:
        final = Path(path).resolve()
        if is_safetensors(final):
            raise ValueError(f"expected a .pt file or a folder to write state to, got {path}")
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise ValueError(f"expected a folder that is new or empty, got {path}")
        aliases = _tied(weights or {}, state["state"])
        once = {name for names in aliases for name in names[1:]}
        contents = {
            "optimizer": {**state, "state": {k: v for k, v in state["state"].items() if k not in once}},
            **({"model": {k: v for k, v in weights.items() if k not in once}} if weights else {}),
        }
        step = step_of(final)
        if step is None:
            step = int(max((float(entries["step"]) for entries in state["state"].values()), default=0))
        manifest = Manifest(step, 1, versions(), aliases, state["param_groups"], optimizer="DecoupledAdamW")
        final.parent.mkdir(parents=True, exist_ok=True)
        write(contents, begin(final), final, manifest, Collectives())


def _contents(path: str | os.PathLike[str]) -> object:
    if Path(path).is_dir():
        folder = found_at(Path(path))[-1]
        saved = Entries(folder, Manifest.of(folder))
        values = saved.wholes(saved.under())
        saved.read(values, placeholders=True)
        contents = dict(nested(saved.under(), values))
        if isinstance(model := contents.get("model"), dict):
            for first, *others in saved.manifest.aliases:
                model.update({name: model[first] for name in others if {first, name} <= model.keys()})
        return contents
    if not Path(path).is_file():
        raise ValueError(f"expected a file or a folder, got {path}, which is not there")
    return read_safetensors(path) if is_safetensors(path) else load_torch(path)


def _check_optimizer(path: str | os.PathLike[str], source: Source, name: str) -> None:
    """Refuse a checkpoint whose manifest names an optimizer with another meaning of weight decay than the source's."""
    # torch's Adam may decouple it, too, and says so in its groups.
    is_decoupled = False if name == "torch.optim.adam.Adam" else IS_DECOUPLED.get(name)
    if name and is_decoupled is not source.is_decoupled:
        hint = "nothing is known of how that compares"
        if is_decoupled is not None:
            hint = f"it is from {(Source.OURS if is_decoupled else Source.TORCH).value}"
        raise ValueError(
            f"{path}: expected a checkpoint of {source.value}, got one of {name}, whose weight decay means something "
            f"else; {hint}"
        )


def _once(state_dict: Mapping[str, Any], manifest: Manifest) -> Mapping[str, Any]:
    """Leave out the state that our checkpoints hold of tied weights under their other names as well."""
    owners = {name for group in state_dict["param_groups"] for name in group["params"]}
    others = {name for names in manifest.aliases if owners & set(names) for name in names} - owners
    if not others:
        return state_dict
    return {**state_dict, "state": {key: value for key, value in state_dict["state"].items() if key not in others}}


def _the_one(path: Path, models: Sequence[tuple[str, Weights]]) -> Weights:
    """Return the only set of weights, however often it is there; nothing if there is none."""
    distinct = {tuple((name, t.data_ptr(), t.shape) for name, t in model.items()): (at, model) for at, model in models}
    if len(distinct) > 1:
        where = ", ".join(at or "the top" for at, _ in distinct.values())
        raise ValueError(
            f"{path}: expected one set of weights that fits the optimizer's state, got those at {where}; save the "
            "right one in a file of its own, and give that as weights"
        )
    return next(iter(distinct.values()))[1] if distinct else {}


def _misfit(state: State, weights: Weights) -> str:
    """Return what keeps weights from being those of a state; empty if nothing does."""
    for name, entries in state["state"].items():
        if name not in weights:
            return f"expected the weights of every parameter with state, got none of {name}"
        if weights[name].shape != entries["exp_avg"].shape:
            expected, got = list(weights[name].shape), list(entries["exp_avg"].shape)
            return f"expected state of {name} in its shape, {expected}, got {got}"
    return ""


def _tied(weights: Weights, state: Mapping[str, Any]) -> list[list[str]]:
    """Return names of weights that share memory, first the one that has state."""
    names: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (name,)
        names.setdefault(place, []).append(name)
    return [sorted(same, key=lambda name: name not in state) for same in names.values() if len(same) > 1]
