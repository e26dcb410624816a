"""Reductions that begin in backward change when gradients travel, and nothing else.

The first test has the control of `tests/harness.py`; where means of several passes add up in a shard, the control adds
up the same means. The others have the same loop without overlap, or a twin that has seen nothing but good steps. Ranks
are simulated, where `Exchange.RANK_ORDER` is what `FASTEST` is; profilers, and counts of what a process holds, are not.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from sharded_dadamw import Exchange, GradientResidency, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.comm.collectives import Collectives
from tests import pool
from tests.harness import (
    ALL_IN_ONE,
    AS_UNSHARDED,
    FULL,
    ONE_EACH,
    SHARDED,
    SOME_EACH,
    Scenario,
    assert_equal,
    assert_state_is_the_controls,
    everything_of,
    go_on_as_if_nothing_had_been,
    loss_of,
    on_numbers_of_ranks,
    ranks,
    refused,
    scenario,
    small,
    train_beside_control,
    train_on,
    values_of,
)
from tests.models import BF16, F16, F32, InOrder, draw_gradient, reduce_for_control, whole_state_dict
from tests.simulated import on_ranks, started

either_residency = pytest.mark.parametrize("residency", [FULL, SHARDED])
over_each_exchange = pytest.mark.parametrize(
    ("residency", "exchange"), [(FULL, Exchange.RANK_ORDER), (SHARDED, Exchange.BACKEND)]
)


def way(**settings: Any) -> Scenario:
    settings = {"bucket_cap_mb": 2 * SOME_EACH, "num_steps": 6, **settings}
    return scenario("tied language model", amsgrad=True, **AS_UNSHARDED, **settings)


IN_SHARDS: dict[str, Any] = dict(gradient_residency=SHARDED)
THREE_MEANS: dict[str, Any] = dict(num_passes=3, without_sync=False)


@on_numbers_of_ranks(
    ("without overlap", way(overlap=False), (3,)),
    ("hooks", way(), (1, 2, 4)),
    ("hooks, a bucket each, two passes, clipped", way(bucket_cap_mb=ONE_EACH, num_passes=2, clip=(0.05, 2.0)), (4,)),
    ("hooks, one bucket, clipped", way(bucket_cap_mb=ALL_IN_ONE, clip=(0.05, 2.0)), (3,)),
    ("three passes", way(num_passes=3), (2,)),
    ("three passes, no hooks", way(num_passes=3, overlap=False), (4,)),
    ("three passes, no hooks, no no_sync", way(overlap=False, **THREE_MEANS), (3,)),
    ("sharded", way(**IN_SHARDS), (2,)),
    ("sharded, a bucket each, three passes", way(bucket_cap_mb=ONE_EACH, num_passes=3, **IN_SHARDS), (3,)),
    ("sharded, one bucket", way(bucket_cap_mb=ALL_IN_ONE, **IN_SHARDS), (4,)),
    ("sharded, no hooks", way(overlap=False, **IN_SHARDS), (3,)),
    ("sharded, three reductions", way(**THREE_MEANS, **IN_SHARDS), (1, 2)),
    ("sharded, three reductions, one bucket", way(bucket_cap_mb=ALL_IN_ONE, **THREE_MEANS, **IN_SHARDS), (3,)),
    ("sharded, three reductions, clipped", way(clip=(0.05, 2.0), **THREE_MEANS, **IN_SHARDS), (4,)),
    ("sharded, infinities", scenario(skip_nonfinite=True, overflows={1: 0, 3: 1}, **IN_SHARDS), (2,)),
)
def test_every_way_of_reducing_leads_to_the_bits_of_the_control(case: Scenario, num_ranks: int) -> None:
    assert_state_is_the_controls(on_ranks(num_ranks, train_beside_control, case))


# --- when it happens ---


def warm_up(group: Any, model: nn.Module, optimizer: ShardedDecoupledAdamW) -> None:
    """Take the first step, in which ranks find out whether something else averages, and nothing overlaps."""
    train_on(model, optimizer, group.rank(), 10)


def test_sharded_gradients_of_buckets_of_all_sizes_go_through_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory would cost a page fault for every 4 KiB, in every step."""
    taken: list[int] = []

    def new_buffer(_: Collectives, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        taken.append(numel)
        return torch.zeros(numel, dtype=dtype, device=device)

    monkeypatch.setattr(Collectives, "new_buffer", new_buffer)
    params = [nn.Parameter(torch.zeros(64 * n)) for n in (3, 1, 4, 2)]
    config = ShardingConfig(gradient_residency=SHARDED, overlap=False, bucket_cap_mb=ONE_EACH)
    optimizer = ShardedDecoupledAdamW(params, config=config)
    for _ in range(3):
        taken.clear()
        torch.stack([param.sum() for param in params]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert taken == []


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)], ids=str)
@ranks(4, pool.on_ranks)
def test_a_profiler_sees_replicas_exchange_means_while_backward_runs(group: Any, shape: tuple[int, int]) -> None:
    """In backward nothing but a mean on its way through its column gathers."""
    model, optimizer = small(init_device_mesh("cpu", shape))
    warm_up(group, model, optimizer)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        loss_of(model, group.rank()).backward()
    events = profiler.events() or ()
    left = max(e.time_range.end for e in events if e.name.endswith("evaluate_function: AddmmBackward0"))
    assert any(event.name == "sharded_dadamw::all_gather" and event.time_range.end < left for event in events)


