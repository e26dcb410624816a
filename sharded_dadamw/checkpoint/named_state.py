"""A run's state by the names of its parameters: what there is to save.

Names are those of the bare model, and a weight that several names share is stored under the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _get_fqns, get_model_state_dict, get_optimizer_state_dict
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.run_state import pack


def refuse_parts(model: nn.Module, optimizers: Iterable[Optimizer]) -> Exception | None:
    """What is wrong with a model and optimizers of its parameters; None if nothing is."""
    if not isinstance(model, nn.Module):
        return TypeError(f"model: expected a torch.nn.Module, got {model!r:.80}")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            return TypeError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer!r:.80}")
        known = {id(param) for param in model.parameters()}
        strange = [param for group in optimizer.param_groups for param in group["params"] if id(param) not in known]
        if strange:
            return ValueError(
                f"optimizer: expected parameters of the model, got {len(strange)} that it does not have, the first of "
                f"shape {list(strange[0].shape)}; pass the model that the optimizer was built for"
            )
    return None


_KNOWN = {
    "sharded_dadamw.sharded.ShardedDecoupledAdamW": "ShardedDecoupledAdamW",
    "sharded_dadamw.decoupled.DecoupledAdamW": "DecoupledAdamW",
    "composer.optim.decoupled_weight_decay.DecoupledAdamW": "DecoupledAdamW",
    "torch.optim.adamw.AdamW": "AdamW",
}
"""The names in ``IS_DECOUPLED`` of what an optimizer may descend from."""


def name_of(optimizer: Optimizer) -> str:
    """What kind of optimizer it is, for the manifest: one in ``IS_DECOUPLED``, or its class with its module."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__]
    return next((_KNOWN[name] for name in names if name in _KNOWN), names[0])


def tied(model: nn.Module) -> list[list[str]]:
    """Names of parameters and buffers that are the same tensor, in the order of the model."""
    names: dict[int, list[str]] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        of_it = _get_fqns(model, name)
        if len(of_it) == 1:  # or it is a flat parameter of FSDP1, and they are those of its parts
            names.setdefault(id(tensor), []).extend(of_it)
    return [same for same in names.values() if len(same) > 1]


def model_state(model: nn.Module) -> tuple[dict[str, Any], list[list[str]]]:
    """What there is to save of a model, tied weights under their first name alone, and which are tied."""
    state = get_model_state_dict(model)
    aliases = [same for same in ([name for name in names if name in state] for names in tied(model)) if len(same) > 1]
    for _, *others in aliases:
        for name in others:
            del state[name]
    return state, aliases


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], bool]:
    """The state of an optimizer by names, and whether it has ever stepped. It is left as it is.

    torch's function has an optimizer without state take a step with zero gradients. Its first real step would then be
    corrected for the bias of a second, so what that leaves behind in the optimizer is removed.
    """
    has_stepped = bool(optimizer.state)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if not has_stepped:
        optimizer.state.clear()
    return state, has_stepped


def require_plain(weights: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Look whether what is saved beside tensors could be read back.

    Raises:
        ValueError: It could not, without running code; names it.
    """
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            pack(f"model, {name}", value)
            _require_texts_as_keys(f"model, {name}", value)
    for index, group in enumerate(groups):
        for key, value in group.items():
            if not isinstance(value, Tensor):
                pack(f"param_groups[{index}][{key!r}]", value)


def _require_texts_as_keys(label: str, value: Any) -> None:
    """torch.distributed.checkpoint makes texts of all keys."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(value, Mapping) and not isinstance(key, str):
            raise ValueError(f"{label}: expected texts as keys of dicts, got {key!r}, which would come back as a text")
        _require_texts_as_keys(label, item)
