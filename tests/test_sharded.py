"""Sharded equals unsharded, bit for bit, given equal reduced gradients.

The experiment is ShardedDecoupledAdamW on 1, 2, 3 and 4 ranks. The control is DecoupledAdamW on a whole copy of the
parameters, fed with the mean of all ranks' gradients, (g0 + g1 + ...) / N in rank order in fp32. After every step every
parameter must be torch.equal to the control's, and at the end so must every moment, put together over the ranks.

Sizes and numbers of ranks meet in the layout of a bucket, which tests/test_layout.py proves for all; schedules, dtypes
and clipping know nothing of ranks. So each scenario names the few numbers of ranks on which it runs. Ranks are
simulated, but where DDP, a process's memory or its wire is what is tested.
"""

import contextlib
import copy
import gc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, StepLR

from sharded_dadamw import DecoupledAdamW, Exchange, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.precision import weight_of
from tests import pool
from tests.models import (
    BF16,
    F32,
    F64,
    MODELS,
    TiedLanguageModel,
    draw_gradient,
    mains_of,
    make_groups,
    mean_in_rank_order,
    named,
    reduce_for_control,
    whole_state_dict,
)
from tests.simulated import on_ranks

ONE_EACH = 1e-6  # MiB: less than any parameter, so every parameter gets a bucket of its own
FEW_EACH = 1e-3
ALL_IN_ONE = 1024.0
ALIGNMENT = 64  # elements

SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LinearLR": lambda o: LinearLR(o, start_factor=0.2, total_iters=6),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=[g["lr"] for g in o.param_groups], total_steps=30),
    "StepLR": lambda o: StepLR(o, step_size=3, gamma=0.5),
}

WITHOUT_GRADIENT: dict[str, Callable[[int, int], bool]] = {
    "nobody": lambda step, index: False,
    "alternating": lambda step, index: (step + index) % 3 == 0,
    "one never": lambda step, index: index == 1,
    "some late": lambda step, index: step < 2 * index,
    "everybody sometimes": lambda step, index: step % 4 == 2,
}


@dataclass(frozen=True)
class Scenario:
    """One way to train; the defaults are the plainest."""

    parameters: str = "odd sizes"
    num_steps: int = 12
    bucket_cap_mb: float = ALL_IN_ONE
    amsgrad: bool = False
    main_parameter: MainParameter = MainParameter.FP32
    moments: Moments = Moments.FP32
    schedule: str | None = None
    clip: tuple[float, float] | None = None  # max_norm, norm_type
    num_micro_batches: int = 1
    without_gradient: str = "nobody"
    assign: bool = False  # p.grad = ... by hand instead of backward
    reduce_gradients: bool = True
    exchange: Exchange = Exchange.FASTEST

    @property
    def config(self) -> ShardingConfig:
        return ShardingConfig(
            bucket_cap_mb=self.bucket_cap_mb,
            reduce_gradients=self.reduce_gradients,
            main_parameter=self.main_parameter,
            moments=self.moments,
            exchange=self.exchange,
        )


AS_UNSHARDED: dict[str, Any] = dict(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)
"""Everything in the parameter's dtype, as DecoupledAdamW has it."""


@dataclass
class Report:
    """What one rank saw: its fragments of the state, and the control's state."""

    fragments: dict[str, dict[str, Tensor]]
    control_state: dict[str, dict[str, Tensor]]
    control_params: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    trainable: list[str] = field(default_factory=list)


def deliver(params: dict[str, nn.Parameter], gradients: dict[str, Tensor], assign: bool) -> None:
    """Adds gradients the way backward does, or by hand."""
    if assign:
        for name, gradient in gradients.items():
            grad = params[name].grad
            params[name].grad = gradient.clone() if grad is None else grad + gradient
    elif gradients:
        torch.autograd.backward(
            [params[name].view_as(params[name]) for name in gradients], [g.clone() for g in gradients.values()]
        )


def clipped(gradient: Tensor, norm: Tensor, max_norm: float) -> Tensor:
    """What clipping makes of a gradient: divided, in fp32, by 1 / min(1, max_norm / (norm + 1e-6))."""
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return (gradient / (1.0 / coefficient)).to(gradient.dtype)


def first_difference(params: dict[str, nn.Parameter], control: dict[str, nn.Parameter]) -> str | None:
    for name, param in params.items():
        expected = weight_of(control[name].detach(), param.dtype)
        if param.shape != expected.shape or not torch.equal(param, expected):
            difference = (param.detach().double() - expected.double()).abs().max().item()
            return f"{name} {tuple(param.shape)} {param.dtype} differs by up to {difference:.3g}"
    return None


