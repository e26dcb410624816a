"""What others do to the parameters of an optimizer: it stays right, or one error on every rank says what to do.

A model is moved after the optimizer was built, saved by whoever looks at storages, wrapped by
DistributedDataParallel, or given to a second optimizer.
"""

import copy
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sharded_dadamw import DecoupledAdamW, Exchange, GradientResidency, ShardedDecoupledAdamW, ShardingConfig
from tests.harness import FULL, ONE_EACH, SHARDED, assert_equal, loss_of, ranks, refused, small, train_on, values_of
from tests.models import BF16, F32, draw_gradient, reduce_for_control
from tests.simulated import on_ranks

either_residency = pytest.mark.parametrize("residency", [FULL, SHARDED])

# --- parameters that were moved ---


def copy_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def swap_tensors(model: nn.Module) -> None:
    """What model.to does under torch.__future__.set_swap_module_params_on_conversion; it leaves hooks behind."""
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def order_by_columns(model: nn.Module) -> None:
    """Where they lie, as after ``p.data = p.data.t()``."""
    for p in model.parameters():
        if p.dim() == 2 and p.shape[0] == p.shape[1]:
            p.data.copy_(p.data.t().clone())
            p.data = p.data.t()


@pytest.mark.parametrize(
    ("move", "residency", "is_attached"),
    [
        *((copy_data, FULL, False), (copy_data, SHARDED, True), (swap_tensors, FULL, True)),
        *((swap_tensors, SHARDED, False), (order_by_columns, FULL, True), (order_by_columns, SHARDED, False)),
    ],
)
@ranks(2)
def test_parameters_that_were_moved_are_taken_back_with_the_values_they_have(
    group: Any, move: Callable[[nn.Module], None], residency: GradientResidency, is_attached: bool
) -> None:
    results = []
    for moves in (False, True):
        model, optimizer = small(group, gradient_residency=residency)
        if is_attached and moves:
            optimizer.attach(model)
        for step in range(4):
            if moves and step in (0, 2):
                optimizer.synchronize()
                move(model)
            train_on(model, optimizer, group.rank(), step)
        loss_of(model, group.rank()).backward()
        gone = [p.grad is None or not p.grad.any() for p in model.parameters()]
        assert gone == [residency is SHARDED] * len(gone), "hooks were left behind"
        optimizer.synchronize()
        results.append(values_of(model))
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter with main parameters beside it
def test_values_written_while_a_parameter_was_elsewhere_count(dtype: torch.dtype) -> None:
    (model, optimizer), (other, control) = small(None, dtype=dtype), small(None, dtype=dtype)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = p.data + 1.0
            q.add_(1.0)
    for step, is_frozen in enumerate((True, False)):
        for each, its in ((model, optimizer), (other, control)):
            each[0].weight.requires_grad_(not is_frozen)
            train_on(each, its, 0, step)
        assert_equal(values_of(other), values_of(model))


def tie(model: Any) -> None:
    model[2].bias.data = model[0].bias.data


def swap(model: Any) -> None:
    one, other = model[0].bias, model[2].bias
    one.data, other.data = other.data, one.data


@pytest.mark.parametrize("bucket_cap_mb", [ONE_EACH, 1.0])
@pytest.mark.parametrize("share", [tie, swap])
def test_parameters_that_were_given_the_memory_of_others_are_an_error(
    share: Callable[[nn.Module], None], bucket_cap_mb: float
) -> None:
    model, optimizer = small(None, bucket_cap_mb=bucket_cap_mb)
    train_on(model, optimizer, 0, 0)
    share(model)
    loss_of(model, 0).backward()
    before = values_of(model)
    with pytest.raises(RuntimeError, match=r"bias is no longer.* it has the memory of [02]\.bias now\. To tie them"):
        optimizer.step()
    assert_equal(before, values_of(model))


