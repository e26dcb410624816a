"""A scenario in, a report out: ShardedDecoupledAdamW beside its control, on any ranks, transport and device.

The control is DecoupledAdamW on a whole copy of the parameters, in fp32 where sharding keeps an fp32 main parameter. It
is fed with the mean of all ranks' gradients, (g0 + g1 + ...) / N in rank order in fp32, which torch's own all-gather
brings together. After every step every parameter must be `torch.equal` to the control's; at the end so must all state,
put together over the ranks.

    reports = on_ranks(3, train_beside_control, scenario("odd sizes", clip=(0.5, 2.0), bucket_cap_mb=ONE_EACH))
    assert_state_is_the_controls(reports)

Gradients are drawn, or of a model's loss. `ranks` makes a test of what each rank does. `Pair` is for what happens
between the steps of a few parameters, and has the control too. `small` and what follows it are for loops that have no
control but the same loop in another way.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR, StepLR

from sharded_dadamw import (
    DecoupledAdamW,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
)
from sharded_dadamw.update.precision import join, weight_of
from tests import simulated
from tests.gpu.probes import no_host_sync
from tests.models import (
    F32,
    F64,
    MODELS,
    draw_gradient,
    mains_of,
    make_groups,
    mean_in_rank_order,
    named,
    reduce_for_control,
)

ONE_EACH, SOME_EACH, ALL_IN_ONE = 1e-6, 1e-3, 1024.0
"""MiB: a bucket for each parameter, for a few, and for all."""
FULL, SHARDED = GradientResidency.FULL, GradientResidency.SHARDED
AS_UNSHARDED: dict[str, Any] = dict(main_parameter=MainParameter.NONE, moments=Moments.LIKE_PARAMETERS)
"""Everything in the parameter's dtype, as DecoupledAdamW has it."""

Params = dict[str, nn.Parameter]

same_gradients = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")

SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 1.0 / (1 + step)),
    "CyclicLR": lambda o: CyclicLR(o, 1e-4, 3e-3, step_size_up=2),
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
    """One way to train; the defaults are the plainest. `scenario` makes it, with the settings of ShardingConfig."""

    parameters: str = "odd sizes"  # of PARAMETERS, whose gradients are drawn, or of MODELS
    config: ShardingConfig = field(default_factory=ShardingConfig)
    num_steps: int = 8
    dtype: torch.dtype | None = None  # of a model
    amsgrad: bool = False
    schedule: str | None = None
    lr_on_device: bool = False
    clip: tuple[float, float] | None = None  # max_norm, norm_type
    num_passes: int = 1
    without_sync: bool = True  # for all passes but the last
    without_gradient: str = "nobody"
    assign: bool = False  # p.grad = ... by hand instead of backward
    ddp: dict[str, Any] | None = None  # around a model; "last": once the optimizer is built
    loss_scale: float | None = None
    overflows: Mapping[int, int] = field(default_factory=dict)  # the step, and the rank that alone meets an infinity
    device: str = "cpu"
    over_nccl: bool = False  # at one rank


def scenario(parameters: str = "odd sizes", **settings: Any) -> Scenario:
    of_scenario = {each.name for each in fields(Scenario)}
    config = {name: settings.pop(name) for name in list(settings) if name not in of_scenario}
    return Scenario(parameters, ShardingConfig(**{"bucket_cap_mb": ALL_IN_ONE, **config}), **settings)


def on_numbers_of_ranks(*cases: tuple[str, Scenario, Sequence[int]]) -> Any:
    """Each scenario on the numbers of ranks beside it: all where sizes meet shards, else one or two that differ."""
    params = [
        pytest.param(case, num_ranks, id=f"{name}, {num_ranks} ranks")
        for name, case, of_it in cases
        for num_ranks in of_it
    ]
    return pytest.mark.parametrize(("case", "num_ranks"), params)


