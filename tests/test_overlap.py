"""Reductions that begin in backward change when gradients travel, and nothing else.

The experiment trains with reductions launched by hooks, in any order of buckets, with any residency of gradients; the
control is DecoupledAdamW on a whole copy, fed with the mean of all ranks' gradients in rank order. Parameters and state
must be the same bits. Where means of several passes add up in a shard, the control adds up the same means.

A way of reducing does not know the number of ranks, nor a transport who uses it: they meet in chosen pairs.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.checkpoint import checkpoint

from sharded_dadamw import (
    DecoupledAdamW,
    Exchange,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
)
from sharded_dadamw.buckets.gradients import Stage
from sharded_dadamw.comm.messages import MessageVerbs
from tests import pool
from tests.models import BF16, F32, MODELS, draw_gradient, reduce_for_control
from tests.simulated import on_ranks

FULL, SHARDED = GradientResidency.FULL, GradientResidency.SHARDED
over_each_exchange = pytest.mark.parametrize(
    ("residency", "exchange"),
    [(FULL, Exchange.FASTEST), (SHARDED, Exchange.FASTEST), (FULL, Exchange.RANK_ORDER), (SHARDED, Exchange.BACKEND)],
)
ONE_EACH, SOME_EACH, ALL_IN_ONE = 1e-6, 2e-3, 1024.0


@dataclass(frozen=True)
class Way:
    """One way to train a model; every one of them must lead to the same bits."""

    overlap: bool = True
    residency: GradientResidency = FULL
    bucket_cap_mb: float = SOME_EACH
    num_passes: int = 1
    without_sync: bool = True  # for all passes but the last
    clip: bool = False

    @property
    def adds_up_means(self) -> bool:
        return self.residency is SHARDED and not self.without_sync

    @property
    def config(self) -> ShardingConfig:
        return ShardingConfig(
            overlap=self.overlap,
            gradient_residency=self.residency,
            bucket_cap_mb=self.bucket_cap_mb,
            main_parameter=MainParameter.NONE,
            moments=Moments.LIKE_PARAMETERS,
        )


def make_model(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]()


def train(group: Any, name: str, way: Way, num_steps: int) -> None:
    """Parameters after every step, and at the end this rank's fragments of the state, must be those of the control."""
    model = make_model(name)
    twin = copy.deepcopy(model)
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(), lr=1e-2, weight_decay=1e-5, amsgrad=True, process_group=group, config=way.config
    )
    control = DecoupledAdamW(twin.named_parameters(), lr=1e-2, weight_decay=1e-5, amsgrad=True)
    for step in range(num_steps):
        for number in range(way.num_passes):
            last = number == way.num_passes - 1
            seed = 1000 * step + 10 * number + group.rank()
            with contextlib.nullcontext() if last or not way.without_sync else optimizer.no_sync():
                model.loss(seed).backward()
        means = means_of(group, twin, way, step)
        if way.clip:
            norm = optimizer.clip_grad_norm_(0.05)
            torch.testing.assert_close(norm, control_norm(means), rtol=1e-6, atol=0)
        optimizer.step()
        optimizer.zero_grad()
        for param, mean in zip(twin.parameters(), means, strict=True):
            param.grad = mean
        if way.clip:
            coefficient = torch.clamp(0.05 / (norm + 1e-6), max=1.0)
            for mean in means:
                if mean is not None:
                    mean.div_(1.0 / coefficient)
        control.step()
        for (label, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(param, other), f"{label} after step {step}"
    for (label, param), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        for key, value in control.state[other].items():
            own = optimizer.state[param][key]
            if key != "step":
                bucket, slot = optimizer._shards.slots[id(param)]
                fragment = bucket.layout.fragment(slot, group.rank())
                value = value.flatten()[fragment.param_start :][: fragment.numel]
            assert torch.equal(own, value), f"{label}/{key}"


def means_of(group: Any, twin: nn.Module, way: Way, step: int) -> list[Tensor | None]:
    """The averages that a step should use, by autograd on the control's own model."""
    totals: list[Tensor | None] = [None for _ in twin.parameters()]
    twin.zero_grad()
    for number in range(way.num_passes):
        twin.loss(1000 * step + 10 * number + group.rank()).backward()
        if not way.adds_up_means and number < way.num_passes - 1:
            continue
        gradients = {index: param.grad for index, param in enumerate(twin.parameters()) if param.grad is not None}
        for index, mean in zip(gradients, reduce_for_control(group, list(gradients.values())), strict=True):
            total = totals[index]
            totals[index] = mean if total is None else total + mean
        twin.zero_grad()
    return totals


def control_norm(means: list[Tensor | None]) -> Tensor:
    return torch.stack([mean.double().square().sum() for mean in means if mean is not None]).sum().sqrt().float()


WAYS = {
    "without overlap": Way(overlap=False),
    "hooks": Way(),
    "hooks, a bucket each": Way(bucket_cap_mb=ONE_EACH),
    "hooks, one bucket": Way(bucket_cap_mb=ALL_IN_ONE),
    "three passes": Way(num_passes=3),
    "three passes, no hooks": Way(num_passes=3, overlap=False),
    "three passes, no hooks, no no_sync": Way(num_passes=3, overlap=False, without_sync=False),
    "clipped": Way(clip=True),
    "clipped, two passes": Way(clip=True, num_passes=2, bucket_cap_mb=ONE_EACH),
    "sharded": Way(residency=SHARDED),
    "sharded, a bucket each": Way(residency=SHARDED, bucket_cap_mb=ONE_EACH),
    "sharded, one bucket": Way(residency=SHARDED, bucket_cap_mb=ALL_IN_ONE),
    "sharded, no hooks": Way(residency=SHARDED, overlap=False),
    "sharded, three passes": Way(residency=SHARDED, num_passes=3),
    "sharded, three reductions": Way(residency=SHARDED, num_passes=3, without_sync=False),
    "sharded, three reductions, one bucket": Way(
        residency=SHARDED, num_passes=3, without_sync=False, bucket_cap_mb=ALL_IN_ONE
    ),
    "sharded, clipped": Way(residency=SHARDED, clip=True, num_passes=2, without_sync=False),
}


@pytest.mark.parametrize(
    ("way", "num_ranks"),
    [
        *zip(WAYS, itertools.cycle([3, 2, 4])),
        *(("hooks", num_ranks) for num_ranks in (1, 3, 4)),
        *(("sharded, three reductions", num_ranks) for num_ranks in (1, 3)),
    ],
)
def test_every_way_of_reducing_leads_to_the_bits_of_the_control(way: str, num_ranks: int) -> None:
    on_ranks(num_ranks, train, "tied language model", WAYS[way], 8)


@pytest.mark.parametrize("way", ["hooks", "sharded, three reductions"])
def test_a_transformer_layer_too(way: str) -> None:
    on_ranks(2, train, "attention", WAYS[way], 8)


# --- gradients on the way ---


def small(group: Any, seed: int = 1, **config: Any) -> tuple[nn.Module, ShardedDecoupledAdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    settings = ShardingConfig(**{"bucket_cap_mb": ONE_EACH, **config})
    return model, ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=settings)


def loss_of(model: nn.Module, rank: int, step: int = 0) -> Tensor:
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(data).square().mean()


def warm_up(group: Any, model: nn.Module, optimizer: ShardedDecoupledAdamW) -> None:
    """Take the first step, in which ranks find out whether something else averages, and nothing overlaps."""
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(1000 + group.rank()))
    model(data.to(next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def launched(optimizer: ShardedDecoupledAdamW) -> list[Stage]:
    return [bucket.gradients.stage for bucket in optimizer._shards.buckets]


def reductions_begin_in_backward(group: Any) -> list[str]:
    """What has begun by the time at which each layer's backward has run."""
    model, optimizer = small(group)
    seen: list[str] = []
    warm_up(group, model, optimizer)
    for step in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss_of(model, group.rank(), step).backward()
        backward = [
            e for e in profile.events() if e.name.startswith("autograd::engine::evaluate_function: AddmmBackward")
        ]
        reductions = [e for e in profile.events() if e.name == "sharded_dadamw::reduce_scatter"]
        last_layer_left = max(event.time_range.end for event in backward)
        began = sum(event.time_range.start < last_layer_left for event in reductions)
        seen.append(f"{began} of {len(reductions)}")
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_a_profiler_sees_reductions_begin_while_backward_runs() -> None:
    for seen in pool.on_ranks(2, reductions_begin_in_backward):
        for step in seen:
            began, total = map(int, step.split(" of "))
            assert total >= 6 and began >= 3, f"{step} reductions began before the first layer's backward"


def gathers_run_in_forward(group: Any, attached: bool) -> list[str]:
    """What forward did in which order after each step: gathers that it finished, and layers that it computed."""
    model, optimizer = small(group, exchange=Exchange.RANK_ORDER)
    if attached:
        optimizer.attach(model)
    seen: list[str] = []
    for step in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            loss = loss_of(model, group.rank(), step)
        signs = {"sharded_dadamw::all_gather": "g", "aten::linear": "L"}
        events = sorted(profile.events(), key=lambda event: event.time_range.start)
        seen.append("".join(signs.get(event.name, "") for event in events))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seen


def test_a_profiler_sees_gathers_run_during_forward_where_the_model_is_attached() -> None:
    """A weight and a bias, in a bucket each, are waited for by their own layer."""
    assert pool.on_ranks(2, gathers_run_in_forward, True) == [["LLL", "ggLggLggL", "ggLggLggL"]] * 2
    assert pool.on_ranks(2, gathers_run_in_forward, False) == [["LLL", "LLL", "LLL"]] * 2


class Slow:
    """A network that takes its time: each reduction arrives so long after it began, one after the other."""

    def __init__(self, verbs: Any, seconds: float) -> None:
        self._verbs, self._seconds, self._free_at = verbs, seconds, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._verbs, name)

    def reduce_scatter_mean(self, *args: Any, **kwargs: Any) -> Any:
        self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
        return Delayed(self._verbs.reduce_scatter_mean(*args, **kwargs), self._free_at)


class Delayed:
    def __init__(self, handle: Any, arrives_at: float) -> None:
        self._handle, self._arrives_at = handle, arrives_at

    def wait(self) -> None:
        time.sleep(max(0.0, self._arrives_at - time.perf_counter()))
        self._handle.wait()


# --- loops that are not the plainest ---


def in_no_sync_nothing_begins(group: Any, residency: GradientResidency) -> None:
    model, optimizer = small(group, gradient_residency=residency)
    rounds = optimizer._reducer.num_rounds
    with optimizer.no_sync():
        loss_of(model, group.rank()).backward()
        assert set(launched(optimizer)) == {Stage.LOCAL} and optimizer._reducer.num_rounds == rounds
        assert all(param.grad is not None for param in model.parameters())
    loss_of(model, group.rank(), 1).backward()
    optimizer.step()


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_in_no_sync_nothing_is_sent(residency: GradientResidency) -> None:
    on_ranks(2, in_no_sync_nothing_begins, residency)


def back_twice(group: Any) -> str:
    model, optimizer = small(group)
    warm_up(group, model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    loss_of(model, group.rank()).backward()
    with pytest.raises(RuntimeError, match="no_sync") as error:
        loss_of(model, group.rank(), 1).backward()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    as_if_nothing_had_been(group, model, optimizer)
    return str(error.value)


def as_if_nothing_had_been(group: Any, model: nn.Module, optimizer: ShardedDecoupledAdamW, **config: Any) -> None:
    """Train on, beside a twin that has seen nothing but good steps."""
    twin, other = small(group, **config)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for step in range(3, 6):
        for each, its in ((model, optimizer), (twin, other)):
            loss_of(each, group.rank(), step).backward()
            its.step()
            its.zero_grad()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_second_backward_that_was_not_announced_is_a_clear_error_and_nothing_is_lost() -> None:
    for message in on_ranks(2, back_twice):
        assert "overlap=False" in message and "backward reached" in message


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("in the middle of backward")


def break_backward(group: Any, residency: GradientResidency, clears: str) -> None:
    """Rank 0 breaks off after one layer and rank 1 after two: they have begun different numbers of reductions."""
    model, optimizer = small(group, gradient_residency=residency)
    x = torch.randn(6, 8)
    for index, layer in enumerate(model):
        x = layer(x)
        if index == (1 if group.rank() == 1 else 3):
            x = Broken.apply(x)
    with pytest.raises(ArithmeticError):
        x.square().mean().backward()
    optimizer.zero_grad() if clears == "optimizer" else model.zero_grad()
    if clears == "model" and residency is SHARDED:
        optimizer.zero_grad()  # model.zero_grad cannot be noticed where p.grad is None
    as_if_nothing_had_been(group, model, optimizer)


@pytest.mark.parametrize("clears", ["optimizer", "model"])
@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_after_an_exception_in_the_middle_of_backward_zero_grad_makes_good(
    residency: GradientResidency, clears: str
) -> None:
    on_ranks(2, break_backward, residency, clears)


def skip_a_batch(group: Any, residency: GradientResidency) -> None:
    model, optimizer = small(group, gradient_residency=residency)
    loss_of(model, group.rank()).backward()
    optimizer.zero_grad()
    as_if_nothing_had_been(group, model, optimizer)


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_gradients_that_are_reduced_may_be_dropped(residency: GradientResidency) -> None:
    on_ranks(2, skip_a_batch, residency)


def disagree(group: Any, residency: GradientResidency, what: str) -> str:
    model, optimizer = small(group, gradient_residency=residency)
    rank = group.rank()
    before = [param.detach().clone() for param in model.parameters()]
    if what == "an unused layer":
        layers = list(model)[:3] if rank == 1 else list(model)
        nn.Sequential(*layers)(torch.randn(6, 8)).square().mean().backward()
    elif what == "no backward":
        if rank == 0:
            loss_of(model, rank).backward()
    elif what == "no backward after one that all dropped":
        loss_of(model, rank, 9).backward()
        optimizer.zero_grad()
        if rank == 0:
            loss_of(model, rank).backward()
    elif what == "a pass that only one dropped":
        if rank == 1:
            loss_of(model, rank, 9).backward()
            optimizer.zero_grad()
        else:
            loss_of(model, rank).backward()
            optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(RuntimeError, match="ranks disagree") as error:
        optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    assert all(not value.any() for param in model.parameters() for value in optimizer.state[param].values())
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1e-2
    as_if_nothing_had_been(group, model, optimizer)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "residency"),
    [
        ("an unused layer", FULL),
        ("an unused layer", SHARDED),
        ("no backward", FULL),
        ("no backward", SHARDED),
        ("no backward after one that all dropped", FULL),
        ("no backward after one that all dropped", SHARDED),
        ("a pass that only one dropped", FULL),
    ],
)
def test_ranks_that_disagree_after_backward_hear_of_it_and_can_go_on(what: str, residency: GradientResidency) -> None:
    first, second = on_ranks(2, disagree, residency, what)
    assert first == second