def report_state(
    optimizer: ShardedDecoupledAdamW,
    control: DecoupledAdamW,
    params: dict[str, nn.Parameter],
    control_params: dict[str, nn.Parameter],
) -> Report:
    def values(state: dict[str, Any]) -> dict[str, Tensor]:
        return {key: value.detach().clone() for key, value in state.items()}

    return Report(
        fragments={name: values(optimizer.state[p]) for name, p in params.items() if p in optimizer.state},
        control_state={name: values(control.state[p]) for name, p in control_params.items() if p in control.state},
        control_params={name: p.detach().clone() for name, p in control_params.items()},
        dtypes={name: p.dtype for name, p in params.items()},
        trainable=[name for name, p in params.items() if p.requires_grad],
    )


def train_beside_control(group: Any, scenario: Scenario) -> Report:
    """Trains both, and raises at the first step after which a parameter differs."""
    rank, num_ranks = group.rank(), group.size()
    # Every rank starts from weights of its own: the optimizer must make them rank 0's.
    groups, start = make_groups(scenario.parameters, seed=rank), make_groups(scenario.parameters, seed=0)
    control_groups = mains_of(start) if scenario.main_parameter is MainParameter.FP32 else copy.deepcopy(start)
    params, control_params = named(groups), named(control_groups)  # before torch takes the names out of the groups
    hyper: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4, amsgrad=scenario.amsgrad)
    optimizer = ShardedDecoupledAdamW(groups, **hyper, process_group=group, config=scenario.config)
    control = DecoupledAdamW(control_groups, **hyper)
    schedulers = [SCHEDULES[scenario.schedule](o) for o in (optimizer, control)] if scenario.schedule else []
    assert first_difference(params, named(start)) is None, "construction did not broadcast rank 0's weights"

    for step in range(scenario.num_steps):
        missing = WITHOUT_GRADIENT[scenario.without_gradient]
        with_gradient = {
            name: index
            for index, (name, p) in enumerate(params.items())
            if p.requires_grad and not missing(step, index)
        }

        def local_gradients(of_rank: int, micro: int) -> dict[str, Tensor]:
            return {
                name: draw_gradient(params[name], step, of_rank, micro, index)  # noqa: B023
                for name, index in with_gradient.items()  # noqa: B023
            }

        per_rank = []
        for r in range(num_ranks):
            total = local_gradients(r, 0)
            for micro in range(1, scenario.num_micro_batches):
                for name, gradient in local_gradients(r, micro).items():
                    total[name] = total[name] + gradient
            per_rank.append(total)
        reduced = {name: mean_in_rank_order([local[name] for local in per_rank]) for name in with_gradient}

        if scenario.reduce_gradients:
            for micro in range(scenario.num_micro_batches):
                last = micro == scenario.num_micro_batches - 1
                with contextlib.nullcontext() if last else optimizer.no_sync():
                    deliver(params, local_gradients(rank, micro), scenario.assign)
        else:
            deliver(params, reduced, scenario.assign)
        norm = torch.tensor(0.0)
        if scenario.clip is not None:
            norm = optimizer.clip_grad_norm_(scenario.clip[0], norm_type=scenario.clip[1])
            check_norm(norm, reduced, scenario.clip[1])
        optimizer.step()
        if not scenario.reduce_gradients:
            for name, gradient in reduced.items():
                assert torch.equal(params[name].grad, gradient), f"{name}.grad was to be read only"
        optimizer.zero_grad()

        for name, p in control_params.items():
            p.grad = reduced[name].to(p.dtype) if name in reduced else None
            if p.grad is not None and scenario.clip is not None:
                p.grad = clipped(p.grad, norm, scenario.clip[0])
        control.step()
        for scheduler in schedulers:
            scheduler.step()
        difference = first_difference(params, control_params)
        assert difference is None, f"step {step}: {difference}"
    return report_state(optimizer, control, params, control_params)


def check_norm(norm: Tensor, reduced: dict[str, Tensor], norm_type: float) -> None:
    assert norm.shape == (), f"expected a 0-d norm, got {tuple(norm.shape)}"
    flat = torch.cat([torch.zeros(1, dtype=F64), *(g.double().flatten() for g in reduced.values())])
    expected = flat.abs().max() if norm_type == math.inf else flat.square().sum().sqrt()
    # One fp32 rounding of the result, and for the 2-norm whatever blocks the squares are summed in.
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)


