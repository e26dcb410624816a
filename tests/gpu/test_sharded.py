"""``ShardedDecoupledAdamW`` on a GPU: alone, over NCCL at one rank, and over gloo at two ranks that share the GPU.

The control is that of `tests/harness.py`, on the same GPU. A sum of two has the same bits in either order, so at two
ranks no backend can deviate from the mean in rank order, and nothing here has a tolerance.
"""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_dadamw import MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.hyperparameters import Hyperparameters
from tests.gpu.probes import DEVICE, FIRST_CASE_TIMEOUT_S, on_gpu
from tests.harness import (
    ALL_IN_ONE,
    AS_UNSHARDED,
    ONE_EACH,
    SOME_EACH,
    Scenario,
    assert_state_is_the_controls,
    nccl_group,
    on_cpu,
    scenario,
    train_beside_control,
)
from tests.models import BF16, F32, draw_gradient, make_groups, named
from tests.pool import on_ranks

LR = 3e-3


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
    """From the second step on the host does not wait, clipping and loss scaler included."""
    case = replace(ALONE[label], over_nccl=True)
    assert_state_is_the_controls(on_ranks(1, train_beside_control, case, timeout_s=FIRST_CASE_TIMEOUT_S))


@pytest.mark.parametrize("case", [*SCENARIOS.values(), *SIZES.values()], ids=[*SCENARIOS, *SIZES])
def test_two_ranks_that_share_a_gpu_equal_the_unsharded_optimizer_bit_for_bit(case: Scenario) -> None:
    assert_state_is_the_controls(on_ranks(2, train_beside_control, case, timeout_s=FIRST_CASE_TIMEOUT_S))


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


# --- stochastic moments ---


def train_with_bf16_moments(group: Any, over_nccl: bool, config: ShardingConfig) -> dict[str, Tensor]:
    """Parameters, and this rank's fragments of the moments, after a few steps on gradients equal on all ranks."""
    groups = on_gpu(make_groups("bf16", seed=0))
    params = named(groups)
    process_group = nccl_group() if over_nccl else group
    optimizer = ShardedDecoupledAdamW(groups, lr=LR, amsgrad=True, process_group=process_group, config=config)
    for step in range(5):
        for index, p in enumerate(params.values()):
            p.grad = draw_gradient(p.detach().cpu(), step, index).to(DEVICE)
        optimizer.step()
        optimizer.zero_grad()
    report = on_cpu(params)
    for name, p in params.items():
        report.update(on_cpu({f"{name}.{key}": value for key, value in optimizer.state[p].items()}))
    return report


@pytest.mark.parametrize("main_parameter", [MainParameter.FP32, MainParameter.REMAINDER])
@pytest.mark.parametrize("cap", [ONE_EACH, ALL_IN_ONE], ids=["one bucket each", "one bucket"])
def test_stochastic_rounding_draws_the_same_bits_on_one_rank_on_two_and_on_a_cpu(
    cap: float, main_parameter: MainParameter
) -> None:
    """Moments depend on gradients alone, by arithmetic that rounds the same everywhere; so a CPU gets their very bits.

    Parameters are compared between numbers of ranks only: the reference divides where the kernel multiplies.
    """
    config = ShardingConfig(bucket_cap_mb=cap, main_parameter=main_parameter, moments=Moments.BF16)
    (alone,) = on_ranks(1, train_with_bf16_moments, True, config, timeout_s=FIRST_CASE_TIMEOUT_S)
    first, second = on_ranks(2, train_with_bf16_moments, False, config, timeout_s=FIRST_CASE_TIMEOUT_S)
    for key, whole in alone.items():
        _, _, kind = key.partition(".")
        if kind in ("", "step"):
            assert torch.equal(first[key], whole) and torch.equal(second[key], whole), key
        else:
            assert torch.equal(torch.cat([first[key], second[key]]), whole), key

    params = named(make_groups("bf16", seed=0))
    hyper = Hyperparameters(LR, LR, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=1e-5, amsgrad=True)
    first_element = 0
    for index, (name, p) in enumerate(params.items()):
        moments = [torch.zeros(p.shape, dtype=BF16) for _ in range(3)]
        for step in range(5):
            adamw_(
                p.detach().float(),
                draw_gradient(p.detach(), step, index),
                moments[0],
                moments[1],
                moments[2],
                torch.tensor(step + 1.0),
                Step([hyper]),
                first_element=first_element,
            )
        first_element += p.numel()
        for key, moment in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=True):
            assert torch.equal(alone[f"{name}.{key}"], moment.flatten()), f"{name}.{key}"
