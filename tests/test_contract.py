"""What users of torch.optim rely on, on ShardedDecoupledAdamW: on one rank in-process, on two where ranks matter.

It shows what is kept and what is refused. Bits on many ranks are for tests/test_sharded.py.
"""

import contextlib
import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharded_dadamw import DecoupledAdamW, GradientResidency, MainParameter, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.interchange import from_torch
from tests.harness import ranks, same_gradients
from tests.models import BF16, F32, TiedLanguageModel, draw_gradient, make_groups, mean_in_rank_order, named
from tests.simulated import on_ranks, outcomes

Params = dict[str, nn.Parameter]
either_class = pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
on_one_rank_or_two = pytest.mark.parametrize(("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)])
whoever_reduces = pytest.mark.parametrize("reduces", [True, False], ids=["reduced here", "reduced by others"])


def make(parameters: str = "odd sizes", seed: int = 0) -> Params:
    return named(make_groups(parameters, seed))


def give_gradients(params: Params, step: int, rank: int = 0, without: Sequence[str] = ()) -> None:
    for index, (name, p) in enumerate(params.items()):
        if p.requires_grad and name not in without:
            p.grad = draw_gradient(p, step, rank, index)


def backward_onto(params: Params, step: int, rank: int = 0, without: Sequence[str] = ()) -> None:
    used = [p for name, p in params.items() if p.requires_grad and name not in without]
    torch.autograd.backward([p.view_as(p) for p in used], [draw_gradient(p, step, rank, i) for i, p in enumerate(used)])


def values(params: Params) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in params.items()}


def assert_equal(ours: Any, theirs: Any) -> None:
    __tracebackhide__ = True
    for name, p in ours.items():
        assert torch.equal(p, theirs[name].to(p.dtype)), (
            f"{name} differs by {(p - theirs[name]).abs().max().item():.3g}"
        )


class Pair:
    """Ours, and the unsharded optimizer on a copy, which gets the mean of all ranks' gradients."""

    def __init__(self, group: Any = None, config: ShardingConfig | None = None, **hyper: Any) -> None:
        self.rank, self.num_ranks = (0, 1) if group is None else (group.rank(), group.size())
        self.params, self.control_params = make(), make()
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
        assert_equal(self.params, self.control_params)

    def train(self, *steps: int) -> None:
        __tracebackhide__ = True
        for step in steps:
            self.give(step)
            self.step()


def parameter_state(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Copies of what this rank has of the state."""
    return {
        f"{index}.{key}": getattr(value, "fragment", value).clone()
        for index, entries in state_dict["state"].items()
        for key, value in entries.items()
    }


# --- the class ---


def test_it_is_a_torch_optimizer_with_the_defaults_and_groups_of_decoupled_adamw() -> None:
    pair = Pair()
    assert isinstance(pair.optimizer, Optimizer) and isinstance(pair.control, AdamW)
    assert pair.optimizer.defaults == pair.control.defaults
    assert set(pair.optimizer.param_groups[0]) == set(pair.control.param_groups[0])
    assert pair.optimizer.param_groups[0]["param_names"] == list(make())
    assert "ShardedDecoupledAdamW" in repr(pair.optimizer) and "lr: 0.003" in repr(pair.optimizer)


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
        give_gradients(params, 0)
        optimizer.step()
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
    pair = Pair()
    with pytest.raises(TypeError, match=r"(?s)ShardedDecoupledAdamW.*state_dict"):
        copier(pair.optimizer)
    pair.train(0)


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


def closure_fails(group: Any) -> None:
    def closure() -> float:
        raise KeyError("from the closure")

    Pair(group).optimizer.step(closure)


def test_an_exception_in_a_closure_comes_through_unchanged() -> None:
    for outcome in outcomes(2, closure_fails):
        assert outcome.error == "KeyError"


def test_a_step_without_any_gradient_changes_nothing_and_returns_none() -> None:
    pair = Pair()
    assert pair.optimizer.step() is None
    assert_equal(pair.params, make())
    pair.train(0)
    before, state = values(pair.params), parameter_state(pair.optimizer.state_dict())
    pair.optimizer.step()
    pair.optimizer.step()
    assert_equal(before, pair.params)
    assert_equal(state, parameter_state(pair.optimizer.state_dict()))


def zero_grads(params: Params, optimizer: Optimizer, how: str) -> None:
    if how.startswith("optimizer"):
        optimizer.zero_grad(set_to_none="none" in how)
    elif how.startswith("model"):
        nn.ParameterList(params.values()).zero_grad(set_to_none="none" in how)
    else:
        for p in params.values():
            p.grad = None


ZEROINGS = ["optimizer to none", "optimizer to zero", "model to none", "model to zero", "by hand"]


@pytest.mark.parametrize("how", ZEROINGS)
def test_however_gradients_are_zeroed_training_is_that_of_the_unsharded_optimizer(how: str) -> None:
    """After zeroing to None an unused parameter stays untouched; after zeroing to zeros it has a zero gradient."""
    pair = Pair()
    for step in range(5):
        missing = [name for index, name in enumerate(pair.params) if (step + index) % 3 == 0]
        for params, optimizer in pair.sides:
            backward_onto(params, step, without=missing)
            optimizer.step()
            zero_grads(params, optimizer, how)
        pair.check()


@pytest.mark.parametrize("how", ZEROINGS)
@whoever_reduces
def test_gradients_that_were_clipped_and_then_dropped_leave_no_trace(how: str, reduces: bool) -> None:
    """A training loop may look at the norm and decide to skip the step."""
    pair = Pair(config=ShardingConfig(reduce_gradients=reduces), lr=1e-2)
    give_gradients(pair.params, 0)
    pair.optimizer.clip_grad_norm_(1e-3)
    zero_grads(pair.params, pair.optimizer, how)
    if how == "model to zero" and not reduces:
        # Zeros that somebody else writes into gradients of somebody else look like any edit after the clip, which
        # must not pass silently. So this one is refused, with the way out.
        backward_onto(pair.params, 0)
        with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
            pair.optimizer.step()
        pair.optimizer.zero_grad()
    for step in range(1, 3):
        for params, _ in pair.sides:
            backward_onto(params, step)
        pair.step()


def test_looking_at_the_norm_skipping_the_step_and_clearing_in_place_is_fine_where_others_reduce() -> None:
    pair = Pair(config=ShardingConfig(reduce_gradients=False), lr=1e-2)
    for step in range(4):
        for params, _ in pair.sides:
            backward_onto(params, step)
        said = "gradients have changed since clip_grad_norm_"
        with pytest.warns(UserWarning, match=said) if step == 2 else contextlib.nullcontext():
            pair.optimizer.clip_grad_norm_(1e9)
        if step != 1:
            pair.optimizer.step()
            pair.control.step()
        nn.ParameterList(pair.params.values()).zero_grad(set_to_none=False)
        pair.control.zero_grad()
        pair.check()


def test_a_second_step_on_the_same_gradients_is_refused_and_changes_nothing() -> None:
    pair = Pair()
    pair.give(0)
    pair.optimizer.step()
    pair.control.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        pair.optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        pair.optimizer.clip_grad_norm_(1.0)
    pair.check()
    pair.optimizer.zero_grad()
    pair.train(1)


def test_backward_onto_used_gradients_is_refused() -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.parameters())
    model.loss(0).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="zero_grad"):
        model.loss(1).backward()


@whoever_reduces
def test_fresh_gradients_over_used_ones_need_no_zero_grad_and_those_of_others_may_be_used_twice(reduces: bool) -> None:
    pair = Pair(config=ShardingConfig(reduce_gradients=reduces))
    for step in range(3):
        if reduces or step != 1:
            pair.give(step)
        pair.optimizer.step()
        pair.control.step()
        pair.check()


@either_class
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


@ranks(2)
def test_an_update_that_is_interrupted_leaves_no_message_for_the_next_step(group: Any) -> None:
    """In the middle of a step, on all ranks."""
    # A bucket per parameter: some are in flight when one fails.
    pair = Pair(group, config=ShardingConfig(bucket_cap_mb=1e-4))
    give_gradients(pair.params, 0, pair.rank)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair.optimizer._shards.buckets[0], "update_", interrupt)
        pair.optimizer.step()
    pair.optimizer.zero_grad()
    pair.train(1)


# --- clips ---


def test_the_clip_holds_for_one_step_only_and_a_second_one_clips_what_the_first_has_left() -> None:
    pair = Pair()
    pair.give(0)
    norm = pair.optimizer.clip_grad_norm_(0.25)
    expected = nn.utils.clip_grad_norm_(list(pair.control_params.values()), 0.25)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    seen = pair.optimizer.clip_grad_norm_(float("inf"))
    torch.testing.assert_close(seen, torch.tensor(0.25), rtol=1e-5, atol=0.0)
    for _, optimizer in pair.sides:
        optimizer.step()
        optimizer.zero_grad()
    for name, p in pair.params.items():  # one rounding apart: we divide by 1/c where torch multiplies by c
        torch.testing.assert_close(p, pair.control_params[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, p in pair.control_params.items():
            p.copy_(pair.params[name])
            for key, value in pair.control.state[p].items():
                value.copy_(pair.optimizer.state[pair.params[name]][key].view(value.shape))
    pair.train(1)


@pytest.mark.parametrize(("max_norm", "norm_type"), [(-1.0, 2.0), (float("nan"), 2.0), (1.0, 1.0), (1.0, 0.0)])
def test_a_clip_without_a_meaning_is_refused(max_norm: float, norm_type: float) -> None:
    pair = Pair()
    give_gradients(pair.params, 0)
    with pytest.raises(ValueError, match="norm"):
        pair.optimizer.clip_grad_norm_(max_norm, norm_type=norm_type)
    pair.train(0)


@pytest.mark.parametrize(
    ("value", "norm_type", "said"), [(math.inf, 2.0, "inf"), (math.nan, 2.0, "nan"), (math.nan, math.inf, "inf")]
)
def test_a_norm_that_is_not_finite_raises_on_request_only(value: float, norm_type: float, said: str) -> None:
    pair = Pair()
    give_gradients(pair.params, 0)
    with torch.no_grad():
        pair.params["p1"].grad[0, 0] = value  # type: ignore[index]
    with pytest.raises(RuntimeError, match=f"(?s){said}.*error_if_nonfinite"):
        pair.optimizer.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    assert str(pair.optimizer.clip_grad_norm_(1.0, norm_type).item()) == said


@same_gradients
@pytest.mark.parametrize("what", ["there are none", "they are cleared", "one is replaced beside zeros"])
@whoever_reduces
@ranks(2)
def test_a_clip_is_for_the_gradients_there_are(group: Any, reduces: bool, what: str) -> None:
    pair = Pair(group, config=ShardingConfig(reduce_gradients=reduces))
    grads = {name: torch.full_like(p, 7.0 if name == "p1" else 0.0) for name, p in pair.params.items()}
    for name, p in pair.params.items():
        p.grad = None if what == "there are none" else grads[name].clone()
    pair.optimizer.clip_grad_norm_(1e-3)
    if what == "there are none":
        pair.give(0)
        for name, p in pair.params.items():
            p.grad = pair.control_params[name].grad.clone()  # type: ignore[union-attr]
    elif what == "they are cleared":
        for name, p in pair.params.items():
            p.grad.zero_()  # type: ignore[union-attr]
            pair.control_params[name].grad = torch.zeros_like(p)
    else:
        pair.params["p1"].grad = grads["p1"].clone()
        with pytest.raises(RuntimeError, match=r"changed between clip_grad_norm_\(\) and step\(\)"):
            pair.optimizer.step()
        return
    pair.step()


def test_unsharded_gradients_that_change_after_a_clip_are_an_error() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = DecoupledAdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.clip_grad_norm_(0.1)
    weight.grad.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed between clip_grad_norm_\(\) and step\(\)"):
        optimizer.step()
    assert not weight.any()


# --- groups, freezing ---


def test_a_group_added_later_trains_with_its_own_hyperparameters() -> None:
    sides = []
    for cls in (ShardedDecoupledAdamW, DecoupledAdamW):
        params = make("several groups")
        names = list(params)
        optimizer: Any = cls([(name, params[name]) for name in names[:3]], lr=3e-3, weight_decay=2e-4)
        for step in range(4):
            if step == 2:
                late = [(name, params[name]) for name in names[3:]]
                optimizer.add_param_group({"params": late, "lr": 1e-2, "amsgrad": True, "betas": (0.7, 0.9)})
            give_gradients(params, step, without=() if step >= 2 else names[3:])
            optimizer.step()
            optimizer.zero_grad()
        sides.append(params)
        assert optimizer.param_groups[1]["initial_lr"] == 1e-2
    assert_equal(*sides)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    pair = Pair()
    extra, groups = nn.Parameter(torch.ones(3)), pair.optimizer.param_groups
    for bad, said in (
        ({"params": [("extra", extra)], "lr": -1.0}, r"lr.*-1\.0"),
        ({"params": [("again", pair.params["p0"])]}, "more than one parameter group"),
        ({"params": [("odd", nn.Parameter(torch.ones(3, dtype=torch.complex64)))]}, "odd.*complex64"),
        ({"params": [("view", nn.Parameter(pair.params["p1"].detach()[1:]))]}, "shares memory"),
        ({"params": [extra]}, "names"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            pair.optimizer.add_param_group(bad)
        assert len(groups) == 1
    pair.train(0)
    pair.optimizer.add_param_group({"params": [("extra", extra)]})
    assert len(groups) == 2


@pytest.mark.parametrize(("clip", "num_ranks"), [(False, 2), (True, 1), (True, 2)])
@ranks()
def test_a_parameter_that_is_unfrozen_later_is_trained_from_then_on(group: Any, clip: bool) -> list[float]:
    """Three of them are frozen, two come along later, and another is frozen for good."""
    pair, norms = Pair(group), []
    for params, _ in pair.sides:
        for name in ("p1", "p5", "p9"):
            params[name].requires_grad_(False)
    for step in range(8):
        for params, _ in pair.sides:
            params["p1"].requires_grad_(step >= 3)
            params["p9"].requires_grad_(step >= 5)
            params["p6"].requires_grad_(step < 5)
        pair.give(step)
        if clip:
            gradients = [p.grad.double() for p in pair.control_params.values() if p.grad is not None]
            norm = pair.optimizer.clip_grad_norm_(1e6)
            expected = torch.cat([g.flatten() for g in gradients]).norm()
            torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0.0)
            norms.append(norm.item())
        pair.step()
    assert pair.optimizer.state[pair.params["p1"]]["step"].item() == 5
    return norms


@pytest.mark.parametrize("how", ["optimizer to none", "optimizer to zero"])
def test_a_parameter_that_is_frozen_later_stays_where_it_is(how: str) -> None:
    pair = Pair(weight_decay=0.1)
    for step in range(4):
        if step == 2:
            frozen_at = pair.params["p1"].detach().clone()
        for params, optimizer in pair.sides:
            params["p1"].requires_grad_(step < 2)
            backward_onto(params, step)
            optimizer.step()
            zero_grads(params, optimizer, how)
        pair.check()
    assert torch.equal(pair.params["p1"], frozen_at)


def test_everything_frozen_is_allowed_and_can_be_unfrozen() -> None:
    params = make()
    for p in params.values():
        p.requires_grad_(False)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2)
    assert optimizer.state_bytes == 0
    optimizer.step()
    assert_equal(params, make())
    control_params = make()
    control = DecoupledAdamW(control_params.items(), lr=1e-2)
    for p in params.values():
        p.requires_grad_(True)
    for some, its in ((params, optimizer), (control_params, control)):
        give_gradients(some, 0)
        its.step()
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


@pytest.mark.filterwarnings("error:.*lr_scheduler.step.*:UserWarning")  # where they think that step was not called
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drives_it_as_it_drives_the_unsharded_optimizer(name: str) -> None:
    pair = Pair()
    schedulers = [SCHEDULERS[name](optimizer) for _, optimizer in pair.sides]
    lrs = set()
    for step in range(5):
        pair.train(step)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        ours, theirs = (optimizer.param_groups[0] for _, optimizer in pair.sides)
        assert all(ours.get(key) == theirs.get(key) for key in ("lr", "betas", "initial_lr", "max_lr"))
        lrs.add(ours["lr"])
    assert len(lrs) > 1, "the schedule never changed the lr, so this proves nothing"


# --- hooks ---


def test_step_hooks_run_once_per_step_around_it() -> None:
    pair = Pair()
    params, optimizer = pair.params, pair.optimizer
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
    assert seen == ["pre", "pre", "post", "post"]
    for handle in handles:
        handle.remove()
    optimizer.zero_grad()
    give_gradients(params, 1)
    optimizer.step()
    assert len(seen) == 4


def test_state_dict_hooks_see_and_may_replace_the_state_dict() -> None:
    optimizer = Pair().optimizer
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
    saved = optimizer.state_dict()
    assert saved["note"] == "kept" and set(saved) == {"state", "param_groups", "note"}
    optimizer.load_state_dict(saved)
    assert seen == ["pre save", "post save", "pre load", "post load"]
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert saved["param_groups"][0]["lr"] == 3e-3, "loading changed the caller's state dict"


# --- state dicts ---


def test_saving_and_loading_before_the_first_step_changes_nothing() -> None:
    pair = Pair(amsgrad=True)
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    pair.train(0, 1, 2)


def build_saved(group: Any, parameters: str) -> tuple[Params, ShardedDecoupledAdamW, Any]:
    params, config = make(parameters, seed=5), ShardingConfig(bucket_cap_mb=1e-3)
    optimizer = ShardedDecoupledAdamW(
        params.items(), lr=3e-3, weight_decay=1e-4, amsgrad=True, process_group=group, config=config
    )
    return params, optimizer, lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=20)


def train(params: Params, optimizer: Any, scheduler: Any, steps: range, rank: int) -> None:
    names = list(params)
    for step in steps:  # step counts of neighbours come to differ, and are there together again in the next steps
        give_gradients(params, step, rank, without=[names[step % len(names)]] if step % 3 == 1 else ())
        optimizer.clip_grad_norm_(0.3)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


@pytest.mark.parametrize(
    ("parameters", "optimizer_first"), [("several groups", True), ("mixed dtypes", True), ("mixed dtypes", False)]
)
@ranks(2)
def test_a_saved_run_resumes_bit_for_bit(group: Any, parameters: str, optimizer_first: bool) -> None:
    """Whether the optimizer is loaded first or the weights."""
    params, optimizer, scheduler = build_saved(group, parameters)
    train(params, optimizer, scheduler, range(5), group.rank())
    saved = copy.deepcopy((values(params), optimizer.state_dict(), scheduler.state_dict()))
    train(params, optimizer, scheduler, range(5, 9), group.rank())
    resumed_params, resumed, resumed_scheduler = build_saved(group, parameters)
    train(resumed_params, resumed, resumed_scheduler, range(90, 92), group.rank())  # to be overwritten
    if optimizer_first:
        resumed.load_state_dict(saved[1])
    with torch.no_grad():
        for name, p in resumed_params.items():
            p.copy_(saved[0][name])
    if not optimizer_first:
        resumed.load_state_dict(saved[1])
    resumed_scheduler.load_state_dict(saved[2])
    train(resumed_params, resumed, resumed_scheduler, range(5, 9), group.rank())
    assert_equal(resumed_params, params)
    ours, theirs = (parameter_state(each.state_dict()) for each in (resumed, optimizer))
    assert set(ours) == set(theirs)
    assert_equal(ours, theirs)


@same_gradients
@ranks(3)
def test_a_shard_of_another_bucket_layout_is_refused_on_every_rank(group: Any) -> None:
    """Sizes for which the middle rank's fragment of `p` has the same length in both layouts, but starts elsewhere."""

    def build(bucket_cap_mb: float) -> tuple[Params, ShardedDecoupledAdamW]:
        params = {"a": nn.Parameter(torch.ones(64)), "p": nn.Parameter(torch.ones(256))}
        config = ShardingConfig(bucket_cap_mb=bucket_cap_mb)
        return params, ShardedDecoupledAdamW(params.items(), process_group=group, config=config)

    params, saved = build(1.0)
    give_gradients(params, 0)
    saved.step()
    _, optimizer = build(1e-6)
    with pytest.raises(ValueError, match=r"^state of "):
        optimizer.load_state_dict(saved.state_dict())
    assert not any(value.any() for entries in optimizer.state.values() for value in entries.values())


def damage(saved: dict[str, Any], kind: str) -> dict[str, Any]:
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


def save_alone(group: Any) -> dict[str, Any]:
    pair = Pair(group)
    pair.train(0)
    return copy.deepcopy(pair.optimizer.state_dict())


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
    on_ranks(2, load_what_does_not_fit, damage(on_ranks(1, save_alone)[0], kind), said)


def load_what_does_not_fit(group: Any, saved: dict[str, Any], said: str) -> None:
    pair = Pair(group)
    with pytest.raises(ValueError, match=said):
        pair.optimizer.load_state_dict(saved)
    pair.train(0, 1)


def test_loading_does_not_alias_the_callers_tensors() -> None:
    pair = Pair()
    pair.train(0)
    saved = copy.deepcopy(pair.optimizer.state_dict())
    snapshot = parameter_state(saved)
    pair.optimizer.load_state_dict(saved)
    pair.train(1)
    assert_equal(snapshot, parameter_state(saved))


@ranks(2)
def test_one_ranks_shards_are_not_taken_for_the_whole_state(group: Any) -> None:
    pair = Pair(group)
    with pytest.raises(
        ValueError, match=r"(?s)one rank's fragments.*ShardedDecoupledAdamW|ShardedDecoupledAdamW.*one r"
    ):
        pair.control.load_state_dict(pair.optimizer.state_dict())
    assert not any(entry.count_nonzero() for state in pair.control.state.values() for entry in state.values())


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


@pytest.mark.parametrize("by_name", [False, True], ids=["load_state_dict", "set_optimizer_state_dict"])
@either_class
def test_the_decay_of_torchs_adamw_is_not_taken_for_ours(cls: Any, by_name: bool) -> None:
    model = nn.Linear(3, 2)
    theirs = AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    model(torch.ones(2, 3)).sum().backward()
    theirs.step()
    theirs.zero_grad()
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


@either_class
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


@either_class
def test_a_loaded_group_may_lack_entries(cls: Any) -> None:
    optimizer = cls([nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["weight_decay"]
    optimizer.load_state_dict(saved)


# --- GradScaler ---


@ranks(2)
def test_means_of_others_under_scalers_that_have_parted_are_an_error_on_all(group: Any) -> str:
    """Rank 1 alone finds an inf in means that others have made; what they make of two scales cannot be put right."""
    pair = Pair(group, config=ShardingConfig(reduce_gradients=False))
    scaler = GradScaler("cpu", init_scale=8.0)
    message, before = "", {}
    for step in range(3):
        scaler.scale(torch.ones(()))
        pair.give(step)
        for name, p in pair.params.items():
            p.grad = pair.control_params[name].grad
        if step == 1:
            before = values(pair.params)
        if step == 1 and pair.rank == 1:
            pair.params["p1"].grad[0, 0] = float("inf")  # type: ignore[index]
        try:
            scaler.step(pair.optimizer)
        except RuntimeError as error:
            message = str(error)
        scaler.update()
        pair.optimizer.zero_grad()
    assert "the loss scale: rank 0 has 8.0, rank 1 has 4.0" in message
    assert_equal(before, pair.params)
    return message


@whoever_reduces
def test_a_loss_scale_saves_fp16_gradients_that_would_vanish_without_it(reduces: bool) -> None:
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float16))
    config = ShardingConfig(reduce_gradients=reduces)
    optimizer = ShardedDecoupledAdamW([weight], lr=1e-2, weight_decay=0.0, eps=1e-12, config=config)
    scaler = GradScaler("cpu", init_scale=65536.0)
    for step in range(1, 4):
        scaler.scale((weight.float() * 1e-8).sum()).backward()  # 1e-8 is below the smallest fp16
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch.testing.assert_close(weight.float(), torch.full((5,), -0.01 * step), rtol=2e-3, atol=0.0)


@either_class
def test_a_void_step_does_not_count(cls: Any) -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer, scaler = cls([weight]), GradScaler("cpu", init_scale=2.0)
    for value in (1.0, math.inf, 1.0):
        before = weight.detach().clone()
        weight.grad = torch.full((4,), value)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weight, before) == (value == math.inf)
    assert optimizer.state[weight]["step"] == 2.0


# --- edits from outside ---


@pytest.mark.parametrize("when", ["before the step", "before clipping", "after clipping"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@ranks()
def test_gradients_edited_in_place_count_or_are_refused(group: Any, when: str) -> None:
    """Before they are reduced, in a first step, they count; after it nothing may go wrong silently."""
    pair = Pair(group)
    for step in range(3):
        backward_onto(pair.params, step, pair.rank)
        pair.give_control(step, 2.0)
        if when == "after clipping":
            pair.optimizer.clip_grad_norm_(1e9)
        for p in pair.params.values():
            p.grad *= 2  # type: ignore[operator]
        if when == "before clipping":
            pair.optimizer.clip_grad_norm_(1e9)
        try:
            pair.step()
        except RuntimeError as error:
            assert when == "after clipping" and "clip_grad_norm_" in str(error)
            return


EDITS: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "copy_ under no_grad": lambda p, new: p.copy_(new),
    "p.data.copy_": lambda p, new: p.data.copy_(new),
    "load_state_dict": lambda p, new: nn.ParameterDict({"p": p}).load_state_dict({"p": new}),
    "one element": lambda p, new: p.view(-1)[-1:].fill_(0.5),
}
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
@ranks(2)
def test_weights_edited_in_place_between_steps_are_the_ones_trained_on(group: Any, parameters: str, how: str) -> None:
    params = make(parameters)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    for step in range(3):
        give_gradients(params, step, group.rank())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for index, p in enumerate(params.values()):
            EDITS[how](p, draw_gradient(p, 77, index))
    edited = values(params)
    optimizer.param_groups[0]["lr"] = 1e-9  # so that the weights stay where they are, but for the edit
    give_gradients(params, 3, group.rank())
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), edited[name], rtol=2e-2, atol=1e-6)
        if how != "one element":
            assert torch.equal(p, edited[name]) or p.dtype != BF16, f"{name}: the edit was lost"