def assert_state_is_the_controls(reports: list[Report]) -> None:
    """Fragments, concatenated in rank order, are the control's moments; step counts agree everywhere."""
    __tracebackhide__ = True
    control = reports[0]
    for report in reports:
        assert set(report.fragments) == set(reports[0].fragments), "state keys differ between ranks"
    for name, expected in control.control_state.items():
        shards = [report.fragments[name] for report in reports]
        keys = set(expected) | ({"main_param"} if control.control_params[name].dtype != control.dtypes[name] else set())
        for rank, shard in enumerate(shards):
            assert set(shard) == keys, f"{name} on rank {rank} holds {set(shard)}"
            assert shard["step"].shape == () and shard["step"].dtype == F32
            assert torch.equal(shard["step"], expected["step"]), f"{name}: step {shard['step']} on rank {rank}"
            assert all(value.dim() == 1 for key, value in shard.items() if key != "step")
        for key in keys - {"step"}:
            whole = torch.cat([shard[key] for shard in shards])
            truth = control.control_params[name] if key == "main_param" else expected[key]
            assert whole.dtype == truth.dtype, f"{name}.{key} is {whole.dtype}"
            assert torch.equal(whole, truth.flatten()), f"{name}.{key} differs"
    for name in set(control.fragments) - set(control.control_state):
        assert name in control.trainable, f"frozen {name} has state"
        for report in reports:
            for key, value in report.fragments[name].items():
                assert key == "main_param" or not value.any(), f"{name} never had a gradient, but {key} moved"


def on_numbers_of_ranks(*scenarios: tuple[str, Scenario, Sequence[int]]) -> Any:
    """Each scenario on the numbers of ranks beside it: all where sizes meet shards, else one or two that differ."""
    cases = [
        pytest.param(scenario, num_ranks, id=f"{name}, {num_ranks} ranks")
        for name, scenario, of_it in scenarios
        for num_ranks in of_it
    ]
    return pytest.mark.parametrize(("scenario", "num_ranks"), cases)


@on_numbers_of_ranks(
    ("odd sizes in one bucket", Scenario(), (1, 2, 3, 4)),
    ("odd sizes, one bucket each", Scenario(bucket_cap_mb=ONE_EACH), (2, 3)),
    ("odd sizes, a few per bucket", Scenario(bucket_cap_mb=FEW_EACH), (4,)),
    ("a bias smaller than the rank count", Scenario("tiny"), (3, 4)),
    ("a bias smaller than the rank count in a bucket of its own", Scenario("tiny", bucket_cap_mb=ONE_EACH), (2, 4)),
    ("nothing but a scalar and an empty parameter", Scenario("empty and scalar", num_steps=3), (1, 3)),
    ("the same, one bucket each", Scenario("empty and scalar", num_steps=3, bucket_cap_mb=ONE_EACH), (2,)),
    ("several groups", Scenario("several groups"), (3,)),
    (
        "several groups, a few per bucket, scheduled",
        Scenario("several groups", bucket_cap_mb=FEW_EACH, schedule="StepLR"),
        (2,),
    ),
    ("mixed dtypes with fp32 main parameters", Scenario("mixed dtypes"), (2, 3)),
    ("mixed dtypes with fp32 main parameters, one bucket each", Scenario("mixed dtypes", bucket_cap_mb=ONE_EACH), (4,)),
    ("mixed dtypes without main parameters", Scenario("mixed dtypes", **AS_UNSHARDED), (3,)),
    ("bf16 with fp32 main parameters and amsgrad", Scenario("bf16", amsgrad=True), (3,)),
    ("bf16 without main parameters and amsgrad", Scenario("bf16", amsgrad=True, **AS_UNSHARDED), (2,)),
    ("fp16 with fp32 main parameters", Scenario("fp16", num_steps=8), (2,)),
    ("fp16 without main parameters", Scenario("fp16", num_steps=8, **AS_UNSHARDED), (3,)),
    ("more than is exchanged at once", Scenario("large", num_steps=2), (2, 3)),
    ("non-contiguous parameters", Scenario("non-contiguous", num_steps=6), (2,)),
    ("aligned sizes", Scenario("aligned", num_steps=6), (4,)),
    ("amsgrad", Scenario(amsgrad=True), (1, 4)),
    ("LinearLR", Scenario("several groups", schedule="LinearLR", num_steps=15), (2,)),
    ("OneCycleLR", Scenario("several groups", schedule="OneCycleLR", num_steps=20), (3,)),
    ("gradients assigned by hand", Scenario("mixed dtypes", assign=True), (2, 3)),
)
def test_sharded_equals_unsharded(scenario: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, scenario))


@pytest.mark.parametrize("exchange", [Exchange.FASTEST, Exchange.RANK_ORDER])
def test_processes_that_exchange_memory_or_messages_do_as_simulated_ranks(exchange: Exchange) -> None:
    scenario = Scenario("mixed dtypes", bucket_cap_mb=FEW_EACH, clip=(0.05, 2.0), exchange=exchange)
    assert_state_is_the_controls(pool.on_ranks(3, train_beside_control, scenario))


