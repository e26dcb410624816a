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
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, islice
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.checkpoint.names import canonical_name
from sharded_dadamw.interchange.contents import State, is_optimizer, nested_form, own_names, plain
from sharded_dadamw.update.hyperparameters import FREE_OF_LR, HIGH_WEIGHT_DECAY, Hyperparameters, check_group
from sharded_dadamw.update.storage import MAINS, moments_of

log = logging.getLogger("sharded_dadamw")

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
    groups, numbers = [], count()
    for group in state["param_groups"]:
        names = list(group["params"])
        reference = Hyperparameters.from_group(group).initial_lr
        if group["weight_decay"] and not reference:
            raise ValueError(f"initial_lr: expected one > 0 to divide weight_decay {group['weight_decay']} by, got 0")
        theirs = float(group["weight_decay"]) / reference if reference else 0.0
        indices = list(islice(numbers, len(names)))
        own = {"weight_decay": theirs, "decoupled_weight_decay": True, "params": indices, "param_names": names}
        groups.append({**group, **own})
        for index, name in zip(indices, names, strict=True):
            if name in state["state"]:
                entries = state["state"][name]
                indexed[index] = {key: value for key, value in entries.items() if key not in MAINS}
    return {"state": indexed, "param_groups": groups}


def is_ours(state_dict: Mapping[str, Any]) -> bool:
    """Return whether a state dict says that one of our optimizers wrote it."""
    return any(group.get("decoupled_weight_decay") == FREE_OF_LR for group in state_dict["param_groups"])


def imported_group(
    group: Mapping[str, Any], where: str, names: Sequence[str], *, coupled: bool, peak_lr: float | None
) -> State:
    """Convert one parameter group of another optimizer, whose parameters have these canonical ``names``.

    ``coupled`` says that its decay is multiplied by the learning rate. A ValueError, which calls it ``where``, says
    that it asks for another update rule than AdamW's, or that the peak cannot be told.
    """
    missing = [key for key in _NEEDED if key not in group]
    if "foreach" in group and "amsgrad" not in group:
        missing.append("amsgrad")  # torch's RAdam, whose state looks the same
    if missing:
        raise ValueError(f"{where}: expected the hyperparameters of AdamW, got a group without {_few(missing)}")
    own = {key: plain(value) for key, value in group.items() if key not in _OF_THEIR_OWN}
    ours: State = {key: value for key, value in own.items() if isinstance(value, Number | str | None)}
    try:
        ours |= {key: float(own[key]) for key in ("lr", "eps", "weight_decay")}
        ours |= {"betas": tuple(float(beta) for beta in group["betas"]), "amsgrad": bool(group.get("amsgrad", False))}
        check_group(ours)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    if False in (group.get("bias_correction"), group.get("correct_bias")):
        raise ValueError(f"{where}: expected AdamW with bias correction, got one without")
    is_marked = group.get("decoupled_weight_decay") == FREE_OF_LR
    if not (coupled or is_marked) and ours["weight_decay"] > HIGH_WEIGHT_DECAY:
        log.warning(
            "%s decays by %g a step: if torch's AdamW wrote it, it is to be converted from torch",
            where,
            ours["weight_decay"],
        )
    if coupled and is_marked:
        raise ValueError(f"{where}: expected a weight decay that scales with lr, got ours, which is to stay as it is")
    if coupled and group.get("decoupled_weight_decay") is False and ours["weight_decay"]:
        raise ValueError(
            f"{where}: expected AdamW's weight decay, got Adam's, which adds {ours['weight_decay']} times the weights "
            "to the gradient; no setting here continues that"
        )
    ours |= _SWITCHES
    if peak_lr is not None and not 0.0 < peak_lr < math.inf:
        raise ValueError(f"peak_lr: expected a finite number > 0, got {peak_lr}")
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
    step = plain(entries["step"])
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
    if not isinstance(state_dict, Mapping) or not is_optimizer(state_dict):
        raise ValueError("expected the state dict of an optimizer, with 'state' and 'param_groups', got something else")
    state_dict = nested_form(state_dict)
    groups, saved = state_dict["param_groups"], state_dict["state"]
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


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
