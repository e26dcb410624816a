"""State dicts of other optimizers as ours, and back. Functions from dicts to dicts; tensors pass through as they are.

The form in the middle is what `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives with
`full_state_dict=True`:

    {"state": {name: {"step", "exp_avg", "exp_avg_sq" [, "max_exp_avg_sq"] [, "main_param"]}},
     "param_groups": [{"lr", "betas", ..., "params": [name, ...] [, "param_names"]}, ...]}

with canonical names, tensors in the parameter's shape, and `weight_decay` as our update rule reads it: independent of
the learning rate. torch's AdamW, fairscale's and DeepSpeed's shrink a weight by `lr * weight_decay` per step, and ours
by `weight_decay * lr / initial_lr`, where `max_lr` stands for an `initial_lr` that is smaller. So

    ours = initial_lr * theirs

decays alike at every lr of the schedule.
"""

from __future__ import annotations

import logging
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.update.hyperparameters import FREE_OF_LR, Hyperparameters, check_group
from sharded_dadamw.update.storage import MAINS, moments_of

log = logging.getLogger("sharded_dadamw")

State = dict[str, Any]
"""Optimizer state in the form in the middle."""

Parameters = Iterable[str] | Iterable[tuple[str, Tensor]]
"""Names in the order in which the other optimizer was given its parameters, or `named_parameters()` in that order."""

_NEEDED = ("lr", "betas", "eps", "weight_decay")
_OF_THEIR_OWN = frozenset({"params", "param_names", "step", "bias_correction", "name", "moe"})
_SWITCHES: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": FREE_OF_LR,
}


def from_torch(
    state_dict: Mapping[str, Any], parameters: Parameters | None = None, *, peak_lr: float | None = None
) -> State:
    """Convert state of torch's AdamW, or of ZeroRedundancyOptimizer or fairscale's OSS over it, consolidated.

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
    """Convert state of Composer's DecoupledAdamW. Its update rule is ours, so `weight_decay` stays as it is.

    Args:
        state_dict: What a checkpoint of Composer's trainer has under `state`, `optimizers`, `DecoupledAdamW`, or the
            optimizer's own `state_dict()`. Only read.
        parameters: As in `from_torch`.

    Returns:
        The form in the middle, with the same tensors and `step` 0-d fp32.

    Raises:
        ValueError: If the state is not AdamW's or does not fit `parameters`.
    """
    return _imported(state_dict, parameters, coupled=False, peak_lr=None)


def to_torch(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert state into what `load_state_dict` of torch's AdamW takes.

    Args:
        state: The form in the middle. Only read.

    Returns:
        State by index, in the order of the groups, with the same tensors; `param_names` tell which is which. Main
        parameters are left out, since AdamW has none: weights are then what the model holds.

    Raises:
        ValueError: If a group decays but has a peak of 0, which no coupled weight decay equals.
    """
    indexed: dict[int, dict[str, Tensor]] = {}
    groups = []
    first = 0
    for group in state["param_groups"]:
        names = list(group["params"])
        reference = Hyperparameters.from_group(group).initial_lr
        if group["weight_decay"] and not reference:
            raise ValueError(f"initial_lr: expected one > 0 to divide weight_decay {group['weight_decay']} by, got 0")
        theirs = float(group["weight_decay"]) / reference if reference else 0.0
        indices = list(range(first, first + len(names)))
        own = {"weight_decay": theirs, "decoupled_weight_decay": True, "params": indices, "param_names": names}
        groups.append({**group, **own})
        for index, name in zip(indices, names, strict=True):
            if name in state["state"]:
                entries = state["state"][name]
                indexed[index] = {key: value for key, value in entries.items() if key not in MAINS}
        first += len(names)
    return {"state": indexed, "param_groups": groups}


def optimizers_in(contents: object) -> list[tuple[str, Mapping[str, Any]]]:
    """Find optimizers' state dicts in nested dicts, lists and tuples; each with the keys that lead to it, and dots."""
    found = [(at, inner) for at, inner in _dicts_in(contents) if _is_optimizer(inner)]
    return [(at, _unflattened(inner) if _is_flat(inner) else inner) for at, inner in found]


def models_in(contents: object) -> list[tuple[str, dict[str, Tensor]]]:
    """Find models' state dicts, as ``optimizers_in`` does, under canonical names.

    They are dicts of nothing but tensors, floating-point ones among them.
    """
    return [
        (at, {canonical_name(name): tensor for name, tensor in found.items()})
        for at, found in _dicts_in(contents)
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
        and any(tensor.is_floating_point() for tensor in found.values())
        and not _is_optimizer(found)
    ]