@pytest.mark.parametrize(
    ("cast", "said"),
    [(nn.Module.bfloat16, r"torch\.float32.*bfloat16"), (nn.Module.double, r"torch\.float32.*float64")],
)
def test_a_model_that_was_cast_is_an_error_that_says_so(cast: Callable[[nn.Module], nn.Module], said: str) -> None:
    model, optimizer = small(None)
    cast(model)
    with pytest.raises(RuntimeError, match=said + r".*Build the optimizer after the model is on its device"):
        optimizer.step()
    with pytest.raises(ValueError, match=said + r".*build the optimizer after"):
        loss_of(model, 0).backward()


@ranks(2)
def test_parameters_that_were_replaced_in_the_groups_are_an_error(group: Any) -> None:
    """What fully_shard does to a model, and accelerate then to the groups of its optimizer; after a step too."""
    model, optimizer = small(group)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    other = copy.deepcopy(model)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    loss_of(other, group.rank()).backward()
    with pytest.raises(RuntimeError, match="param_groups do not hold the parameters"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="Build the optimizer when the model is as it will be trained"):
        optimizer.step()


OTHER_GROUPS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "reversed": lambda groups: groups.reverse(),
    "with one in another": lambda groups: groups[1]["params"].insert(0, groups[0]["params"].pop()),
    "merged": lambda groups: groups[0]["params"].extend(groups.pop()["params"]),
}


@pytest.mark.parametrize("how", OTHER_GROUPS)
@ranks(2)
def test_parameters_in_other_groups_are_an_error_that_changes_nothing(group: Any, how: str) -> None:
    model, _ = small(group)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2:].parameters()), "lr": 1e-3}]
    optimizer = ShardedDecoupledAdamW(groups, lr=1e-2, process_group=group)
    train_on(model, optimizer, group.rank(), 0)
    before = values_of(model)
    OTHER_GROUPS[how](optimizer.param_groups)
    loss_of(model, group.rank()).backward()
    with pytest.raises(RuntimeError, match="param_groups hold parameters in other groups, or in another order"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="in other groups"):
        optimizer.state_dict()
    assert_equal(before, values_of(model))


def test_several_ranks_without_a_process_group_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"WORLD_SIZE is 2 .* call torch\.distributed\.init_process_group\(\) before"
    ):
        small(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    small(None)


# --- storages ---


def test_each_parameter_has_a_storage_of_its_own() -> None:
    model, _ = small(None, bucket_cap_mb=16.0)
    storages = [p.untyped_storage() for p in model.parameters()]
    assert [s.nbytes() for s in storages] == [p.numel() * p.itemsize for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)


# --- memory that is not row-major ---


@ranks(2)
def test_strides_by_which_ddp_would_go_are_refused_with_what_works(group: Any) -> None:
    model, config = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), ShardingConfig(reduce_gradients=False)
    model[0].weight.data = torch.randn(8, 16).t()
    with pytest.raises(
        ValueError, match=r"(?s)0\.weight: expected a row-major parameter where reduce_gradients=False"
    ) as said:
        ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    assert "contiguous_format" in str(said.value)
    model[0].weight.data = model[0].weight.data.contiguous()  # type: ignore[operator]
    control = copy.deepcopy(model).double()
    ddp = DistributedDataParallel(model, process_group=group)
    ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    loss_of(ddp, group.rank()).backward()
    (sum(loss_of(control, rank) for rank in range(group.size())) / group.size()).backward()  # type: ignore[union-attr]
    for p, q in zip(model.parameters(), control.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max() / q.grad.abs().max()) < 1e-5


@ranks(2)
def test_an_order_in_memory_that_ddp_has_not_found_is_refused_in_the_step(group: Any) -> None:
    model, optimizer = small(group, reduce_gradients=False)
    ddp = DistributedDataParallel(model, process_group=group)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    loss_of(ddp, group.rank()).backward()
    before = values_of(model)
    with pytest.raises(ValueError, match=r"2\.weight: expected a row-major parameter where reduce_gradients=False"):
        optimizer.step()
    assert_equal(before, values_of(model))


# --- who averages, and who clips ---