@either_residency
@ranks(2)
def test_in_no_sync_nothing_is_sent(group: Any, residency: GradientResidency) -> None:
    model, optimizer = small(group, gradient_residency=residency)
    with started(group) as calls, optimizer.no_sync():
        loss_of(model, group.rank()).backward()
    assert not calls and all(param.grad is not None for param in model.parameters())
    loss_of(model, group.rank(), 1).backward()
    optimizer.step()


@pytest.mark.parametrize(("num_layers", "in_time"), [(5, [0, 0, 7]), (4, [0, 1, 7])])
@ranks(2)
def test_the_order_in_which_gradients_come_is_learnt_from_the_first_backward(
    group: Any, num_layers: int, in_time: list[int]
) -> None:
    """How many reductions have begun, in each backward, by the time at which its last gradient comes.

    What comes first in the order of registration, a layer without gradients say, holds up everything once.
    """
    model = InOrder(num_layers, (3, 2, 1, 0), 8)
    config = ShardingConfig(bucket_cap_mb=ONE_EACH)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    found = [0]
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda _: found.append(len(calls)))
    last = []
    for step in range(3):
        with started(group) as calls:
            loss_of(model, group.rank(), step).backward()
            last.append(found[-1])
        optimizer.step()
        optimizer.zero_grad()
    assert last == in_time


# --- loops that are not the plainest ---


