"""What Lightning's strategies without DDP have in common: the optimizers average, or nobody does."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NoReturn

from sharded_dadamw.sharded import ShardedDecoupledAdamW


def averaging(optimizer: Any) -> ShardedDecoupledAdamW:
    """Return the optimizer; a TypeError for one that leaves gradients as each rank has them."""
    if not isinstance(optimizer, ShardedDecoupledAdamW):
        raise TypeError(
            "ShardedStrategy has no DDP, so its optimizers average the gradients: expected ShardedDecoupledAdamW, "
            f"got {type(optimizer).__name__}; use another strategy with it"
        )
    return optimizer


def no_sync(optimizers: Iterable[ShardedDecoupledAdamW]) -> AbstractContextManager[Any]:
    """A context in which backward accumulates for all of them."""
    stack = ExitStack()
    for optimizer in optimizers:
        stack.enter_context(optimizer.no_sync())
    return stack


def refuse_clip_by_value(*_: Any, **__: Any) -> NoReturn:
    """Stand in for a stack's clip by value."""
    raise ValueError(
        "gradients are averaged by the optimizer, and are clipped by their norm alone: clip by that, or give the "
        "optimizer max_grad_norm"
    )
