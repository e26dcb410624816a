"""State dicts of a sharded optimizer: one rank's shards or whole tensors, and back, if they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sharded_dadamw.buffers import Bucket
from sharded_dadamw.collectives import Collectives
from sharded_dadamw.decoupled import SHARD
from sharded_dadamw.parameters import named_parameters
from sharded_dadamw.placement import like_parameter, local
from sharded_dadamw.storage import is_in_8_bits, widened

_Pairs = list[tuple[Tensor, Tensor]]
"""Live tensors, each with the saved one that belongs into it; equal in shape, and the live one can hold its values."""


def shard_identity(buckets: Sequence[Bucket]) -> dict[str, Any]:
    """What makes one rank's state its own.

    Args:
        buckets: All buckets of the rank.

    Returns:
        ``rank``, ``num_ranks``; ``fragments``: per parameter index (as in the state dict) the range of its flattened
        local elements that this rank holds; and ``parts``: per parameter that is sharded already, which part is local.
    """
    fragments, parts = {}, {}
    for bucket in buckets:
        for slot, member in enumerate(bucket.members):
            fragment = bucket.layout.fragment(slot, bucket.rank)
            fragments[member.index] = (fragment.param_start, fragment.param_start + fragment.numel)
            if member.placement.part:
                parts[member.index] = member.placement.part
    return {
        "rank": buckets[0].rank if buckets else 0,
        "num_ranks": buckets[0].layout.num_ranks if buckets else 1,
        "fragments": dict(sorted(fragments.items())),
        "parts": dict(sorted(parts.items())),
    }


def gather_state(buckets: Sequence[Bucket], collectives: Collectives) -> dict[int, dict[str, Tensor]]:
    """The state of whole parameters, on every rank. Collective; needs memory for one more flat buffer at a time.

    Args:
        buckets: All buckets of the rank.
        collectives: The ranks that have the other shards.

    Returns:
        Per parameter index ``step`` [] and, in the parameter's shape, what there is of ``exp_avg``, ``exp_avg_sq``,
        ``max_exp_avg_sq``, ``main_param`` and ``main_remainder``: copies in host memory; DTensors where the parameter
        is one. Moments in 8 bits become fp32.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for bucket in buckets:
        layout = bucket.layout
        for slot, member in enumerate(bucket.members):
            state[member.index] = {"step": bucket.steps[slot].to("cpu", copy=True)}
        for name, shard in bucket.shards.items():
            values = widened(shard)
            buffer = torch.empty(layout.numel, dtype=values.dtype, device=bucket.weights.shard.device)
            buffer[slice(*layout.shard_range(bucket.rank))].copy_(values)
            collectives.all_gather_(buffer.view(torch.uint8)).wait()  # bytes: not every backend knows int16
            for member, offset in zip(bucket.members, layout.offsets, strict=True):
                part = buffer[offset : offset + member.placement.local_numel].view(member.placement.local_shape)
                state[member.index][name] = like_parameter(part, member.param)
    return dict(sorted(state.items()))


def match_state(
    state_dict: Mapping[str, Any],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    buckets: Sequence[Bucket],
    groups: Sequence[Mapping[str, Any]],
) -> _Pairs:
    """Pair every live state tensor with the saved one that belongs into it, and write nothing.

    Args:
        state_dict: What ``state_dict()`` returned: shards, from the same rank of an equally large group; or whole
            tensors, from any number of ranks, from ``DecoupledAdamW``, torch's AdamW or Composer's optimizer.
        state: The live state, by parameter.
        buckets: All buckets of the rank.
        groups: The optimizer's parameter groups.

    Raises:
        ValueError: The saved state does not fit; names the first difference.
    """
    saved_groups = state_dict["param_groups"]
    sizes, saved_sizes = ([len(group["params"]) for group in side] for side in (groups, saved_groups))
    if sizes != saved_sizes:
        raise ValueError(f"parameters per group: expected {sizes}, got {saved_sizes}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        if group["amsgrad"] != saved_group.get("amsgrad", group["amsgrad"]):
            raise ValueError(
                f"param_groups[{index}]['amsgrad']: expected {group['amsgrad']}, got {saved_group['amsgrad']}"
            )
    saved_indices = [saved_index for group in saved_groups for saved_index in group["params"]]
    if SHARD in state_dict["state"]:
        return _match_shards(state_dict, state, buckets, groups, saved_indices)
    return _match_whole(state_dict, buckets, saved_indices)


def _match_shards(
    state_dict: Mapping[str, Any],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    buckets: Sequence[Bucket],
    groups: Sequence[Mapping[str, Any]],
    saved_indices: Sequence[int],
) -> _Pairs:
    identity, saved_identity = shard_identity(buckets), state_dict["state"][SHARD]
    for key in ("num_ranks", "rank", "parts"):
        if saved_identity.get(key, {}) != identity[key]:
            raise ValueError(f"{key}: expected a shard saved at {identity[key]}, got {saved_identity.get(key)}")
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


def _match_whole(state_dict: Mapping[str, Any], buckets: Sequence[Bucket], saved_indices: Sequence[int]) -> _Pairs:
    pairs = []
    for bucket in buckets:
        for slot, member in enumerate(bucket.members):
            live, saved = bucket.state_of(slot), state_dict["state"].get(saved_indices[member.index], {})
            missing = [key for key in live if key not in saved and not (key.startswith("main_") or not saved)]
            if missing:
                raise ValueError(f"state of {member.name}: expected entries {sorted(live)}, got {sorted(saved)}")
            fragment = bucket.layout.fragment(slot, bucket.rank)
            for key, tensor in live.items():
                if key not in saved:  # never stepped; or whoever saved it had no main parameter, and ours is the weight
                    if key != "main_param":
                        pairs.append((tensor, torch.zeros(tensor.shape, dtype=tensor.dtype)))
                    continue
                value = local(torch.as_tensor(saved[key]))
                shape = () if key == "step" else member.placement.local_shape
                if tuple(value.shape) != shape or torch.promote_types(value.dtype, tensor.dtype) != tensor.dtype:
                    expected = f"{tensor.dtype} {list(shape)}"
                    raise ValueError(f"state of {member.name}, {key}: expected {expected}, got {_describe(value)}")
                if key != "step":
                    value = value.reshape(-1)[fragment.param_start : fragment.param_start + fragment.numel]
                pairs.append((tensor, value))
    return pairs


def _describe(tensor: Tensor) -> str:
    """Shape and dtype, and how many bits are stored where that is not what the dtype says."""
    return f"{tensor.dtype} {list(tensor.shape)}" + ", in 8 bits" * is_in_8_bits(tensor)