@either_residency
@ranks(2)
def test_overlap_changes_nothing_where_a_later_hook_of_the_users_changes_each_gradient(
    group: Any, residency: GradientResidency
) -> None:
    def halve(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(0.5)

    results = []
    for overlap in (False, True):
        model, optimizer = small(group, overlap=overlap, gradient_residency=residency)
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(halve)
        train_on(model, optimizer, group.rank(), 0, 1, 2)
        results.append(everything_of(model, optimizer))
    assert_equal(*results)


@pytest.mark.parametrize(("residency", "bucket_cap_mb"), [(FULL, ONE_EACH), (SHARDED, ALL_IN_ONE)])
@ranks(2)
def test_the_users_own_hooks_see_this_ranks_gradient_whatever_the_buckets(
    group: Any, residency: GradientResidency, bucket_cap_mb: float
) -> None:
    """Hooks of the user's, from before and from after the optimizer, beside the gradients of a model without one."""
    model, _ = small(None)
    twin, model = (copy.deepcopy(model) for _ in range(2))
    seen: list[dict[Tensor, Tensor]] = [{}, {}]

    def watch(number: int) -> None:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(
                lambda param: seen[number].update({param: param.grad.clone()})  # type: ignore[union-attr]
            )

    watch(0)
    config = ShardingConfig(bucket_cap_mb=bucket_cap_mb, gradient_residency=residency)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    watch(1)
    for step in range(2):
        twin.zero_grad()
        for number in range(2):
            loss_of(twin, group.rank(), 10 * step + number).backward()
            with optimizer.no_sync() if number == 0 else contextlib.nullcontext():
                loss_of(model, group.rank(), 10 * step + number).backward()
            for param, of_twin in zip(model.parameters(), twin.parameters(), strict=True):
                assert_equal([of_twin.grad, of_twin.grad], [seen[0][param], seen[1][param]])
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("reentrant", "inside", "residency", "num_passes"),
    [(False, 2, SHARDED, 1), (False, 3, FULL, 1), (True, 2, SHARDED, 2), (True, 3, FULL, 1), (True, 3, SHARDED, 2)],
)
@ranks(2)
def test_activation_checkpointing_changes_nothing(
    group: Any, reentrant: bool, residency: GradientResidency, inside: int, num_passes: int
) -> None:
    """The bits, and the bytes sent, are those without checkpoints: each backward is one round of reductions.

    Of three parts two or all are computed in checkpoints; one has a layer that it does not use.
    """
    results = []
    for num_checkpoints in (0, inside):
        torch.manual_seed(1)
        parts = nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 4))
        parts[1].unused = nn.Linear(3, 3)
        parts[1].forward = lambda x, parts=parts: parts[1][:2](x)
        config = ShardingConfig(bucket_cap_mb=ONE_EACH, gradient_residency=residency)
        optimizer = ShardedDecoupledAdamW(parts.named_parameters(), lr=1e-2, process_group=group, config=config)
        sent = []
        for step in range(3):
            for number in range(num_passes):
                generator = torch.Generator().manual_seed(100 * step + 10 * number + group.rank())
                x = torch.randn(6, 8, generator=generator, requires_grad=True)
                for index, part in enumerate([*parts[:2], lambda x, head=parts[2]: head(x).square().mean()]):
                    x = checkpoint(part, x, use_reentrant=reentrant) if index < num_checkpoints else part(x)
                x.backward()
            left = [param.grad for param in parts.parameters() if param.grad is not None]
            assert residency is FULL or step < 2 or not any(grad.any() for grad in left), (
                "all are reduced, once the order is known"
            )
            optimizer.step()
            optimizer.zero_grad()
            sent.append(optimizer.last_step.wire_bytes)
        results.append([values_of(parts), sent])
    assert_equal(*results)


@ranks(2)
def test_sharded_gradients_may_be_reduced_first_and_left_local_later(group: Any) -> None:
    """What stays local after a mean is there is added to it in the step; not every pass uses every layer."""
    results = []
    for residency in (FULL, SHARDED):
        model, optimizer = small(group, gradient_residency=residency, bucket_cap_mb=ALL_IN_ONE)
        for step in range(2):
            if residency is SHARDED:
                loss_of(model, group.rank(), step).backward()
            with optimizer.no_sync():
                loss_of(model[:4], group.rank(), step + 10).backward()
                with optimizer.no_sync():
                    loss_of(model[:3], group.rank(), step + 20).backward()
            if residency is FULL:
                loss_of(model, group.rank(), step).backward()
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append([optimizer.state[param]["exp_avg"] for param in model.parameters()])
    for full, sharded in zip(*results, strict=True):
        torch.testing.assert_close(sharded, full, rtol=1e-5, atol=1e-8)


@over_each_exchange
@ranks(2)
def test_two_optimizers_may_share_a_model(group: Any, residency: GradientResidency, exchange: Exchange) -> None:
    """Weights belong to one optimizer and biases to another, which take their steps in any order."""
    results = []
    for overlap in (False, True):
        model, first = small(group, overlap=overlap, gradient_residency=residency, exchange=exchange)
        config, named = first.config, list(model.named_parameters())
        del first
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
        results.append(values_of(model))
    assert_equal(*results)


@over_each_exchange
@ranks(2)
def test_an_optimizer_may_die_between_backward_and_step(
    group: Any, residency: GradientResidency, exchange: Exchange
) -> None:
    model, optimizer = small(group, gradient_residency=residency, exchange=exchange)
    loss_of(model, group.rank()).backward()
    config = optimizer.config
    del optimizer
    model.zero_grad()
    successor = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=config)
    go_on_as_if_nothing_had_been(group, model, successor)