def test_swapping_weights_out_and_back_in_loses_no_precision() -> None:
    """As an exponential moving average does for evaluation: the fp32 main parameters survive."""
    mains = []
    for swaps in (False, True):
        params = make("bf16")
        optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-3)
        for step in range(6):
            give_gradients(params, step)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for p in params.values() if swaps else ():
                    saved = p.clone()
                    p.zero_()
                    p.copy_(saved)
        mains.append({name: optimizer.state[p]["main_param"] for name, p in params.items()})
    assert_equal(*mains)


# --- no_sync ---


def test_no_sync_nests_ends_with_an_exception_and_refuses_step_and_clip() -> None:
    pair = Pair()
    give_gradients(pair.params, 0)
    with pair.optimizer.no_sync():
        with pair.optimizer.no_sync():
            pass
        with pytest.raises(RuntimeError, match="no_sync"):
            pair.optimizer.step()
        with pytest.raises(RuntimeError, match="no_sync"):
            pair.optimizer.clip_grad_norm_(1.0)
    with pytest.raises(KeyError), pair.optimizer.no_sync():
        raise KeyError
    pair.train(0)


def test_no_sync_belongs_to_whoever_reduces() -> None:
    optimizer = ShardedDecoupledAdamW(make().items(), config=ShardingConfig(reduce_gradients=False))
    with pytest.raises(RuntimeError, match="reduce_gradients"), optimizer.no_sync():
        pass


