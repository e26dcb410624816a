"""What users of torch.optim rely on, on ShardedDecoupledAdamW: on one rank in-process, on two where ranks matter.

It shows what is kept and what is refused. Bits on many ranks are for tests/test_sharded.py.
"""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharded_dadamw import (
    DecoupledAdamW,
    GradientResidency,
    MainParameter,
    ShardedDecoupledAdamW,
    ShardingConfig,
)
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.interchange import from_torch
from tests.models import BF16, F32, TiedLanguageModel, draw_gradient, make_groups, mean_in_rank_order, named
from tests.simulated import on_ranks, outcomes

Params = dict[str, nn.Parameter]


def make(parameters: str = "odd sizes", seed: int = 0) -> Params:
    return named(make_groups(parameters, seed))


def give_gradients(params: Params, step: int, rank: int = 0, without: tuple[str, ...] = ()) -> None:
    for index, (name, p) in enumerate(params.items()):
        if p.requires_grad and name not in without:
            p.grad = draw_gradient(p, step, rank, index)


def give_mean_gradients(params: Params, step: int, num_ranks: int, without: tuple[str, ...] = ()) -> None:
    for index, (name, p) in enumerate(params.items()):
        if p.requires_grad and name not in without:
            p.grad = mean_in_rank_order([draw_gradient(p, step, rank, index) for rank in range(num_ranks)])


def assert_equal(ours: Params, theirs: Params) -> None:
    __tracebackhide__ = True
    for name, p in ours.items():
        assert torch.equal(p, theirs[name].to(p.dtype)), (
            f"{name} differs by {(p - theirs[name]).abs().max().item():.3g}"
        )


def pair(**hyper: Any) -> tuple[Params, ShardedDecoupledAdamW, Params, DecoupledAdamW]:
    """Ours on one rank, and the unsharded optimizer on a copy."""
    params, control_params = make(), make()
    hyper = dict(lr=3e-3, weight_decay=2e-4) | hyper
    return (
        params,
        ShardedDecoupledAdamW(params.items(), **hyper),
        control_params,
        DecoupledAdamW(control_params.items(), **hyper),
    )


def step_both(params: Params, optimizer: Optimizer, control_params: Params, control: Optimizer, step: int) -> None:
    for some_params, some_optimizer in ((params, optimizer), (control_params, control)):
        give_gradients(some_params, step)
        some_optimizer.step()
        some_optimizer.zero_grad()


def parameter_state(state_dict: dict[str, Any]) -> dict[int, dict[str, Tensor]]:
    """What this rank has of the state."""
    return {
        index: {key: getattr(value, "fragment", value) for key, value in entries.items()}
        for index, entries in state_dict["state"].items()
    }


# --- the class ---


def test_it_is_a_torch_optimizer_with_the_defaults_and_groups_of_decoupled_adamw() -> None:
    _, optimizer, _, control = pair()
    assert isinstance(optimizer, Optimizer) and isinstance(control, AdamW)
    assert optimizer.defaults == control.defaults
    assert set(optimizer.param_groups[0]) == set(control.param_groups[0])
    assert optimizer.param_groups[0]["param_names"] == list(make())


def test_parameters_may_be_given_plain_named_or_in_groups_of_either() -> None:
    results = []
    for give in (
        lambda p: p.values(),
        lambda p: list(p.items()),
        lambda p: iter(p.items()),
        lambda p: [{"params": p.values()}],
        lambda p: [{"params": list(p.items())}],
    ):
        params = make()
        optimizer = ShardedDecoupledAdamW(give(params), lr=1e-2)
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(params)
    for params in results[1:]:
        assert_equal(params, results[0])


def test_parameters_stay_the_same_objects_with_the_same_values_as_contiguous_views() -> None:
    params = make("non-contiguous")
    before = {name: (p, p.detach().clone()) for name, p in params.items()}
    ShardedDecoupledAdamW(params.items())
    for name, p in params.items():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.shape == before[name][1].shape
        assert p.is_leaf and p.requires_grad and p.is_contiguous() and type(p) is nn.Parameter


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickle.dumps], ids=["deepcopy", "copy", "pickle"])
def test_copying_is_refused_with_the_reason_and_what_to_do(copier: Callable[[Any], Any]) -> None:
    params, optimizer, control_params, control = pair()
    with pytest.raises(TypeError, match=r"(?s)ShardedDecoupledAdamW.*state_dict"):
        copier(optimizer)
    step_both(params, optimizer, control_params, control, 0)
    assert_equal(params, control_params)


def test_repr_shows_the_hyperparameters() -> None:
    _, optimizer, _, _ = pair()
    assert "ShardedDecoupledAdamW" in repr(optimizer) and "lr: 0.003" in repr(optimizer)


# --- step and zero_grad ---


def test_step_runs_a_closure_with_gradients_enabled_and_returns_its_loss() -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.parameters(), lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    before = model.loss(0).item()
    losses = [optimizer.step(closure=closure) for _ in range(20)]
    assert losses[0].item() == before
    assert losses[-1].item() < 0.8 * before
    give_gradients(dict(model.named_parameters()), 0)
    assert optimizer.step(lambda: 3.0) == 3.0


def test_step_returns_none_without_a_closure() -> None:
    params, optimizer, _, _ = pair()
    give_gradients(params, 0)
    assert optimizer.step() is None


def test_a_step_without_any_gradient_changes_nothing() -> None:
    params, optimizer, control_params, control = pair()
    optimizer.step()
    assert_equal(params, make())
    step_both(params, optimizer, control_params, control, 0)
    before = {name: p.detach().clone() for name, p in params.items()}
    state = copy.deepcopy(parameter_state(optimizer.state_dict()))
    optimizer.step()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    for index, entries in parameter_state(optimizer.state_dict()).items():
        assert all(torch.equal(value, state[index][key]) for key, value in entries.items())


def zero_grads(params: Params, optimizer: Optimizer, how: str) -> None:
    if how.startswith("optimizer"):
        optimizer.zero_grad(set_to_none="none" in how)
    elif how.startswith("model"):
        container = nn.ParameterList(params.values())
        container.zero_grad(set_to_none="none" in how)
    else:
        for p in params.values():
            p.grad = None


ZEROINGS = ["optimizer to none", "optimizer to zero", "model to none", "model to zero", "by hand"]


@pytest.mark.parametrize("how", ZEROINGS)
def test_however_gradients_are_zeroed_training_is_that_of_the_unsharded_optimizer(how: str) -> None:
    """After zeroing to None an unused parameter stays untouched; after zeroing to zeros it has a zero gradient."""
    params, optimizer, control_params, control = pair()
    for step in range(8):
        missing = [name for index, name in enumerate(params) if (step + index) % 3 == 0]
        for some_params, some_optimizer in ((params, optimizer), (control_params, control)):
            used = [p for name, p in some_params.items() if name not in missing]
            gradients = [draw_gradient(p, step, index) for index, p in enumerate(used)]
            torch.autograd.backward([p.view_as(p) for p in used], gradients)
            some_optimizer.step()
            zero_grads(some_params, some_optimizer, how)
        assert_equal(params, control_params)