# --- backwards that break off, or that not every rank runs ---


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("in the middle of backward")


def break_off(model: Any, after: int | None, in_checkpoints: bool = False) -> None:
    """A backward that breaks off, behind the layers from `after` on, or not at all."""
    x = torch.randn(6, 8, requires_grad=True)
    parts = (model[:2], model[2:4], model[4:]) if in_checkpoints else model
    for index, part in enumerate(parts):
        x = checkpoint(part, x, use_reentrant=True) if in_checkpoints else part(x)
        x = Broken.apply(x) if index == after else x
    with contextlib.nullcontext() if after is None else pytest.raises(ArithmeticError):
        x.square().mean().backward()


@pytest.mark.parametrize("how", ["anywhere", "cleared by the model", "between checkpoints", "nowhere"])
@either_residency
@ranks(2)
def test_after_a_backward_that_breaks_off_or_is_not_wanted_zero_grad_makes_good(
    group: Any, residency: GradientResidency, how: str
) -> None:
    """Rank 0 breaks off after one layer and rank 1 after two: they have begun different numbers of reductions."""
    model, optimizer = small(group, gradient_residency=residency)
    if how == "between checkpoints":  # where rank 1 waits for rank 0 in its own
        break_off(model, None if group.rank() else 0, in_checkpoints=True)
    elif how == "nowhere":
        loss_of(model, group.rank()).backward()
    else:
        break_off(model, 1 if group.rank() else 3)
    if how == "cleared by the model":
        model.zero_grad()
    if how != "cleared by the model" or residency is SHARDED:
        optimizer.zero_grad()  # model.zero_grad cannot be noticed where p.grad is None
    go_on_as_if_nothing_had_been(group, model, optimizer)


@ranks(2)
def test_each_backward_is_a_round_also_after_one_that_was_broken_off(group: Any) -> None:
    """So ranks may meet elsewhere, as in a barrier, between backward and step: or they part here."""
    model, optimizer = small(group, gradient_residency=SHARDED)
    break_off(model, None if group.rank() else 2)
    loss_of(model, group.rank(), 1).backward()
    dist.barrier(group)
    optimizer.step()


@ranks(2)
def test_a_second_backward_that_was_not_announced_is_a_clear_error_and_nothing_is_lost(group: Any) -> None:
    model, optimizer = small(group)
    warm_up(group, model, optimizer)
    loss_of(model, group.rank()).backward()
    with refused(group, model, optimizer, r"(?s)backward reached.*no_sync.*overlap=False"):
        loss_of(model, group.rank(), 1).backward()


