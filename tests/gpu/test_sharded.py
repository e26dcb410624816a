"""``ShardedDecoupledAdamW`` on a GPU: alone, over NCCL at one rank, and over gloo at two ranks that share the GPU.

The control is the unsharded optimizer on the same GPU, fed with the mean of all ranks' gradients in rank order in fp32.
A sum of two has the same bits in either order, so at two ranks no backend can deviate from that, and nothing here has a
tolerance.
"""

import gc
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim.lr_scheduler import LambdaLR

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.precision import join, weight_of
from tests.gpu.probes import DEVICE, no_host_sync
from tests.models import BF16, F32, Groups, draw_gradient, mains_of, make_groups, mean_in_rank_order, named
from tests.pool import on_ranks

ONE_EACH = 1e-6  # MiB: less than any parameter, so every parameter gets a bucket of its own
FEW_EACH = 1e-3
ALL_IN_ONE = 1024.0
FIRST_CASE_TIMEOUT_S = 120.0  # the first case on a rank starts CUDA, and NCCL, and compiles kernels

LR = 3e-3
WEIGHT_DECAY = 2e-4


@dataclass(frozen=True)
class Scenario:
    """One way to train; the defaults are the plainest."""

    parameters: str = "odd sizes"
    num_steps: int = 6
    bucket_cap_mb: float = ALL_IN_ONE
    amsgrad: bool = False
    main_parameter: MainParameter = MainParameter.FP32
    moments: Moments = Moments.FP32
    max_norm: float | None = None
    some_are_missing: bool = False
    loss_scale: float | None = None
    overflowing_steps: tuple[int, ...] = ()
    lr_on_device: bool = False

    @property
    def config(self) -> ShardingConfig:
        return ShardingConfig(
            bucket_cap_mb=self.bucket_cap_mb, main_parameter=self.main_parameter, moments=self.moments
        )

    def make_lr(self) -> float | Tensor:
        return torch.tensor(LR, device=DEVICE) if self.lr_on_device else LR


AS_UNSHARDED: dict[str, Any] = dict(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)
"""Everything in the parameter's dtype, as DecoupledAdamW has it."""


@dataclass
class Report:
    """What one rank saw: its fragments of the state, the parameters, and the control's state and parameters."""

    fragments: dict[str, dict[str, Tensor]]
    params: dict[str, Tensor]
    control_state: dict[str, dict[str, Tensor]]
    control_params: dict[str, Tensor]


# --- on a rank ---


@cache
def nccl_group() -> Any:
    """A group of this rank alone, made once per process."""
    torch.cuda.set_device(0)
    return dist.new_group([dist.get_rank()], backend="nccl", use_local_synchronization=True)


def on_gpu(groups: Groups) -> Groups:
    for group in groups:
        group["params"] = [(name, nn.Parameter(p.detach().to(DEVICE), p.requires_grad)) for name, p in group["params"]]
    return groups


