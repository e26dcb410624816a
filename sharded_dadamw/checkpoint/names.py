"""What parameters and optimizers are called, whatever a model is wrapped in.

A weight that several names share is stored under the first of them.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import Optimizer

_OPTIMIZERS = {
    "sharded_dadamw.sharded.ShardedDecoupledAdamW": True,
    "sharded_dadamw.decoupled.DecoupledAdamW": True,
    "composer.optim.decoupled_weight_decay.DecoupledAdamW": True,
    "torch.optim.adamw.AdamW": False,
}
IS_DECOUPLED = {name.rpartition(".")[2]: is_decoupled for name, is_decoupled in _OPTIMIZERS.items()}
"""Optimizers, and whether their weight decay is free of lr."""

# What DistributedDataParallel and other wrappers, torch.compile, activation checkpointing and FSDP1 add to a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """Return a parameter's name in the bare model: without components that wrappers add, but for the last, its own."""
    *modules, own = name.split(".")
    return ".".join([component for component in modules if component not in _WRAPPERS] + [own])


def name_of(optimizer: Optimizer) -> str:
    """Return what a manifest calls an optimizer: what it is or descends from in ``IS_DECOUPLED``, or its full name."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(optimizer).__mro__]
    return next((name.rpartition(".")[2] for name in names if name in _OPTIMIZERS), names[0])


def tied(model: nn.Module) -> list[list[str]]:
    """Return the names of parameters and buffers that are the same tensor, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        of_it = _get_fqns(model, name)
        if len(of_it) == 1:  # or it is a flat parameter of FSDP1, and they are those of its parts
            names.setdefault(id(tensor), []).extend(of_it)
    return [same for same in names.values() if len(same) > 1]