@on_numbers_of_ranks(
    ("frozen parameters", Scenario("frozen"), (3,)),
    ("frozen parameters, one bucket each", Scenario("frozen", bucket_cap_mb=ONE_EACH), (2,)),
    ("unused ones alternating", Scenario(without_gradient="alternating"), (2, 3)),
    (
        "unused ones alternating, one bucket each",
        Scenario(without_gradient="alternating", bucket_cap_mb=ONE_EACH),
        (4,),
    ),
    ("unused ones alternating, amsgrad, bf16", Scenario("bf16", without_gradient="alternating", amsgrad=True), (3,)),
    ("unused ones alternating, assigned by hand", Scenario(without_gradient="alternating", assign=True), (2,)),
    (
        "unused ones alternating in several dtypes and groups",
        Scenario("mixed dtypes", without_gradient="alternating"),
        (3,),
    ),
    ("one never used", Scenario("several groups", without_gradient="one never"), (4,)),
    ("some used late, scheduled", Scenario(without_gradient="some late", schedule="OneCycleLR", num_steps=24), (2,)),
    ("steps without any gradient", Scenario("several groups", without_gradient="everybody sometimes"), (1, 3)),
    (
        "unused ones, accumulated and clipped",
        Scenario(without_gradient="alternating", num_micro_batches=2, clip=(0.5, 2.0)),
        (3,),
    ),
    (
        "unused ones, gradients reduced by others",
        Scenario(without_gradient="alternating", reduce_gradients=False),
        (2,),
    ),
)
def test_a_parameter_without_gradient_is_untouched_decay_included(scenario: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, scenario))


@on_numbers_of_ranks(
    ("two micro-batches", Scenario(num_micro_batches=2), (2, 3)),
    ("five micro-batches, mixed dtypes", Scenario("mixed dtypes", num_micro_batches=5, num_steps=6), (4,)),
    ("three micro-batches, a few per bucket", Scenario(num_micro_batches=3, bucket_cap_mb=FEW_EACH), (3,)),
    ("three micro-batches assigned by hand", Scenario(num_micro_batches=3, assign=True), (1,)),
)
def test_accumulation_with_no_sync_sums_locally_and_reduces_once(scenario: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, scenario))


@on_numbers_of_ranks(
    ("2-norm", Scenario(clip=(0.5, 2.0)), (1, 3)),
    ("2-norm, one bucket each", Scenario(clip=(0.5, 2.0), bucket_cap_mb=ONE_EACH), (4,)),
    ("inf-norm", Scenario(clip=(0.01, math.inf)), (3,)),
    ("2-norm that never clips", Scenario(clip=(1e6, 2.0)), (2,)),
    ("2-norm, bf16 with main parameters", Scenario("bf16", clip=(0.1, 2.0)), (2,)),
    (
        "2-norm, several groups, amsgrad, scheduled",
        Scenario("several groups", clip=(0.1, 2.0), amsgrad=True, schedule="StepLR"),
        (4,),
    ),
    ("inf-norm, unused ones", Scenario("several groups", clip=(0.01, math.inf), without_gradient="alternating"), (3,)),
    ("2-norm without any gradient", Scenario(clip=(0.5, 2.0), without_gradient="everybody sometimes"), (2,)),
    ("2-norm, gradients reduced by others", Scenario(clip=(0.1, 2.0), reduce_gradients=False), (3,)),
)
def test_clipping_is_by_the_true_global_norm(scenario: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, scenario))


@on_numbers_of_ranks(
    ("odd sizes", Scenario(reduce_gradients=False), (1, 3)),
    ("odd sizes, one bucket each", Scenario(reduce_gradients=False, bucket_cap_mb=ONE_EACH), (4,)),
    ("mixed dtypes, assigned by hand", Scenario("mixed dtypes", reduce_gradients=False, assign=True), (2,)),
)
def test_gradients_reduced_by_others_are_only_read(scenario: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, scenario))


# --- real models through real backward ---