@pytest.mark.parametrize("how", ZEROINGS)
@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced by others"])
def test_gradients_that_were_clipped_and_then_dropped_leave_no_trace(how: str, reduce_gradients: bool) -> None:
    """A training loop may look at the norm and decide to skip the step."""
    params, control_params = make(), make()
    config = ShardingConfig(reduce_gradients=reduce_gradients)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, config=config)
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    give_gradients(params, 0)
    optimizer.clip_grad_norm_(1e-3)
    zero_grads(params, optimizer, how)
    if how == "model to zero" and not reduce_gradients:
        # Zeros that somebody else writes into gradients of somebody else look like any edit after the clip, which
        # must not pass silently. So this one is refused, with the way out.
        torch.autograd.backward([p.view_as(p) for p in params.values()], [torch.ones_like(p) for p in params.values()])
        with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
            optimizer.step()
        optimizer.zero_grad()
    for step in range(1, 3):
        for some_params, some_optimizer in ((params, optimizer), (control_params, control)):
            gradients = [draw_gradient(p, step, index) for index, p in enumerate(some_params.values())]
            torch.autograd.backward([p.view_as(p) for p in some_params.values()], gradients)
            some_optimizer.step()
            some_optimizer.zero_grad()
        assert_equal(params, control_params)


def test_a_second_step_on_the_same_gradients_is_refused_and_changes_nothing() -> None:
    params, optimizer, control_params, control = pair()
    give_gradients(params, 0)
    give_gradients(control_params, 0)
    optimizer.step()
    control.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.clip_grad_norm_(1.0)
    assert_equal(params, control_params)
    optimizer.zero_grad()
    step_both(params, optimizer, control_params, control, 1)
    assert_equal(params, control_params)


def test_backward_onto_used_gradients_is_refused() -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.parameters())
    model.loss(0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        model.loss(1).backward()


def test_gradients_that_others_reduce_may_be_stepped_on_twice_as_in_torch() -> None:
    params, control_params = make(), make()
    optimizer = ShardedDecoupledAdamW(params.items(), config=ShardingConfig(reduce_gradients=False))
    control = DecoupledAdamW(control_params.items())
    give_gradients(params, 0)
    give_gradients(control_params, 0)
    for _ in range(2):
        optimizer.step()
        control.step()
    assert_equal(params, control_params)


def test_fresh_gradients_assigned_over_used_ones_need_no_zero_grad() -> None:
    params, optimizer, control_params, control = pair()
    for step in range(3):
        give_gradients(params, step)
        give_gradients(control_params, step)
        optimizer.step()
        control.step()
        assert_equal(params, control_params)


def test_the_clip_holds_for_one_step_only() -> None:
    params, optimizer, control_params, control = pair()
    give_gradients(params, 0)
    give_gradients(control_params, 0)
    norm = optimizer.clip_grad_norm_(0.25)
    expected = nn.utils.clip_grad_norm_(list(control_params.values()), 0.25)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    optimizer.step()
    control.step()
    optimizer.zero_grad()
    for name, p in params.items():  # one rounding apart: we divide by 1/c where torch multiplies by c
        torch.testing.assert_close(p, control_params[name], rtol=1e-5, atol=1e-6)
    before = {name: p.detach().clone() for name, p in params.items()}
    fresh = {name: nn.Parameter(p) for name, p in before.items()}
    reference = DecoupledAdamW(fresh.values(), lr=3e-3, weight_decay=2e-4)
    for name, p in fresh.items():
        reference.state[p] = {
            key: value.clone().reshape(() if key == "step" else p.shape)
            for key, value in optimizer.state[params[name]].items()
        }
    give_gradients(params, 1)
    give_gradients(fresh, 1)
    optimizer.step()
    reference.step()
    assert_equal(params, fresh)


@pytest.mark.parametrize(("max_norm", "norm_type"), [(-1.0, 2.0), (float("nan"), 2.0), (1.0, 1.0), (1.0, 0.0)])
def test_a_clip_without_a_meaning_is_refused(max_norm: float, norm_type: float) -> None:
    params, optimizer, control_params, control = pair()
    give_gradients(params, 0)
    with pytest.raises(ValueError, match="norm"):
        optimizer.clip_grad_norm_(max_norm, norm_type=norm_type)
    step_both(params, optimizer, control_params, control, 0)
    assert_equal(params, control_params)


def test_a_norm_that_is_not_finite_raises_on_request_only() -> None:
    params, optimizer, _, _ = pair()
    give_gradients(params, 0)
    with torch.no_grad():
        params["p1"].grad[0, 0] = float("inf")  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"(?s)inf.*error_if_nonfinite"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert optimizer.clip_grad_norm_(1.0).item() == float("inf")


# --- groups, freezing ---


def test_a_group_added_later_trains_with_its_own_hyperparameters() -> None:
    def build(cls: type[DecoupledAdamW]) -> tuple[Params, DecoupledAdamW]:
        params = make("several groups")
        names = list(params)
        optimizer = cls([(name, params[name]) for name in names[:3]], lr=3e-3, weight_decay=2e-4)
        return params, optimizer

    def add(params: Params, optimizer: Optimizer) -> None:
        late = [(name, params[name]) for name in list(params)[3:]]
        optimizer.add_param_group({"params": late, "lr": 1e-2, "amsgrad": True, "betas": (0.7, 0.9)})

    (params, optimizer), (control_params, control) = build(ShardedDecoupledAdamW), build(DecoupledAdamW)
    for step in range(6):
        if step == 2:
            add(params, optimizer)
            add(control_params, control)
        late = () if step >= 2 else tuple(list(params)[3:])
        for some_params, some_optimizer in ((params, optimizer), (control_params, control)):
            give_gradients(some_params, step, without=late)
            some_optimizer.step()
            some_optimizer.zero_grad()
        assert_equal(params, control_params)
    assert optimizer.param_groups[1]["initial_lr"] == 1e-2
    assert optimizer.state_bytes > 0


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    params, optimizer, control_params, control = pair()
    extra = nn.Parameter(torch.ones(3))
    for bad, said in (
        ({"params": [("extra", extra)], "lr": -1.0}, r"lr.*-1\.0"),
        ({"params": [("again", params["p0"])]}, "more than one parameter group"),
        ({"params": [("odd", nn.Parameter(torch.ones(3, dtype=torch.complex64)))]}, "odd.*complex64"),
        ({"params": [("view", nn.Parameter(params["p1"].detach()[1:]))]}, "view.*shares memory|p1.*shares memory"),
        ({"params": [extra]}, "names"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            optimizer.add_param_group(bad)
        assert len(optimizer.param_groups) == 1
    step_both(params, optimizer, control_params, control, 0)
    assert_equal(params, control_params)
    optimizer.add_param_group({"params": [("extra", extra)]})
    assert len(optimizer.param_groups) == 2


def unfreeze_on_the_way(group: Any, clip: bool) -> list[float]:
    """Freezes two of four layers, unfreezes one after three steps, freezes another for good, beside the control."""
    rank, num_ranks = group.rank(), group.size()
    params, control_params = make("odd sizes", seed=rank), make("odd sizes", seed=0)
    for some in (params, control_params):
        for name in ("p1", "p5", "p9"):
            some[name].requires_grad_(False)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=3e-3, process_group=group)
    control = DecoupledAdamW(control_params.items(), lr=3e-3)
    assert_equal(params, make("odd sizes", seed=0))
    norms = []
    for step in range(8):
        for some in (params, control_params):
            if step == 3:
                some["p1"].requires_grad_(True)
            if step == 5:
                some["p9"].requires_grad_(True)
                some["p6"].requires_grad_(False)
        give_gradients(params, step, rank)
        give_mean_gradients(control_params, step, num_ranks)
        if clip:
            gradients = [p.grad.double() for p in control_params.values() if p.grad is not None]
            expected = torch.cat([g.flatten() for g in gradients]).norm()
            norm = optimizer.clip_grad_norm_(1e6)
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)
            norms.append(norm.item())
        optimizer.step()
        control.step()
        optimizer.zero_grad()
        control.zero_grad()
        assert_equal(params, control_params)
    assert optimizer.state[params["p1"]]["step"].item() == 5
    return norms


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clipped"])
def test_a_parameter_that_is_unfrozen_later_is_trained_from_then_on(clip: bool, num_ranks: int) -> None:
    results = on_ranks(num_ranks, unfreeze_on_the_way, clip)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("how", ["optimizer to none", "optimizer to zero"])
def test_a_parameter_that_is_frozen_later_stays_where_it_is(how: str) -> None:
    params, optimizer, control_params, control = pair(weight_decay=0.1)
    for step in range(4):
        if step == 2:
            params["p1"].requires_grad_(False)
            control_params["p1"].requires_grad_(False)
            frozen_at = params["p1"].detach().clone()
        for some_params, some_optimizer in ((params, optimizer), (control_params, control)):
            used = [p for p in some_params.values() if p.requires_grad]
            gradients = [draw_gradient(p, step, index) for index, p in enumerate(used)]
            torch.autograd.backward([p.view_as(p) for p in used], gradients)
            some_optimizer.step()
            zero_grads(some_params, some_optimizer, how)
        assert_equal(params, control_params)
    assert torch.equal(params["p1"], frozen_at)


def test_everything_frozen_is_allowed_and_can_be_unfrozen() -> None:
    params = make()
    for p in params.values():
        p.requires_grad_(False)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2)
    assert optimizer.state_bytes == 0
    optimizer.step()
    assert_equal(params, make())
    control_params = make()
    for p in params.values():
        p.requires_grad_(True)
    step_both(params, optimizer, control_params, DecoupledAdamW(control_params.items(), lr=1e-2), 0)
    assert_equal(params, control_params)


