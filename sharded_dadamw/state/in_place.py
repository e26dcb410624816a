"""State of parameters that stay where they are: in the shape of the parameter, a dict each, as in torch's AdamW."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.kernels.ready import base_of
from sharded_dadamw.layout.placement import local
from sharded_dadamw.update.storage import LARGEST_BETA2_FOR_NEAREST, MAINS, MOMENTS, moments_of

log = logging.getLogger("sharded_dadamw")

_NOT_BEGUN = torch.zeros(())
"""Stands for the step count of new state until that has its place among the others."""


def fill_in(state: MutableMapping[Any, Any], group: Mapping[str, Any]) -> bool:
    """Make the state that parameters of a group lack, and bring what they have to where they are.

    Frozen ones get no state, and keep what they have. Returns whether any moment was made. State of another shape is
    made anew before its first step, and later a ValueError.
    """
    by_device: dict[torch.device, list[dict[str, Tensor]]] = {}
    is_any_new = False
    for place, param in enumerate(group["params"]):
        if param.requires_grad or state.get(param):
            of_param = state.setdefault(param, {})
            if not of_param:
                _check_freezing(param.dtype, float(group["betas"][1]))
                of_param["step"] = _NOT_BEGUN
            moments = map(of_param.get, MOMENTS)
            misfits = [moment for moment in moments if moment is not None and moment.shape != param.shape]
            if misfits and not of_param["step"].is_meta and of_param["step"] != 0:
                name = group["param_names"][place] if "param_names" in group else f"parameter {place} of its group"
                raise ValueError(
                    f"state of {name}: expected the parameter's shape {list(param.shape)}, got "
                    f"{list(misfits[0].shape)}; state is loaded in the order of parameters, and to begin anew takes "
                    "optimizer.state.pop(param)"
                )
            is_any_new |= _bring(of_param, param, group["amsgrad"])
            by_device.setdefault(param.device, []).append(of_param)
    for device, states in by_device.items():
        _join_steps(states, device)
    return is_any_new


def is_fragment(value: Any) -> bool:
    """Whether it is what the state dict of a sharded optimizer has on one of several ranks."""
    return hasattr(value, "span")


def without_mains(state: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Return the state of a state dict, which must not be one rank's fragments, without main parameters."""
    if any(is_fragment(value) for entries in state.values() for value in entries.values()):
        raise ValueError(
            "expected whole tensors, got one rank's fragments of them, from ShardedDecoupledAdamW.state_dict(); "
            "call its consolidate_state_dict(), or go through torch.distributed.checkpoint"
        )
    return {key: {name: entries[name] for name in entries if name not in MAINS} for key, entries in state.items()}


def unshare(
    state: Mapping[Any, dict[str, Any]], given: Mapping[Any, Mapping[str, Any]], earlier: MutableMapping[Any, Any]
) -> None:
    """Copy what loaded state has of the caller's own tensors: training would write into them.

    What lies where the ``earlier`` state of the parameter does is ours. That is emptied meanwhile, to make room.
    """
    theirs = {_memory(value) for entries in given.values() for value in entries.values() if isinstance(value, Tensor)}
    for param, entries in state.items():
        before = earlier.pop(param, {})
        for key, value in entries.items():
            if isinstance(value, Tensor) and _memory(value) in theirs:
                is_ours = key in before and _memory(value) == _memory(before[key])
                entries[key] = value if is_ours else value.clone()


def _memory(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def drop_strangers(state: MutableMapping[Any, Any], params: Iterable[Tensor]) -> None:
    """Drop the state of parameters that are in no group any more, since others were put in their place."""
    members = set(map(id, params))
    for stranger in [key for key in state if isinstance(key, Tensor) and id(key) not in members]:
        del state[stranger]


def _bring(of_param: dict[str, Tensor], param: Tensor, amsgrad: bool) -> bool:
    """Give a parameter the moments that it lacks; whether any was new."""
    is_any_new = False
    for key in moments_of(amsgrad):
        moment = of_param.get(key)
        if moment is None or moment.shape != param.shape or moment.is_meta != param.is_meta:
            of_param[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
            is_any_new = True
        elif moment.device != param.device or moment.dtype != param.dtype:
            of_param[key] = moment.to(param)
    return is_any_new


def _join_steps(states: list[dict[str, Tensor]], device: torch.device) -> None:
    """Make step counts views of one tensor: one addition counts them all, where a list takes one for every hundred."""
    steps = [of_param["step"] for of_param in states]
    base = base_of(steps)
    if base is not None and base.device == device:
        return
    joined = torch.zeros(len(steps), dtype=torch.float32, device=device)
    begun = [place for place, step in enumerate(steps) if step is not _NOT_BEGUN and not step.is_meta]
    if begun:
        joined[begun] = torch.stack([steps[place].to(device, torch.float32) for place in begun])
    for place, of_param in enumerate(states):
        of_param["step"] = joined[place]


@cache
def _check_freezing(dtype: torch.dtype, beta2: float) -> None:
    if dtype.itemsize < 4 and beta2 > LARGEST_BETA2_FOR_NEAREST:
        log.warning(
            "beta2=%g is high for moments in %s that are rounded to the nearest: a step of exp_avg_sq is then below "
            "half its last digit, and it never falls again. ShardedDecoupledAdamW, on one rank too, keeps them in "
            "fp32, or rounds them stochastically.",
            beta2,
            dtype,
        )
