"""State and updates in host memory: the bits of state beside the parameters, and no tensor at the wrong place.

On a CPU both kinds of memory are the host's, and the very copies that a GPU needs are made between two buffers.
"""

import itertools
import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_dadamw import (
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
    StateResidency,
)
from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels import torch_kernel
from tests.elsewhere import ELSEWHERE, parameters_elsewhere, pretended_device, put_elsewhere, without_waiting
from tests.harness import ranks
from tests.models import BF16, F16, F32, F64, draw_gradient, whole_state_dict

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4)
SHAPES = [(65, 16), (300,), (), (4096,), (33, 3), (0,), (256, 20)]
FEW_EACH = 2.0**-7  # MiB
CLIPPED, SKIPPED, EDITED, SECRETLY_EDITED = (1, 2), (0, 3), 2, 4  # the steps at which these happen

PRECISIONS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (F32, {}),
    "fp64": (F64, {}),
    "fp32, bf16 moments": (F32, dict(moments=Moments.BF16)),
    "bf16, fp32 main": (BF16, {}),
    "bf16, fp32 main and gradients": (BF16, dict(gradients_in=F32)),
    "bf16, remainder": (BF16, dict(main_parameter=MainParameter.REMAINDER)),
    "bf16, remainder, bf16 moments": (BF16, dict(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)),
    "bf16 alone": (BF16, dict(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)),
    "fp16, fp32 main": (F16, {}),
}