# --- schedulers ---


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 3e-3, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 3e-3, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=3),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_it_as_it_drives_the_unsharded_optimizer(name: str) -> None:
    params, optimizer, control_params, control = pair()
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, control)]
    lrs = set()
    for step in range(7):
        step_both(params, optimizer, control_params, control, step)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        keys = ("lr", "betas", "initial_lr", "max_lr")
        assert [optimizer.param_groups[0].get(k) for k in keys] == [control.param_groups[0].get(k) for k in keys]
        lrs.add(optimizer.param_groups[0]["lr"])
        assert_equal(params, control_params)
    assert len(lrs) > 1, "the schedule never changed the lr, so this proves nothing"


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*:UserWarning")
def test_the_scheduler_sees_every_step() -> None:
    """Schedulers patch step to count calls, and warn where they think it was not called."""
    params, optimizer, _, _ = pair()
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    give_gradients(params, 0)
    optimizer.step()
    scheduler.step()


# --- hooks ---


def test_step_hooks_run_once_per_step_around_it() -> None:
    params, optimizer, _, _ = pair()
    seen: list[str] = []
    before = params["p1"].detach().clone()

    def pre(o: Optimizer, args: Any, kwargs: Any) -> None:
        assert o is optimizer and torch.equal(params["p1"], before)
        seen.append("pre")

    def post(o: Optimizer, args: Any, kwargs: Any) -> None:
        assert o is optimizer and not torch.equal(params["p1"], before)
        seen.append("post")

    handles = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]
    handles += [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]
    give_gradients(params, 0)
    optimizer.step()
    assert sorted(seen[:2]) == ["pre", "pre"] and sorted(seen[2:]) == ["post", "post"]
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    give_gradients(params, 1)
    optimizer.step()
    assert len(seen) == 4


def test_state_dict_hooks_see_and_may_replace_the_state_dict() -> None:
    params, optimizer, _, _ = pair()
    seen: list[str] = []

    def post_save(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("post save")
        return state_dict | {"note": "kept"}

    def pre_load(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("pre load")
        assert state_dict["note"] == "kept"
        state_dict["param_groups"] = copy.deepcopy(state_dict["param_groups"])
        state_dict["param_groups"][0]["lr"] = 0.125
        return state_dict

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre save"))
    optimizer.register_state_dict_post_hook(post_save)
    optimizer.register_load_state_dict_pre_hook(pre_load)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post load"))
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["note"] == "kept" and set(saved) == {"state", "param_groups", "note"}
    optimizer.load_state_dict(saved)
    assert seen == ["pre save", "post save", "pre load", "post load"]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert saved["param_groups"][0]["lr"] == 3e-3, "loading changed the caller's state dict"


# --- state dicts ---


def test_saving_and_loading_before_the_first_step_changes_nothing() -> None:
    params, optimizer, control_params, control = pair(amsgrad=True)
    optimizer.load_state_dict(optimizer.state_dict())
    for step in range(3):
        step_both(params, optimizer, control_params, control, step)
    assert_equal(params, control_params)


def build_saved(group: Any, parameters: str, config: ShardingConfig) -> tuple[Params, ShardedDecoupledAdamW, Any]:
    params = make(parameters, seed=5)
    optimizer = ShardedDecoupledAdamW(
        params.items(), lr=3e-3, weight_decay=1e-4, amsgrad=True, process_group=group, config=config
    )
    return params, optimizer, lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=20)


def train(params: Params, optimizer: Any, scheduler: Any, steps: range, rank: int) -> None:
    names = list(params)
    for step in steps:  # step counts of neighbours come to differ, and are there together again in the next steps
        give_gradients(params, step, rank, without=(names[step % len(names)],) if step % 3 == 1 else ())
        optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def save_and_resume(group: Any, parameters: str, optimizer_first: bool) -> bool:
    config = ShardingConfig(bucket_cap_mb=1e-3)
    params, optimizer, scheduler = build_saved(group, parameters, config)
    train(params, optimizer, scheduler, range(5), group.rank())
    saved = copy.deepcopy(
        {
            "weights": {name: p.detach() for name, p in params.items()},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
    )
    train(params, optimizer, scheduler, range(5, 10), group.rank())
    resumed_params, resumed, resumed_scheduler = build_saved(group, parameters, config)
    train(resumed_params, resumed, resumed_scheduler, range(90, 92), group.rank())  # to be overwritten
    if optimizer_first:
        resumed.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for name, p in resumed_params.items():
            p.copy_(saved["weights"][name])
    if not optimizer_first:
        resumed.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["scheduler"])
    train(resumed_params, resumed, resumed_scheduler, range(5, 10), group.rank())
    assert_equal(resumed_params, params)
    for name, p in params.items():
        ours, theirs = resumed.state[resumed_params[name]], optimizer.state[p]
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"state of {name} differs"
    return True


@pytest.mark.parametrize("optimizer_first", [True, False], ids=["optimizer loaded first", "weights loaded first"])
@pytest.mark.parametrize("parameters", ["several groups", "mixed dtypes", "frozen"])
def test_a_saved_run_resumes_bit_for_bit(parameters: str, optimizer_first: bool) -> None:
    assert on_ranks(2, save_and_resume, parameters, optimizer_first) == [True, True]


def save_whole(group: Any) -> dict[str, Any]:
    params = make()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=3e-3, process_group=group)
    give_gradients(params, 0)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def load_what_does_not_fit(group: Any, saved: dict[str, Any]) -> str:
    """Returns the refusal after proving that nothing has changed."""
    params, control_params = make(), make()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(saved)
    for step in range(2):
        give_gradients(params, step)
        give_gradients(control_params, step)
        optimizer.step()
        control.step()
        optimizer.zero_grad()
    assert_equal(params, control_params)
    return str(refusal.value)