def train_model(group: Any, name: str, dtype: torch.dtype, bucket_cap_mb: float, num_micro: int, clip: bool) -> Report:
    """The control takes the ranks' real gradients, gathered by torch, and trains a whole copy with them."""
    torch.manual_seed(group.rank())
    model = MODELS[name]().to(dtype)
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(),
        lr=3e-3,
        weight_decay=1e-4,
        process_group=group,
        config=ShardingConfig(bucket_cap_mb=bucket_cap_mb, overlap=False),  # or p.grad would be an average in part
    )
    params = dict(model.named_parameters())
    control_groups = mains_of([{"params": list(params.items())}])
    control_params = named(control_groups)
    control = DecoupledAdamW(control_groups, lr=3e-3, weight_decay=1e-4)
    schedulers = [SCHEDULES["LinearLR"](o) for o in (optimizer, control)]
    for step in range(10):
        # What this rank's gradient must be, from a copy that no optimizer has touched.
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.grad = None
        seeds = [1000 * step + 10 * micro + group.rank() for micro in range(num_micro)]
        for seed in seeds:
            twin.loss(seed).backward()
        for micro, seed in enumerate(seeds):
            with contextlib.nullcontext() if micro == num_micro - 1 else optimizer.no_sync():
                model.loss(seed).backward()
        norm = torch.tensor(0.0)
        local = {}
        for (key, p), twin_p in zip(params.items(), twin.parameters(), strict=True):
            assert (p.grad is None) == (twin_p.grad is None), f"{key}: a gradient appeared or got lost"
            if p.grad is not None:
                # Other addresses, maybe another order of sums inside a matrix product: not always the same bits.
                torch.testing.assert_close(p.grad, twin_p.grad, rtol=0.05 if dtype == BF16 else 1e-4, atol=1e-6)
                local[key] = p.grad
        reduced = dict(zip(local, reduce_for_control(group, list(local.values())), strict=True))
        if clip:
            norm = optimizer.clip_grad_norm_(0.1)
            check_norm(norm, reduced, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        for key, p in control_params.items():
            p.grad = reduced[key].to(p.dtype) if key in reduced else None
            if clip and p.grad is not None:
                p.grad = clipped(p.grad, norm, 0.1)
        control.step()
        for scheduler in schedulers:
            scheduler.step()
        difference = first_difference(params, control_params)
        assert difference is None, f"step {step}: {difference}"
    if isinstance(model, TiedLanguageModel):
        assert model.head.weight is model.embedding.weight, "the tie was cut"
    return report_state(optimizer, control, params, control_params)


@pytest.mark.parametrize(
    ("model", "dtype", "bucket_cap_mb", "num_micro", "clip", "num_ranks"),
    [
        ("tied language model", F32, ALL_IN_ONE, 1, False, 1),
        ("tied language model", F32, FEW_EACH, 2, True, 3),
        ("tied language model", BF16, ALL_IN_ONE, 1, False, 2),
        ("attention", F32, ALL_IN_ONE, 1, False, 3),
        ("attention", F32, FEW_EACH, 2, True, 2),
        ("attention", BF16, ALL_IN_ONE, 1, False, 4),
    ],
)
def test_a_real_model_trains_as_if_unsharded(
    model: str, dtype: torch.dtype, bucket_cap_mb: float, num_micro: int, clip: bool, num_ranks: int
) -> None:
    reports = on_ranks(num_ranks, train_model, model, dtype, bucket_cap_mb, num_micro, clip)
    assert_state_is_the_controls(reports)
    if model == "tied language model":
        assert not any(name.startswith("frozen") for name in reports[0].control_state)
        unused = [state for name, state in reports[0].control_state.items() if name.startswith("unused")]
        assert unused and not any(value.count_nonzero() for state in unused for value in state.values())


def train_under_ddp(group: Any, wrap_first: bool, gradient_as_bucket_view: bool) -> Report:
    torch.manual_seed(group.rank())
    model = MODELS["tied language model"]()
    for p in model.unused.parameters():  # type: ignore[union-attr]
        p.requires_grad_(False)

    def wrap() -> DistributedDataParallel:
        return DistributedDataParallel(
            model, process_group=group, bucket_cap_mb=1, gradient_as_bucket_view=gradient_as_bucket_view
        )

    def build() -> ShardedDecoupledAdamW:
        config = ShardingConfig(reduce_gradients=False)
        return ShardedDecoupledAdamW(model.named_parameters(), lr=3e-3, process_group=group, config=config)

    if wrap_first:
        ddp = wrap()
        optimizer = build()
    else:
        optimizer = build()
        ddp = wrap()
    params = dict(model.named_parameters())
    control_groups = mains_of([{"params": list(params.items())}])
    control_params = named(control_groups)
    control = DecoupledAdamW(control_groups, lr=3e-3)
    for step in range(8):
        with ddp.no_sync():
            ddp_loss(ddp, 2000 * step + group.rank()).backward()
        ddp_loss(ddp, 2000 * step + 100 + group.rank()).backward()
        for key, p in control_params.items():
            p.grad = None if params[key].grad is None else params[key].grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        control.step()
        difference = first_difference(params, control_params)
        assert difference is None, f"step {step}: {difference}"
    return report_state(optimizer, control, params, control_params)


def ddp_loss(ddp: DistributedDataParallel, seed: int) -> Tensor:
    tokens = torch.randint(0, 17, (4, 9), generator=torch.Generator().manual_seed(seed))
    logits = ddp(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    ("num_ranks", "wrap_first", "gradient_as_bucket_view"),
    [(2, True, False), (3, True, True), (2, False, True), (3, False, False)],
)
def test_under_ddp_the_gradients_it_averaged_train_as_if_unsharded(
    num_ranks: int, wrap_first: bool, gradient_as_bucket_view: bool
) -> None:
    reports = pool.on_ranks(num_ranks, train_under_ddp, wrap_first, gradient_as_bucket_view)
    assert_state_is_the_controls(reports)


def train_on_world(_: Any) -> Report:
    """Without process_group the optimizer takes the default group."""
    return a_few_steps(None, dist.get_rank(), dist.get_world_size())


def a_few_steps(process_group: Any, rank: int, num_ranks: int) -> Report:
    params, control_params = (named(make_groups("odd sizes", seed=seed)) for seed in (rank, 0))
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-3, process_group=process_group)
    control = DecoupledAdamW(control_params.items(), lr=1e-3)
    for step in range(3):
        for index, (p, c) in enumerate(zip(params.values(), control_params.values(), strict=True)):
            p.grad = draw_gradient(p, step, rank, index)
            c.grad = mean_in_rank_order([draw_gradient(p, step, r, index) for r in range(num_ranks)])
        optimizer.clip_grad_norm_(1e9)
        optimizer.step()
        optimizer.zero_grad()
        control.step()
    assert first_difference(params, control_params) is None
    return report_state(optimizer, control, params, control_params)


