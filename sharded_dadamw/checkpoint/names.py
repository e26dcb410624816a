"""What a parameter is called, whatever has been wrapped around its module."""

# What DistributedDataParallel and other wrappers, torch.compile, activation checkpointing and FSDP1 add to a name.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def canonical_name(name: str) -> str:
    """`name` without the components that wrappers add, wherever they stand.

    Args:
        name: As `named_parameters()` gives it, such as `module._orig_mod.layers.0.weight`.

    Returns:
        The name in the bare model, `layers.0.weight`. The last component is the parameter's own and always stays.
    """
    *modules, own = name.split(".")
    return ".".join([component for component in modules if component not in _WRAPPERS] + [own])