class Training:
    """The optimizer, and if need be a loss scaler, as a training loop uses them."""

    def __init__(self, groups: Groups, process_group: Any, scenario: Scenario) -> None:
        self.params = named(groups)
        self.max_norm = scenario.max_norm
        self.optimizer = ShardedDecoupledAdamW(
            groups,
            lr=scenario.make_lr(),
            weight_decay=WEIGHT_DECAY,
            amsgrad=scenario.amsgrad,
            process_group=process_group,
            config=scenario.config,
        )
        self.scaler = None
        if scenario.loss_scale is not None:
            # Its scalers agree on what they found, as those of several ranks must.
            group = None if process_group is None or process_group.size() == 1 else process_group
            make = torch.amp.GradScaler if group is None else partial(ShardedGradScaler, process_group=group)
            self.scaler = make(DEVICE, init_scale=scenario.loss_scale)

    def step(self, gradients: dict[str, Tensor]) -> Tensor | None:
        """Backward and step; the norm, where gradients are clipped."""
        if self.scaler is not None:
            self.scaler.scale(torch.zeros((), device=DEVICE))  # as every loop does, with its loss
        torch.autograd.backward(
            [self.params[name].view_as(self.params[name]) for name in gradients], [*gradients.values()]
        )
        norm = None
        if self.scaler is not None and (self.max_norm is not None or isinstance(self.scaler, ShardedGradScaler)):
            self.scaler.unscale_(self.optimizer)
        if self.max_norm is not None:
            norm = self.optimizer.clip_grad_norm_(self.max_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return norm


def train_beside_control(group: Any, over_nccl: bool, scenario: Scenario) -> Report:
    """Trains both, and raises at the first step after which a parameter differs.

    Args:
        group: A gloo group, or None without torch.distributed.
        over_nccl: Take a group of this rank alone instead.
        scenario: What to train, and how.
    """
    process_group = nccl_group() if over_nccl else group
    rank, num_ranks = (0, 1) if process_group is None else (process_group.rank(), process_group.size())
    # Every rank starts from weights of its own: the optimizer must make them rank 0's.
    training = Training(on_gpu(make_groups(scenario.parameters, seed=rank)), process_group, scenario)
    params = training.params
    control_groups = on_gpu(make_groups(scenario.parameters, seed=0))
    if scenario.main_parameter is not MainParameter.NONE:
        control_groups = mains_of(control_groups)
    control_params = named(control_groups)
    control = DecoupledAdamW(control_groups, lr=scenario.make_lr(), weight_decay=WEIGHT_DECAY, amsgrad=scenario.amsgrad)
    schedulers = [LambdaLR(one, lambda step: 1.0 / (1 + step)) for one in (training.optimizer, control)]
    scale = scenario.loss_scale or 1.0

    for step in range(scenario.num_steps):
        overflows = step in scenario.overflowing_steps
        scaled = [
            {
                name: draw_gradient(p.detach().cpu(), step, of_rank, index).to(DEVICE) * scale
                for index, (name, p) in enumerate(params.items())
                if p.requires_grad and not (scenario.some_are_missing and (step + index) % 3 == 0)
            }
            for of_rank in range(num_ranks)
        ]
        if overflows:
            scaled[0]["weight"].fill_(math.inf)  # on one rank alone, of which the others have to hear
        with no_host_sync() if num_ranks == 1 and step > 0 else nullcontext():
            norm = training.step({name: gradient.clone() for name, gradient in scaled[rank].items()})

        if overflows:
            scale /= 2
        else:
            for name, p in control_params.items():
                p.grad = None
                if name in scaled[0]:
                    p.grad = mean_in_rank_order([one[name] for one in scaled]).to(p.dtype) / scale
                if p.grad is not None and norm is not None and scenario.max_norm is not None:
                    p.grad = p.grad / (1.0 / torch.clamp(scenario.max_norm / (norm + 1e-6), max=1.0))
            control.step()
        for scheduler in schedulers:
            scheduler.step()
        for name, p in params.items():
            expected = weight_of(control_params[name].detach(), p.dtype)
            assert torch.equal(p, expected), f"step {step}: {name} {tuple(p.shape)} {p.dtype} differs"
    if training.scaler is not None:
        assert training.scaler.get_scale() == scale
    return Report(
        fragments={name: on_cpu(training.optimizer.state.get(p, {})) for name, p in params.items()},
        params=on_cpu(params),
        control_state={name: on_cpu(control.state.get(p, {})) for name, p in control_params.items()},
        control_params=on_cpu(control_params),
    )


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in tensors.items()}


# --- in the test process ---


def assert_state_is_the_controls(reports: list[Report]) -> None:
    """Fragments joined in rank order are the control's state; a main parameter, with its remainder, is the control."""
    one = reports[0]
    for name, control_state in one.control_state.items():
        if not control_state:
            continue
        for report in reports:
            assert torch.equal(report.fragments[name]["step"], control_state["step"]), f"{name}.step"
        whole = {
            key: torch.cat([report.fragments[name][key] for report in reports])
            for key in one.fragments[name]
            if key != "step"
        }
        expected = {key: value.flatten() for key, value in control_state.items() if key != "step"}
        if one.control_params[name].dtype != one.params[name].dtype:
            expected["main_param"] = one.control_params[name].flatten()
            if "main_remainder" in whole:
                whole["main_param"] = join(one.params[name].flatten(), whole.pop("main_remainder"))
        assert set(whole) == set(expected)
        for key, value in expected.items():
            assert whole[key].dtype == value.dtype and torch.equal(whole[key], value), f"{name}.{key}"


