"""What others do to the parameters of an optimizer: it stays right, or one error on every rank says what to do.

A model is moved after the optimizer was built, saved by whoever looks at storages, wrapped by
DistributedDataParallel, or given to a second optimizer.
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_dadamw import GradientResidency, ShardedDecoupledAdamW, ShardingConfig
from tests.simulated import on_ranks

FULL, SHARDED = GradientResidency.FULL, GradientResidency.SHARDED


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: ShardedDecoupledAdamW, step: int, group: Any = None) -> None:
    rank = 0 if group is None else dist.get_rank(group)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    model(x.to(next(model.parameters()).dtype)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def build(model: nn.Module, group: Any, **config: Any) -> ShardedDecoupledAdamW:
    return ShardedDecoupledAdamW(
        model.named_parameters(), lr=1e-2, process_group=group, config=ShardingConfig(**config)
    )


# --- parameters that were moved ---


def copy_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def swap_tensors(model: nn.Module) -> None:
    """What model.to does under torch.__future__.set_swap_module_params_on_conversion; it leaves hooks behind."""
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def trained_with_moves(
    group: Any, move: Callable[[nn.Module], None] | None, residency: GradientResidency, is_attached: bool
) -> Tensor:
    model = make_model()
    optimizer = build(model, group, gradient_residency=residency)
    if is_attached:
        optimizer.attach(model)
    for step in range(4):
        if move is not None and step in (0, 2):
            optimizer.synchronize()
            move(model)
        train(model, optimizer, step, group)
    model(torch.ones(1, 8)).sum().backward()
    assert all((p.grad is None) == (residency is SHARDED) for p in model.parameters()), "hooks were left behind"
    optimizer.synchronize()
    return values_of(model)


@pytest.mark.parametrize(
    ("move", "residency", "is_attached"),
    [(copy_data, FULL, False), (copy_data, SHARDED, True), (swap_tensors, FULL, True), (swap_tensors, SHARDED, False)],
)
def test_parameters_that_were_moved_are_taken_back_with_the_values_they_have(
    move: Callable[[nn.Module], None], residency: GradientResidency, is_attached: bool
) -> None:
    moved = on_ranks(2, trained_with_moves, move, residency, is_attached)
    stayed = on_ranks(2, trained_with_moves, None, residency, False)
    for each in moved:
        assert torch.equal(each, stayed[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the latter with main parameters beside it
def test_values_written_while_a_parameter_was_elsewhere_count(dtype: torch.dtype) -> None:
    model, other = make_model().to(dtype), make_model().to(dtype)
    optimizer, control = build(model, None), build(other, None)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.data = p.data + 1.0
            q.add_(1.0)
    train(model, optimizer, 0)
    train(other, control, 0)
    assert torch.equal(values_of(model), values_of(other))


@pytest.mark.parametrize(
    ("cast", "said"),
    [(nn.Module.bfloat16, r"torch\.float32.*bfloat16"), (nn.Module.double, r"torch\.float32.*float64")],
)
def test_a_model_that_was_cast_is_an_error_that_says_so(cast: Callable[[nn.Module], nn.Module], said: str) -> None:
    model = make_model()
    optimizer = build(model, None)
    cast(model)
    with pytest.raises(RuntimeError, match=said + r".*Build the optimizer after the model is on its device"):
        optimizer.step()
    x = torch.ones(2, 8, dtype=next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=said + r".*build the optimizer after"):
        model(x).sum().backward()


def replace_parameters(group: Any) -> str:
    """What fully_shard does to a model, and accelerate then to the groups of its optimizer."""
    model, other = make_model(), make_model()
    optimizer = build(model, group)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    other(torch.ones(1, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="param_groups do not hold the parameters"):
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="Build the optimizer when the model is as it will be trained") as caught:
        optimizer.step()
    return str(caught.value)


def test_parameters_that_were_replaced_in_the_groups_are_an_error() -> None:
    assert all(on_ranks(2, replace_parameters))


def test_several_ranks_without_a_process_group_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RuntimeError, match=r"WORLD_SIZE is 2 .* call torch\.distributed\.init_process_group\(\) before"
    ):
        build(make_model(), None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    build(make_model(), None)


# --- storages ---


def test_each_parameter_has_a_storage_of_its_own() -> None:
    model = make_model()
    build(model, None)
    storages = [p.untyped_storage() for p in model.parameters()]
    assert [s.nbytes() for s in storages] == [p.numel() * p.itemsize for p in model.parameters()]
    assert len({s.data_ptr() for s in storages}) == len(storages)


# --- memory that is not row-major ---


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(6, 8).t())
        self.v = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(torch.tanh(x @ self.w))


def refusal_of_strides(group: Any) -> str:
    with pytest.raises(ValueError, match="expected a row-major parameter where reduce_gradients=False") as caught:
        build(Transposed(), group, reduce_gradients=False)
    return str(caught.value)


def under_ddp(group: Any) -> float:
    """The worst relative error of a gradient that DistributedDataParallel wrote, once weights are contiguous."""
    model = Transposed()
    model.w.data = model.w.data.contiguous()
    control = copy.deepcopy(model).double()
    ddp = DistributedDataParallel(model, process_group=group)
    build(model, group, reduce_gradients=False)
    xs = [torch.randn(5, 8, generator=torch.Generator().manual_seed(r)) for r in range(dist.get_world_size(group))]
    ddp(xs[dist.get_rank(group)]).square().mean().backward()
    (sum(control(x.double()).square().mean() for x in xs) / len(xs)).backward()
    pairs = zip(model.parameters(), control.parameters(), strict=True)
    return max(float((p.grad - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)  # type: ignore[operator,union-attr]


def test_strides_by_which_ddp_would_go_are_refused_with_what_works() -> None:
    assert all("w:" in said and "contiguous_format" in said for said in on_ranks(2, refusal_of_strides))
    assert max(on_ranks(2, under_ddp)) < 1e-5


# --- who averages, and who clips ---


def steps_under(group: Any, wraps: bool, reduces: bool, how: str, residency: GradientResidency) -> tuple[str, Tensor]:
    """Three steps on different data; returns what was said, as a warning or as an error, and the weights."""
    model = make_model()
    config = {"reduce_gradients": reduces, "gradient_residency": residency, "overlap": how != "without overlap"}
    optimizer = build(model, group, **config)
    called = DistributedDataParallel(model, process_group=group) if wraps else model
    rank, said = dist.get_rank(group), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            data = 0 if how == "the same data" else rank
            x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + data))
            called(x).square().mean().backward()
            if how != "the same data":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            try:
                optimizer.step()
            except RuntimeError as error:
                said = str(error)
                break
            optimizer.zero_grad()
    return said or "; ".join(str(each.message) for each in caught if each.category is UserWarning), values_of(model)


@pytest.mark.parametrize("how", ["", "without overlap"])
def test_a_clip_by_each_ranks_own_norm_is_an_error_that_names_ours(how: str) -> None:
    for said, _ in on_ranks(2, steps_under, False, True, how, FULL):
        assert "use optimizer.clip_grad_norm_() in place of torch's" in said


def assign_after_backward(group: Any, assign: Callable[[Tensor], Tensor]) -> str:
    model = make_model()
    optimizer = build(model, group)
    train(model, optimizer, 0, group)
    before = values_of(model)
    model(torch.ones(1, 8) + dist.get_rank(group)).square().mean().backward()
    for p in model.parameters():
        p.grad = None if p.grad is None else assign(p.grad)
    with pytest.raises(RuntimeError, match=r"p\.grad was assigned after its average") as caught:
        optimizer.step()
    assert torch.equal(values_of(model), before)
    optimizer.zero_grad()
    train(model, optimizer, 1, group)
    return str(caught.value)


def test_averages_that_were_replaced_are_an_error() -> None:
    assert all("reduce_gradients=False" in said for said in on_ranks(2, assign_after_backward, torch.neg))


def double_one_alike(group: Any) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = build(model, group, bucket_cap_mb=1e-6)  # so that each rank has a part of either layer
    for step in range(2):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(100 * step + dist.get_rank(group)))
        model(x).square().mean().backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    for layer in (0, 1):
        for p in model[layer].parameters():
            if p.grad is not None:
                p.grad.mul_(2.0 - layer)
    with pytest.raises(RuntimeError, match=r"use optimizer\.clip_grad_norm_\(\) in place of torch's") as caught:
        optimizer.step()
    return str(caught.value)


def test_averages_that_every_rank_has_changed_alike_but_not_by_one_number_are_an_error() -> None:
    first, second = on_ranks(2, double_one_alike)
    assert first == second


def test_where_ddp_averages_too_a_warning_names_it_and_nothing_is_wrong() -> None:
    right = on_ranks(2, steps_under, True, False, "", FULL)
    for (said, values), (silence, expected) in zip(on_ranks(2, steps_under, True, True, "", FULL), right, strict=True):
        assert "DistributedDataParallel, pass ShardingConfig(reduce_gradients=False)" in said and not silence
        assert torch.equal(values, expected)


def test_where_nobody_averages_the_first_step_is_an_error() -> None:
    for said, values in on_ranks(2, steps_under, False, False, "", FULL):
        assert "wrap the model in DistributedDataParallel" in said
        assert torch.equal(values, values_of(make_model()))


def test_the_same_data_on_all_ranks_is_trained_on_with_a_warning() -> None:
    alone = on_ranks(1, steps_under, False, True, "the same data", FULL)[0]
    for said, values in on_ranks(2, steps_under, False, True, "the same data", FULL):
        assert "the same on all ranks" in said
        assert torch.equal(values, alone[1])


# --- a second optimizer over the same model ---


def two_phases(group: Any, residency: GradientResidency, drop_first: bool) -> tuple[Tensor, str]:
    model = make_model()
    first: ShardedDecoupledAdamW | None = build(model, group, gradient_residency=residency)
    assert first is not None
    train(model, first, 0, group)
    if drop_first:
        first = None
    second = build(model, group, gradient_residency=residency)
    for step in range(1, 3):
        train(model, second, step, group)
    said = ""
    if first is not None:
        model(torch.ones(1, 8)).sum().backward()
        with pytest.raises(RuntimeError, match="given to another optimizer") as caught:
            first.step()
        said = str(caught.value)
    return values_of(model), said


@pytest.mark.parametrize("residency", [FULL, SHARDED])
def test_a_second_optimizer_takes_over_and_the_first_says_so(residency: GradientResidency) -> None:
    kept, dropped = (on_ranks(2, two_phases, residency, drop) for drop in (False, True))
    for (values, said), (expected, _) in zip(kept, dropped, strict=True):
        assert torch.equal(values, expected)
        assert "use one optimizer for a parameter" in said


# --- gradients that stay from another loss, or that something else makes, too ---


def leave_gradients_of_another_loss(group: Any, clear_with: str) -> tuple[str, Tensor]:
    """Steps whose model also takes part in another one's loss, as the discriminator does in a GAN's."""
    model = make_model()
    optimizer = build(model, group, gradient_residency=SHARDED)
    rank = 0 if group is None else dist.get_rank(group)
    said = ""
    for step in range(2):
        if clear_with == "model":
            model.zero_grad()
        elif clear_with == "optimizer":
            optimizer.zero_grad()
        try:
            for micro in range(2):
                x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
                model(x).square().mean().backward()
        except RuntimeError as error:
            said = str(error)
            break
        optimizer.step()
        if clear_with == "optimizer":
            model(torch.ones(1, 8)).sum().backward()
    return said, values_of(model)


def test_means_that_model_zero_grad_cannot_drop_are_an_error_before_they_add_up() -> None:
    for said, _ in on_ranks(2, leave_gradients_of_another_loss, "model"):
        assert "call optimizer.zero_grad() between a step and the next backward" in said
    for said, values in on_ranks(2, leave_gradients_of_another_loss, "optimizer"):
        assert not said
        control = make_model()
        torch_like = ShardedDecoupledAdamW(control.named_parameters(), lr=1e-2)
        for step in range(2):
            xs = [
                torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))
                for micro in range(2)
                for rank in range(2)
            ]
            (sum(control(x).square().mean() for x in xs) / 2).backward()  # type: ignore[union-attr]
            torch_like.step()
            torch_like.zero_grad()
        torch.testing.assert_close(values, values_of(control), rtol=0, atol=2e-6)  # sums in another order


def step_under_ddp(group: Any, as_bucket_view: bool) -> str:
    model = make_model()
    ddp = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=as_bucket_view)
    optimizer = build(model, group, gradient_residency=SHARDED)
    before = values_of(model)
    ddp(torch.ones(1, 8) + dist.get_rank(group)).sum().backward()
    with pytest.raises(RuntimeError, match="DistributedDataParallel, pass") as caught:
        optimizer.step()
    assert torch.equal(values_of(model), before)
    return str(caught.value)


@pytest.mark.parametrize("as_bucket_view", [False, True])
def test_ddp_around_sharded_gradients_is_an_error_that_names_it(as_bucket_view: bool) -> None:
    assert all("reduce_gradients=False" in said for said in on_ranks(2, step_under_ddp, as_bucket_view))
