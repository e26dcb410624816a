"""``ShardedDecoupledAdamW`` on a GPU: alone, over NCCL at one rank, and over gloo at two ranks that share the GPU.

The control is that of `tests/harness.py`, on the same GPU. A sum of two has the same bits in either order, so at two
ranks no backend can deviate from the mean in rank order, and nothing here has a tolerance.
"""

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sharded_dadamw import Exchange, MainParameter, ShardedDecoupledAdamW, ShardingConfig
from tests.gpu.probes import DEVICE, FIRST_CASE_TIMEOUT_S, no_host_sync, on_gpu
from tests.harness import (
    ALL_IN_ONE,
    AS_UNSHARDED,
    ONE_EACH,
    SHARDED,
    SOME_EACH,
    Scenario,
    assert_state_is_the_controls,
    nccl_group,
    scenario,
    train_beside_control,
)
from tests.models import BF16, F32, draw_gradient, make_groups, named
from tests.pool import on_ranks


def on_device(parameters: str = "odd sizes", **settings: Any) -> Scenario:
    settings = {"num_steps": 6, "schedule": "LambdaLR", "device": DEVICE, **settings}
    return scenario(parameters, **settings)


IN_REMAINDER: dict[str, Any] = dict(main_parameter=MainParameter.REMAINDER)
NOW_AND_THEN: dict[str, Any] = dict(without_gradient="alternating", num_steps=8)
SCENARIOS = {
    "fp32": on_device(),
    "fp32, amsgrad": on_device(amsgrad=True),
    "several groups": on_device("several groups"),
    "frozen": on_device("frozen"),
    "non-contiguous": on_device("non-contiguous"),
    "mixed dtypes, fp64 among them": on_device("mixed dtypes"),
    "bf16 with fp32 main": on_device("bf16", amsgrad=True),
    "bf16 with remainder": on_device("bf16", **IN_REMAINDER),
    "bf16 alone": on_device("bf16", **AS_UNSHARDED),
    "fp16 alone, amsgrad": on_device("fp16", amsgrad=True, **AS_UNSHARDED),
    "fp16 with fp32 main": on_device("fp16"),
    "clipped": on_device("several groups", clip=(0.5, 2.0)),
    "bf16 with remainder, clipped": on_device("bf16", clip=(0.1, 2.0), **IN_REMAINDER),
    "gradients missing now and then": on_device(**NOW_AND_THEN),
    "gradients missing now and then, several buckets": on_device(bucket_cap_mb=SOME_EACH, **NOW_AND_THEN),
    "loss scaler": on_device("tiny", loss_scale=2.0**10),
    "loss scaler that skips": on_device("tiny", loss_scale=2.0**6, overflows={1: 0, 3: 0}),
    "loss scaler that skips, amsgrad, clipped": on_device(
        "tiny", amsgrad=True, clip=(0.1, 2.0), loss_scale=2.0**10, overflows={2: 0}
    ),
    "lr on the device": on_device("several groups", lr_on_device=True),
    "sums in rank order": on_device("bf16", exchange=Exchange.RANK_ORDER),
    "sharded gradients, several buckets": on_device(gradient_residency=SHARDED, bucket_cap_mb=SOME_EACH),
    "void steps without a scaler": on_device(skip_nonfinite=True, overflows={1: 0, 3: 0}),
}
ALONE = SCENARIOS | {  # several ranks' scalers unscale gradients in place, which rounds in fp16
    "fp16, loss scaler that skips": on_device("fp16", loss_scale=2.0**6, overflows={1: 0, 3: 0})
}
SIZES = {
    f"{parameters}, {cap} MiB": on_device(parameters, bucket_cap_mb=cap, num_steps=3)
    for parameters in ("odd sizes", "mixed dtypes", "large")
    for cap in (ONE_EACH, SOME_EACH, ALL_IN_ONE)
}


@pytest.mark.parametrize("label", ["fp32, amsgrad", "bf16 with remainder, clipped", "fp16, loss scaler that skips"])
def test_without_torch_distributed_a_step_never_waits_and_equals_the_unsharded_one_bit_for_bit(label: str) -> None:
    assert_state_is_the_controls([train_beside_control(None, ALONE[label])])