SCENARIOS = {
    "fp32": Scenario(),
    "fp32, amsgrad": Scenario(amsgrad=True),
    "several groups": Scenario("several groups"),
    "frozen": Scenario("frozen"),
    "non-contiguous": Scenario("non-contiguous"),
    "mixed dtypes, fp64 among them": Scenario("mixed dtypes"),
    "bf16 with fp32 main": Scenario("bf16", amsgrad=True),
    "bf16 with remainder": Scenario("bf16", main_parameter=MainParameter.REMAINDER),
    "bf16 alone": Scenario("bf16", **AS_UNSHARDED),
    "fp16 with fp32 main": Scenario("fp16"),
    "clipped": Scenario("several groups", max_norm=0.5),
    "bf16 with remainder, clipped": Scenario("bf16", main_parameter=MainParameter.REMAINDER, max_norm=0.1),
    "gradients missing now and then": Scenario(some_are_missing=True, num_steps=8),
    "gradients missing now and then, several buckets": Scenario(
        some_are_missing=True, num_steps=8, bucket_cap_mb=FEW_EACH
    ),
    "loss scaler": Scenario("tiny", loss_scale=2.0**10),
    "loss scaler that skips": Scenario("tiny", loss_scale=2.0**6, overflowing_steps=(1, 3), num_steps=6),
    "loss scaler that skips, amsgrad, clipped": Scenario(
        "tiny", amsgrad=True, max_norm=0.1, loss_scale=2.0**10, overflowing_steps=(2,)
    ),
    "lr on the device": Scenario("several groups", lr_on_device=True),
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
ALONE = SCENARIOS | {  # several ranks' scalers unscale gradients in place, which rounds in fp16
    "fp16, loss scaler that skips": Scenario("fp16", loss_scale=2.0**6, overflowing_steps=(1, 3), num_steps=6)
}


@pytest.mark.parametrize("label", ["fp32, amsgrad", "bf16 with remainder, clipped", "fp16, loss scaler that skips"])
def test_without_torch_distributed_a_step_never_waits_and_equals_the_unsharded_one_bit_for_bit(label: str) -> None:
    assert_state_is_the_controls([train_beside_control(None, False, ALONE[label])])


@pytest.mark.parametrize("scenario", ALONE.values(), ids=list(ALONE))
def test_over_nccl_at_one_rank_a_step_never_waits_and_equals_the_unsharded_one_bit_for_bit(scenario: Scenario) -> None:
    """From the second step on the host does not wait, clipping and loss scaler included."""
    reports = on_ranks(1, train_beside_control, True, scenario, timeout_s=FIRST_CASE_TIMEOUT_S)
    assert_state_is_the_controls(reports)


@every_scenario
def test_two_ranks_that_share_a_gpu_equal_the_unsharded_optimizer_bit_for_bit(scenario: Scenario) -> None:
    reports = on_ranks(2, train_beside_control, False, scenario, timeout_s=FIRST_CASE_TIMEOUT_S)
    assert_state_is_the_controls(reports)


@pytest.mark.parametrize("cap", [ONE_EACH, FEW_EACH, ALL_IN_ONE], ids=["one bucket each", "a few each", "one bucket"])
@pytest.mark.parametrize("parameters", ["odd sizes", "mixed dtypes", "large"])
def test_the_size_of_buckets_changes_no_bit(parameters: str, cap: float) -> None:
    scenario = Scenario(parameters, bucket_cap_mb=cap, num_steps=3)
    assert_state_is_the_controls(on_ranks(2, train_beside_control, False, scenario, timeout_s=FIRST_CASE_TIMEOUT_S))


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