def test_without_a_process_group_the_default_group_is_used() -> None:
    assert_state_is_the_controls(on_ranks(4, train_on_world))


def train_on_mesh(group: Any) -> Report:
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("dp",))
    return a_few_steps(mesh, group.rank(), group.size())


def test_a_mesh_with_one_axis_is_as_good_as_its_group() -> None:
    assert_state_is_the_controls(on_ranks(2, train_on_mesh))


def train_on_last_two(_: Any) -> Report | None:
    """A group whose ranks are not the world's first: group ranks and global ranks differ."""
    subgroup = dist.new_group([2, 3])
    return None if dist.get_rank() < 2 else a_few_steps(subgroup, subgroup.rank(), 2)


def test_group_ranks_need_not_be_global_ranks() -> None:
    first, second, third, fourth = on_ranks(4, train_on_last_two)
    assert first is None and second is None
    assert_state_is_the_controls([third, fourth])


# --- bytes ---


def make_as(parameters: str, dtype: torch.dtype | None) -> dict[str, nn.Parameter]:
    params = named(make_groups(parameters, seed=0))
    return {
        name: nn.Parameter(p.detach().to(dtype), p.requires_grad) if dtype is not None else p
        for name, p in params.items()
    }


def bytes_held(
    group: Any, parameters: str, dtype: torch.dtype, precision: dict[str, Any], amsgrad: bool, cap: float
) -> tuple[int, int, int]:
    """(state_bytes, bytes of the storages that the state's tensors really occupy, number of trained elements)."""
    params = make_as(parameters, dtype)
    config = ShardingConfig(bucket_cap_mb=cap, **precision)
    optimizer = ShardedDecoupledAdamW(params.items(), amsgrad=amsgrad, process_group=group, config=config)
    own = {p.untyped_storage().data_ptr() for p in params.values() if p.numel()}
    storages = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if key != "step" and value.numel():
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert not own & set(storages), "state lives in the parameters' memory"
    return optimizer.state_bytes, sum(storages.values()), sum(p.numel() for p in params.values() if p.requires_grad)


REMAINDER = dict(main_parameter=MainParameter.REMAINDER)
IN_BF16 = dict(moments=Moments.BF16)
STATE_KINDS = [
    *(pytest.param(F32, {}, False, 8, num_ranks, id=f"fp32, {num_ranks} ranks") for num_ranks in (1, 2, 3, 4)),
    pytest.param(F32, {}, True, 12, 4, id="fp32 amsgrad"),
    pytest.param(F32, IN_BF16, True, 6, 4, id="fp32 with bf16 moments, amsgrad"),
    pytest.param(BF16, {}, False, 12, 4, id="bf16 with fp32 main"),
    pytest.param(BF16, {}, True, 16, 4, id="bf16 with fp32 main, amsgrad"),
    pytest.param(BF16, REMAINDER, False, 10, 4, id="bf16 with remainder"),
    pytest.param(BF16, REMAINDER | IN_BF16, False, 6, 4, id="bf16 with remainder and bf16 moments"),
    pytest.param(BF16, AS_UNSHARDED, False, 4, 4, id="bf16 without main"),
    pytest.param(F64, IN_BF16, False, 16, 4, id="fp64"),
]