def own_names(state_dict: Mapping[str, Any]) -> list[str] | None:
    """Return the canonical names that a state dict has of its parameters; None where it only numbers them."""
    groups = state_dict["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if not all(isinstance(key, str) for key in keys):
        if any(len(group.get("param_names", ())) != len(group["params"]) for group in groups):
            return None
        keys = [name for group in groups for name in group["param_names"]]
    return [canonical_name(key) for key in keys]


def names_by_shape(state_dict: Mapping[str, Any], weights: dict[str, Tensor]) -> list[str] | None:
    """Name the parameters of an optimizer's only group after a model's weights, which come in the same order.

    Tied weights count once. None if there are more groups, or numbers or shapes of parameters differ.
    """
    distinct = {(tensor.data_ptr(), tensor.shape): name for name, tensor in reversed(weights.items())}
    names = [name for name in reversed(distinct.values()) if weights[name].is_floating_point()]
    groups = state_dict["param_groups"]
    if len(groups) != 1 or len(names) != len(groups[0]["params"]):
        return None
    state = _by_key(state_dict)
    for key, name in zip(groups[0]["params"], names, strict=True):
        entries = state.get(key)
        moment = entries.get("exp_avg") if isinstance(entries, Mapping) else None
        if isinstance(moment, Tensor) and moment.shape != weights[name].shape:
            return None
    return names


def imported_group(
    group: Mapping[str, Any], where: str, names: Sequence[str], *, coupled: bool, peak_lr: float | None
) -> State:
    """Convert one parameter group of another optimizer, whose parameters have these canonical ``names``.

    ``coupled`` says that its decay is multiplied by the learning rate. A ValueError, which calls it ``where``, says
    that it asks for another update rule than AdamW's, or that the peak cannot be told.
    """
    missing = [key for key in _NEEDED if key not in group]
    if missing:
        raise ValueError(f"{where}: expected the hyperparameters of AdamW, got a group without {_few(missing)}")
    own = {key: _plain(value) for key, value in group.items() if key not in _OF_THEIR_OWN}
    ours: State = {key: value for key, value in own.items() if isinstance(value, Number | str | None)}
    try:
        ours |= {key: float(own[key]) for key in ("lr", "eps", "weight_decay")}
        ours |= {"betas": tuple(float(beta) for beta in group["betas"]), "amsgrad": bool(group.get("amsgrad", False))}
        check_group(ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if group.get("bias_correction", True) is False:
        raise ValueError(f"{where}: expected AdamW with bias correction, got one without")
    if coupled and group.get("decoupled_weight_decay") == FREE_OF_LR:
        raise ValueError(f"{where}: expected a weight decay that scales with lr, got ours, which is to stay as it is")
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
        ours["weight_decay"] *= Hyperparameters.from_group(ours).initial_lr
    return {**ours, "params": list(names), "param_names": list(names)}


def checked_entries(name: str, entries: Mapping[str, Any], amsgrad: bool) -> dict[str, Tensor]:
    """Return one parameter's state with `step` as a 0-d fp32 tensor on the CPU; a ValueError if it is not AdamW's."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"state of {name}: expected a dict of tensors, got {type(entries).__name__}")
    needed = {"step", *moments_of(amsgrad)}
    missing = sorted(needed - set(entries))
    unknown = sorted(set(entries) - needed - {"max_exp_avg_sq", *MAINS}, key=str)
    if missing or unknown:
        differences = [f"none of {_few(missing)}"] * bool(missing) + [f"{_few(unknown)} besides"] * bool(unknown)
        raise ValueError(f"state of {name}: expected AdamW's {_few(sorted(needed))}, got {' and '.join(differences)}")
    step = _plain(entries["step"])
    if not isinstance(step, int | float) or not (math.isfinite(step) and step >= 0):
        raise ValueError(f"state of {name}: expected a step >= 0, got {reprlib.repr(entries['step'])}")
    tensors = {key: value for key, value in entries.items() if key != "step"}
    if not amsgrad:
        tensors.pop("max_exp_avg_sq", None)
    shape = getattr(tensors["exp_avg"], "shape", None)
    for key, value in tensors.items():
        if not isinstance(value, Tensor) or not (value.is_floating_point() or key == "main_remainder"):
            raise ValueError(f"state of {name}, {key}: expected a tensor of numbers, got {reprlib.repr(value)}")
        if value.shape != shape:
            raise ValueError(f"state of {name}, {key}: expected shape {list(shape or ())}, got {list(value.shape)}")
    return {"step": torch.tensor(step, dtype=torch.float32), **tensors}


def has_main(entries: Mapping[str, Any]) -> bool:
    """Whether there is a main parameter among the entries of a parameter's state."""
    return any(key in entries for key in MAINS)


def unstepped(like: Tensor, amsgrad: bool) -> dict[str, Tensor]:
    """Return the state of a parameter before its first step: zeros of its shape and dtype, on the CPU."""
    zeros = {key: torch.zeros(like.shape, dtype=like.dtype) for key in moments_of(amsgrad)}
    return {"step": torch.zeros(()), **zeros}


def _imported(
    state_dict: Mapping[str, Any], parameters: Parameters | None, *, coupled: bool, peak_lr: float | None
) -> State:
    if not isinstance(state_dict, Mapping) or not _is_optimizer(state_dict):
        raise ValueError("expected the state dict of an optimizer, with 'state' and 'param_groups', got something else")
    state_dict = _unflattened(state_dict) if _is_flat(state_dict) else state_dict
    groups, saved = state_dict["param_groups"], _by_key(state_dict)
    keys = [key for group in groups for key in group["params"]]
    given = [(item, None) if isinstance(item, str) else item for item in parameters or ()]
    all_names = own_names(state_dict)
    if parameters is not None and not all(isinstance(key, str) for key in keys):
        if len(given) != len(keys):
            raise ValueError(f"expected as many parameters as the state has, {len(keys)}, got {len(given)} names")
        all_names = [canonical_name(name) for name, _ in given]
    if all_names is None:
        raise ValueError(
            f"expected names for the {len(keys)} parameters, which this state dict only numbers; give the parameters' "
            "names in the order of the optimizer's groups"
        )
    names = dict(zip(keys, all_names, strict=True))
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise ValueError(f"expected parameters with different names, got {_few(repeated)} more than once")
    unknown = [key for key in saved if key not in names]
    if unknown:
        raise ValueError(
            f"expected state of parameters in the groups alone, got state of {_few(unknown)} too; state that is spread "
            "over ranks has to be consolidated before it is saved"
        )
    tensors = {canonical_name(name): tensor for name, tensor in given if tensor is not None}
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


def _by_key(state_dict: Mapping[str, Any]) -> Mapping[Any, Any]:
    """Return the state by the keys of `params`; torch.distributed.checkpoint makes a list of a dict with numbers."""
    state = state_dict["state"]
    return dict(enumerate(state)) if isinstance(state, list) else state


def _is_optimizer(found: Mapping[Any, Any]) -> bool:
    """Return whether this is an optimizer's state dict. What a file holds may be anything, so all is looked at."""
    groups, state = found.get("param_groups"), found.get("state")
    return _is_flat(found) or (
        isinstance(groups, list)
        and isinstance(state, Mapping | list)
        and all(isinstance(group, Mapping) and _is_list(group.get("params"), int | str) for group in groups)
        and all(_is_list(group.get("param_names", []), str) for group in groups)
    )


def _is_list(found: object, of: Any) -> bool:
    return isinstance(found, list) and all(isinstance(item, of) for item in found)


def _is_flat(found: Mapping[Any, Any]) -> bool:
    """Return whether each entry of an optimizer's state dict has a name of its own, as torchtitan saves it."""
    parts = {key.partition(".")[0] for key in found if isinstance(key, str) and "." in key}
    return "param_groups" in parts <= {"state", "param_groups"}


def _unflattened(flat: Mapping[str, Any]) -> State:
    """Put state that was saved with `flatten_optimizer_state_dict=True` into the form in the middle.

    For every parameter it has `state.NAME.exp_avg` and so on, and `param_groups.NAME.lr` and so on. Parameters with
    the same hyperparameters are one group.
    """
    state: dict[str, dict[str, Any]] = {}
    options: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        part, _, rest = str(key).partition(".")
        name, _, what = rest.rpartition(".")
        (state if part == "state" else options).setdefault(name, {})[what] = value
    groups: list[State] = []
    for name, group in options.items():
        plain = {k: tuple(map(_plain, v)) if isinstance(v, list | tuple) else (_plain(v),) for k, v in group.items()}
        known = [key for key, parts in plain.items() if all(isinstance(part, Number | str | None) for part in parts)]
        kept = {key: plain[key] if key == "betas" else plain[key][0] for key in known if plain[key]}
        same = next((other for other in groups if {**kept, "params": other["params"]} == other), None)
        if same is None:
            groups.append(same := {**kept, "params": []})
        same["params"].append(name)
    return {"state": state, "param_groups": groups}


def _dicts_in(contents: object) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield each dict in what was saved, with the keys that lead to it; of an optimizer's, none that are inside."""
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], object]] = [((), contents)]
    while waiting:
        at, found = waiting.pop()
        if not isinstance(found, Mapping | list | tuple) or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, Mapping):
            yield ".".join(at), found
            if _is_optimizer(found):
                continue
        inner = found.items() if isinstance(found, Mapping) else enumerate(found)
        held = [((*at, str(key)), value) for key, value in inner if isinstance(value, Mapping | list | tuple)]
        waiting.extend(reversed(held))


def _plain(value: Any) -> Any:
    """Return a number of NumPy's, or in a tensor, as Python's; anything else as it is."""
    is_number = isinstance(value, Number) if not isinstance(value, Tensor) else value.numel() == 1
    return value.item() if is_number and hasattr(value, "item") else value


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