def sit_out(group: Any, exchange: Exchange, residency: GradientResidency, set_to_none: bool) -> list[str]:
    """Rank 1 runs no backward in step 1, with more buckets than may be under way at once."""
    results, messages = [], []
    for overlap in (False, True):
        model, optimizer = small(group, exchange=exchange, gradient_residency=residency, overlap=overlap)
        for step in range(3):
            if step != 1 or group.rank() == 0:
                loss_of(model, group.rank(), step).backward()
            try:
                optimizer.step()
            except RuntimeError as error:
                messages.append(str(error))
            optimizer.zero_grad(set_to_none)
        results.append([*model.parameters(), *(optimizer.state[param]["exp_avg"] for param in model.parameters())])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.equal(plain, overlapped)
    return messages


@pytest.mark.parametrize(
    ("exchange", "residency", "set_to_none"),
    [
        (Exchange.FASTEST, FULL, False),
        (Exchange.FASTEST, SHARDED, True),
        (Exchange.RANK_ORDER, FULL, True),
        (Exchange.BACKEND, FULL, False),
        (Exchange.BACKEND, SHARDED, True),
    ],
)
def test_a_rank_without_a_backward_takes_part_with_the_gradients_it_has_and_without_any_is_an_error_on_all(
    exchange: Exchange, residency: GradientResidency, set_to_none: bool
) -> None:
    first, second = on_ranks(2, sit_out, exchange, residency, set_to_none)
    assert first == second and len(first) == (2 if set_to_none else 0)
    assert all("the gradient of 0.weight: rank 0 has a tensor, rank 1 has None" in message for message in first)