@pytest.mark.parametrize(("dtype", "precision", "amsgrad", "bytes_per_param", "num_ranks"), STATE_KINDS)
def test_state_is_divided_by_the_number_of_ranks(
    dtype: torch.dtype, precision: dict[str, Any], amsgrad: bool, bytes_per_param: int, num_ranks: int
) -> None:
    """Sizes without padding: bytes per parameter / N, to the byte."""
    for reported, held, numel in on_ranks(num_ranks, bytes_held, "aligned", dtype, precision, amsgrad, ALL_IN_ONE):
        assert reported == held == bytes_per_param * numel // num_ranks


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
@pytest.mark.parametrize(
    ("parameters", "cap", "num_buckets", "dtype", "bytes_per_param"),
    [
        ("odd sizes", ALL_IN_ONE, 1, BF16, 12),
        ("odd sizes", ONE_EACH, 11, F32, 8),
        ("tiny", ALL_IN_ONE, 1, F32, 8),
        ("frozen", ALL_IN_ONE, 1, F32, 8),
    ],
)
def test_odd_sizes_cost_at_most_one_alignment_unit_of_state_per_bucket(
    parameters: str, cap: float, num_buckets: int, dtype: torch.dtype, bytes_per_param: int, num_ranks: int
) -> None:
    results = on_ranks(num_ranks, bytes_held, parameters, dtype, {}, False, cap)
    for reported, held, numel in results:
        assert reported <= bytes_per_param * (numel / num_ranks + num_buckets * ALIGNMENT)
        assert held <= reported, "more is held than reported"
    assert sum(reported for reported, _, _ in results) >= bytes_per_param * results[0][2]


def frozen_state_bytes(group: Any) -> tuple[int, int]:
    frozen = nn.Parameter(torch.zeros(100 * 256), requires_grad=False)
    trained = nn.Parameter(torch.zeros(4 * 256))
    optimizer = ShardedDecoupledAdamW([frozen, trained], process_group=group)
    return optimizer.state_bytes, trained.numel()


def test_a_frozen_parameter_costs_no_state() -> None:
    for reported, numel in on_ranks(2, frozen_state_bytes):
        assert reported == 8 * numel // 2