def make_params(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {f"p{i}": nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for i, shape in enumerate(SHAPES)}


def give_gradients(params: Mapping[str, nn.Parameter], step: int, rank: int) -> None:
    """On a step to be skipped one of them is not finite, and always some are missing."""
    given = []
    for index, p in enumerate(params.values()):
        if (step + index) % 3:
            grad = draw_gradient(torch.empty(p.shape, dtype=p.dtype), step, rank, index)
            if step in SKIPPED and rank == 0 and index == 4:
                grad[-1] = math.inf
            # autograd and not an assignment, so that gradients may be wider than their parameters
            given.append((p.view_as(p), torch.zeros_like(p).copy_(grad)))
    torch.autograd.backward(*zip(*given, strict=True))


@torch.no_grad()
def edit(params: Mapping[str, nn.Parameter], step: int) -> None:
    """Weights that somebody else writes between steps, with a trace of it or without."""
    for p in params.values():
        if step == EDITED:
            p.mul_(0.5)
        if step == SECRETLY_EDITED:
            p.data.add_(0.25)


def training(
    params: Mapping[str, nn.Parameter],
    group: Any = None,
    *,
    rank: int = 0,
    law: dict[str, Any] | None = None,
    step_as: Any = lambda optimizer: optimizer.step(),
    gradients_in: torch.dtype | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Everything that comes of a few steps on one rank."""
    if gradients_in is not None:
        for p in params.values():
            p.grad_dtype = gradients_in
    config = ShardingConfig(**dict(bucket_cap_mb=FEW_EACH, skip_nonfinite=True) | settings)
    optimizer = ShardedDecoupledAdamW(params.items(), **LAW | (law or {}), process_group=group, config=config)
    found: dict[str, Tensor] = {}
    for step in range(6):
        give_gradients(params, step, rank)
        edit(params, step)
        if step in CLIPPED:
            found[f"norm at {step}"] = optimizer.clip_grad_norm_(0.1)
        step_as(optimizer)
        for key, value in optimizer.metrics().items():
            found[f"{key} at {step}"] = value
        for name, p in params.items():
            found[f"{name} at {step}"] = p.detach().clone()
        optimizer.zero_grad()
    assert found["skipped_steps at 5"] == len(SKIPPED)
    for name, p in params.items():
        for key, value in optimizer.state[p].items():
            found[f"{name}.{key}"] = value.clone()
    found["state_bytes"] = torch.tensor(optimizer.state_bytes)
    return found


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key].nan_to_num(), value.nan_to_num()), key


# --- the same bits ---


@pytest.mark.parametrize(
    ("precision", "num_ranks", "more"),
    [
        *((precision, num_ranks, {}) for precision, num_ranks in zip(PRECISIONS, itertools.cycle([2, 3, 1]))),
        ("bf16, remainder", 2, dict(gradient_residency=GradientResidency.SHARDED, bucket_cap_mb=16.0)),
        ("bf16, fp32 main", 2, dict(overlap=False)),
        ("bf16, fp32 main", 2, dict(reduce_gradients=False, bucket_cap_mb=1e-6)),
    ],
)
@ranks()
def test_parameters_state_and_metrics_have_the_same_bits_with_state_in_host_memory(
    group: Any, precision: str, more: dict[str, Any]
) -> None:
    """Clipped steps, a skipped one, gradients that are missing and weights that were edited among them."""
    dtype, settings = PRECISIONS[precision]
    settings = settings | more
    rank = group.rank() if settings.get("reduce_gradients", True) else 0  # else all have the mean
    law = dict(amsgrad=group.size() == 2)
    device, host = (
        training(make_params(dtype), group, rank=rank, law=law, state_residency=residency, **settings)
        for residency in (StateResidency.DEVICE, StateResidency.HOST)
    )
    assert_equal(host, device)


@pytest.mark.parametrize("whole", [False, True], ids=["shards", "whole"])
@ranks(2)
def test_what_was_saved_with_one_residency_goes_on_with_the_other(group: Any, whole: bool) -> None:
    ends, (dtype, settings) = [], PRECISIONS["bf16, remainder"]
    device, host = StateResidency
    for residencies in ((device, device), (device, host), (host, device)):
        params = make_params(dtype)
        saved: dict[str, Any] = {}
        for residency in residencies:
            config = ShardingConfig(state_residency=residency, bucket_cap_mb=FEW_EACH, **settings)
            optimizer = ShardedDecoupledAdamW(params.items(), **LAW, process_group=group, config=config)
            if saved:
                optimizer.load_state_dict(saved)
            for step in (1, 2, 4):
                give_gradients(params, step, group.rank())
                optimizer.step()
                optimizer.zero_grad()
            saved = whole_state_dict(optimizer, group.size()) if whole else optimizer.state_dict()
        ends.append({name: p.detach().clone() for name, p in params.items()})
    for end in ends[1:]:
        assert_equal(end, ends[0])


# --- the right places ---


@pytest.mark.parametrize(
    "precision", ["fp32", "bf16, fp32 main and gradients", "bf16, remainder, bf16 moments", "fp16, fp32 main"]
)
def test_only_copies_take_tensors_of_both_places_and_a_step_waits_for_them_alone(precision: str) -> None:
    """On a pretended device whose copies take place when they are waited for; see tests/elsewhere.py."""
    dtype, settings = PRECISIONS[precision]
    lr = torch.tensor(3e-3)
    expected = training(make_params(dtype), law=dict(lr=float(lr)), **settings)
    num_steps = 0
    with pretended_device() as pretence:

        def step_without_waiting(optimizer: Any) -> None:
            nonlocal num_steps
            with without_waiting(pretence) if num_steps else nullcontext():  # in the first one ranks agree on an order
                optimizer.step()
            num_steps += 1

        found = training(
            parameters_elsewhere(make_params(dtype)),
            law=dict(lr=put_elsewhere(lr)),
            step_as=step_without_waiting,
            state_residency=StateResidency.HOST,
            **settings,
        )
        for key, value in found.items():
            is_state = "." in key.partition(" at ")[0] or key == "state_bytes"
            assert value.device == (torch.device("cpu") if is_state else ELSEWHERE), key
    assert_equal(found, expected)


def test_whole_state_goes_through_the_device_where_ranks_exchange_it() -> None:
    with pretended_device():
        params = parameters_elsewhere(make_params(BF16))
        config = ShardingConfig(state_residency=StateResidency.HOST)
        optimizer = ShardedDecoupledAdamW(params.items(), **LAW, config=config)
        give_gradients(params, 1, 0)
        optimizer.step()
        saved = whole_state_dict(optimizer, 1)
        assert all(value.device.type == "cpu" for entries in saved["state"].values() for value in entries.values())
        other = ShardedDecoupledAdamW(parameters_elsewhere(make_params(BF16)).items(), **LAW, config=config)
        other.load_state_dict(saved)
        again = whole_state_dict(other, 1)
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            assert torch.equal(again["state"][index][key], value)


def test_metrics_that_no_update_measures_are_computed_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel_for", lambda form: torch_kernel.Update)
    monkeypatch.setattr(torch_kernel, "_is_fusible", lambda form: False)
    expected = training(make_params(BF16))
    with pretended_device():
        found = training(parameters_elsewhere(make_params(BF16)), state_residency=StateResidency.HOST)
    assert_equal(found, expected)


def test_the_next_gradient_is_on_its_way_down_while_a_bucket_is_updated() -> None:
    with pretended_device() as pretence:
        params = parameters_elsewhere(make_params(F32))
        config = ShardingConfig(state_residency=StateResidency.HOST, bucket_cap_mb=1e-6)
        optimizer = ShardedDecoupledAdamW(params.items(), **LAW, config=config)
        give_gradients(params, 1, 0)
        optimizer.step()
    down = pretence.left_under_way
    assert len(down) == len(params) and down[-1] == 0
    assert all(left == 2 for left in down[:-1]), "a gradient, and a parameter on which the law acts"


def test_a_device_without_streams_is_refused() -> None:
    with pretended_device():
        delattr(torch.get_device_module(ELSEWHERE), "Stream")
        with pytest.raises(ValueError, match=r"state_residency: expected StateResidency.DEVICE.*on cuda, got HOST"):
            ShardedDecoupledAdamW(
                parameters_elsewhere(make_params(F32)).items(),
                config=ShardingConfig(state_residency=StateResidency.HOST),
            )