def refuse_without_a_backward(group: Any, exchange: Exchange, residency: GradientResidency) -> list[str]:
    """Rank 1 calls step() in no_sync(), or a second time without zero_grad(), while rank 0 has gradients."""
    messages = []
    for why in ("in no_sync()", "used gradients"):
        model, optimizer = small(group, exchange=exchange, gradient_residency=residency)
        loss_of(model, group.rank()).backward()
        optimizer.step()
        used = [param.grad for param in model.parameters()]
        before = [None if grad is None else grad.clone() for grad in used]
        if group.rank() == 0 or why != "used gradients":
            optimizer.zero_grad()
        if group.rank() == 0:
            loss_of(model, group.rank(), 1).backward()
        inside = group.rank() == 1 and (why == "in no_sync()" or residency is SHARDED)
        with pytest.raises(RuntimeError) as error, optimizer.no_sync() if inside else contextlib.nullcontext():
            optimizer.step()
        messages.append(str(error.value))
        if group.rank() == 0 and residency is FULL:
            with pytest.raises(RuntimeError, match="zero_grad"):  # the other rank's are not in them
                loss_of(model, group.rank(), 2).backward()
        if group.rank() == 1 and why == "used gradients" and residency is FULL:
            for grad, old in zip(used, before, strict=True):
                assert grad is not None and old is not None and torch.equal(grad, old), "metrics may still want it"
        optimizer.zero_grad()
        loss_of(model, group.rank(), 2).backward()
        optimizer.step()
    return messages


@over_each_exchange
def test_a_rank_that_refuses_a_step_without_a_backward_holds_up_nobody(
    exchange: Exchange, residency: GradientResidency
) -> None:
    first, second = on_ranks(2, refuse_without_a_backward, exchange, residency)
    for told, said in zip(first, second, strict=True):
        assert said in told and "rank 1 has refused" in told


def refuse_alike(group: Any, residency: GradientResidency) -> None:
    """Every rank gives the same wrong argument, and then rank 0 alone has a backward: an error, and no wait.

    Rank 1 takes part in its round as it comes to its own step.
    """
    model, optimizer = small(group, gradient_residency=residency)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, group.rank()).backward()
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad_norm_(-1.0)
    optimizer.zero_grad()
    if group.rank() == 0:
        loss_of(model, group.rank(), 1).backward()
    with pytest.raises(RuntimeError, match="rank 0 has a tensor, rank 1 has None"):
        optimizer.step()
    optimizer.zero_grad()
    as_if_nothing_had_been(group, model, optimizer, gradient_residency=residency)


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_after_a_call_that_all_refuse_a_rank_may_still_be_without_a_backward(residency: GradientResidency) -> None:
    on_ranks(2, refuse_alike, residency, timeout_s=20.0)


def refuse_twice(group: Any) -> None:
    """Gradients that are still local are as they were after a refusal, and after another one as they are then."""
    model, optimizer = small(group, overlap=False)
    twin, control = small(group, overlap=False)
    for name, param in model.named_parameters():
        param.grad = torch.full_like(param, 1.0 + group.rank())
        twin.get_parameter(name).grad = torch.full_like(param, 1.0 + 5.0 * group.rank())
    optimizer.param_groups[0]["lr"] = 1.0 + group.rank()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="lr"):
            optimizer.step()
        for param in model.parameters():
            assert param.grad is not None
            param.grad.add_(2.0 * group.rank())
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.step()
    control.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_that_step_would_average_are_as_they_were_after_each_refusal() -> None:
    on_ranks(2, refuse_twice)


