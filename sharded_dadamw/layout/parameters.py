"""The parameters of a set of groups, by name, and which of them can be sharded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_dadamw.layout.placement import Placement, is_of_fsdp1, local, placements_of

_NO_DISPATCH = torch._C._disabled_torch_dispatch_impl
SHARDABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False)
class NamedParameter:
    """A parameter, what messages call it, and where it stands.

    Attributes:
        index: Its number over all groups, which is its key in a state dict.
        first_element: Number of the first element of this rank's part, counted over all parameters of all groups.
    """

    name: str
    param: Tensor
    index: int
    group_index: int
    first_element: int
    placement: Placement

    @property
    def local(self) -> Tensor:
        """This rank's part of it, a view of its memory."""
        return local(self.param.detach() if self.placement.is_borrowed else self.param.data)

    @property
    def is_left_alone(self) -> bool:
        """Whether it is frozen, and in a form that could not be sharded, as the weights of a quantised model are."""
        could_be = self.param.dtype in SHARDABLE_DTYPES and has_plain_memory(self.local)
        return not self.param.requires_grad and not could_be

    @property
    def gradient_dtype(self) -> torch.dtype:
        """In what dtype autograd accumulates its gradient: ``p.grad_dtype``, or else its own."""
        return getattr(self.param, "grad_dtype", None) or self.param.dtype

    def describe(self) -> str:
        """Everything about it that has to be equal on all ranks."""
        kind = "trainable" if self.param.requires_grad else "frozen"
        dtype, grad = (str(each).removeprefix("torch.") for each in (self.param.dtype, self.gradient_dtype))
        kind += "" if grad == dtype else f" with {grad} gradients"
        return f"{self.name}, {dtype} {list(self.param.shape)}, {kind}, in group {self.group_index}"


def named_parameters(groups: Sequence[Mapping[str, Any]]) -> list[NamedParameter]:
    """All parameters in the order of their groups.

    Unnamed ones are called by their place in ``param_groups``, which is added to a name that several have.
    """
    members: list[NamedParameter] = []
    num_elements = 0
    num_bearers = Counter(name for group in groups for name in group.get("param_names", ()))
    placements = iter(placements_of([param for group in groups for param in group["params"]]))
    for group_index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            place = f"param_groups[{group_index}]['params'][{position}]"
            name = group["param_names"][position] if "param_names" in group else place
            if num_bearers[name] > 1:
                name = f"{name} of {place}"
            placement = next(placements)
            first_element = num_elements + placement.first_element
            members.append(NamedParameter(name, param, len(members), group_index, first_element, placement))
            num_elements += param.numel()
    return members


def check_parameters(members: Sequence[NamedParameter]) -> None:
    """Refuse what cannot be laid into flat buffers, but for what is left alone."""
    if not members:
        raise ValueError("expected at least one parameter, got empty groups")
    members = [member for member in members if not member.is_left_alone]
    first_use: dict[Tensor, NamedParameter] = {}
    for member in members:
        param = member.param
        if param.layout != torch.strided:
            raise TypeError(f"{member.name}: expected a dense parameter, got layout {param.layout}")
        if is_of_fsdp1(param):
            raise TypeError(
                f"{member.name}: expected a plain parameter or a DTensor, got one that FSDP1 has flattened; "
                "use DecoupledAdamW, which updates the local shards as they are, or FSDP2 (fully_shard)"
            )
        if not has_plain_memory(member.local):
            raise TypeError(
                f"{member.name}: expected a plain parameter, got a {type(param).__name__}, whose elements are not what "
                "lies in its memory; use DecoupledAdamW, which updates it by torch's operations"
            )
        if param.dtype not in SHARDABLE_DTYPES:
            raise TypeError(f"{member.name}: expected a dtype of {SHARDABLE_DTYPES}, got {param.dtype}")
        if param.device.type == "meta":
            raise ValueError(f"{member.name}: expected memory, got a meta tensor; materialise the model first")
        if param.device != members[0].param.device:
            raise ValueError(
                f"{member.name}: expected it on {members[0].param.device} like {members[0].name}, got {param.device}; "
                "use one optimizer per device"
            )
        if param in first_use:
            raise ValueError(f"{member.name} is the same parameter as {first_use[param].name}; pass it once")
        first_use[param] = member
    _check_memory([member for member in members if member.placement.local_numel])


def has_plain_memory(tensor: Tensor) -> bool:
    """Whether what lies at a tensor's address are its elements: a subclass may wrap others, and a view may negate."""
    kind = type(tensor)
    is_its_own = kind is Tensor or kind is Parameter or kind.__torch_dispatch__ is _NO_DISPATCH
    return is_its_own and not tensor.is_neg()


def _check_memory(members: Sequence[NamedParameter]) -> None:
    """Moving two parameters that share memory into separate slots would silently untie them."""
    spans = sorted((*_span(member.local), index) for index, member in enumerate(members))
    for (_, stop, index), (start, _, following) in pairwise(spans):
        if start < stop:
            raise ValueError(
                f"{members[following].name} shares memory with {members[index].name}; to tie weights, use one "
                "Parameter object in both places"
            )


def _span(param: Tensor) -> tuple[int, int]:
    """First byte address of a tensor, and the one behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
    return param.data_ptr(), param.data_ptr() + (reach + 1) * param.element_size()