def save_and_load_in_other_buckets(group: Any) -> str:
    """Sizes for which the middle rank's fragment of `p` has the same length in both layouts, but starts elsewhere."""

    def build(bucket_cap_mb: float) -> tuple[Params, ShardedDecoupledAdamW]:
        params = {"a": nn.Parameter(torch.ones(64)), "p": nn.Parameter(torch.ones(256))}
        config = ShardingConfig(bucket_cap_mb=bucket_cap_mb)
        return params, ShardedDecoupledAdamW(params.items(), process_group=group, config=config)

    params, saved = build(1.0)
    give_gradients(params, 0)
    saved.step()
    _, optimizer = build(1e-6)
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(saved.state_dict())
    assert not any(value.any() for entries in optimizer.state.values() for value in entries.values())
    return str(refusal.value)


def test_a_shard_of_another_bucket_layout_is_refused_on_every_rank() -> None:
    for message in on_ranks(3, save_and_load_in_other_buckets):
        assert message.startswith("state of "), message


def damaged(kind: str) -> dict[str, Any]:
    saved: dict[str, Any] = on_ranks(1, save_whole)[0]
    if kind == "torch's SGD":
        params = make()
        control = SGD(params.values(), momentum=0.9)
        give_gradients(params, 0)
        control.step()
        return control.state_dict()
    if kind == "a missing entry":
        del saved["state"][3]["exp_avg"]
    elif kind == "a surplus entry":
        saved["state"][3]["max_exp_avg_sq"] = saved["state"][3]["exp_avg_sq"]
    elif kind == "another shape":
        saved["state"][1]["exp_avg"] = torch.zeros(5)
    elif kind == "another dtype":
        saved["state"][1]["exp_avg_sq"] = saved["state"][1]["exp_avg_sq"].double()
    elif kind == "another number of groups":
        saved["param_groups"].append(copy.deepcopy(saved["param_groups"][0]))
    elif kind == "amsgrad":
        saved["param_groups"][0]["amsgrad"] = True
    return saved


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("torch's SGD", "exp_avg"),
        ("a missing entry", "p3"),
        ("a surplus entry", "p3"),
        ("another shape", "p1"),
        ("another dtype", "p1"),
        ("another number of groups", "group"),
        ("amsgrad", "amsgrad"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name_and_changes_nothing(kind: str, said: str) -> None:
    for message in on_ranks(2, load_what_does_not_fit, damaged(kind)):
        assert said in message


def test_loading_does_not_alias_the_callers_tensors() -> None:
    params, optimizer, _, _ = pair()
    give_gradients(params, 0)
    optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    snapshot = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    give_gradients(params, 1)
    optimizer.step()
    for index, entries in parameter_state(snapshot).items():
        assert all(torch.equal(value, saved["state"][index][key]) for key, value in entries.items())


# --- GradScaler ---


def scaled_steps(group: Any, bad_step: int | None, bad_rank: int, clip: str, reduce_gradients: bool) -> list[str]:
    """Scaled steps, of which one meets an inf on one rank only, or in a mean: all ranks must skip it, to the byte."""
    rank, num_ranks = group.rank(), group.size()
    params, control_params = make(), make()
    config = ShardingConfig(bucket_cap_mb=1e-3, reduce_gradients=reduce_gradients)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=3e-3, process_group=group, config=config)
    control = DecoupledAdamW(control_params.items(), lr=3e-3)
    settings: dict[str, Any] = dict(init_scale=2.0**10, growth_interval=2)
    # Where one rank alone may find an infinity, scalers have to agree, which they do in unscale_().
    agrees = bool(clip) and reduce_gradients
    scaler = ShardedGradScaler("cpu", process_group=group, **settings) if agrees else GradScaler("cpu", **settings)
    happened: list[str] = []
    for step in range(6):
        scale = scaler.scale(torch.ones(())).item()
        if reduce_gradients:
            give_gradients(params, step, rank)
        else:
            give_mean_gradients(params, step, num_ranks)
        for p in params.values():
            p.grad *= scale  # type: ignore[operator]
        if step == bad_step and (rank == bad_rank or not reduce_gradients):
            params["p1"].grad[0, 0] = float("inf")  # type: ignore[index]
        weights = {name: p.detach().clone() for name, p in params.items()}
        state = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in params.items()}
        if clip:
            scaler.unscale_(optimizer)
            if clip == "clipped":
                optimizer.clip_grad_norm_(1e6)
        if "skipped" in happened and reduce_gradients and num_ranks > 1 and not agrees:
            with pytest.raises(RuntimeError, match="ShardedGradScaler"):
                scaler.step(optimizer)
            return [*happened, "refused"]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == bad_step:
            for name, p in params.items():
                assert torch.equal(p, weights[name]), f"{name} changed in a skipped step"
                for key, value in optimizer.state[p].items():
                    assert torch.equal(value, state[name][key]), f"{key} of {name} changed in a skipped step"
            happened.append("skipped")
        else:
            give_mean_gradients(control_params, step, num_ranks)
            control.step()
            assert_equal(params, control_params)
            happened.append("stepped")
    return happened


@pytest.mark.parametrize(
    ("num_ranks", "clip", "reduce_gradients"),
    [
        (1, "clipped", True),
        (2, "", True),
        (3, "unscaled", True),
        (3, "clipped", True),
        (2, "", False),
        (3, "unscaled", False),
        (2, "clipped", False),
    ],
)
def test_under_a_grad_scaler_finite_gradients_train_as_without(
    num_ranks: int, clip: str, reduce_gradients: bool
) -> None:
    """The scale is a power of two, so scaling and unscaling round nothing."""
    assert on_ranks(num_ranks, scaled_steps, None, 0, clip, reduce_gradients) == [["stepped"] * 6] * num_ranks


@pytest.mark.parametrize(
    ("bad_step", "num_ranks", "bad_rank", "clip", "reduce_gradients"),
    [
        (0, 1, 0, "clipped", True),
        (2, 1, 0, "", True),
        (0, 2, 0, "", True),
        (2, 2, 1, "", True),
        (0, 3, 2, "unscaled", True),
        (2, 2, 0, "clipped", True),
        (0, 2, 1, "clipped", True),
        (0, 2, 1, "", False),
        (2, 3, 2, "unscaled", False),
        (2, 2, 0, "clipped", False),
    ],
)
def test_an_inf_on_one_rank_skips_the_step_on_all_to_the_byte_and_the_next_is_fine(
    bad_step: int, num_ranks: int, bad_rank: int, clip: str, reduce_gradients: bool
) -> None:
    expected = ["skipped" if step == bad_step else "stepped" for step in range(6)]
    if reduce_gradients and num_ranks > 1 and not clip:  # where scalers do not agree
        expected = [*expected[: bad_step + 1], "refused"]
    assert on_ranks(num_ranks, scaled_steps, bad_step, bad_rank, clip, reduce_gradients) == [expected] * num_ranks