# --- lifetime ---


def storages_of(optimizer: Optimizer) -> list[StorageWeakRef]:
    tensors = [v for entries in optimizer.state.values() for v in entries.values()]
    return [StorageWeakRef(t.untyped_storage()) for t in tensors if t.numel()]


@whoever_reduces
def test_deleting_model_and_optimizer_frees_everything(reduces: bool) -> None:
    model = TiedLanguageModel()
    config = ShardingConfig(reduce_gradients=reduces, bucket_cap_mb=1e-3)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), config=config)
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
    model.loss(0).backward()
    optimizer.step()
    optimizer.zero_grad()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.loss(5), model.loss(5))
        assert twin.head.weight is twin.embedding.weight
        twin.loss(5).backward()
        assert model.head.weight.grad is None, "the copy's backward reached the original"


# --- hyperparameters ---


def test_fp32_parameters_have_no_main_copy_and_narrower_ones_do() -> None:
    params = make("mixed dtypes")
    optimizer = ShardedDecoupledAdamW(params.items())
    for p in params.values():
        state = optimizer.state[p]
        assert ("main_param" in state) == (p.dtype == BF16)
        assert state["exp_avg"].dtype == (F32 if p.dtype == BF16 else p.dtype)


@pytest.mark.parametrize("built_with", [False, True])
def test_amsgrad_switched_after_construction_is_refused_and_changes_nothing(built_with: bool) -> None:
    pair = Pair(amsgrad=built_with)
    give_gradients(pair.params, 0)
    pair.optimizer.param_groups[0]["amsgrad"] = not built_with
    with pytest.raises(ValueError, match=r"amsgrad.*expected (True|False).*got (True|False)"):
        pair.optimizer.step()
    pair.optimizer.param_groups[0]["amsgrad"] = built_with
    pair.optimizer.zero_grad()
    pair.train(0)