def go_on_after_an_exception(group: Any) -> int:
    """Rank 0 breaks off in the middle of its first backward, and neither clears anything before the second."""
    model, optimizer = small(group, gradient_residency=SHARDED)
    x = torch.randn(6, 8)
    for index, layer in enumerate(model):
        x = layer(x)
        x = Broken.apply(x) if index == 2 and group.rank() == 0 else x
    with contextlib.suppress(ArithmeticError):
        x.square().mean().backward()
    loss_of(model, group.rank(), 1).backward()
    num_rounds = optimizer._reducer.num_rounds
    if num_rounds == 2:  # or the other rank is still in backward
        dist.barrier(group)
    optimizer.step()
    return num_rounds


def test_each_backward_is_a_round_also_after_one_that_was_broken_off() -> None:
    """So ranks may meet elsewhere, as in a barrier, between backward and step."""
    assert on_ranks(2, go_on_after_an_exception) == [2, 2]


def look_in_hooks(group: Any, residency: GradientResidency, overlap: bool, bucket_cap_mb: float) -> None:
    """Hooks of the user's, from before and from after the optimizer, beside the gradients of a model without one."""
    torch.manual_seed(1)
    twin = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    model = copy.deepcopy(twin)
    seen: list[dict[str, Tensor]] = [{}, {}]

    def watch(number: int) -> None:
        for name, param in model.named_parameters():

            def look(param: Tensor, name: str = name) -> None:
                assert param.grad is not None
                seen[number][name] = param.grad.clone()

            param.register_post_accumulate_grad_hook(look)

    watch(0)
    config = ShardingConfig(bucket_cap_mb=bucket_cap_mb, gradient_residency=residency, overlap=overlap)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    watch(1)
    for step in range(2):
        twin.zero_grad()
        for number in range(2):
            loss_of(twin, group.rank(), 10 * step + number).backward()
            with optimizer.no_sync() if number == 0 else contextlib.nullcontext():
                loss_of(model, group.rank(), 10 * step + number).backward()
            for name, param in twin.named_parameters():
                assert param.grad is not None
                assert torch.equal(seen[0][name], param.grad) and torch.equal(seen[1][name], param.grad)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("residency", "overlap", "bucket_cap_mb"),
    [
        (FULL, True, ONE_EACH),
        (FULL, True, ALL_IN_ONE),
        (FULL, False, SOME_EACH),
        (SHARDED, True, SOME_EACH),
        (SHARDED, True, ALL_IN_ONE),
        (SHARDED, False, ONE_EACH),
    ],
)
def test_the_users_own_hooks_see_this_ranks_gradient_whatever_the_buckets(
    residency: GradientResidency, overlap: bool, bucket_cap_mb: float
) -> None:
    on_ranks(2, look_in_hooks, residency, overlap, bucket_cap_mb)


def one_backward_more(group: Any, residency: GradientResidency) -> list[str]:
    """Rank 1 runs a second backward while rank 0 is in its step; what comes after that error fails as well."""
    model, optimizer = small(group, gradient_residency=residency)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, group.rank()).backward()
    if group.rank() == 1 and residency is FULL:
        optimizer.zero_grad()
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            if group.rank() == 1:
                loss_of(model, group.rank(), 1).backward()
            optimizer.step()
        messages.append(str(error.value))
    return messages


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_one_backward_more_on_one_rank_is_an_error_on_all_and_no_hang(residency: GradientResidency) -> None:
    first, second = pool.on_ranks(2, one_backward_more, residency, timeout_s=20.0)
    assert first[0] == first[1] and "rank 1 has begun a reduce-scatter of" in first[0]
    assert second[0] == second[1] and "rank 0 has begun a small exchange of" in second[0]


class Spare(nn.Module):
    """A part with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 16), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).tanh()


def loss_in(inside: str, parts: nn.Sequential, x: Tensor, reentrant: bool) -> Tensor:
    """A loss of which no part, all parts but the last, or everything is computed in checkpoints."""
    *body, head = parts

    def end(y: Tensor) -> Tensor:
        return head(y).square().mean()  # type: ignore[no-any-return]

    for part in body:
        x = part(x) if inside == "nothing" else checkpoint(part, x, use_reentrant=reentrant)
    return checkpoint(end, x, use_reentrant=reentrant) if inside == "everything" else end(x)


def checkpointed(group: Any, reentrant: bool, residency: GradientResidency, inside: str, num_passes: int) -> None:
    """The bits, and the bytes sent, are those without checkpoints: each backward is one round of reductions."""
    results = []
    for within in ("nothing", inside):
        torch.manual_seed(1)
        parts = nn.Sequential(Spare(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 4))
        config = ShardingConfig(bucket_cap_mb=ONE_EACH, gradient_residency=residency)
        optimizer = ShardedDecoupledAdamW(parts.named_parameters(), lr=1e-2, process_group=group, config=config)
        sent = []
        for step in range(3):
            for number in range(num_passes):
                generator = torch.Generator().manual_seed(100 * step + 10 * number + group.rank())
                x = torch.randn(6, 8, generator=generator, requires_grad=True)
                loss_in(within, parts, x, reentrant).backward()
            optimizer.step()
            optimizer.zero_grad()
            sent.append(optimizer.last_step.wire_bytes)
        results.append(([param.detach().clone() for param in parts.parameters()], sent))
    (plain, plain_bytes), (wrapped, wrapped_bytes) = results
    assert all(map(torch.equal, plain, wrapped)) and plain_bytes == wrapped_bytes


@pytest.mark.parametrize(
    ("reentrant", "inside", "residency", "num_passes"),
    [
        (False, "all but the head", SHARDED, 1),
        (False, "everything", FULL, 1),
        (True, "all but the head", FULL, 1),
        (True, "all but the head", SHARDED, 2),
        (True, "everything", FULL, 1),
        (True, "everything", SHARDED, 2),
    ],
)
def test_activation_checkpointing_changes_nothing(
    reentrant: bool, inside: str, residency: GradientResidency, num_passes: int
) -> None:
    on_ranks(2, checkpointed, reentrant, residency, inside, num_passes)


def break_in_a_checkpoint(group: Any, residency: GradientResidency) -> None:
    """Rank 0's backward breaks off between two reentrant checkpoints; rank 1 waits for it in its own."""
    model, optimizer = small(group, gradient_residency=residency)
    x = torch.randn(6, 8, requires_grad=True)
    for index, part in enumerate((model[:2], model[2:4], model[4:])):  # type: ignore[index]
        x = checkpoint(part, x, use_reentrant=True)
        x = Broken.apply(x) if index == 0 and group.rank() == 0 else x
    with contextlib.suppress(ArithmeticError):
        x.square().mean().backward()
    optimizer.zero_grad()
    as_if_nothing_had_been(group, model, optimizer)


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_a_backward_that_breaks_off_between_checkpoints_is_completed_by_the_next_call(
    residency: GradientResidency,
) -> None:
    on_ranks(2, break_in_a_checkpoint, residency)