def clip_before(group: Any, reduce_gradients: bool, what: str) -> str:
    """A clip, and then other gradients than those that it was for."""
    params, control_params = make(), make()
    params["empty"], control_params["empty"] = nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))
    config = ShardingConfig(reduce_gradients=reduce_gradients)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=3e-3, process_group=group, config=config)
    control = DecoupledAdamW(control_params.items(), lr=3e-3)
    grads = {name: torch.full_like(p, 7.0 if name == "p1" else 0.0) for name, p in params.items()}
    for name, p in params.items():
        p.grad = None if what == "there are none" else grads[name].clone()
    optimizer.clip_grad_norm_(1e-3)
    if what == "there are none":
        give_mean_gradients(params, 0, group.size())
        give_mean_gradients(control_params, 0, group.size())
    elif what == "they are cleared":
        for name, p in params.items():
            p.grad.zero_()  # type: ignore[union-attr]
            control_params[name].grad = torch.zeros_like(p)
    else:
        params["p1"].grad = grads["p1"].clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    control.step()
    assert_equal(params, control_params)
    return ""


@pytest.mark.parametrize("what", ["there are none", "they are cleared", "one is replaced beside zeros"])
@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced by others"])
def test_a_clip_is_for_the_gradients_there_are(reduce_gradients: bool, what: str) -> None:
    for message in on_ranks(2, clip_before, reduce_gradients, what):
        assert ("changed between clip_grad_norm_() and step()" in message) == (what == "one is replaced beside zeros")


def scalers_part_over_means(group: Any) -> tuple[bool, str]:
    """Rank 1 alone finds an inf in means that others have made; what they make of two scales cannot be put right."""
    params = make()
    config = ShardingConfig(reduce_gradients=False)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=3e-3, process_group=group, config=config)
    scaler = GradScaler("cpu", init_scale=8.0)
    message, before = "", {}
    for step in range(3):
        scaler.scale(torch.ones(()))
        give_mean_gradients(params, step, group.size())
        if step == 1:
            before = {name: p.detach().clone() for name, p in params.items()}
        if step == 1 and group.rank() == 1:
            params["p1"].grad[0, 0] = float("inf")  # type: ignore[index]
        try:
            scaler.step(optimizer)
        except RuntimeError as error:
            message = str(error)
        scaler.update()
        optimizer.zero_grad()
    return all(torch.equal(p, before[name]) for name, p in params.items()), message


def test_means_of_others_under_scalers_that_have_parted_are_an_error_on_all() -> None:
    first, second = on_ranks(2, scalers_part_over_means)
    assert first == second and first[0]
    assert "the loss scale: rank 0 has 8.0, rank 1 has 4.0" in first[1]


def skip_with_main_params(group: Any) -> bool:
    params = make("bf16")
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, amsgrad=True, process_group=group)
    scaler = ShardedGradScaler("cpu", init_scale=4.0, process_group=group)
    for step in range(4):
        give_gradients(params, step, group.rank())
        before = copy.deepcopy(parameter_state(optimizer.state_dict()))
        if step == 2 and group.rank() == 1:
            params["bias"].grad[0] = float("nan")  # type: ignore[index]
        scaler.scale(torch.ones(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = parameter_state(optimizer.state_dict())
        same = all(torch.equal(v, after[i][k]) for i, entries in before.items() for k, v in entries.items())
        assert same == (step == 2)
        assert not any(v.isnan().any() for entries in after.values() for v in entries.values())
    return True


def test_a_nan_on_one_rank_leaves_main_parameters_and_maxima_alone_too() -> None:
    assert on_ranks(2, skip_with_main_params) == [True, True]


# --- edits from outside ---


def edit_gradients(group: Any, when: str) -> str:
    """Doubles every gradient in place: before the reduction it counts, after it nothing may go wrong silently."""
    rank, num_ranks = group.rank(), group.size()
    params, control_params = make(), make()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    for step in range(3):
        gradients = [draw_gradient(p, step, rank, index) for index, p in enumerate(params.values())]
        torch.autograd.backward([p.view_as(p) for p in params.values()], gradients)
        give_mean_gradients(control_params, step, num_ranks)
        for p in control_params.values():
            p.grad *= 2  # type: ignore[operator]
        if when == "after clipping":
            optimizer.clip_grad_norm_(1e9)
        for p in params.values():
            p.grad *= 2  # type: ignore[operator]
        if when == "before clipping":
            optimizer.clip_grad_norm_(1e9)
        try:
            optimizer.step()
        except RuntimeError as error:
            return str(error)
        control.step()
        optimizer.zero_grad()
        assert_equal(params, control_params)
    return "counted"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("when", ["before the step", "before clipping"])
def test_gradients_edited_in_place_before_they_are_reduced_count(when: str, num_ranks: int) -> None:
    assert on_ranks(num_ranks, edit_gradients, when) == ["counted"] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_edited_in_place_after_clipping_count_or_are_refused(num_ranks: int) -> None:
    for said in on_ranks(num_ranks, edit_gradients, "after clipping"):
        assert said == "counted" or "clip_grad_norm_" in said


EDITS = ("copy_ under no_grad", "p.data.copy_", "load_state_dict", "one element")


def edit_weights(params: Params, how: str) -> None:
    replacement = {name: draw_gradient(p, 77, i) for i, (name, p) in enumerate(params.items())}
    for name, p in params.items():
        if how == "copy_ under no_grad":
            with torch.no_grad():
                p.copy_(replacement[name])
        elif how == "p.data.copy_":
            p.data.copy_(replacement[name])
        elif how == "load_state_dict":
            holder = nn.ParameterDict({name: p})
            holder.load_state_dict({name: replacement[name]})
        elif how == "one element":
            with torch.no_grad():
                p.view(-1)[-1:].fill_(0.5)


def edit_between_steps(group: Any, how: str, parameters: str) -> bool:
    """The edit must win: the step after it starts from the edited weights, as the control's does."""
    params = make(parameters)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    for step in range(3):
        give_gradients(params, step, group.rank())
        optimizer.step()
        optimizer.zero_grad()
    edit_weights(params, how)
    edited = {name: p.detach().clone() for name, p in params.items()}
    optimizer.param_groups[0]["lr"] = 1e-9  # so that the weights stay where they are, but for the edit
    give_gradients(params, 3, group.rank())
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), edited[name], rtol=2e-2, atol=1e-6)
        if how != "one element":
            assert torch.equal(p, edited[name]) or p.dtype != BF16, f"{name}: the edit was lost"
    return True


UNNOTICED = (
    "an edit through p.data leaves no trace, and comparing every weight with its main parameter costs two updates"
)


@pytest.mark.parametrize(
    ("parameters", "how"),
    [
        *((parameters, how) for parameters in ("bf16", "odd sizes") for how in EDITS if how != "p.data.copy_"),
        ("odd sizes", "p.data.copy_"),
        pytest.param("bf16", "p.data.copy_", marks=pytest.mark.xfail(strict=True, reason=UNNOTICED)),
    ],
)
def test_weights_edited_in_place_between_steps_are_the_ones_trained_on(parameters: str, how: str) -> None:
    assert on_ranks(2, edit_between_steps, how, parameters) == [True, True]


def test_swapping_weights_out_and_back_in_loses_no_precision() -> None:
    """As an exponential moving average does for evaluation: the fp32 main parameters survive."""
    params, untouched_params = make("bf16"), make("bf16")
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-3)
    untouched = ShardedDecoupledAdamW(untouched_params.items(), lr=1e-3)
    for step in range(6):
        step_both(params, optimizer, untouched_params, untouched, step)
        with torch.no_grad():
            saved = {name: p.detach().clone() for name, p in params.items()}
            for name, p in params.items():
                p.zero_()
                p.copy_(saved[name])
    for name, p in params.items():
        assert torch.equal(optimizer.state[p]["main_param"], untouched.state[untouched_params[name]]["main_param"])