def tensor_bytes(skip: set[int]) -> dict[int, int]:
    """Every storage that some tensor in this process keeps alive, by address, but for those in `skip`."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            start = storage.data_ptr()
            storages[start] = max(storage.nbytes(), storages.get(start, 0))
    end, sizes = 0, {}
    for start, size in sorted(storages.items()):
        if start not in skip:
            sizes[start] = max(0, start + size - max(start, end))  # a parameter's storage is a part of its bucket's
            end = max(end, start + size)
    return sizes


def everything_held(group: Any, reduce_gradients: bool, num_rows: int) -> list[int]:
    """Bytes alive after construction, and after steps and zero_grad."""
    before = set(tensor_bytes(set()))
    params = [nn.Parameter(torch.zeros(n * num_rows, 256)) for n in (128, 64, 1)]
    config = ShardingConfig(reduce_gradients=reduce_gradients, bucket_cap_mb=0.5)
    optimizer = ShardedDecoupledAdamW(params, process_group=group, config=config)
    held = [sum(tensor_bytes(before).values())]
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    del p
    held.append(sum(tensor_bytes(before).values()))
    return held


@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced by others"])
def test_nothing_is_held_but_parameters_gradients_and_the_shards_of_the_state(reduce_gradients: bool) -> None:
    """Where gradients are reduced here the whole flat gradient buffer; else a copy of this rank's shard of them."""

    def expected(num_rows: int) -> int:
        numel = (128 + 64 + 1) * num_rows * 256
        return 4 * (numel + (numel if reduce_gradients else numel // 2) + 2 * numel // 2)

    small, large = (pool.on_ranks(2, everything_held, reduce_gradients, rows) for rows in (4, 8))
    slack = 16 * 1024  # step counts, flags
    for (small_at_first, small_later), (large_at_first, large_later) in zip(small, large, strict=True):
        assert expected(4) <= small_at_first <= expected(4) + slack
        assert expected(8) <= large_at_first <= expected(8) + slack
        # Scratch memory for the exchange appears with the first step. Its size does not depend on the model's.
        assert abs((large_later - small_later) - (expected(8) - expected(4))) <= slack


def written_bytes() -> int | None:
    """Bytes this process has handed to write(): on Linux gloo's sockets are among them."""
    try:
        with open("/proc/self/io") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar"))
    except OSError:
        return None


def wire_bytes(
    group: Any, parameters: str, dtype: torch.dtype | None, reduce_gradients: bool, cap: float, clip: bool
) -> tuple[int, int]:
    """(wire_bytes of the third step, parameter bytes)."""
    params = make_as(parameters, dtype)
    config = ShardingConfig(reduce_gradients=reduce_gradients, bucket_cap_mb=cap)
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group, config=config)
    for step in range(3):
        for index, p in enumerate(params.values()):
            p.grad = draw_gradient(p, step, group.rank() if reduce_gradients else 0, index)
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    cost = optimizer.last_step
    assert min(cost.reduce_s, cost.update_s, cost.gather_s) >= 0.0
    return cost.wire_bytes, sum(p.numel() * p.element_size() for p in params.values())


@pytest.mark.parametrize(
    ("dtype", "reduce_gradients", "clip", "num_ranks"),
    [
        *((F32, True, False, num_ranks) for num_ranks in (1, 2, 3, 4)),
        (BF16, True, True, 3),
        (F64, True, False, 4),
        (F32, False, True, 3),
        (BF16, False, False, 2),
    ],
)
def test_a_step_sends_each_gradient_and_each_parameter_once(
    dtype: torch.dtype, reduce_gradients: bool, clip: bool, num_ranks: int
) -> None:
    """Sizes without padding: (N-1)/N * (gradient + parameter bytes), to the byte."""
    times = 2 if reduce_gradients else 1
    for reported, num_bytes in on_ranks(num_ranks, wire_bytes, "aligned", dtype, reduce_gradients, ALL_IN_ONE, clip):
        assert reported * num_ranks == (num_ranks - 1) * times * num_bytes


@pytest.mark.parametrize(
    ("cap", "num_buckets", "num_ranks"), [(ALL_IN_ONE, 1, 4), (ONE_EACH, 11, 3), (ONE_EACH, 11, 4)]
)
def test_odd_sizes_send_at_most_one_alignment_unit_more_per_rank_and_bucket(
    cap: float, num_buckets: int, num_ranks: int
) -> None:
    results = on_ranks(num_ranks, wire_bytes, "odd sizes", None, True, cap, False)
    for reported, num_bytes in results:
        exact = (num_ranks - 1) / num_ranks * 2 * num_bytes
        assert exact <= reported <= exact + (num_ranks - 1) * 8 * ALIGNMENT * num_buckets
    assert len({reported for reported, _ in results}) == 1, "ranks share the load equally"


def written_by_a_large_step(group: Any) -> tuple[int, int | None]:
    param = nn.Parameter(torch.zeros(3 * 2**18))
    config = ShardingConfig(exchange=Exchange.RANK_ORDER)
    optimizer = ShardedDecoupledAdamW([param], process_group=group, config=config)
    written = None
    for _ in range(2):
        param.grad = torch.ones_like(param)
        before = written_bytes()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        after = written_bytes()
        written = None if before is None or after is None else after - before
        optimizer.zero_grad()
    return optimizer.last_step.wire_bytes, written


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="only Linux counts the bytes a process writes")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_operating_system_counts_the_same_bytes(num_ranks: int) -> None:
    for reported, written in pool.on_ranks(num_ranks, written_by_a_large_step):
        assert written is not None
        # Headers of messages, and the few words by which ranks agree that they are doing the same thing.
        assert 0 <= written - reported <= 32 * 1024, f"{written} bytes written, {reported} reported"


def train_on(group: Any, shape: tuple[int, int] | None) -> Any:
    """Gradients are small integers, so that their means are the same in whatever order they are added."""
    mesh = None if shape is None else init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    params = [nn.Parameter(torch.ones(n, 3)) for n in (50, 7, 201)]
    frozen = nn.Parameter(torch.full((5,), float(dist.get_rank())), requires_grad=False)
    named = [(str(n), p) for n, p in enumerate([*params, frozen])]
    config = ShardingConfig(bucket_cap_mb=0.002)
    optimizer = ShardedDecoupledAdamW(named, lr=0.1, weight_decay=0.1, process_group=mesh or group, config=config)
    norms = []
    for step in range(3):
        for p in params:
            p.grad = torch.arange(p.numel()).reshape(p.shape).remainder(5 + step) * float(1 + dist.get_rank())
        norms.append(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        norms += optimizer.metrics().values()
        optimizer.zero_grad()
    whole = whole_state_dict(optimizer, 4 if shape is None else shape[1])["state"]
    state = [tensor for _, of_param in sorted(whole.items()) for tensor in of_param.values()]
    return [p.detach().clone() for p in [*params, frozen]], norms, state, optimizer.state_bytes


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4)], ids=str)
def test_replicas_of_shards_train_as_shards_on_all_ranks_do(shape: tuple[int, int]) -> None:
    params, norms, state, _ = on_ranks(4, train_on, None)[0]
    for held, said, kept, state_bytes in on_ranks(4, train_on, shape):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(held, params, strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, state, strict=True))
        for ours, theirs in zip(said, norms, strict=True):  # which are added up in another order
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
        assert state_bytes >= 8 * 258 * 3 / shape[1]