@pytest.mark.parametrize("label", ALONE)
def test_over_nccl_at_one_rank_a_step_never_waits_and_equals_the_unsharded_one_bit_for_bit(label: str) -> None:
    """From the second step on the host does not wait, clipping and loss scaler included; nor for the unsharded one."""
    case = replace(ALONE[label], over_nccl=True)
    assert_state_is_the_controls(on_ranks(1, train_beside_control, case, timeout_s=FIRST_CASE_TIMEOUT_S))


@pytest.mark.parametrize("case", [*SCENARIOS.values(), *SIZES.values()], ids=[*SCENARIOS, *SIZES])
def test_two_ranks_that_share_a_gpu_equal_the_unsharded_optimizer_bit_for_bit(case: Scenario) -> None:
    assert_state_is_the_controls(on_ranks(2, train_beside_control, case, timeout_s=FIRST_CASE_TIMEOUT_S))


def same_run(group: Any, over_nccl: bool) -> list[str]:
    """The fingerprint after each of a few clipped steps, of four micro-batches over all ranks."""
    params = named(on_gpu(make_groups("bf16", seed=0)))
    config = ShardingConfig(micro_batches=4, bucket_cap_mb=SOME_EACH, main_parameter=MainParameter.REMAINDER)
    process_group = nccl_group() if over_nccl else group
    optimizer = ShardedDecoupledAdamW(
        params.items(), process_group=process_group, config=config, max_grad_norm=0.1, metrics_in_step=True
    )
    found = []
    for step in range(4):
        passes = [
            [draw_gradient(p.detach().cpu(), step, number, index).to(DEVICE) for index, p in enumerate(params.values())]
            for number in optimizer.micro_batches
        ]
        with no_host_sync() if over_nccl and step > 1 else nullcontext():
            for gradients in passes:
                torch.autograd.backward([p.view_as(p) for p in params.values()], gradients)
            optimizer.step()
            optimizer.metrics()
        found.append(str(optimizer.fingerprint()))
        optimizer.zero_grad()
    return found


def test_micro_batches_have_the_same_bits_on_one_rank_over_nccl_and_on_two_that_share_a_gpu() -> None:
    (alone,) = on_ranks(1, same_run, True, timeout_s=FIRST_CASE_TIMEOUT_S)
    assert len(set(alone)) == len(alone)
    assert on_ranks(2, same_run, False, timeout_s=FIRST_CASE_TIMEOUT_S) == [alone, alone]


def differ_in_lr(group: Any) -> str:
    param = nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = ShardedDecoupledAdamW([param], process_group=group)
    for step in range(3):
        (param * (1 + group.rank())).sum().backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + group.rank()) if step == 1 else 1e-3
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
        optimizer.zero_grad()
    return "no error"


def test_ranks_that_disagree_hear_of_it_in_the_next_step() -> None:
    for heard in on_ranks(2, differ_in_lr, timeout_s=FIRST_CASE_TIMEOUT_S):
        assert heard.startswith("2: ranks disagreed about the step before this call; the first difference is param_gro")
        assert heard.endswith("that was taken with wrong numbers, so go back to a checkpoint")


def bytes_of(group: Any, over_nccl: bool, dtype: torch.dtype) -> tuple[int, int]:
    """What the optimizer says it holds, and what the device says has come into use."""
    gc.collect()
    param = nn.Parameter(torch.ones(2**22, device=DEVICE, dtype=dtype))
    before = torch.cuda.memory_allocated()
    optimizer = ShardedDecoupledAdamW([param], process_group=nccl_group() if over_nccl else group)
    return optimizer.state_bytes, torch.cuda.memory_allocated() - before


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_two_ranks_hold_half_of_the_state_each(dtype: torch.dtype) -> None:
    """And the device knows of that half, beside the gradients."""
    ((whole, used_alone),) = on_ranks(1, bytes_of, True, dtype)
    for half, used in on_ranks(2, bytes_of, False, dtype):
        assert 2 * half == whole
        assert used_alone - used == whole - half