# --- no_sync ---


def test_step_and_clip_inside_no_sync_are_refused() -> None:
    params, optimizer, control_params, control = pair()
    give_gradients(params, 0)
    with optimizer.no_sync():
        with pytest.raises(RuntimeError, match="no_sync"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="no_sync"):
            optimizer.clip_grad_norm_(1.0)
    step_both(params, optimizer, control_params, control, 0)
    assert_equal(params, control_params)


def test_no_sync_nests_and_ends_with_an_exception() -> None:
    params, optimizer, control_params, control = pair()
    with optimizer.no_sync():
        with optimizer.no_sync():
            pass
        give_gradients(params, 0)
        with pytest.raises(RuntimeError, match="no_sync"):
            optimizer.step()
    with pytest.raises(KeyError), optimizer.no_sync():
        raise KeyError
    step_both(params, optimizer, control_params, control, 0)
    assert_equal(params, control_params)


def test_no_sync_belongs_to_whoever_reduces() -> None:
    optimizer = ShardedDecoupledAdamW(make().items(), config=ShardingConfig(reduce_gradients=False))
    with pytest.raises(RuntimeError, match="reduce_gradients"), optimizer.no_sync():
        pass


# --- lifetime ---


@contextlib.contextmanager
def no_automatic_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def storages_of(optimizer: Optimizer) -> list[StorageWeakRef]:
    tensors = [v for entries in optimizer.state.values() for v in entries.values()]
    return [StorageWeakRef(t.untyped_storage()) for t in tensors if t.numel()]


@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced by others"])
def test_deleting_model_and_optimizer_frees_everything(reduce_gradients: bool) -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(), config=ShardingConfig(reduce_gradients=reduce_gradients, bucket_cap_mb=1e-3)
    )
    scheduler = lr_scheduler.LinearLR(optimizer)
    for step in range(2):
        model.loss(step).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.loss(9).backward()
    objects = [weakref.ref(thing) for thing in (model, optimizer, model.norm.weight)]
    storages = storages_of(optimizer)
    storages += [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    storages += [StorageWeakRef(p.grad.untyped_storage()) for p in model.parameters() if p.grad is not None]
    del model, optimizer, scheduler
    gc.collect()
    assert [ref() for ref in objects] == [None] * 3
    assert all(storage.expired() for storage in storages)


def test_deleting_the_optimizer_alone_frees_its_state_and_leaves_a_plain_model() -> None:
    model, twin = TiedLanguageModel(), TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.named_parameters())
    model.loss(0).backward()
    optimizer.step()
    optimizer.zero_grad()
    storages = storages_of(optimizer)
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None and all(storage.expired() for storage in storages)
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m.loss(1).backward()
        m.loss(2).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_a_model_trained_here_deep_copies_and_pickles_like_any_other() -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2)
    for step in range(2):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.loss(5), model.loss(5))
        assert twin.head.weight is twin.embedding.weight
        twin.loss(5).backward()
        assert model.head.weight.grad is None, "the copy's backward reached the original"


# --- a peer's failure inside a closure is the user's, but state stays whole ---


def closure_fails(group: Any) -> None:
    params = make()
    optimizer = ShardedDecoupledAdamW(params.items(), process_group=group)

    def closure() -> float:
        raise KeyError("from the closure")

    optimizer.step(closure)


def test_an_exception_in_a_closure_comes_through_unchanged() -> None:
    for outcome in outcomes(2, closure_fails):
        assert outcome.error == "KeyError"


def test_fp32_parameters_have_no_main_copy_and_narrower_ones_do() -> None:
    params = make("mixed dtypes")
    optimizer = ShardedDecoupledAdamW(params.items())
    for p in params.values():
        state = optimizer.state[p]
        assert ("main_param" in state) == (p.dtype == BF16)
        assert state["exp_avg"].dtype == (F32 if p.dtype == BF16 else p.dtype)


@pytest.mark.parametrize("built_with", [False, True])
def test_amsgrad_switched_after_construction_is_refused_and_changes_nothing(built_with: bool) -> None:
    params, optimizer, control_params, control = pair(amsgrad=built_with)
    give_gradients(params, 0)
    optimizer.param_groups[0]["amsgrad"] = not built_with
    with pytest.raises(ValueError, match=r"amsgrad.*expected (True|False).*got (True|False)"):
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = built_with
    optimizer.zero_grad()
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(control_params, 0)
    control.step()
    assert_equal(params, control_params)


def load_shards_into_the_unsharded_optimizer(group: Any) -> str:
    params, control_params = make(), make()
    sharded = ShardedDecoupledAdamW(params.items(), process_group=group)
    control = DecoupledAdamW(control_params.items())
    with pytest.raises(ValueError, match="one rank's fragments") as error:
        control.load_state_dict(sharded.state_dict())
    assert not any(entry.count_nonzero() for state in control.state.values() for entry in state.values())
    return str(error.value)


def test_one_ranks_shards_are_not_taken_for_the_whole_state() -> None:
    assert all("ShardedDecoupledAdamW" in message for message in on_ranks(2, load_shards_into_the_unsharded_optimizer))


def test_tensors_of_different_shapes_never_reach_the_kernel() -> None:
    whole, part = torch.zeros(256), torch.zeros(128)
    scalars: dict[str, Any] = dict(
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3, initial_lr=1e-3, weight_decay=0.0, eps=1e-8
    )
    with pytest.raises(ValueError, match=r"one shape.*\[256\].*\[128\]"):
        DecoupledAdamW.adamw([whole], [whole], [part], [whole], [], [torch.ones(())], **scalars)
    assert not whole.any()


def test_a_high_weight_decay_warns_whether_it_is_the_default_or_a_groups_own(caplog: pytest.LogCaptureFixture) -> None:
    DecoupledAdamW(make().values(), weight_decay=0.1)
    assert len(caplog.records) == 1
    groups = [{"params": list(make().values()), "weight_decay": 0.1}, {"params": list(make().values())}]
    DecoupledAdamW(groups)
    assert len(caplog.records) == 2 and "0.1" in caplog.records[1].getMessage()


@pytest.mark.parametrize("reduce_gradients", [True, False], ids=["reduced here", "reduced by others"])
def test_a_loss_scale_saves_fp16_gradients_that_would_vanish_without_it(reduce_gradients: bool) -> None:
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    config = ShardingConfig(reduce_gradients=reduce_gradients)
    optimizer = ShardedDecoupledAdamW([weight], lr=1e-2, weight_decay=0.0, eps=1e-12, config=config)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for step in range(1, 4):
        scaler.scale((weight.float() * 1e-8).sum()).backward()  # 1e-8 is below the smallest fp16
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(weight.float(), torch.full((5,), -0.01 * step), rtol=2e-3, atol=0.0)