def steps_under(group: Any, wraps: bool, reduces: bool, how: str) -> tuple[str, Tensor]:
    """Three steps on different data; returns what was said, as a warning or as an error, and the weights."""
    model, optimizer = small(group, reduce_gradients=reduces, overlap=how != "without overlap", bucket_cap_mb=16.0)
    called = DistributedDataParallel(model, process_group=group) if wraps else model
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            loss_of(called, 0 if how == "the same data" else group.rank(), step).backward()
            if how != "the same data":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            try:
                optimizer.step()
            except RuntimeError as error:
                said = str(error)
                break
            optimizer.zero_grad()
    return said or "; ".join(str(each.message) for each in caught if each.category is UserWarning), values_of(model)


@pytest.mark.parametrize(
    ("reduces", "how", "advice"),
    [
        (True, "", "use optimizer.clip_grad_norm_() in place of torch's"),
        (True, "without overlap", "use optimizer.clip_grad_norm_() in place of torch's"),
        (False, "", "wrap the model in DistributedDataParallel"),
    ],
)
@ranks(2)
def test_clips_by_each_ranks_own_norm_and_gradients_that_nobody_averages_are_an_error_in_the_first_step(
    group: Any, reduces: bool, how: str, advice: str
) -> None:
    said, found = steps_under(group, False, reduces, how)
    assert advice in said
    assert_equal(values_of(small(group)[0]), found)


def clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


@pytest.mark.parametrize(("touch", "buckets"), [(clip, {}), (nn.Module.zero_grad, {}), (clip, {"bucket_cap_mb": 16.0})])
@ranks(2)
def test_what_others_do_to_sharded_gradients_is_an_error(
    group: Any, touch: Callable[[nn.Module], None], buckets: dict[str, Any]
) -> None:
    model, optimizer = small(group, gradient_residency=SHARDED, **buckets)
    for micro in range(2):  # whose means add up
        loss_of(model, group.rank(), micro).backward()
    touch(model)
    said = r"after backward.*optimizer\.clip_grad_norm_\(\) or max_grad_norm="
    with refused(group, model, optimizer, said, gradient_residency=SHARDED, **buckets):
        optimizer.step()


@ranks(3)
def test_where_ddp_averages_too_a_warning_names_it_and_nothing_is_wrong(group: Any) -> None:
    silence, expected = steps_under(group, True, False, "")
    said, found = steps_under(group, True, True, "")
    assert "DistributedDataParallel, pass ShardingConfig(reduce_gradients=False)" in said and not silence
    torch.testing.assert_close(expected, found, rtol=1e-6, atol=1e-7)  # a mean of three equal numbers is rounded


def test_the_same_data_on_all_ranks_is_trained_on_with_a_warning() -> None:
    alone = on_ranks(1, steps_under, False, True, "the same data")[0]
    for said, found in on_ranks(2, steps_under, False, True, "the same data"):
        assert "the same on all ranks" in said
        assert_equal(alone[1], found)


def assign_negative(param: Tensor) -> None:
    param.grad = None if param.grad is None else torch.neg(param.grad)


def give_memory_of_negative(param: Tensor) -> None:
    if param.grad is not None:
        param.grad.data = torch.neg(param.grad)


@pytest.mark.parametrize("replace", [assign_negative, give_memory_of_negative])
@ranks(2)
def test_averages_that_were_replaced_are_an_error(group: Any, replace: Callable[[Tensor], None]) -> None:
    model, optimizer = small(group)
    train_on(model, optimizer, group.rank(), 0)
    loss_of(model, group.rank()).backward()
    for p in model.parameters():
        replace(p)
    said = r"(?s)p\.grad was assigned after its average.*reduce_gradients=False"
    with refused(group, model, optimizer, said):
        optimizer.step()


# --- a second optimizer over the same model ---


