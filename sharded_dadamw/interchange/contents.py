"""State dicts wherever they lie in what a file holds, in one form, and the names of an optimizer's parameters.

What a file holds may be anything, and is looked at and never followed without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any

from torch import Tensor

from sharded_dadamw.checkpoint.names import canonical_name

State = dict[str, Any]
"""Optimizer state in the form in the middle (see `state_dicts`)."""


def optimizers_in(contents: object) -> list[tuple[str, Mapping[str, Any]]]:
    """Find optimizers' state dicts in nested dicts, lists and tuples; each with the keys that lead to it, and dots."""
    return [(at, nested_form(found)) for at, found in _dicts_in(contents) if is_optimizer(found)]


def models_in(contents: object) -> list[tuple[str, dict[str, Tensor]]]:
    """Find models' state dicts, as ``optimizers_in`` does, under canonical names.

    They are dicts of nothing but tensors, floating-point ones among them.
    """
    return [
        (at, {canonical_name(name): tensor for name, tensor in found.items()})
        for at, found in _dicts_in(contents)
        if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
        and any(tensor.is_floating_point() for tensor in found.values())
        and not is_optimizer(found)
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
    for key, name in zip(groups[0]["params"], names, strict=True):
        entries = state_dict["state"].get(key)
        moment = entries.get("exp_avg") if isinstance(entries, Mapping) else None
        if isinstance(moment, Tensor) and moment.shape != weights[name].shape:
            return None
    return names


def nested_form(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an optimizer's state dict with its state by the keys of `params`.

    torch.distributed.checkpoint may have flattened it, and makes a list of a dict with numbers.
    """
    if _is_flat(found):
        return _unflattened(found)
    state = found["state"]
    return {**found, "state": dict(enumerate(state))} if isinstance(state, list) else found


def is_optimizer(found: Mapping[Any, Any]) -> bool:
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
        values = {k: tuple(map(plain, v)) if isinstance(v, list | tuple) else (plain(v),) for k, v in group.items()}
        known = [key for key, parts in values.items() if all(isinstance(part, Number | str | None) for part in parts)]
        kept = {key: values[key] if key == "betas" else values[key][0] for key in known if values[key]}
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
            if is_optimizer(found):
                continue
        inner = found.items() if isinstance(found, Mapping) else enumerate(found)
        held = [((*at, str(key)), value) for key, value in inner if isinstance(value, Mapping | list | tuple)]
        waiting.extend(reversed(held))


def plain(value: Any) -> Any:
    """Return a number of NumPy's, or in a tensor, as Python's; anything else as it is."""
    is_number = isinstance(value, Number) if not isinstance(value, Tensor) else value.numel() == 1
    return value.item() if is_number and hasattr(value, "item") else value
