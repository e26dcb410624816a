"""State in host memory while parameters are on a GPU. What can be seen without one is in tests/test_state_residency.py.

The host's kernel and the GPU's round differently, so the two residencies are close; on any number of ranks, and against
a CPU that is given the same averaged gradients, state in host memory has no tolerance.
"""

import gc
import math
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
from tests.gpu.probes import DEVICE, FIRST_CASE_TIMEOUT_S, no_host_sync, on_gpu
from tests.harness import nccl_group, on_cpu
from tests.models import BF16, F32, draw_gradient, make_groups, named
from tests.pool import on_ranks

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4)
FEW_EACH = 1e-3
NUM_STEPS, SKIPPED = 6, 3

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("odd sizes", {}),
    "one bucket": ("odd sizes", dict(bucket_cap_mb=16.0)),
    "large": ("large", {}),
    "bf16, fp32 main": ("bf16", {}),
    "bf16, remainder, bf16 moments": ("bf16", dict(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)),
    "bf16, sharded gradients in fp32": (
        "bf16",
        dict(gradient_residency=GradientResidency.SHARDED, gradients_in=F32),
    ),
    "mixed dtypes": ("mixed dtypes", {}),
}


def train(
    group: Any, parameters: str, settings: dict[str, Any], residency: StateResidency, device: str, over_nccl: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and fragments of state: clipped steps, a skipped one, gradients that are missing now and then."""
    groups = make_groups(parameters, seed=0)
    params = named(on_gpu(groups) if device == DEVICE else groups)
    settings = dict(settings)
    if (dtype := settings.pop("gradients_in", None)) is not None:
        for p in params.values():
            p.grad_dtype = dtype
    config = ShardingConfig(**dict(bucket_cap_mb=FEW_EACH, skip_nonfinite=True, state_residency=residency) | settings)
    process_group = nccl_group() if over_nccl else group
    optimizer = ShardedDecoupledAdamW(groups, **LAW, process_group=process_group, config=config)
    for step in range(NUM_STEPS):
        given = []
        for index, p in enumerate(params.values()):
            if (step + index) % 3:
                gradient = draw_gradient(p.detach().cpu(), step, index)
                if step == SKIPPED and gradient.numel():
                    gradient.view(-1)[-1] = math.inf
                given.append((p.view_as(p), gradient.to(device)))
        torch.autograd.backward(*zip(*given, strict=True))
        optimizer.clip_grad_norm_(0.1)
        if step > 0 and over_nccl:
            with no_host_sync():  # which lets the host wait for an event, as it has to for gradients to come down
                optimizer.step()
        else:
            optimizer.step()
        metrics = optimizer.metrics()
        assert all(value.device == optimizer.param_groups[0]["params"][0].device for value in metrics.values())
        optimizer.zero_grad()
    assert metrics["skipped_steps"] == 1.0
    if residency is StateResidency.HOST:
        assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())
    state = {f"{name}.{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    return on_cpu(params) | {"norm": metrics["l2_norm/update/global"].cpu()}, on_cpu(state)


@pytest.mark.parametrize("case", CASES)
def test_one_rank_over_nccl_waits_for_copies_alone_and_has_what_a_cpu_has(case: str) -> None:
    """Clipping apart, whose norm a GPU adds up in another order: within the rounding of one divisor."""
    there = (*CASES[case], StateResidency.HOST, DEVICE, True)
    ((found, state),) = on_ranks(1, train, *there, timeout_s=FIRST_CASE_TIMEOUT_S)
    ((expected, expected_state),) = on_ranks(1, train, *CASES[case], StateResidency.HOST, "cpu", False)
    for key, value in (expected | expected_state).items():
        torch.testing.assert_close((found | state)[key], value, rtol=1e-2 if value.dtype == BF16 else 1e-5, atol=1e-6)


def bytes_in_use(group: Any, dtype: torch.dtype, residency: GradientResidency) -> tuple[int, int, bool]:
    """What the device holds for 2**22 parameters at rest, what the host holds of state, and if copies are pinned."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    param = nn.Parameter(torch.ones(2**22, device=DEVICE, dtype=dtype))
    config = ShardingConfig(state_residency=StateResidency.HOST, gradient_residency=residency)
    optimizer = ShardedDecoupledAdamW([param], process_group=group, config=config)
    for _ in range(2):
        param.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    is_pinned = all(bucket.param.is_pinned() and bucket.grad.is_pinned() for bucket in optimizer._shards.buckets)
    return torch.cuda.memory_allocated() - before, optimizer.state_bytes, is_pinned


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_the_device_holds_parameters_and_gradients_alone(dtype: torch.dtype) -> None:
    """In buckets of their own: with sharded gradients the last one's buffer stays, and here there is only one."""
    numel, itemsize = 2**22, dtype.itemsize
    for used, state_bytes, is_pinned in on_ranks(
        2, bytes_in_use, dtype, GradientResidency.FULL, timeout_s=FIRST_CASE_TIMEOUT_S
    ):
        assert 2 * numel * itemsize <= used <= 2 * numel * itemsize + 2**16
        assert state_bytes == (12 if dtype == BF16 else 8) * numel // 2
        assert is_pinned
    for used, _, _ in on_ranks(2, bytes_in_use, dtype, GradientResidency.SHARDED):
        assert 2.5 * numel * itemsize <= used <= 2.5 * numel * itemsize + 2**16