@pytest.mark.parametrize("first_layer", [0, 2])
@pytest.mark.parametrize("overlap", [True, False])
@either_residency
@ranks(2)
def test_a_second_optimizer_takes_over_and_the_first_says_so(
    group: Any, residency: GradientResidency, overlap: bool, first_layer: int
) -> None:
    """The whole model, or the rest from a layer on, with its own way to average."""
    results = []
    for drops_first in (True, False):
        model, first = small(group, gradient_residency=residency)
        train_on(model, first, group.rank(), 0)
        config = dataclasses.replace(first.config, overlap=overlap)
        if drops_first:
            del first
        taken = model[first_layer:].parameters()
        second = ShardedDecoupledAdamW(taken, lr=1e-2, process_group=group, config=config)
        train_on(model, second, group.rank(), 1, 2)
        results.append(values_of(model))
    assert_equal(*results)
    loss_of(model, group.rank()).backward()
    with pytest.raises(RuntimeError, match=r"(?s)given to another optimizer.*use one optimizer for a parameter"):
        first.step()


@pytest.mark.parametrize(("residency", "num_ranks"), [(FULL, 2), (SHARDED, 1), (SHARDED, 2)])
@ranks()
def test_what_is_left_of_an_earlier_optimizers_averages_is_an_error_until_it_is_dropped(
    group: Any, residency: GradientResidency
) -> None:
    model, first = small(group, gradient_residency=residency)
    train_on(model, first, group.rank(), 0)
    loss_of(model, group.rank(), 1).backward()
    config, before = first.config, values_of(model)
    del first
    gc.collect()
    second = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=config)
    model.zero_grad(set_to_none=False)  # which leaves them where they are
    for call in (second.step, loss_of(model, group.rank(), 2).backward):
        with pytest.raises(RuntimeError, match=r"averaged for an earlier optimizer.*zero_grad\(set_to_none=True\)"):
            call()
    assert_equal(before, values_of(model))
    second.zero_grad()
    train_on(model, second, group.rank(), 2, 3)
    assert not torch.equal(before, values_of(model))