def test_tensors_of_different_shapes_never_reach_the_kernel() -> None:
    whole, part = torch.zeros(256), torch.zeros(128)
    scalars: dict[str, Any] = dict(
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3, initial_lr=1e-3, weight_decay=0.0, eps=1e-8
    )
    with pytest.raises(ValueError, match=r"expected tensors of one shape.*\[256\].*\[128\]"):
        DecoupledAdamW.adamw([whole], [whole], [part], [whole], [], [torch.ones(())], **scalars)
    assert not whole.any()


def test_a_high_weight_decay_warns_whether_it_is_the_default_or_a_groups_own(caplog: pytest.LogCaptureFixture) -> None:
    DecoupledAdamW(make().values(), weight_decay=0.1)
    assert len(caplog.records) == 1
    groups = [{"params": list(make().values()), "weight_decay": 0.1}, {"params": list(make().values())}]
    DecoupledAdamW(groups)
    assert len(caplog.records) == 2 and "0.1" in caplog.records[1].getMessage()


@either_class
def test_an_lr_above_the_peak_is_warned_of_once(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = cls([{"params": [weights[0]], "lr": torch.tensor(0.1)}, {"params": [weights[1]]}], lr=0.1)
    for lr, num_warnings in ((0.1, 0), (0.1 + 1e-7, 0), (0.3, 1), (0.6, 1)):
        optimizer.param_groups[1]["lr"] = lr
        optimizer.step()
        assert caplog.text.count("above initial_lr") == num_warnings
    assert "param_groups[1]: lr=0.3 is above initial_lr=0.1" in caplog.text and "3 times" in caplog.text


def build_on(group: Any, cls: Any, params: Any, **hyper: Any) -> Any:
    return cls(params, **hyper, **({"process_group": group} if cls is ShardedDecoupledAdamW else {}))


@same_gradients
@on_one_rank_or_two
@ranks()
def test_a_decay_of_one_or_more_is_an_error_on_every_rank_that_changes_nothing(group: Any, cls: Any) -> str:
    """As Lightning's lr_find brings about, which writes a tiny start into ``initial_lr``."""
    weight = nn.Parameter(torch.ones(5))
    optimizer = build_on(group, cls, [("w", weight)], lr=1e-2)
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


# --- max_grad_norm ---


def clipped(group: Any, cls: Any, within: bool, settings: dict[str, Any], wrap: bool) -> tuple[Params, list[Any]]:
    """Four steps with a clip within ``step`` or just before it: of two micro-batches, a new group, a loaded state."""
    params, own = make(), {"max_grad_norm": 0.3} if within else {}
    if cls is ShardedDecoupledAdamW:
        own |= {"config": ShardingConfig(bucket_cap_mb=1e-3, **settings)}
    first, *rest = params.items()
    optimizer = build_on(group, cls, rest, lr=3e-3, weight_decay=2e-4, **own)
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
    return params, told


@pytest.mark.parametrize(
    ("cls", "settings", "num_ranks"),
    [
        (DecoupledAdamW, {}, 1),
        (ShardedDecoupledAdamW, {}, 1),
        (ShardedDecoupledAdamW, {"overlap": False, "skip_nonfinite": True}, 2),
        (ShardedDecoupledAdamW, {"gradient_residency": GradientResidency.SHARDED}, 2),
    ],
)
@ranks()
def test_max_grad_norm_clips_as_clip_grad_norm_does_before_the_step(
    group: Any, cls: Any, settings: dict[str, Any]
) -> None:
    expected, said = clipped(group, cls, False, settings, False)
    for wrap in (False, True):
        params, told = clipped(group, cls, True, settings, wrap)
        assert told == said
        assert_equal(params, expected)


@on_one_rank_or_two
@ranks()
def test_max_grad_norm_is_that_of_unscaled_gradients(group: Any, cls: Any) -> None:
    told: list[list[Any]] = []
    for unscale_first in (False, True):
        params = make()
        optimizer = build_on(group, cls, params.items(), lr=3e-3, max_grad_norm=0.3)
        scaler = GradScaler("cpu", init_scale=8.0)
        told.append([])
        for step in range(3):
            give_gradients(params, step, group.rank())
            for p in params.values():
                p.grad.mul_(8.0)  # type: ignore[union-attr]
            scaler.scale(torch.zeros(()))  # which makes the scale
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            told[-1].append(str(optimizer.metrics()))
            optimizer.zero_grad()
        told[-1].append([p.tolist() for p in params.values()])
    assert told[0] == told[1]


@either_class
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


@ranks(2)
def test_ranks_that_clip_to_other_norms_are_told_so(group: Any) -> str:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = ShardedDecoupledAdamW([weight], process_group=group, max_grad_norm=[1.0, None][group.rank()])
    weight.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"max_grad_norm=1\.0") as error:
        optimizer.step()
    assert not weight.any()
    return str(error.value)


@either_class
def test_a_max_grad_norm_without_a_meaning_is_refused(cls: Any) -> None:
    for max_grad_norm in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_grad_norm: expected a number > 0"):
            cls([nn.Parameter(torch.zeros(4))], max_grad_norm=max_grad_norm)


def test_a_copy_clips_to_the_same_norm() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = copy.deepcopy(DecoupledAdamW([weight], max_grad_norm=0.5))
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 2.0


# --- integers ---


@either_class
def test_frozen_integers_are_left_alone(cls: Any, tmp_path: Path) -> None:
    def build(value: int) -> tuple[Any, Any]:
        model: Any = nn.Linear(3, 2)
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
    return values(params), told


@on_one_rank_or_two
@ranks()
def test_every_method_does_the_same_through_a_proxy(group: Any, cls: Any) -> None:
    found = []
    for wrap in (Proxy, lambda optimizer: optimizer):
        params = make("several groups")
        optimizer = build_on(group, cls, params.items(), lr=3e-3, weight_decay=2e-4)
        found.append(train_through(wrap(optimizer), params, group.rank()))
    (ours, told), (expected, also_told) = found
    assert_equal(ours, expected)
    assert str(told) == str(also_told)
