"""One rank's shards as a torch state dict, and back: which shards they are, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sharded_dadamw.buffers import Bucket
from sharded_dadamw.decoupled import SHARD
from sharded_dadamw.parameters import named_parameters
from sharded_dadamw.storage import is_in_8_bits


def shard_identity(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What makes one rank's state its own.

    Args:
        buckets: All buckets of the rank.

    Returns:
        ``rank``, ``num_ranks``, and ``fragments``: per parameter index (as in the state dict) the range of its
        flattened elements that this rank holds.
    """
    fragments = {}
    for bucket in buckets:
        for slot, member in enumerate(bucket.members):
            fragment = bucket.layout.fragment(slot, bucket.rank)
            fragments[member.index] = (fragment.param_start, fragment.param_start + fragment.numel)
    return {
        "rank": buckets[0].rank if buckets else 0,
        "num_ranks": buckets[0].layout.num_ranks if buckets else 1,
        "fragments": dict(sorted(fragments.items())),
    }


def match_state(
    state_dict: Mapping[str, Any],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    buckets: Sequence[Bucket],
    groups: Sequence[Mapping[str, Any]],
) -> list[tuple[Tensor, Tensor]]:
    """Pair every live state tensor with the saved one that belongs into it, and write nothing.

    Args:
        state_dict: What ``state_dict()`` returned on the same rank of an equally large group.
        state: The live state, by parameter.
        buckets: All buckets of the rank.
        groups: The optimizer's parameter groups.

    Returns:
        Pairs (live, saved) of equal shape and dtype.

    Raises:
        ValueError: The saved state does not fit; names the first difference.
    """
    identity, saved_identity = shard_identity(buckets), state_dict["state"].get(SHARD)
    if saved_identity is None:
        raise ValueError(
            "expected a state dict of ShardedDecoupledAdamW, got one without state['shard']; one rank's state_dict() "
            "loads into the same rank of an equally large group"
        )
    for key in ("num_ranks", "rank"):
        if saved_identity[key] != identity[key]:
            raise ValueError(f"{key}: expected a shard saved at {identity[key]}, got {saved_identity[key]}")
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(f"parameters per group: expected {sizes}, got {saved_sizes}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        if group["amsgrad"] != saved_group["amsgrad"]:
            raise ValueError(
                f"param_groups[{index}]['amsgrad']: expected {group['amsgrad']}, got {saved_group['amsgrad']}"
            )
    saved_indices = [saved_index for group in saved_groups for saved_index in group["params"]]
    pairs = []
    for member, saved_index in zip(named_parameters(groups), saved_indices, strict=True):
        live, saved = state.get(member.param, {}), state_dict["state"].get(saved_index, {})
        if sorted(live) != sorted(saved):
            raise ValueError(f"state of {member.name}: expected entries {sorted(live)}, got {sorted(saved)}")
        span, saved_span = identity["fragments"].get(member.index), saved_identity["fragments"].get(saved_index)
        if span != (saved_span if saved_span is None else tuple(saved_span)):
            raise ValueError(f"state of {member.name}: expected its elements {span}, got {saved_span}")
        for key, tensor in live.items():
            expected, came = _describe(tensor), _describe(saved[key])
            if came != expected:
                raise ValueError(f"state of {member.name}, {key}: expected {expected}, got {came}")
            pairs.append((tensor, saved[key]))
    return pairs


def _describe(tensor: Tensor) -> str:
    """Shape and dtype, and how many bits are stored where that is not what the dtype says."""
    return f"{tensor.dtype} {list(tensor.shape)}" + ", in 8 bits" * is_in_8_bits(tensor)