def call_twice(group: Any, residency: GradientResidency) -> None:
    results = []
    for overlap in (False, True):
        model, optimizer = small(group, gradient_residency=residency, overlap=overlap)
        for step in range(3):
            (loss_of(model, group.rank(), step) + loss_of(model, group.rank(), step + 50)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.equal(plain, overlapped)


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_a_module_may_be_called_twice(residency: GradientResidency) -> None:
    on_ranks(2, call_twice, residency)


def change_who_is_frozen(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """A layer is frozen in every other step, before backward or after it."""
    for step in range(5):
        model[2].requires_grad_(step != 1)  # type: ignore[index, operator]
        loss_of(model, rank, step).backward()
        model[2].requires_grad_(step not in (1, 3))  # type: ignore[index, operator]
        optimizer.step()
        optimizer.zero_grad()


def halve_in_backward(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """A hook of the user's, registered after ours, changes each gradient before it is averaged."""

    def halve(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.5)

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(halve)
    for step in range(3):
        loss_of(model, rank, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def share_out_layers(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """Gradients are cleared in place, and the last layer is used by one rank only."""
    for step in range(4):
        layers = list(model) if step == 0 or rank == step % 2 else list(model)[:3]  # type: ignore[call-overload]
        loss_of(nn.Sequential(*layers), rank, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def load_in_the_middle(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    """State and weights are loaded between backward and step, and state while parameters are in flight."""
    saved: tuple[Any, Any] = {}, {}
    optimizer.attach(model)
    for step in range(5):
        loss_of(model, rank, step).backward()
        if step == 1:
            saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
        if step == 3:
            model.load_state_dict(saved[1])
            optimizer.load_state_dict(saved[0])
        optimizer.step()
        optimizer.zero_grad()
        if step == 3:
            optimizer.load_state_dict(saved[0])


def evaluate_between(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    optimizer.attach(model)
    for step in range(4):
        loss_of(model.train(), rank, step).backward()
        if optimizer.config.gradient_residency is FULL:
            with torch.inference_mode():
                assert all(float(param.grad.norm()) > 0 for param in model.parameters() if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode() if step % 2 else torch.no_grad():
            loss_of(model.eval(), rank, step)


def compile_it(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int) -> None:
    compiled = torch.compile(model, backend="aot_eager")
    optimizer.attach(compiled)  # type: ignore[arg-type]
    for step in range(3):
        loss_of(compiled, rank, step).backward()  # type: ignore[arg-type]
        optimizer.step()
        optimizer.zero_grad()


def run_loop(group: Any, residency: GradientResidency, loop: Callable[..., None]) -> None:
    results = []
    for overlap in (False, True):
        model, optimizer = small(group, gradient_residency=residency, overlap=overlap)
        loop(model, optimizer, group.rank())
        optimizer.synchronize()
        moments = [optimizer.state[param]["exp_avg"] for param in model.parameters()]
        results.append([value.detach().clone() for value in (*model.parameters(), *moments)])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.equal(plain, overlapped)


@pytest.mark.parametrize(
    ("loop", "residency"),
    [
        *((loop, residency) for loop in (change_who_is_frozen, load_in_the_middle) for residency in (FULL, SHARDED)),
        *((loop, residency) for loop in (evaluate_between, compile_it) for residency in (FULL, SHARDED)),
        *((halve_in_backward, residency) for residency in (FULL, SHARDED)),
        (share_out_layers, FULL),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_overlap_changes_nothing_about_loops_that_are_not_the_plainest(
    loop: Callable[..., None], residency: GradientResidency
) -> None:
    on_ranks(2, run_loop, residency, loop)


def go_on_without_sync(group: Any) -> None:
    """What stays local after a mean is there is added to it in the step."""
    results = []
    for residency in (FULL, SHARDED):
        model, optimizer = small(group, gradient_residency=residency)
        for step in range(2):
            if residency is SHARDED:
                loss_of(model, group.rank(), step).backward()
            with optimizer.no_sync():
                loss_of(model, group.rank(), step + 10).backward()
                with optimizer.no_sync():
                    loss_of(model, group.rank(), step + 20).backward()
            if residency is FULL:
                loss_of(model, group.rank(), step).backward()
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append([optimizer.state[param]["exp_avg"] for param in model.parameters()])
    for full, sharded in zip(*results, strict=True):
        torch.testing.assert_close(sharded, full, rtol=1e-5, atol=1e-8)


def test_sharded_gradients_may_be_reduced_first_and_left_local_later() -> None:
    on_ranks(2, go_on_without_sync)


def share_a_model(group: Any, residency: GradientResidency, exchange: Exchange) -> None:
    """Weights belong to one optimizer and biases to another, which take their steps in any order."""
    results = []
    for overlap in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        config = ShardingConfig(
            bucket_cap_mb=ONE_EACH, overlap=overlap, gradient_residency=residency, exchange=exchange
        )
        named = list(model.named_parameters())
        optimizers = [
            ShardedDecoupledAdamW(part, lr=1e-2, process_group=group, config=config)
            for part in (named[::2], named[1::2])
        ]
        for optimizer in optimizers:
            optimizer.attach(model)
        for step in range(3):
            loss_of(model, group.rank(), step).backward()
            for optimizer in optimizers[:: 1 if step % 2 else -1]:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        results.append([param.detach().clone() for param in model.parameters()])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.equal(plain, overlapped)


@over_each_exchange
def test_two_optimizers_may_share_a_model(residency: GradientResidency, exchange: Exchange) -> None:
    on_ranks(2, share_a_model, residency, exchange)


def take_over(group: Any, residency: GradientResidency, exchange: Exchange) -> None:
    model, optimizer = small(group, gradient_residency=residency, exchange=exchange)
    loss_of(model, group.rank()).backward()
    config = optimizer.config
    del optimizer
    model.zero_grad()
    successor = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=config)
    as_if_nothing_had_been(group, model, successor)


@over_each_exchange
def test_an_optimizer_may_die_between_backward_and_step(residency: GradientResidency, exchange: Exchange) -> None:
    on_ranks(2, take_over, residency, exchange)


class RegisteredBackwards(nn.Module):
    """Reads its layers from the last to the first, so that gradients come in the order of registration."""

    def __init__(self, with_unused: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        if with_unused:
            self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def learn(group: Any, with_unused: bool) -> list[int]:
    """How many reductions have begun, in each backward, by the time at which its last gradient comes."""
    torch.manual_seed(1)
    model = RegisteredBackwards(with_unused)
    config = ShardingConfig(bucket_cap_mb=ONE_EACH)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    verbs, begun, in_time = optimizer._shards.collectives, 0, 0

    def reduce_scatter_mean(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun += 1
        return type(verbs).reduce_scatter_mean(verbs, *args, **kwargs)

    def look(_param: Tensor) -> None:
        nonlocal in_time
        in_time = begun

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbs, "reduce_scatter_mean", reduce_scatter_mean)
        for step in range(3):
            begun = 0
            loss_of(model, group.rank(), step).backward()
            found.append(in_time)
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_the_order_in_which_gradients_come_is_learnt_from_the_first_backward() -> None:
    """A layer without gradients comes first in the order of registration, and holds up everything once."""
    assert on_ranks(2, learn, True) == [[0, 0, 7]] * 2


def test_where_the_last_bucket_comes_first_the_others_wait_for_it_once() -> None:
    assert on_ranks(2, learn, False) == [[0, 1, 7]] * 2


# --- reading and changing gradients ---


def read_at_once(group: Any, how: str) -> None:
    """Right after backward, in a slow network: this rank's slice must be the mean, the rest its own gradient."""
    model, optimizer = small(group, bucket_cap_mb=ALL_IN_ONE)
    warm_up(group, model, optimizer)
    slow: Any = Slow(optimizer._shards.collectives, 0.05)
    optimizer._reducer._collectives = slow
    loss_of(model, group.rank()).backward()
    (bucket,) = optimizer._shards.buckets
    params = [member.param for member in bucket.members]
    if how == "read":
        found = torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    elif how == "halved by foreach":
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], 0.5)
        found = 2 * torch.cat([param.grad.flatten() for param in params if param.grad is not None])
    torch.manual_seed(1)
    own, mean = [], []
    twin, _ = small(group, overlap=False)
    twin.load_state_dict(model.state_dict())
    loss_of(twin, group.rank()).backward()
    by_name = dict(twin.named_parameters())
    for member in bucket.members:
        grad = by_name[member.name].grad
        assert grad is not None
        own.append(grad.flatten().clone())
        mean += [each.flatten() for each in reduce_for_control(group, [grad])]
    start, stop = bucket.layout.shard_range(group.rank())
    expected = torch.cat(own)
    expected[start:stop] = torch.cat(mean)[start:stop]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    optimizer.step()


@pytest.mark.parametrize("how", ["read", "halved by foreach"])
def test_who_reads_or_changes_a_gradient_waits_until_it_is_reduced(how: str) -> None:
    on_ranks(2, read_at_once, how)


def look_alone(group: Any, exchange: Exchange) -> None:
    model, optimizer = small(group, exchange=exchange, bucket_cap_mb=ALL_IN_ONE)
    for step in range(2):
        loss_of(model, group.rank(), step).backward()
        if group.rank() == step:
            assert all(float(param.grad.norm()) > 0 for param in model.parameters() if param.grad is not None)
        if step == 1:
            dist.barrier(group)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("exchange", Exchange)
def test_one_rank_alone_may_look_at_gradients(exchange: Exchange) -> None:
    """As to log them, while the others wait for it in a barrier or in the step."""
    on_ranks(2, look_alone, exchange)


def look_and_halve(group: Any, exchange: Exchange) -> None:
    """Rank 0 halves what rank 1, which is late, still has to read."""
    results = []
    for overlap in (False, True):
        model, optimizer = small(group, exchange=exchange, overlap=overlap, bucket_cap_mb=ALL_IN_ONE)
        loss_of(model, group.rank()).backward()
        if group.rank() == 1:
            time.sleep(0.05)
        grads = [param.grad.detach().flatten() for param in model.parameters() if param.grad is not None]
        assert all(float(grad.norm()) > 0 for grad in grads)
        for grad in grads:
            grad.mul_(0.5)
        optimizer.step()
        results.append([optimizer.state[param]["exp_avg"].clone() for param in model.parameters()])
    for plain, overlapped in zip(*results, strict=True):
        assert torch.equal(plain, overlapped)


@pytest.mark.parametrize("exchange", Exchange)
def test_gradients_may_be_multiplied_under_another_name_while_another_rank_is_late(exchange: Exchange) -> None:
    on_ranks(2, look_and_halve, exchange)


CHANGES: dict[str, tuple[Callable[[list[Tensor]], object], bool]] = {
    # what is done to the gradients of each rank, and whether that is a change that averages bear
    "halved": (lambda grads: torch._foreach_mul_(grads, 0.5), True),
    "divided by a number of tokens": (lambda grads: [grad.div_(3.0) for grad in grads], True),
    "clipped by more than there is": (lambda grads: clip_by_own_norm(grads, 1e3), True),
    "clipped by each rank's norm": (lambda grads: clip_by_own_norm(grads, 1e-2), False),
    "clipped by each rank's norm in a loop": (lambda grads: clip_by_own_norm(grads, 1e-2, foreach=False), False),
    "clipped by value": (lambda grads: [grad.clamp_(-1e-3, 1e-3) for grad in grads], False),
    "one is multiplied by the rank": (lambda grads: grads[2].mul_(2 + dist.get_rank()), False),
}


def clip_by_own_norm(grads: list[Tensor], max_norm: float, foreach: bool | None = None) -> None:
    coefficient = max_norm / (torch.nn.utils.get_total_norm(grads) + 1e-6)
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)
    assert max_norm > 1 or coefficient < 1


def change_averages(group: Any, what: str, bucket_cap_mb: float, dtype: torch.dtype, verb: str) -> str:
    change, is_fine = CHANGES[what]
    results = []
    for overlap in (False, True):
        model, optimizer = small(group, overlap=overlap, bucket_cap_mb=bucket_cap_mb)
        if dtype != F32:
            model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).to(dtype)
            torch.manual_seed(1)
            nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
            config = ShardingConfig(bucket_cap_mb=bucket_cap_mb, overlap=overlap)
            optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
        warm_up(group, model, optimizer)
        model(torch.randn(6, 8, generator=torch.Generator().manual_seed(group.rank())).to(dtype)).sum().backward()
        before = [param.detach().clone() for param in model.parameters()]
        if overlap or is_fine:
            change([param.grad for param in model.parameters() if param.grad is not None])
        try:
            if verb == "clip":
                optimizer.clip_grad_norm_(1e9)
            optimizer.step()
        except RuntimeError as error:
            assert overlap and all(map(torch.equal, model.parameters(), before))
            optimizer.zero_grad()
            if dtype == F32:
                as_if_nothing_had_been(group, model, optimizer, bucket_cap_mb=bucket_cap_mb)
            return str(error)
        results.append([optimizer.state[param]["exp_avg"] for param in model.parameters()])
    plain, overlapped = map(torch.cat, results)
    tolerance = {F32: 1e-6, BF16: 2e-2}[dtype]
    torch.testing.assert_close(plain, overlapped, rtol=tolerance, atol=tolerance * float(plain.abs().max()))
    return ""


@pytest.mark.parametrize(
    ("bucket_cap_mb", "dtype", "verb"), [(ONE_EACH, F32, "step"), (ALL_IN_ONE, F32, "clip"), (ALL_IN_ONE, BF16, "step")]
)
@pytest.mark.parametrize("what", CHANGES)
def test_averages_may_be_multiplied_alike_on_all_ranks_and_other_changes_are_an_error_that_names_ours(
    what: str, bucket_cap_mb: float, dtype: torch.dtype, verb: str
) -> None:
    first, second = on_ranks(2, change_averages, what, bucket_cap_mb, dtype, verb)
    assert first == second and ("optimizer.clip_grad_norm_()" in first) == (not CHANGES[what][1])


def save_alone(group: Any, exchange: Exchange) -> None:
    model, optimizer = small(group, exchange=exchange)
    optimizer.attach(model)
    for step in range(2):
        loss_of(model, group.rank(), step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if group.rank() == step:
            torch.save(model.state_dict(), io.BytesIO())
            loss_of(model, group.rank())
        dist.barrier(group)


@pytest.mark.parametrize("exchange", Exchange)
def test_one_rank_alone_may_save_and_evaluate_an_attached_model_while_others_wait_in_a_barrier(
    exchange: Exchange,
) -> None:
    on_ranks(2, save_alone, exchange)


# --- memory ---


def bytes_held(group: Any, residency: GradientResidency, dtype: torch.dtype, main: MainParameter) -> dict[str, float]:
    """Bytes per parameter of flat buffers and state, at rest and at the peak of backward and step."""
    torch.manual_seed(1)
    width, depth = 64, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).to(dtype)
    per_bucket = width * width * dtype.itemsize
    config = ShardingConfig(
        bucket_cap_mb=per_bucket / 2**20,
        gradient_residency=residency,
        main_parameter=main,
        exchange=Exchange.RANK_ORDER,
    )
    alive: set[int] = set()
    peak = 0
    sizes: dict[int, int] = {}

    def measured(numel: int, of: torch.dtype, device: torch.device) -> Tensor:
        nonlocal peak
        buffer = torch.zeros(numel, dtype=of, device=device)
        storage = buffer.untyped_storage()
        key = id(storage)
        sizes[key] = storage.nbytes()
        alive.add(key)
        weakref.finalize(storage, alive.discard, key)
        peak = max(peak, sum(sizes[each] for each in alive))
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MessageVerbs, "new_buffer", lambda _self, *args: measured(*args))
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
        shards = optimizer.state_bytes
        if residency is SHARDED:
            shards += sum(bucket.gradients.shard.nbytes for bucket in optimizer._shards.buckets)
        for step in range(3):
            data = torch.randn(4, width, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(data).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        numel = sum(param.numel() for param in model.parameters())
        at_rest = sum(sizes[each] for each in alive) + shards
        held = {"rest": at_rest / numel, "peak": (peak + shards) / numel, "bucket": per_bucket / numel}
        storages = [weakref.ref(bucket.weights.buffer.untyped_storage()) for bucket in optimizer._shards.buckets]  # type: ignore[union-attr]
        del model, optimizer
        gc.collect()
        assert not alive, "deleting model and optimizer frees every buffer"
        assert not any(storage() is not None for storage in storages)
    return held


FORMULAS: dict[tuple[GradientResidency, torch.dtype, MainParameter], tuple[float, float]] = {
    # per parameter on every rank, and what is divided by their number; parameters, gradients, main parameter, moments
    (FULL, F32, MainParameter.NONE): (4 + 4, 8),
    (SHARDED, F32, MainParameter.NONE): (4, 4 + 8),
    (FULL, BF16, MainParameter.FP32): (2 + 2, 4 + 8),
    (SHARDED, BF16, MainParameter.FP32): (2, 2 + 4 + 8),
    (SHARDED, BF16, MainParameter.REMAINDER): (2, 2 + 2 + 8),
}


@pytest.mark.parametrize(("case", "num_ranks"), [*zip(FORMULAS, itertools.cycle([2, 4]))])
def test_bytes_held_are_those_of_the_formula_and_the_buckets_between(
    case: tuple[GradientResidency, torch.dtype, MainParameter], num_ranks: int
) -> None:
    everywhere, spread = FORMULAS[case]
    formula = everywhere + spread / num_ranks
    for held in pool.on_ranks(num_ranks, bytes_held, *case):
        spare = held["bucket"] if case[0] is SHARDED else 0.0
        assert held["rest"] == pytest.approx(formula + spare, rel=1e-9), "at rest: the formula, and one spare buffer"
        assert held["peak"] <= formula + 2 * spare + 1e-9, "at the peak: one bucket fills, one is being reduced"


# --- precision on the way ---


def accumulate_in_fp32(group: Any, residency: GradientResidency, wire_dtype: torch.dtype | None) -> None:
    """bf16 gradients of two passes and all ranks, added up in fp32 and, where it is asked for, sent in bf16."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(64, 3).to(BF16))
    weight.grad_dtype = F32
    config = ShardingConfig(wire_dtype=wire_dtype, gradient_residency=residency)
    optimizer = ShardedDecoupledAdamW([("weight", weight)], process_group=group, config=config)
    drawn = [[draw_gradient(weight, rank, number) for number in range(2)] for rank in range(group.size())]
    for number in range(2):
        with optimizer.no_sync() if number == 0 else contextlib.nullcontext():
            torch.autograd.backward(weight.view_as(weight), drawn[group.rank()][number])
        assert weight.grad is None or weight.grad.dtype == F32
    norm = optimizer.clip_grad_norm_(1e9)
    total = torch.zeros(weight.shape)
    for first, second in drawn:
        own = first.float() + second.float()
        total += own if wire_dtype is None else own.to(wire_dtype).float()
    mean = total / group.size()
    (bucket,) = optimizer._shards.buckets
    start, stop = bucket.layout.shard_range(group.rank())
    kept = mean.flatten()[start:stop]
    assert torch.equal(bucket.gradients.shard[: kept.numel()], kept)
    torch.testing.assert_close(norm, mean.double().norm().float(), rtol=1e-6, atol=0)
    optimizer.step()


@pytest.mark.parametrize(
    ("residency", "wire_dtype", "num_ranks"), [(FULL, None, 2), (FULL, BF16, 3), (SHARDED, None, 3), (SHARDED, BF16, 2)]
)
def test_bf16_gradients_add_up_in_fp32_and_travel_in_what_is_asked_for(
    residency: GradientResidency, wire_dtype: torch.dtype | None, num_ranks: int
) -> None:
    on_ranks(num_ranks, accumulate_in_fp32, residency, wire_dtype)


# --- void steps ---


def skip(group: Any, residency: GradientResidency, clips: bool, value: float) -> None:
    model, optimizer = small(group, gradient_residency=residency, skip_nonfinite=True)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [param.detach().clone() for param in model.parameters()]
    state = [value.clone() for param in model.parameters() for value in optimizer.state[param].values()]
    loss = loss_of(model, group.rank(), 1)
    (loss * value if group.rank() == 1 else loss).backward()
    if clips:
        optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    assert int(optimizer.metrics()["skipped_steps"]) == 1
    optimizer.zero_grad()
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))
    now = [value for param in model.parameters() for value in optimizer.state[param].values()]
    assert all(torch.equal(new, old) for new, old in zip(now, state, strict=True))
    loss_of(model, group.rank(), 2).backward()
    optimizer.step()
    assert not torch.equal(next(model.parameters()), before[0])


@pytest.mark.parametrize(
    ("residency", "clips", "value"),
    [(FULL, False, math.nan), (FULL, True, math.inf), (SHARDED, False, math.inf), (SHARDED, True, math.nan)],
)
def test_a_gradient_that_is_not_finite_on_one_rank_makes_the_step_void_on_all(
    residency: GradientResidency, clips: bool, value: float
) -> None:
    on_ranks(2, skip, residency, clips, value)


def overflow_on_one_rank(group: Any, agrees: bool) -> list[float] | str:
    """Rank 1 meets an infinity in step 1: the step is void on both ranks, and then scalers that do not agree part.

    It stands where rank 1 averages, so rank 0 does not find it in its own ``p.grad``.
    """
    model, optimizer = small(group)
    settings: dict[str, Any] = dict(init_scale=8.0, growth_interval=1000)
    scaler = ShardedGradScaler("cpu", process_group=group, **settings) if agrees else GradScaler("cpu", **settings)
    twin, control = small(group)
    for step in range(4):
        loss = loss_of(model, group.rank(), step)
        if (step, group.rank()) == (1, 1):
            averaged_here = [param for param in model.parameters() if optimizer.state[param]["exp_avg"].numel()]
            loss = loss + math.inf * averaged_here[-1].flatten()[-1]
        scaler.scale(loss).backward()
        before = [param.detach().clone() for param in model.parameters()]
        if agrees:
            scaler.unscale_(optimizer)
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            assert step == 2 and all(map(torch.equal, model.parameters(), before))
            return str(error)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            assert all(map(torch.equal, model.parameters(), before))
            continue
        loss_of(twin, group.rank(), step).backward()
        control.step()
        control.zero_grad()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"step {step}"  # scales are powers of two, so they leave no trace
    return [float(scaler.get_scale())]


def test_loss_scalers_that_agree_on_what_they_find_go_on() -> None:
    assert on_ranks(2, overflow_on_one_rank, True) == [[4.0], [4.0]]


def test_loss_scalers_that_part_are_an_error_on_all_that_names_those_that_agree() -> None:
    first, second = on_ranks(2, overflow_on_one_rank, False)
    assert first == second and "the loss scale: rank 0 has 8.0, rank 1 has 4.0; use torch" in first
    assert "ShardedGradScaler(process_group=...)" in first


def scale_differently(group: Any, overlap: bool, how: str) -> str:
    """Scales differ from the start, which is an error, clipped or not, on averages that are unscaled, too."""
    model, optimizer = small(group, overlap=overlap)
    if how == "unscaled":
        warm_up(group, model, optimizer)
    before = [param.detach().clone() for param in model.parameters()]
    state = [value.clone() for param in model.parameters() for value in optimizer.state[param].values()]
    scale = 8.0 * (1 + group.rank())
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(loss_of(model, group.rank())).backward()
    if how == "unscaled":
        scaler.unscale_(optimizer)
    if how == "clipped":
        optimizer.clip_grad_norm_(0.1)
    if how == "by hand":  # without a non-finite check
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError) as error:
        optimizer.step() if how == "by hand" else scaler.step(optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert all(map(torch.equal, (v for p in model.parameters() for v in optimizer.state[p].values()), state))
    for name in {"grad_scale", "found_inf"} & vars(optimizer).keys():
        delattr(optimizer, name)  # which torch's scaler leaves behind where a step raises
    optimizer.zero_grad()
    as_if_nothing_had_been(group, model, optimizer)
    return str(error.value)


@pytest.mark.parametrize(
    ("overlap", "how"),
    [*((overlap, how) for overlap in (True, False) for how in ("", "clipped", "by hand")), (True, "unscaled")],
)
def test_gradients_of_different_scales_are_an_error_on_all(overlap: bool, how: str) -> None:
    first, second = on_ranks(2, scale_differently, overlap, how)
    assert first == second
    assert ("one scale" if how == "unscaled" else "the loss scale: rank 0 has 8.0, rank 1 has 16.0") in first


def scale_sharded(group: Any) -> None:
    model, optimizer = small(group, gradient_residency=SHARDED)
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, group.rank())).backward()
    with pytest.raises((RuntimeError, AssertionError), match=r"GradientResidency\.FULL"):
        scaler.step(optimizer)


def test_a_loss_scaler_and_sharded_gradients_are_refused() -> None:
    on_ranks(2, scale_sharded)


def scale_beside_a_bucket_without_elements(group: Any, exchange: Exchange) -> list[float]:
    full, empty = nn.Parameter(torch.ones(5, dtype=torch.bfloat16)), nn.Parameter(torch.ones(0, 4))
    config = ShardingConfig(exchange=exchange)
    optimizer = ShardedDecoupledAdamW([full, empty], lr=1e-2, process_group=group, config=config)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=group)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale((full * (group.rank() + 1)).sum() + empty.sum()).backward()
        scaler.unscale_(optimizer)
        if step % 2:
            optimizer.clip_grad_norm_(1e3)
        scaler.step(optimizer)
        scaler.update()
    return [float(optimizer.state[param]["step"]) for param in (full, empty)]


@pytest.mark.parametrize("exchange", [Exchange.RANK_ORDER, Exchange.BACKEND])
def test_a_loss_scaler_works_beside_a_bucket_without_elements(exchange: Exchange) -> None:
    assert on_ranks(2, scale_beside_a_bucket_without_elements, exchange) == [[4.0, 4.0]] * 2