class Wrapper(torch.optim.Optimizer):
    """One that has another do the work, as Lookahead does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([{"params": group["params"]} for group in inner.param_groups], {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        self.inner.step()


@pytest.mark.parametrize(("residency", "num_ranks"), [(SHARDED, 1), (SHARDED, 2), (FULL, 2)])
@ranks()
def test_an_optimizer_of_another_class_over_parameters_that_have_one_is_an_error(
    group: Any, residency: GradientResidency
) -> None:
    model, first = small(group, gradient_residency=residency)
    start = values_of(model)
    train_on(model, Wrapper(first), group.rank(), 0)
    train_on(model, first, group.rank(), 1)
    before = values_of(model)
    assert not torch.equal(before, start)
    successor = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) would not find the gradient of 0.weight.*use one optimizer"):
        train_on(model, successor, group.rank(), 2)
    assert_equal(before, values_of(model))
    del first
    gc.collect()
    model.zero_grad()
    train_on(model, successor, group.rank(), 2)
    assert not torch.equal(before, values_of(model))


# --- gradients that are assigned or dropped before a backward ---


def assign(param: Tensor, value: float) -> None:
    param.grad = torch.full_like(param, value)


def give_memory(param: Tensor, value: float) -> None:
    assert param.grad is not None
    param.grad.data = torch.full_like(param, value)


def drop(param: Tensor, value: float) -> None:
    param.grad = None


# What is assigned is the control of what is given other memory.
BY_HAND = {
    "assigned": (assign, assign),
    "given other memory": (assign, give_memory),
    "dropped": (drop, drop),
}


@pytest.mark.parametrize(
    ("num_ranks", "config", "num_before"),
    [
        (2, {}, 2),
        (2, {"gradient_residency": SHARDED}, 0),
        (3, {"gradient_residency": SHARDED, "exchange": Exchange.RANK_ORDER, "bucket_cap_mb": 1.0}, 2),
    ],
)
@pytest.mark.parametrize("how", BY_HAND)
@ranks()
def test_what_is_assigned_or_dropped_between_two_backwards_counts_as_in_torch(
    group: Any, how: str, config: dict[str, Any], num_before: int
) -> None:
    """In the last layer, over what `no_sync` has left; the last backward leaves it out."""
    found = []
    # The former averages what it finds in p.grad, in step.
    for change, settings in zip(BY_HAND[how], ({"overlap": False}, config), strict=True):
        model, optimizer = small(group, **settings)
        train_on(model, optimizer, group.rank(), *range(num_before))
        with optimizer.no_sync():
            loss_of(model, group.rank(), 7).backward()
        for p in model[4].parameters():
            change(p, 0.1 * (group.rank() + 1))
        loss_of(model[:4], group.rank(), 8).backward()
        optimizer.step()
        found.append(values_of(model))
    assert_equal(*found)


@either_residency
@ranks(2)
def test_gradients_that_were_given_other_memory_may_be_dropped(group: Any, residency: GradientResidency) -> None:
    """And the next step may have none in their place."""
    model, optimizer = small(group, gradient_residency=residency)
    train_on(model, optimizer, group.rank(), 0)
    with optimizer.no_sync():
        loss_of(model, group.rank(), 1).backward()
    for param in model.parameters():
        give_memory(param, 0.1)
    optimizer.zero_grad()
    before = values_of(model)
    optimizer.step()
    assert_equal(before, values_of(model))


@pytest.mark.parametrize(
    "config", [{}, {"overlap": False, "bucket_cap_mb": 1.0}, {"gradient_residency": SHARDED, "bucket_cap_mb": 1.0}]
)
@ranks(2)
def test_two_parameters_may_swap_their_gradients(group: Any, config: dict[str, Any]) -> None:
    found = []
    for copies in (True, False):
        model, optimizer = small(group, **config)
        one, other = model[0].bias, model[2].bias
        for step in (0, 2, 4):
            with optimizer.no_sync():
                loss_of(model, group.rank(), step).backward()
                one.grad, other.grad = (grad.clone() if copies else grad for grad in (other.grad, one.grad))
            loss_of(model, group.rank(), step + 1).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(values_of(model))
    assert_equal(*found)


@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_that_were_cast_and_cast_back_with_their_model_count(cleared: bool) -> None:
    found = []
    for casts in (False, True):
        model, optimizer = small(None)
        for step in range(3):
            loss_of(model, 0, step).backward()
            if casts:
                model.double().float()
            optimizer.step()
            optimizer.zero_grad(set_to_none=cleared)
        found.append(values_of(model))
    assert_equal(*found)


@ranks(2)
def test_local_gradients_may_be_changed_at_will(group: Any) -> None:
    model, optimizer = small(group, overlap=False)
    twin = copy.deepcopy(model)
    control = DecoupledAdamW(twin.named_parameters(), lr=1e-2)
    loss_of(model, group.rank()).backward()
    model[0].weight.grad.neg_()
    model[2].weight.grad = None
    kept = [(p.grad, c) for p, c in zip(model.parameters(), twin.parameters(), strict=True) if p.grad is not None]
    for mean, (_, param) in zip(reduce_for_control(group, [grad for grad, _ in kept]), kept, strict=True):
        param.grad = mean
    optimizer.step()
    control.step()
    assert_equal(values_of(model), values_of(twin))


@pytest.mark.parametrize("overlap", [False, True])
@ranks(2)
def test_gradients_may_be_multiplied_beside_a_layer_that_has_none(group: Any, overlap: bool) -> None:
    found = []
    for factor in (1.0, 0.5):
        model, optimizer = small(group, overlap=overlap)
        for step in range(3):
            (loss_of(model[:4], group.rank(), step) * (0.5 / factor)).backward()
            for p in model[:4].parameters():
                assert p.grad is not None
                p.grad.mul_(factor)
            optimizer.step()
            optimizer.zero_grad()
        found.append(values_of(model))
    assert_equal(*found)


@pytest.mark.parametrize("bucket_cap_mb", [ONE_EACH, 1.0])
@ranks(2)
def test_used_gradients_that_are_multiplied_and_not_cleared_are_an_error(group: Any, bucket_cap_mb: float) -> None:
    model, optimizer = small(group, bucket_cap_mb=bucket_cap_mb)
    train_on(model, optimizer, group.rank(), 0)
    loss_of(model, group.rank()).backward()
    optimizer.step()
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"call optimizer\.zero_grad\(\) between a step and the next backward"):
        loss_of(model, group.rank()).backward()


# --- gradients that stay from another loss, or that something else makes, too ---


@pytest.mark.parametrize("stepped", [False, True])
@ranks(2)
def test_means_that_model_zero_grad_cannot_drop_are_an_error_before_they_add_up(group: Any, stepped: bool) -> None:
    model, optimizer = small(group, gradient_residency=SHARDED)
    loss_of(model, group.rank()).backward()
    if stepped:
        optimizer.step()
    model.zero_grad()
    said = "between a step and the next backward" if stepped else r"after backward.*drop by optimizer\.zero_grad\(\)"
    with pytest.raises(RuntimeError, match=said):
        for micro in range(2):
            loss_of(model, group.rank(), micro).backward()


@pytest.mark.parametrize("as_bucket_view", [False, True])
@ranks(2)
def test_ddp_around_sharded_gradients_is_an_error_that_names_it(group: Any, as_bucket_view: bool) -> None:
    model, _ = small(group)
    ddp = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=as_bucket_view)
    config = ShardingConfig(gradient_residency=SHARDED)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    before = values_of(model)
    loss_of(ddp, group.rank()).backward()
    with pytest.raises(RuntimeError, match=r"(?s)DistributedDataParallel, pass.*reduce_gradients=False"):
        optimizer.step()
    assert_equal(before, values_of(model))


# --- gradients that change after a clip, in one of several buckets ---


def test_a_clip_counts_for_all_buckets_or_for_none() -> None:
    params = {name: nn.Parameter(torch.ones(8)) for name in "ab"}
    groups = [{"params": [param]} for param in params.items()]
    optimizer = ShardedDecoupledAdamW(groups, config=ShardingConfig(reduce_gradients=False))
    for param in params.values():
        param.grad = torch.full_like(param, 0.5)
    assert float(optimizer.clip_grad_norm_(0.1)) == 2.0
    params["a"].grad = torch.full_like(params["a"], 0.5)
    with pytest.raises(RuntimeError, match=r"changed between clip_grad_norm_\(\) and step\(\), in the bucket of a"):
        optimizer.step()
    with pytest.warns(UserWarning, match="clipped anew"):
        assert float(optimizer.clip_grad_norm_(0.1)) == 2.0, "b is clipped twice, or a before its time"
    optimizer.step()
    params["a"].grad = None
    assert float(optimizer.clip_grad_norm_(0.1)) == pytest.approx(2.0**0.5)
    params["a"].grad = torch.full_like(params["a"], 0.5)
    with pytest.raises(RuntimeError, match="in the bucket of a"):
        optimizer.step()


@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_clip_stays_for_the_rest_where_gradients_are_dropped_after_it(num_groups: int) -> None:
    """As torch's, which has multiplied them."""
    params = {name: nn.Parameter(torch.ones(8)) for name in "ab"}
    named = list(params.items())
    groups = [{"params": named}] if num_groups == 1 else [{"params": [each]} for each in named]
    optimizer = ShardedDecoupledAdamW(groups, config=ShardingConfig(reduce_gradients=False))
    for param in params.values():
        param.grad = torch.full_like(param, 0.5)
    optimizer.clip_grad_norm_(0.1)
    params["a"].grad = None
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(0.1 / 2**0.5)
    optimizer.step()
    assert bool((params["a"] == 1.0).all()) and not bool((params["b"] == 1.0).any())