def ranks(
    num_ranks: int | None = None, run: Callable[..., list[Any]] = simulated.on_ranks, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a test of what each rank does with its process group; what it returns must be the same on all of them.

    Args:
        num_ranks: How many. None: the test's parameter of this name.
        run: On ranks that are simulated, or `pool.on_ranks`: processes.
        options: For `run`.
    """

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        def test(**given: Any) -> None:
            __tracebackhide__ = True
            number = given.pop("num_ranks") if num_ranks is None else num_ranks
            results = run(number, _act, body.__module__, body.__name__, given, **options)
            assert all(result == results[0] for result in results), results

        parameters = list(inspect.signature(body).parameters.values())[1:]
        if num_ranks is None:
            parameters.append(inspect.Parameter("num_ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD))
        test.__name__, test.__qualname__, test.__doc__ = body.__name__, body.__qualname__, body.__doc__
        test.__module__ = body.__module__
        vars(test).update(body=body, __signature__=inspect.Signature(parameters))
        return test

    return decorate


def _act(group: Any, module: str, name: str, given: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(module), name).body(group, **given)


@dataclass
class Report:
    """What one rank saw: its fragments of the state, the parameters, and the control's state and parameters."""

    fragments: dict[str, dict[str, Tensor]]
    params: dict[str, Tensor]
    control_state: dict[str, dict[str, Tensor]]
    control_params: dict[str, Tensor]
    trainable: list[str]


class Subject:
    """Parameters in groups, and how they come by gradients."""

    def __init__(self, case: Scenario, seed: int) -> None:
        self.case = case
        self.model: Any = None
        if case.parameters in MODELS:
            torch.manual_seed(seed)
            self.model = _Loss(MODELS[case.parameters]().to(case.dtype))
            self.groups = [{"params": list(self.model.model.named_parameters())}]
        else:
            self.groups = make_groups(case.parameters, seed)
            for group in self.groups:
                group["params"] = [
                    (name, nn.Parameter(p.detach().to(case.device), p.requires_grad)) for name, p in group["params"]
                ]
        self.params = named(self.groups)

    def draw(self, step: int, rank: int, number: int, scale: float) -> Any:
        """What one pass of a rank has to go by: the seed of its data, or gradients."""
        if self.model is not None:
            return 1000 * step + 10 * number + rank
        gradients = {}
        for index, (name, p) in enumerate(self.params.items()):
            if p.requires_grad and not WITHOUT_GRADIENT[self.case.without_gradient](step, index):
                drawn = draw_gradient(p.detach().cpu(), step, rank, number, index).to(self.case.device) * scale
                if drawn.numel() > 1 and self.case.overflows.get(step) == rank:
                    drawn.view(-1)[-1] = math.inf
                gradients[name] = drawn
        return gradients

    def backward(self, drawn: Any) -> None:
        if self.model is not None:
            self.model(drawn).backward()
        elif self.case.assign:
            for name, gradient in drawn.items():
                grad = self.params[name].grad
                self.params[name].grad = gradient if grad is None else grad + gradient
        elif drawn:
            torch.autograd.backward([self.params[name].view_as(self.params[name]) for name in drawn], [*drawn.values()])

    def take_gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        for p in self.params.values():
            p.grad = None
        return found


class _Loss(nn.Module):
    """A model whose forward is its loss, for what wraps models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, seed: int) -> Tensor:
        loss: Tensor = self.model.loss(seed)  # type: ignore[operator]
        return loss


@cache
def nccl_group() -> Any:
    """A group of this rank alone, made once per process."""
    torch.cuda.set_device(0)
    return dist.new_group([dist.get_rank()], backend="nccl", use_local_synchronization=True)


def train_beside_control(group: Any, case: Scenario, given: Callable[[Any], Any] = lambda group: group) -> Report:
    """Trains both, and raises at the first step after which a parameter differs.

    Args:
        group: A process group, or None without torch.distributed.
        case: What to train, and how.
        given: What the optimizer is given of the group.
    """
    group = nccl_group() if case.over_nccl else group
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    # Every rank starts from weights of its own: the optimizer must make them rank 0's.
    ours, twin, start = Subject(case, rank), Subject(case, 0), Subject(case, 0)
    keeps_main = case.config.main_parameter is not MainParameter.NONE
    control_groups = mains_of(start.groups) if keeps_main else start.groups
    params, control_params = ours.params, named(control_groups)  # before torch takes the names out of the groups

    def hyper() -> dict[str, Any]:
        lr = torch.tensor(3e-3, device=case.device) if case.lr_on_device else 3e-3
        return dict(lr=lr, weight_decay=2e-4, amsgrad=case.amsgrad)

    ddp = dict(case.ddp or {})
    wraps_last = ddp.pop("last", False)
    if case.ddp is not None and not wraps_last:
        ours.model = DistributedDataParallel(ours.model, process_group=group, **ddp)
    optimizer = ShardedDecoupledAdamW(ours.groups, **hyper(), process_group=given(group), config=case.config)
    if wraps_last:
        ours.model = DistributedDataParallel(ours.model, process_group=group, **ddp)
    control = DecoupledAdamW(control_groups, **hyper())
    schedulers = [SCHEDULES[case.schedule](o) for o in (optimizer, control)] if case.schedule else []
    assert first_difference(params, named(twin.groups)) is None, "construction did not broadcast rank 0's weights"
    scale, scaler = case.loss_scale or 1.0, _scaler(group, case)
    adds_up_means = case.config.gradient_residency is SHARDED and not case.without_sync

    for step in range(case.num_steps):
        means: dict[str, Tensor] = {}
        for number in range(case.num_passes):
            twin.backward(twin.draw(step, rank, number, scale))
            if adds_up_means or number == case.num_passes - 1:
                local = twin.take_gradients()
                for name, mean in zip(local, reduce_for_control(group, list(local.values())), strict=True):
                    means[name] = means[name] + mean if name in means else mean
        passes = [ours.draw(step, rank, number, scale) for number in range(case.num_passes)]
        if ours.model is None and not case.config.reduce_gradients:
            passes = [{name: mean.clone() for name, mean in means.items()}]
        loss, norm = torch.zeros((), device=case.device), None
        must_not_wait = step > 0 and case.device != "cpu"  # once all is compiled
        with no_host_sync() if must_not_wait and num_ranks == 1 else nullcontext():
            if scaler is not None:
                scaler.scale(loss)  # as every loop does
            for number, drawn in enumerate(passes):
                is_local = case.without_sync and number < len(passes) - 1
                with (optimizer if case.ddp is None else ours.model).no_sync() if is_local else nullcontext():
                    ours.backward(drawn)
            if case.ddp is not None:  # whose order of addition is its own
                means = {name: p.grad.clone() for name, p in params.items() if p.grad is not None}
            if scaler is not None and (case.clip is not None or isinstance(scaler, ShardedGradScaler)):
                scaler.unscale_(optimizer)
            if case.clip is not None:
                norm = optimizer.clip_grad_norm_(case.clip[0], norm_type=case.clip[1])
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        if not case.config.reduce_gradients and scaler is None:
            for name, mean in means.items():
                assert torch.equal(params[name].grad, mean), f"{name}.grad was to be read only"  # type: ignore[arg-type]
        optimizer.zero_grad()

        if step in case.overflows:  # which is void
            scale /= 2 if scaler is not None else 1
        else:
            for name, p in control_params.items():
                p.grad = means[name].to(p.dtype) / scale if name in means else None
            if case.clip is not None and norm is not None:
                trained = [p for p in control_params.values() if p.grad is not None]
                check_norm(norm, [p.grad for p in trained if p.grad is not None], case.clip[1])
                for p in trained:
                    p.grad = clipped(p.grad, norm, case.clip[0])  # type: ignore[arg-type]
            with no_host_sync() if must_not_wait else nullcontext():
                control.step()
        for scheduler in schedulers:
            scheduler.step()
        difference = first_difference(params, control_params)
        assert difference is None, f"step {step}: {difference}"
        with torch.no_grad():
            for name, p in twin.params.items():
                p.copy_(weight_of(control_params[name].detach(), p.dtype))
    assert scaler is None or scaler.get_scale() == scale
    return Report(
        fragments={name: on_cpu(optimizer.state[p]) for name, p in params.items() if p in optimizer.state},
        params=on_cpu(params),
        control_state={name: on_cpu(control.state[p]) for name, p in control_params.items() if p in control.state},
        control_params=on_cpu(control_params),
        trainable=[name for name, p in params.items() if p.requires_grad],
    )


def _scaler(group: Any, case: Scenario) -> Any:
    """Where one rank alone may find an infinity, scalers have to agree, which they do in `unscale_`."""
    if case.loss_scale is None:
        return None
    settings: dict[str, Any] = dict(init_scale=case.loss_scale, growth_interval=1000)
    if group is None or group.size() == 1 or not case.config.reduce_gradients:
        return GradScaler(case.device, **settings)
    return ShardedGradScaler(case.device, process_group=group, **settings)


def clipped(gradient: Tensor, norm: Tensor, max_norm: float) -> Tensor:
    """What clipping makes of a gradient: divided, in fp32, by 1 / min(1, max_norm / (norm + 1e-6))."""
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return (gradient / (1.0 / coefficient)).to(gradient.dtype)


def check_norm(norm: Tensor, means: Sequence[Tensor], norm_type: float) -> None:
    assert norm.shape == (), f"expected a 0-d norm, got {tuple(norm.shape)}"
    flat = torch.cat([norm.new_zeros(1, dtype=F64), *(g.double().flatten() for g in means)])
    expected = flat.abs().max() if norm_type == math.inf else flat.square().sum().sqrt()
    # One fp32 rounding of the result, and for the 2-norm whatever blocks the squares are summed in.
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)


def first_difference(params: Mapping[str, Tensor], control: Mapping[str, Tensor]) -> str | None:
    for name, param in params.items():
        expected = weight_of(control[name].detach(), param.dtype)
        if param.shape != expected.shape or not torch.equal(param, expected):
            difference = (param.detach().double() - expected.double()).abs().max().item()
            return f"{name} {tuple(param.shape)} {param.dtype} differs by up to {difference:.3g}"
    return None


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in tensors.items()}


def assert_state_is_the_controls(reports: Sequence[Report]) -> None:
    """Fragments, concatenated in rank order, are the control's state; step counts agree everywhere."""
    __tracebackhide__ = True
    one = reports[0]
    for report in reports:
        assert set(report.fragments) == set(one.fragments), "state keys differ between ranks"
    for name, of_control in one.control_state.items():
        expected = {key: value.flatten() for key, value in of_control.items() if key != "step"}
        if one.control_params[name].dtype != one.params[name].dtype:
            expected["main_param"] = one.control_params[name].flatten()
        shards = [dict(report.fragments[name]) for report in reports]
        for rank, shard in enumerate(shards):
            count = shard.pop("step")
            assert count.shape == () and count.dtype == F32
            assert torch.equal(count, of_control["step"]), f"{name}: step {count} on rank {rank}"
            assert set(shard) == set(shards[0]) and all(value.dim() == 1 for value in shard.values())
        whole = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        if "main_remainder" in whole:
            whole["main_param"] = join(one.params[name].flatten(), whole.pop("main_remainder"))
        assert set(whole) == set(expected), f"{name} has {set(whole)}"
        for key, value in expected.items():
            assert whole[key].dtype == value.dtype and torch.equal(whole[key], value), f"{name}.{key} differs"
    for name in set(one.fragments) - set(one.control_state):
        assert name in one.trainable, f"frozen {name} has state"
        for report in reports:
            for key, value in report.fragments[name].items():
                assert key.startswith("main") or not value.any(), f"{name} never had a gradient, but {key} moved"


# --- what happens between the steps of a few parameters ---


def make(parameters: str = "odd sizes", seed: int = 0) -> Params:
    return named(make_groups(parameters, seed))


def give_gradients(params: Params, step: int, rank: int = 0, without: Sequence[str] = ()) -> None:
    for index, (name, p) in enumerate(params.items()):
        if p.requires_grad and name not in without:
            p.grad = draw_gradient(p, step, rank, index)


def backward_onto(params: Params, step: int, rank: int = 0, without: Sequence[str] = ()) -> None:
    used = [p for name, p in params.items() if p.requires_grad and name not in without]
    torch.autograd.backward([p.view_as(p) for p in used], [draw_gradient(p, step, rank, i) for i, p in enumerate(used)])


class Pair:
    """Ours, and the unsharded optimizer on a copy, which gets the mean of all ranks' gradients."""

    def __init__(
        self, group: Any = None, parameters: str = "odd sizes", config: ShardingConfig | None = None, **hyper: Any
    ) -> None:
        self.rank, self.num_ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.params, self.control_params = make(parameters), make(parameters)
        hyper = dict(lr=3e-3, weight_decay=2e-4) | hyper
        settings: dict[str, Any] = {} if config is None else {"config": config}
        self.optimizer = ShardedDecoupledAdamW(self.params.items(), **hyper, process_group=group, **settings)
        self.control = DecoupledAdamW(self.control_params.items(), **hyper)
        self.sides: list[tuple[Params, Optimizer]] = [
            (self.params, self.optimizer),
            (self.control_params, self.control),
        ]

    def give(self, step: int) -> None:
        give_gradients(self.params, step, self.rank)
        self.give_control(step)

    def give_control(self, step: int, scale: float = 1.0) -> None:
        for index, p in enumerate(self.control_params.values()):
            if p.requires_grad:
                p.grad = mean_in_rank_order([draw_gradient(p, step, r, index) for r in range(self.num_ranks)]) * scale

    def step(self) -> None:
        for _, optimizer in self.sides:
            optimizer.step()
            optimizer.zero_grad()
        self.check()

    def check(self) -> None:
        __tracebackhide__ = True
        assert (difference := first_difference(self.params, self.control_params)) is None, difference

    def train(self, *steps: int) -> None:
        __tracebackhide__ = True
        for step in steps:
            self.give(step)
            self.step()


# --- loops that have no control but the same loop in another way ---


def small(
    group: Any, seed: int = 1, dtype: torch.dtype = F32, **config: Any
) -> tuple[nn.Sequential, ShardedDecoupledAdamW]:
    """A model of three layers, and its optimizer, with a bucket for each parameter."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    settings = ShardingConfig(**{"bucket_cap_mb": ONE_EACH, **config})
    return model, ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=settings)


def loss_of(model: nn.Module, rank: int, step: int = 0) -> Tensor:
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    loss: Tensor = model(data.to(next(model.parameters()).dtype)).square().mean()
    return loss


def train_on(model: nn.Module, optimizer: Optimizer, rank: int, *steps: int) -> None:
    for step in steps:
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def values_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def everything_of(model: nn.Module, optimizer: ShardedDecoupledAdamW) -> list[Tensor]:
    """Copies of parameters and of this rank's state."""
    optimizer.synchronize()
    state = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [value.detach().clone() for value in (*model.parameters(), *state)]


def assert_equal(expected: Any, found: Any) -> None:
    """The same finite bits."""
    __tracebackhide__ = True
    if isinstance(expected, Tensor):
        assert expected.detach().isfinite().all() and torch.equal(expected, found), (expected, found)
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found)
        for one, other in zip(expected, found, strict=True):
            assert_equal(one, other)
    else:
        assert expected == found


def go_on_as_if_nothing_had_been(group: Any, model: nn.Module, optimizer: ShardedDecoupledAdamW, **config: Any) -> None:
    """Train on, beside a twin that has seen nothing but good steps."""
    twin, other = small(group, **config)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train_on(model, optimizer, group.rank(), 3, 4, 5)
    train_on(twin, other, group.rank(), 3, 4, 5)
    assert_equal(list(twin.parameters()), list(model.parameters()))


@contextmanager
def refused(
    group: Any, model: nn.Module, optimizer: ShardedDecoupledAdamW, said: str, **config: Any
) -> Iterator[pytest.ExceptionInfo[RuntimeError]]:
    """What is done inside is an error that changes nothing; after `zero_grad` training is as if nothing had been."""
    __tracebackhide__ = True
    before = everything_of(model, optimizer)
    with pytest.raises(RuntimeError, match=said) as error:
        yield error
    assert_equal(before, everything_of(model, optimizer))
    optimizer.zero_grad()
    go_on_as_if_nothing_had_been(group, model, optimizer, **config)