@pytest.mark.parametrize(
    ("what", "residency"),
    [
        ("an unused layer", FULL),
        ("an unused layer", SHARDED),
        ("no backward after one that all dropped", SHARDED),
        ("a pass that only one dropped", FULL),
    ],
)
@ranks(2)
def test_ranks_that_disagree_after_backward_hear_of_it_and_can_go_on(
    group: Any, what: str, residency: GradientResidency
) -> str:
    model, optimizer = small(group, gradient_residency=residency)
    rank = group.rank()
    if what == "no backward after one that all dropped" or "only one" in what:
        loss_of(model, rank, 9).backward()
        if rank == 1 or "all" in what:
            optimizer.zero_grad()
    if what == "an unused layer":
        loss_of(model[:3] if rank == 1 else model, rank).backward()
    elif what.startswith("no backward") and rank == 0:
        loss_of(model, rank).backward()
    with refused(group, model, optimizer, "ranks disagree") as error:
        if what == "a pass that only one dropped":
            optimizer.param_groups[0]["lr"] = 1.0 - 0.99 * rank
        try:
            optimizer.step()
        finally:
            optimizer.param_groups[0]["lr"] = 1e-2
    assert not what.startswith("no backward") or "rank 0 has a tensor, rank 1 has None" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("why", "exchange", "residency"),
    [
        ("in no_sync", Exchange.RANK_ORDER, SHARDED),
        ("in no_sync", Exchange.RANK_ORDER, FULL),
        ("used gradients", Exchange.BACKEND, FULL),
    ],
)
@ranks(2)
def test_a_rank_that_refuses_a_step_without_a_backward_holds_up_nobody(
    group: Any, why: str, exchange: Exchange, residency: GradientResidency
) -> None:
    """Rank 1 calls step() in no_sync(), or a second time without zero_grad(), while rank 0 has gradients."""
    model, optimizer = small(group, exchange=exchange, gradient_residency=residency)
    train_on(model, optimizer, group.rank(), 0)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    used = [param.grad for param in model.parameters()]
    before = [None if grad is None else grad.clone() for grad in used]
    refuses = group.rank() == 1
    if not (refuses and why == "used gradients"):
        optimizer.zero_grad()
    if not refuses:
        loss_of(model, group.rank(), 1).backward()
    said = "zero_grad" if why == "used gradients" else r"was called inside no_sync\(\)"
    inside = optimizer.no_sync() if refuses and why == "in no_sync" else contextlib.nullcontext()
    with pytest.raises(RuntimeError, match=said) as error, inside:
        optimizer.step()
    assert refuses or "rank 1 has refused" in str(error.value)
    if not refuses and residency is FULL:
        with pytest.raises(RuntimeError, match="zero_grad"):  # the other rank's are not in them
            loss_of(model, group.rank(), 2).backward()
    if refuses and why == "used gradients":
        assert_equal(before, used)  # metrics may still want them
    optimizer.zero_grad()
    go_on_as_if_nothing_had_been(group, model, optimizer, exchange=exchange, gradient_residency=residency)


# --- reading and changing gradients ---


@ranks(2)
def test_who_reads_a_gradient_after_backward_reads_it_reduced(group: Any) -> None:
    """Right after backward: this rank's slice must be the mean, the rest its own gradient."""
    model, optimizer = small(group, bucket_cap_mb=ALL_IN_ONE)
    warm_up(group, model, optimizer)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        loss_of(each, group.rank()).backward()
    found, local = ([p.grad.flatten() for p in each.parameters() if p.grad is not None] for each in (model, twin))
    for param, reduced, own, mean in zip(
        model.parameters(), found, local, reduce_for_control(group, local), strict=True
    ):
        first = 0 if group.rank() == 0 else param.numel() - optimizer.state[param]["exp_avg"].numel()
        here = slice(first, first + optimizer.state[param]["exp_avg"].numel())
        own[here] = mean[here]
        assert_equal(own, reduced)
    optimizer.step()


@ranks(2)
def test_one_rank_alone_may_look_at_gradients_and_save_and_evaluate_an_attached_model(group: Any) -> None:
    """One rank alone looks at gradients, saves and evaluates, while the others wait in a barrier or in the step."""
    model, optimizer = small(group, exchange=Exchange.BACKEND, bucket_cap_mb=ALL_IN_ONE)
    optimizer.attach(model)
    for step in range(2):
        loss_of(model, group.rank(), step).backward()
        if group.rank() == step:
            assert all(float(param.grad.norm()) > 0 for param in model.parameters() if param.grad is not None)
        if step == 1:
            dist.barrier(group)
        optimizer.step()
        optimizer.zero_grad()
        if group.rank() == step:
            torch.save(model.state_dict(), io.BytesIO())
            loss_of(model, group.rank())
        dist.barrier(group)


CHANGES: dict[str, tuple[Callable[[list[Tensor]], object], bool]] = {
    # what is done to the gradients of each rank, and whether that is a change that averages bear
    "halved": (lambda grads: torch._foreach_mul_(grads, 0.5), True),
    "made too small for their dtype": (lambda grads: [grad.mul_(1e-3) for grad in grads], True),
    "divided by a number of tokens": (lambda grads: [grad.div_(3.0) for grad in grads], True),
    "clipped by more than there is": (lambda grads: clip_by_own_norm(grads, 1e3), True),
    "clipped by each rank's norm": (lambda grads: clip_by_own_norm(grads, 1e-2), False),
    "clipped by each rank's norm in a loop": (lambda grads: clip_by_own_norm(grads, 1e-2, foreach=False), False),
    "clipped by value": (lambda grads: [grad.clamp_(-1e-3, 1e-3) for grad in grads], False),
    "two are doubled, by all ranks alike": (lambda grads: [grad.mul_(2.0) for grad in grads[:2]], False),
    "one is multiplied by the rank": (lambda grads: grads[2].mul_(2 + dist.get_rank()), False),
}


