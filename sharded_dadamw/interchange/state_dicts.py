"""Optimizer state of others, as ours and back. Functions from dicts to dicts; tensors pass through as they are.

The form in the middle is what `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives with
`full_state_dict=True`:

    {"state": {name: {"step", "exp_avg", "exp_avg_sq" [, "max_exp_avg_sq"] [, "main_param"]}},
     "param_groups": [{"lr", "betas", ..., "params": [name, ...] [, "param_names"]}, ...]}

with canonical names, tensors in the parameter's shape, and `weight_decay` as our law reads it: independent of the
learning rate. torch's AdamW, fairscale's and DeepSpeed's shrink a weight by `lr * weight_decay` per step, and ours by
`weight_decay * lr / reference_lr`, where the reference is the larger of a group's `initial_lr` and `max_lr`. So

    ours = reference_lr * theirs

decays alike at every lr of the schedule.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.run import canonical_name
from sharded_dadamw.update.adamw import Hyperparameters, check_group

log = logging.getLogger("sharded_dadamw")

State = dict[str, Any]
"""Optimizer state in the form in the middle."""

Parameters = Iterable[str] | Iterable[tuple[str, Tensor]]
"""Names in the order in which the other optimizer was given its parameters, or `named_parameters()` in that order."""

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
MAIN = ("main_param", "main_remainder")

_NEEDED = ("lr", "betas", "eps", "weight_decay")
_OF_THEIR_OWN = frozenset({"params", "param_names", "step", "bias_correction", "name", "moe"})
_SWITCHES: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def from_torch(
    state_dict: Mapping[str, Any], parameters: Parameters | None = None, *, peak_lr: float | None = None
) -> State:
    """State of torch's AdamW, and of what keeps its format: ZeroRedundancyOptimizer and fairscale's OSS, consolidated.

    Args:
        state_dict: What `optimizer.state_dict()` returned, by index, or `get_optimizer_state_dict`, by name. Only read.
        parameters: The optimizer's parameters in the order of its groups: `model.named_parameters()` if it was built
            from `model.parameters()`. Not needed where the state dict has names itself. Given with tensors, trainable
            parameters that were never stepped get zeros as state.
        peak_lr: The schedule's peak, for all groups. None: the `initial_lr` or `max_lr` that a scheduler left in the
            group, or else its `lr`, which a warning says.

    Returns:
        The form in the middle, with the same tensors, `step` 0-d fp32 and `weight_decay` times the peak.

    Raises:
        ValueError: If the state is not AdamW's, does not fit `parameters`, or the peak cannot be told.
    """
    return _imported(state_dict, parameters, coupled=True, peak_lr=peak_lr)


def from_composer(state_dict: Mapping[str, Any], parameters: Parameters | None = None) -> State:
    """State of Composer's DecoupledAdamW, whose law is ours: nothing is converted but names and `step`.

    Args:
        state_dict: What a checkpoint of Composer's trainer has under `state`, `optimizers`, `DecoupledAdamW`, or the
            optimizer's own `state_dict()`. Only read.
        parameters: As in `from_torch`.

    Returns:
        The form in the middle, with the same tensors.

    Raises:
        ValueError: If the state is not AdamW's or does not fit `parameters`.
    """
    return _imported(state_dict, parameters, coupled=False, peak_lr=None)


def to_torch(state: Mapping[str, Any]) -> dict[str, Any]:
    """State for torch's AdamW: what its `load_state_dict` takes.

    Args:
        state: The form in the middle. Only read.

    Returns:
        By index, in the order of the groups, with the same tensors; `param_names` say which is which. Main parameters
        are left out, since AdamW has none: weights are then what the model holds.

    Raises:
        ValueError: If a group decays but has a peak of 0, which no coupled weight decay equals.
    """
    indexed: dict[int, dict[str, Tensor]] = {}
    groups = []
    first = 0
    for group in state["param_groups"]:
        names = list(group["params"])
        reference = Hyperparameters.from_group(group).reference_lr
        if group["weight_decay"] and not reference:
            raise ValueError(f"initial_lr: expected one > 0 to divide weight_decay {group['weight_decay']} by, got 0")
        theirs = float(group["weight_decay"]) / reference if reference else 0.0
        indices = list(range(first, first + len(names)))
        groups.append({**group, "weight_decay": theirs, "params": indices, "param_names": names})
        for index, name in zip(indices, names, strict=True):
            if name in state["state"]:
                entries = state["state"][name]
                indexed[index] = {key: value for key, value in entries.items() if key not in MAIN}
        first += len(names)
    return {"state": indexed, "param_groups": groups}


def unflattened(flat: Mapping[str, Any]) -> State:
    """State that was saved with `flatten_optimizer_state_dict=True`, as torchtitan does, by parameter and group again.

    Args:
        flat: `state.NAME.exp_avg` and so on, and `param_groups.NAME.lr` and so on, for every parameter. Only read.

    Returns:
        The form in the middle. Parameters with the same hyperparameters are one group.
    """
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, rest = key.partition(".")
        name, _, what = rest.rpartition(".")
        (state if part == "state" else options).setdefault(name, {})[what] = value
    groups: list[State] = []
    for name, group in options.items():
        same = next((other for other in groups if all(other[key] == value for key, value in group.items())), None)
        if same is None:
            groups.append(same := {**group, "params": []})
        same["params"].append(name)
    return {"state": state, "param_groups": groups}


def renamed(state: Mapping[str, Any], names: Iterable[str]) -> State:
    """The same state under the names that a model uses, if its wrappers' components are all that is different.

    Args:
        state: The form in the middle. Only read.
        names: As the model's `named_parameters()` gives them; more of them than the state has is fine.

    Returns:
        The form in the middle, but for its names.

    Raises:
        ValueError: If the model lacks one of the state's names.
    """
    own = {canonical_name(name): name for name in names}
    missing = [name for name in state["state"] if canonical_name(name) not in own]
    if missing:
        raise ValueError(f"expected a model that has every parameter of the state, got one without {_few(missing)}")

    def rename(name: str) -> str:
        return own.get(canonical_name(name), name)

    return {
        "state": {rename(name): dict(entries) for name, entries in state["state"].items()},
        "param_groups": [
            {**group, **{key: [rename(name) for name in group["params"]] for key in ("params", "param_names")}}
            for group in state["param_groups"]
        ],
    }


def imported_group(
    group: Mapping[str, Any], where: str, names: Sequence[str], *, coupled: bool, peak_lr: float | None
) -> State:
    """One parameter group of others as ours.

    Args:
        group: Its hyperparameters. Only read.
        where: What to call it in an error.
        names: Canonical names of its parameters.
        coupled: Whether its decay is multiplied by the learning rate.
        peak_lr: As in `from_torch`.

    Raises:
        ValueError: If it asks for a law that is not AdamW's, or the peak cannot be told.
    """
    missing = [key for key in _NEEDED if key not in group]
    if missing:
        raise ValueError(f"{where}: expected the hyperparameters of AdamW, got a group without {_few(missing)}")
    ours = {key: value for key, value in group.items() if key not in _OF_THEIR_OWN and _is_plain(value)}
    try:
        ours |= {key: float(group[key]) for key in ("lr", "eps", "weight_decay")}
        ours |= {"betas": tuple(float(beta) for beta in group["betas"]), "amsgrad": bool(group.get("amsgrad", False))}
        check_group({**group, **ours})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if group.get("bias_correction", True) is False:
        raise ValueError(f"{where}: expected AdamW with bias correction, got one without")
    if coupled and group.get("decoupled_weight_decay") is False and ours["weight_decay"]:
        raise ValueError(
            f"{where}: expected AdamW's weight decay, got Adam's, which adds {ours['weight_decay']} times the weights "
            "to the gradient; no setting here continues that"
        )
    ours |= _SWITCHES
    if peak_lr is not None:
        ours |= {"initial_lr": peak_lr}
        ours.pop("max_lr", None)
    elif "initial_lr" not in ours:
        if coupled and ours["weight_decay"]:
            if ours["lr"] == 0:
                raise ValueError(
                    f"{where}: expected initial_lr beside an lr of 0, got none; say what the schedule's peak is"
                )
            log.warning("%s has no initial_lr: taking its lr, %g, for the peak of its schedule", where, ours["lr"])
        ours["initial_lr"] = ours["lr"]
    if coupled:
        ours["weight_decay"] *= Hyperparameters.from_group(ours).reference_lr
    return {**ours, "params": list(names), "param_names": list(names)}


def checked_entries(name: str, entries: Mapping[str, Any], amsgrad: bool) -> dict[str, Tensor]:
    """What there is of one parameter's state, if it is AdamW's.

    Args:
        name: What to call the parameter in an error.
        entries: `step` and tensors of one shape.
        amsgrad: Whether `max_exp_avg_sq` is needed.

    Returns:
        The same tensors and `step` as a 0-d fp32 tensor on the CPU.

    Raises:
        ValueError: If an entry is missing, unknown, not floating point, or of another shape.
    """
    needed = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    missing, unknown = sorted(needed - set(entries)), sorted(set(entries) - needed - {"max_exp_avg_sq", *MAIN})
    if missing or unknown:
        differences = [f"none of {_few(missing)}"] * bool(missing) + [f"{_few(unknown)} besides"] * bool(unknown)
        raise ValueError(f"state of {name}: expected AdamW's {_few(sorted(needed))}, got {' and '.join(differences)}")
    if not isinstance(entries["step"], Tensor | int | float):
        raise ValueError(f"state of {name}: expected a step >= 0, got {reprlib.repr(entries['step'])}")
    step = torch.as_tensor(entries["step"]).detach().to("cpu", torch.float32).reshape(-1)
    if step.numel() != 1 or not (math.isfinite(step.item()) and step.item() >= 0):
        raise ValueError(f"state of {name}: expected a step >= 0, got {entries['step']}")
    tensors = {key: value for key, value in entries.items() if key != "step"}
    if not amsgrad:
        tensors.pop("max_exp_avg_sq", None)
    shape = getattr(tensors["exp_avg"], "shape", None)
    for key, value in tensors.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or key == "main_remainder"):
            raise ValueError(f"state of {name}, {key}: expected a tensor of numbers, got {reprlib.repr(value)}")
        if value.shape != shape:
            raise ValueError(f"state of {name}, {key}: expected shape {list(shape or ())}, got {list(value.shape)}")
    return {"step": step[0].clone(), **tensors}


def _imported(
    state_dict: Mapping[str, Any], parameters: Parameters | None, *, coupled: bool, peak_lr: float | None
) -> State:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("expected the state dict of an optimizer, with 'state' and 'param_groups', got something else")
    groups = state_dict["param_groups"]
    saved = state_dict["state"]
    if isinstance(saved, list):  # what torch.distributed.checkpoint makes of a dict with numbers for keys
        saved = dict(enumerate(saved))
    keys = [key for group in groups for key in group["params"]]
    given = [(item, None) if isinstance(item, str) else item for item in parameters] if parameters is not None else None
    names = dict(zip(keys, _names(keys, groups, given), strict=True))
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise ValueError(f"expected parameters with different names, got {_few(repeated)} more than once")
    unknown = [key for key in saved if key not in names]
    if unknown:
        raise ValueError(
            f"expected state of parameters in the groups alone, got state of {_few(unknown)} too; state that is spread "
            "over ranks has to be consolidated before it is saved"
        )
    tensors = {canonical_name(name): tensor for name, tensor in given or () if tensor is not None}
    state: dict[str, dict[str, Tensor]] = {}
    ours = []
    for index, group in enumerate(groups):
        own = [names[key] for key in group["params"]]
        ours.append(imported_group(group, f"param_groups[{index}]", own, coupled=coupled, peak_lr=peak_lr))
        for key, name in zip(group["params"], own, strict=True):
            tensor = tensors.get(name)
            if saved.get(key):
                state[name] = checked_entries(name, saved[key], ours[-1]["amsgrad"])
                if tensor is not None and tensor.shape != state[name]["exp_avg"].shape:
                    expected, got = list(tensor.shape), list(state[name]["exp_avg"].shape)
                    raise ValueError(f"state of {name}: expected the parameter's shape {expected}, got {got}")
            elif tensor is not None and tensor.requires_grad:
                state[name] = unstepped(tensor, ours[-1]["amsgrad"])
    return {"state": state, "param_groups": ours}


def unstepped(like: Tensor, amsgrad: bool) -> dict[str, Tensor]:
    """State of a parameter before its first step: zeros of its shape and dtype, on the CPU.

    Args:
        like: The parameter, or what has its shape and dtype.
        amsgrad: Whether there is a `max_exp_avg_sq`.
    """
    zeros = {key: torch.zeros(like.shape, dtype=like.dtype) for key in (MOMENTS if amsgrad else MOMENTS[:2])}
    return {"step": torch.zeros(()), **zeros}


def _names(
    keys: Sequence[Any], groups: Sequence[Mapping[str, Any]], given: Sequence[tuple[str, Tensor | None]] | None
) -> list[str]:
    if all(isinstance(key, str) for key in keys):
        return [canonical_name(key) for key in keys]
    if given is not None:
        if len(given) != len(keys):
            raise ValueError(f"expected as many parameters as the state has, {len(keys)}, got {len(given)} names")
        return [canonical_name(name) for name, _ in given]
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return [canonical_name(name) for group in groups for name in group["param_names"]]
    raise ValueError(
        f"expected names for the {len(keys)} parameters, which this state dict only numbers; give the parameters' "
        "names in the order of the optimizer's groups"
    )


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _few(names: Sequence[object], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