def test_clipping_twice_clips_what_the_first_has_left() -> None:
    params, optimizer, control_params, control = pair()
    give_gradients(params, 0)
    give_gradients(control_params, 0)
    first = optimizer.clip_grad_norm_(0.1)
    assert first > 1.0
    seen = optimizer.clip_grad_norm_(float("inf"))
    torch.testing.assert_close(seen, torch.tensor(0.1), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(nn.utils.clip_grad_norm_(control_params.values(), 0.1), first, rtol=1e-6, atol=0.0)
    optimizer.step()
    control.step()
    for name, p in params.items():  # torch rounds the clipped gradient once more
        torch.testing.assert_close(p, control_params[name], rtol=1e-6, atol=1e-7)


def test_looking_at_the_norm_skipping_the_step_and_clearing_in_place_is_fine_where_others_reduce() -> None:
    params, control_params = make(), make()
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, config=ShardingConfig(reduce_gradients=False))
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    for step in range(4):
        for some in (params, control_params):
            gradients = [draw_gradient(p, step, index) for index, p in enumerate(some.values())]
            torch.autograd.backward([p.view_as(p) for p in some.values()], gradients)
        optimizer.clip_grad_norm_(1e9)
        if step != 1:
            optimizer.step()
            control.step()
        nn.ParameterList(params.values()).zero_grad(set_to_none=False)
        control.zero_grad()
        assert_equal(params, control_params)


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_backward_through_a_graph_from_before_the_step_fails_instead_of_mixing_weights(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = cls(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def interrupt(*_args: Any, **_kwargs: Any) -> None:
    raise KeyboardInterrupt


def interrupted_update(group: Any) -> bool:
    """An update fails in the middle of a step, on all ranks; the next step must find the group as clean as ever."""
    params, control_params = make(), make()
    config = ShardingConfig(bucket_cap_mb=1e-4)  # a bucket per parameter: some are in flight when one fails
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group, config=config)
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    give_gradients(params, 0, group.rank())
    first: Any = optimizer._shards.buckets[0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(first, "update_", interrupt)
        optimizer.step()
    optimizer.zero_grad()
    give_gradients(params, 1, group.rank())
    give_mean_gradients(control_params, 1, group.size())
    optimizer.step()
    control.step()
    assert_equal(params, control_params)
    return True


def test_an_update_that_is_interrupted_leaves_no_message_for_the_next_step() -> None:
    assert on_ranks(2, interrupted_update) == [True, True]


def test_a_loaded_group_is_checked_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(3))
    ours = DecoupledAdamW([weight], weight_decay=1e-2)
    caplog.clear()
    DecoupledAdamW([weight]).load_state_dict(ours.state_dict())
    assert "weight_decay=0.01" in caplog.text
    theirs = AdamW([weight], weight_decay=0.0)
    theirs.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        DecoupledAdamW([weight]).load_state_dict(theirs.state_dict())


def _trained(cls: Any, model: nn.Module, **settings: Any) -> Any:
    optimizer = cls(model.named_parameters() if cls is not AdamW else model.parameters(), lr=1e-2, **settings)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("by_name", [False, True], ids=["load_state_dict", "set_optimizer_state_dict"])
@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_the_decay_of_torchs_adamw_is_not_taken_for_ours(cls: Any, by_name: bool) -> None:
    model = nn.Linear(3, 2)
    theirs = _trained(AdamW, model, weight_decay=0.3)
    optimizer = cls(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['weight_decay'\].*0\.3.*from_torch"):
        if by_name:
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, theirs))
        else:
            optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == str(before)

    set_optimizer_state_dict(model, optimizer, from_torch(theirs.state_dict(), model.named_parameters()))
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(3e-3)
    with pytest.raises(ValueError, match="scales with lr"):
        from_torch(optimizer.state_dict(), model.named_parameters())


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_a_high_decay_of_ours_loads_however_its_group_came_to_be(cls: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = cls([model.weight], lr=1e-2)
    optimizer.load_state_dict(AdamW([model.weight], weight_decay=1e-4).state_dict())
    optimizer.add_param_group({"params": [model.bias], "decoupled_weight_decay": True})
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01
    other = cls([{"params": [model.weight]}, {"params": [model.bias]}], lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in other.param_groups] == [0.01, 0.01]


# --- lr and the peak of its schedule ---


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_an_lr_above_the_peak_is_warned_of_once(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = cls([{"params": [weights[0]], "lr": torch.tensor(0.1)}, {"params": [weights[1]]}], lr=0.1)
    for lr, num_warnings in ((0.1, 0), (0.1 + 1e-7, 0), (0.3, 1), (0.6, 1)):
        optimizer.param_groups[1]["lr"] = lr
        optimizer.step()
        assert caplog.text.count("above initial_lr") == num_warnings
    assert "param_groups[1]: lr=0.3 is above initial_lr=0.1" in caplog.text and "3 times" in caplog.text


def search_learning_rates(group: Any, cls: Any) -> str:
    """As Lightning's lr_find does, which writes a tiny start into ``initial_lr``; one rank alone goes too far."""
    weight = nn.Parameter(torch.ones(5))
    settings = {"process_group": group} if cls is ShardedDecoupledAdamW else {}
    optimizer = cls([("w", weight)], lr=1e-2, **settings)
    optimizer.param_groups[0].update(initial_lr=1e-8, lr=5e-4)
    weight.grad = torch.ones(5)
    optimizer.step()
    optimizer.zero_grad()
    weight.grad = torch.ones(5)
    optimizer.param_groups[0]["lr"] = 1e-3
    before = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: expected a decay per step below 1, got 1[^0].*initial_lr"
    ) as e:
        optimizer.step()
    assert torch.equal(weight, before[0]) and str(optimizer.state[weight]) == str(before[1])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before[0])
    return str(e.value)