def clip_by_own_norm(grads: Sequence[Tensor], max_norm: float, foreach: bool | None = None) -> None:
    coefficient = max_norm / (torch.nn.utils.get_total_norm(grads) + 1e-6)
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)
    assert max_norm > 1 or coefficient < 1


@pytest.mark.parametrize(
    ("what", "bucket_cap_mb", "dtype", "verb"),
    [
        *((what, ONE_EACH, F32, "step") for what in CHANGES if "small" not in what),
        ("halved", ALL_IN_ONE, F32, "clip"),
        ("clipped by value", ALL_IN_ONE, F32, "clip"),
        ("clipped by each rank's norm", ALL_IN_ONE, BF16, "step"),
        ("divided by a number of tokens", ALL_IN_ONE, BF16, "step"),
        ("made too small for their dtype", ALL_IN_ONE, F16, "step"),
    ],
)
@ranks(2)
def test_averages_may_be_multiplied_alike_on_all_ranks_and_other_changes_are_an_error_that_names_ours(
    group: Any, what: str, bucket_cap_mb: float, dtype: torch.dtype, verb: str
) -> str:
    (change, is_fine), config = CHANGES[what], {"dtype": dtype, "bucket_cap_mb": bucket_cap_mb}
    results = []
    for overlap in (False, True) if is_fine else (True,):
        model, optimizer = small(group, overlap=overlap, **config)
        warm_up(group, model, optimizer)
        loss_of(model, group.rank()).backward()
        change([param.grad for param in model.parameters() if param.grad is not None])
        refusal = refused(group, model, optimizer, r"optimizer\.clip_grad_norm_\(\)", **config)
        with contextlib.nullcontext() if is_fine else refusal as error:
            if verb == "clip":
                optimizer.clip_grad_norm_(1e9)
            optimizer.step()
        if error is not None:
            return str(error.value)
        results.append([optimizer.state[param]["exp_avg"] for param in model.parameters()])
    plain, overlapped = map(torch.cat, results)
    tolerance = {F32: 1e-6, BF16: 2e-2, F16: 2e-3}[dtype]
    torch.testing.assert_close(plain, overlapped, rtol=tolerance, atol=tolerance * float(plain.abs().max()))
    return ""


# --- precision on the way ---