# --- state that is replaced ---


RESETS: dict[str, Callable[[Any, Tensor], object]] = {
    "all are removed": lambda state, param: state.clear(),
    "one is removed": lambda state, param: state.pop(param),
    "nothing is put": lambda state, param: state.update({param: {}}),
    "zeros are put": lambda state, param: state[param].update(
        {key: torch.zeros_like(value) for key, value in state[param].items()}
    ),
    "zeros of the whole are put": lambda state, param: state[param].update(exp_avg=torch.zeros_like(param)),
    # As Lightning does, and whoever moves what was loaded to a device.
    "what is there is put": lambda state, param: state.update(
        {param: {key: value.to(param.device) for key, value in state[param].items()}}
    ),
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("how", RESETS)
@ranks()
def test_state_that_is_replaced_or_removed_counts_as_in_torch(group: Any, how: str) -> None:
    reset, results = RESETS[how], []
    for cls in (DecoupledAdamW, ShardedDecoupledAdamW):
        model, made = small(group, reduce_gradients=False)
        optimizer: Any = made if cls is ShardedDecoupledAdamW else cls(model.parameters(), lr=made.defaults["lr"])
        for step in range(4):
            if step == 2:
                reset(optimizer.state, next(model.parameters()))
            for number, param in enumerate(model.parameters()):
                param.grad = draw_gradient(param, number, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(values_of(model))
    assert_equal(*results)
    reset(optimizer.state, next(model.parameters()))
    at_once = optimizer.fingerprint()
    optimizer.load_state_dict(optimizer.state_dict())
    assert at_once == optimizer.fingerprint()


@pytest.mark.parametrize(("key", "dtype"), [(None, F32), ("exp_avg", F32), (None, BF16)])
@ranks(2)
def test_two_parameters_may_swap_their_state(group: Any, key: str | None, dtype: torch.dtype) -> None:
    """But not their main parameters, which the weights are rounded from."""
    found = []
    for copies in (True, False):
        model, optimizer = small(group, dtype=dtype)
        train_on(model, optimizer, group.rank(), 0, 1)
        state, one, other = optimizer.state, model[0].bias, model[2].bias
        entries = {param: copy.deepcopy(entry) if copies else entry for param, entry in state.items()}
        if key is None:
            state.clear()  # so that entries keep their order
            state.update({{one: other, other: one}.get(param, param): entry for param, entry in entries.items()})
            if copies and dtype is BF16:
                state[one]["main_param"], state[other]["main_param"] = one.detach().float(), other.detach().float()
        else:
            state[one][key], state[other][key] = entries[other][key], entries[one][key]
        train_on(model, optimizer, group.rank(), 2, 3)
        found.append(values_of(model))
    assert_equal(*found)


@ranks(2)
def test_state_that_does_not_fit_is_an_error_on_every_rank_that_changes_nothing(group: Any) -> None:
    model, optimizer = small(group)
    train_on(model, optimizer, group.rank(), 0)
    before = values_of(model)
    for entry, said in (({"step": torch.ones(())}, "expected entries"), (None, r"exp_avg: expected \[")):
        param = next(model.parameters())
        saved = dict(optimizer.state[param])
        if group.rank() == 1:
            optimizer.state[param] = entry or {**saved, "exp_avg": torch.zeros(7777)}
        loss_of(model, group.rank()).backward()
        with pytest.raises(RuntimeError, match=said):
            optimizer.step()
        optimizer.state[param] = saved
        optimizer.zero_grad()
    assert_equal(before, values_of(model))
    saved = optimizer.state_dict()
    optimizer.state[next(model.parameters())] = {"step": torch.ones(())}
    optimizer.load_state_dict(saved)
    train_on(model, optimizer, group.rank(), 1)


# --- optimizers that nobody holds any more ---


def test_one_that_is_collected_within_the_step_of_another_leaves_that_alone() -> None:
    """The collector comes when it likes, and torch then goes through its hooks."""
    left, param = ShardedDecoupledAdamW([nn.Parameter(torch.ones(3))]), nn.Parameter(torch.ones(3))
    left.itself = left  # type: ignore[attr-defined]
    gone = weakref.ref(left)
    del left
    param.grad = torch.ones(3)
    handle = register_optimizer_step_pre_hook(lambda *_: [gc.collect(), None][1])
    try:
        ShardedDecoupledAdamW([param]).step()
    finally:
        handle.remove()
    assert gone() is None