@pytest.mark.parametrize(("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)])
def test_a_decay_of_one_or_more_is_an_error_on_every_rank_that_changes_nothing(cls: Any, num_ranks: int) -> None:
    assert len(set(on_ranks(num_ranks, search_learning_rates, cls))) == 1


# --- max_grad_norm ---


def clipped(group: Any, cls: Any, within: bool, settings: dict[str, Any], wrap: bool) -> tuple[Params, list[Any]]:
    """Four steps with a clip within ``step`` or just before it: of two micro-batches, a new group, a loaded state."""
    params, own = make(), {"max_grad_norm": 0.3} if within else {}
    if cls is ShardedDecoupledAdamW:
        own |= {"process_group": group, "config": ShardingConfig(bucket_cap_mb=1e-3, **settings)}
    first, *rest = params.items()
    optimizer = cls(rest, lr=3e-3, weight_decay=2e-4, **own)
    optimizer = Proxy(optimizer) if wrap else optimizer
    told: list[Any] = []
    for step in range(4):
        with optimizer.no_sync() if cls is ShardedDecoupledAdamW else contextlib.nullcontext():
            backward_onto(params, 2 * step, group.rank())
        backward_onto(params, 2 * step + 1, group.rank())
        norm = None if within else optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        metrics = optimizer.metrics()
        told.append(str(metrics.pop("grad_norm") if within else norm))
        coefficient = metrics.pop("clip_coefficient") if within else torch.clamp(0.3 / (norm + 1e-6), max=1.0)
        assert coefficient < 0.5
        told += [str(coefficient), str(metrics)]
        optimizer.zero_grad()
        if step == 1:
            optimizer.add_param_group({"params": [first]})
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return {name: p.detach().clone() for name, p in params.items()}, told


def backward_onto(params: Params, step: int, rank: int) -> None:
    used = [p for p in params.values() if p.requires_grad]
    torch.autograd.backward([p.view_as(p) for p in used], [draw_gradient(p, step, rank, i) for i, p in enumerate(used)])


def clips_within_the_step_as_before_it(group: Any, cls: Any, settings: dict[str, Any]) -> None:
    expected, said = clipped(group, cls, False, settings, False)
    for wrap in (False, True):
        params, told = clipped(group, cls, True, settings, wrap)
        assert told == said
        assert all(torch.equal(p, expected[name]) for name, p in params.items())


@pytest.mark.parametrize(
    ("cls", "num_ranks", "settings"),
    [
        (DecoupledAdamW, 1, {}),
        (ShardedDecoupledAdamW, 1, {}),
        (ShardedDecoupledAdamW, 2, {}),
        (ShardedDecoupledAdamW, 2, {"overlap": False, "skip_nonfinite": True}),
        (ShardedDecoupledAdamW, 2, {"gradient_residency": GradientResidency.SHARDED}),
    ],
)
def test_max_grad_norm_clips_as_clip_grad_norm_does_before_the_step(
    cls: Any, num_ranks: int, settings: dict[str, Any]
) -> None:
    on_ranks(num_ranks, clips_within_the_step_as_before_it, cls, settings)


def unscales_then_clips(group: Any, cls: Any, unscale_first: bool) -> list[Any]:
    params = make()
    settings = {"process_group": group} if cls is ShardedDecoupledAdamW else {}
    optimizer = cls(params.items(), lr=3e-3, max_grad_norm=0.3, **settings)
    scaler, told = GradScaler("cpu", init_scale=8.0), []
    for step in range(3):
        give_gradients(params, step, group.rank())
        for p in params.values():
            p.grad.mul_(8.0)
        scaler.scale(torch.zeros(()))  # which makes the scale
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        told.append({name: str(value) for name, value in optimizer.metrics().items()})
        optimizer.zero_grad()
    return [told, [p.tolist() for p in params.values()]]


@pytest.mark.parametrize(("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)])
def test_max_grad_norm_is_that_of_unscaled_gradients(cls: Any, num_ranks: int) -> None:
    scaled, unscaled = (on_ranks(num_ranks, unscales_then_clips, cls, first) for first in (False, True))
    assert scaled == unscaled


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_of_max_grad_norm_and_a_clip_by_hand_the_tighter_one_wins(cls: Any) -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = cls([weight], max_grad_norm=0.5)
    for by_hand, expected in ((0.25, 0.25), (2.0, 0.5), (None, 0.5)):
        weight.grad = torch.full((4,), 2.0)
        if by_hand is not None:
            assert optimizer.clip_grad_norm_(by_hand) == 4.0
        optimizer.step()
        metrics = optimizer.metrics()
        assert metrics["l2_norm/grad/global"] == pytest.approx(expected, rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(by_hand or 4.0, rel=1e-5)
        assert metrics["clip_coefficient"] == pytest.approx(expected / 4.0, rel=1e-5)
        optimizer.zero_grad()


def steps_with_other_norms(group: Any) -> str:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = ShardedDecoupledAdamW([weight], process_group=group, max_grad_norm=[1.0, None][group.rank()])
    weight.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0") as error:
        optimizer.step()
    assert not weight.any()
    return str(error.value)


def test_ranks_that_clip_to_other_norms_are_told_so() -> None:
    on_ranks(2, steps_with_other_norms)


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
@pytest.mark.parametrize("max_grad_norm", [0.0, -1.0, float("nan")])
def test_a_max_grad_norm_without_a_meaning_is_refused(cls: Any, max_grad_norm: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm: expected a number > 0"):
        cls([nn.Parameter(torch.zeros(4))], max_grad_norm=max_grad_norm)


def test_a_copy_clips_to_the_same_norm() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = copy.deepcopy(DecoupledAdamW([weight], max_grad_norm=0.5))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 2.0


# --- integers ---


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_frozen_integers_are_left_alone(cls: Any, tmp_path: Path) -> None:
    def build(value: int) -> tuple[nn.Module, Any]:
        model = nn.Linear(3, 2)
        model.packed = nn.Parameter(torch.full((3,), value, dtype=torch.uint8), requires_grad=False)
        model.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        kind = {} if cls is DecoupledAdamW else {"config": ShardingConfig(main_parameter=MainParameter.REMAINDER)}
        return model.bfloat16(), cls(
            [{"params": [(name, p)]} for name, p in reversed(list(model.named_parameters()))], lr=1e-2, **kind
        )

    model, optimizer = build(7)
    packed, at = model.packed, model.packed.data_ptr()
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.clip_grad_norm_(0.1) > 1.0
    optimizer.step()
    assert not [key for key in optimizer.metrics() if "packed" in key]
    assert model.packed is packed and packed.data_ptr() == at and packed.tolist() == [7, 7, 7]

    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other_model, other = build(9)
    load_checkpoint(tmp_path, model=other_model, optimizer=other)
    assert other_model.packed.tolist() == [7, 7, 7] and not other_model.packed.requires_grad
    assert str(get_optimizer_state_dict(other_model, other)) == str(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(other.state_dict()["state"]) == 2


@pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_a_loaded_group_may_lack_entries(cls: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = cls([weight])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["weight_decay"]
    optimizer.load_state_dict(saved)


# --- proxies ---


class Proxy:
    """What Lightning and Fabric hand out: the optimizer's attributes, a class made from its, and its own ``step``."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


def train_through(optimizer: Any, params: Params, rank: int) -> tuple[dict[str, Tensor], list[Any]]:
    """Every public method, in the order of a loop, with what each has to tell."""
    told: list[Any] = []
    for step in range(3):
        give_gradients(params, step, rank)
        told.append(optimizer.clip_grad_norm_(0.1))
        optimizer.step(lambda: told.append("evaluated"))
        told.append({name: float(value) for name, value in optimizer.metrics().items()})
        reported = optimizer.report_per_parameter_metrics(next(iter(params.values())), "first", {})
        told.append({name: float(value) for name, value in optimizer.pre_reduce_metrics(reported).items()})
        optimizer.zero_grad()
        told.append([p.grad for p in params.values()])
        for scaled in (1, 2):  # the second clip is of gradients that no step has used
            give_gradients(params, step, rank)
            told.append(optimizer.clip_grad_norm_(0.1 / scaled))
            optimizer.zero_grad()
    if isinstance(optimizer, ShardedDecoupledAdamW):
        optimizer.synchronize()
        with optimizer.no_sync():
            pass
        told += [optimizer.state_bytes, optimizer.last_step.wire_bytes]
        optimizer.consolidate_state_dict(0)
    state = optimizer.state_dict()
    if rank == 0:
        told.append([(key, value.tolist()) for entries in state["state"].values() for key, value in entries.items()])
        optimizer.load_state_dict(copy.deepcopy(state))
    return {name: p.detach().clone() for name, p in params.items()}, told


def through_a_proxy_and_without(group: Any, kind: type[Any]) -> None:
    found = []
    for wrap in (Proxy, lambda optimizer: optimizer):
        params = make("several groups")
        settings = {"process_group": group} if kind is ShardedDecoupledAdamW else {}
        optimizer = kind(params.items(), lr=3e-3, weight_decay=2e-4, **settings)
        found.append(train_through(wrap(optimizer), params, 0 if group is None else group.rank()))
    (params, told), (expected, also_told) = found
    assert all(torch.equal(value, expected[name]) for name, value in params.items())
    assert str(told) == str(also_told)


@pytest.mark.parametrize("kind", [DecoupledAdamW, ShardedDecoupledAdamW])
def test_every_method_does_the_same_through_a_proxy(kind: type[Any]) -> None:
    through_a_proxy_and_without(None, kind)


def test_every_method_does_the_same_through_a_proxy_on_two_ranks() -> None:
    on_ranks(2, through_a_proxy_and_without, ShardedDecoupledAdamW)