@pytest.mark.parametrize(
    ("residency", "wire_dtype", "num_ranks"), [(FULL, None, 2), (FULL, BF16, 3), (SHARDED, None, 3), (SHARDED, BF16, 2)]
)
@ranks()
def test_bf16_gradients_add_up_in_fp32_and_travel_in_what_is_asked_for(
    group: Any, residency: GradientResidency, wire_dtype: torch.dtype | None
) -> None:
    """bf16 gradients of two passes and all ranks, added up in fp32 and, where it is asked for, sent in bf16."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(64, 3).to(BF16))
    weight.grad_dtype = F32
    narrow = nn.Parameter(torch.zeros(3, dtype=BF16))  # whose gradients are, in a bucket of its own
    config = ShardingConfig(wire_dtype=wire_dtype, gradient_residency=residency)
    params = [("weight", weight), ("bf16", narrow)]
    optimizer = ShardedDecoupledAdamW(params, betas=(0.0, 0.95), process_group=group, config=config)
    drawn = [[draw_gradient(weight, rank, number) for number in range(2)] for rank in range(group.size())]
    for number in range(2):
        with optimizer.no_sync() if number == 0 else contextlib.nullcontext():
            gradients = [drawn[group.rank()][number], torch.zeros_like(narrow)]
            torch.autograd.backward([weight.view_as(weight), narrow.view_as(narrow)], gradients)
        assert weight.grad is None or weight.grad.dtype == F32
    norm = optimizer.clip_grad_norm_(1e9)
    total = torch.zeros(weight.shape)
    for first, second in drawn:
        own = first.float() + second.float()
        total += own if wire_dtype is None else own.to(wire_dtype).float()
    mean = total / group.size()
    torch.testing.assert_close(norm, mean.double().norm().float(), rtol=1e-6, atol=0)
    optimizer.step()
    assert_equal(mean, whole_state_dict(optimizer, group.size())["state"][0]["exp_avg"])


# --- void steps ---


@ranks(2)
def test_loss_scalers_that_part_are_an_error_on_all_that_names_those_that_agree(group: Any) -> None:
    """Rank 1 meets an infinity in step 1: the step is void on both ranks, and then scalers that do not agree part.

    It stands where rank 1 averages, so rank 0 does not find it in its own ``p.grad``.
    """
    model, optimizer = small(group)
    scaler = GradScaler("cpu", init_scale=8.0)
    for step in range(3):
        loss = loss_of(model, group.rank(), step)
        if (step, group.rank()) == (1, 1):
            averaged_here = [param for param in model.parameters() if optimizer.state[param]["exp_avg"].numel()]
            loss = loss + math.inf * averaged_here[-1].flatten()[-1]
        scaler.scale(loss).backward()
        before = values_of(model)
        said = r"the loss scale: rank 0 has 8\.0, rank 1 has 4\.0; use torch.*ShardedGradScaler\(process_group=\.\.\.\)"
        with pytest.raises(RuntimeError, match=said) if step == 2 else contextlib.nullcontext():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(values_of(model), before) == (step > 0)


@pytest.mark.parametrize(
    ("overlap", "how"), [(True, ""), (False, ""), (True, "clipped"), (True, "by hand"), (True, "unscaled")]
)
@ranks(2)
def test_gradients_of_different_scales_are_an_error_on_all(group: Any, overlap: bool, how: str) -> str:
    """Scales differ from the start, which is an error, clipped or not, on averages that are unscaled, too."""
    model, optimizer = small(group, overlap=overlap)
    if how == "unscaled":
        warm_up(group, model, optimizer)
    scale = 8.0 * (1 + group.rank())
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(loss_of(model, group.rank())).backward()
    if how == "unscaled":
        scaler.unscale_(optimizer)
    if how == "clipped":
        optimizer.clip_grad_norm_(0.1)
    if how == "by hand":  # without a non-finite check
        optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
    said = "one scale" if how == "unscaled" else r"the loss scale: rank 0 has 8\.0, rank 1 has 16\.0"
    with refused(group, model, optimizer, said) as error:
        try:
            optimizer.step() if how == "by hand" else scaler.step(optimizer)
        finally:
            for name in {"grad_scale", "found_inf"} & vars(optimizer).keys():
                delattr(optimizer, name)  # which torch's scaler leaves behind where a step raises
    return str(error.value)


@ranks(2)
def test_a_loss_scaler_and_sharded_gradients_are_refused(group: Any) -> None:
    model, optimizer = small(group, gradient_residency=SHARDED)
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, group.rank())).backward()
    with pytest.raises((RuntimeError, AssertionError), match=r"GradientResidency\.FULL"):
        scaler.step(optimizer)


@ranks(2)
def test_a_parameter_unfrozen_under_a_loss_scaler_is_clipped_with_the_others(group: Any) -> None:
    """Averages that backward made were unscaled since; the one that the clip makes is of unscaled gradients."""
    sides = []
    for enabled in (True, False):
        early, late = params = [nn.Parameter(torch.linspace(1.0, 2.0, n)) for n in (6, 8)]
        late.requires_grad_(False)
        optimizer = ShardedDecoupledAdamW(params, lr=1e-2, process_group=group)
        scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=group, enabled=enabled)
        for step in range(4):
            late.requires_grad_(step > 1)
            optimizer.zero_grad()
            scaler.scale((group.rank() + 1) * (early.square().sum() + late.square().sum())).backward()
            scaler.unscale_(optimizer)
            norm = optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
        assert float(optimizer.state[late]["step"]) == 2.0
        sides.append([*params, norm])
    assert_equal(*sides)
