"""Optimizers where several ranks, wrappers or modules have a say, off the straight path.

The numbers of every layout are in `tests/test_layouts.py`; here are equal names, other orders of calls, one rank
that does something else, and objects that come and go: each test is something that once went wrong.
"""

import copy
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_dadamw import DecoupledAdamW, Exchange, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.layout.placement import placements_of
from tests.harness import ONE_EACH, ranks
from tests.layouts import grid, line, root_sum_square
from tests.simulated import on_ranks
from tests.test_metrics import both, build, numbers

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests


class Net(nn.Module):
    """Its head has one row, so that where it is sharded by rows the first rank holds all of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).square().sum()


def backward(model: nn.Module, factor: float = 1.0) -> None:
    (factor * model(torch.linspace(-1.0, 2.0, 8))).backward()


def whole(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def copies(model: nn.Module) -> list[Tensor]:
    return [whole(p).clone() for p in model.parameters()]


def moved(model: nn.Module, since: Iterable[Tensor]) -> list[bool]:
    return [not torch.equal(now, before) for now, before in zip(copies(model), since, strict=True)]


def norm_of_gradients(model: nn.Module) -> float:
    return root_sum_square(torch.linalg.vector_norm(whole(p.grad).double()).item() for p in model.parameters())


def placed(group: Any, kind: str) -> tuple[nn.Module, DecoupledAdamW]:
    """Sharded: HSDP on four ranks. Unsharded: FSDP2 on any number."""
    mesh = grid("replicate", "shard") if kind == "sharded" else line(group)
    model = Net()
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer_class = ShardedDecoupledAdamW if kind == "sharded" else DecoupledAdamW
    return model, optimizer_class(model.named_parameters(), lr=1e-2)


# --- groups and names ---


@both
@ranks(2)
def test_two_parameters_of_one_name_are_two(group: Any, kind: str) -> None:
    torch.manual_seed(0)
    modules = [nn.Linear(64, 8, bias=False) for _ in range(2)]
    if kind == "unsharded":
        modules = [fully_shard(module, mesh=line(group)) for module in modules]
    pairs = [pair for module in modules for pair in module.named_parameters()]
    optimizer = DecoupledAdamW(pairs) if kind == "unsharded" else ShardedDecoupledAdamW(pairs, process_group=group)
    outputs = [module(torch.linspace(-1.0, 2.0, 64)) for module in modules]
    sum(factor * output.square().sum() for factor, output in enumerate(outputs, start=1)).backward()
    norms = [norm_of_gradients(module) for module in modules]
    assert float(optimizer.clip_grad_norm_(1e9)) == pytest.approx(root_sum_square(norms), rel=1e-6)
    optimizer.step()
    names = ["weight of param_groups[0]['params'][0]", "weight of param_groups[0]['params'][1]", "global"]
    reported = {key: value for key, value in numbers(optimizer.metrics()).items() if key.startswith("l2_norm/grad/")}
    assert list(reported) == [f"l2_norm/grad/{name}" for name in names]
    assert list(reported.values()) == pytest.approx([*norms, root_sum_square(norms)], rel=1e-6)


# --- stages of a pipeline ---


def stage(group: Any) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    """A module of which every gradient is 1, with names of its own: 20 elements on each rank."""
    torch.manual_seed(group.rank())
    model = nn.ModuleDict({str(group.rank()): nn.Linear(4, 4)})
    return model, list(model.named_parameters())


def step_of_stage(model: nn.Module, optimizer: DecoupledAdamW) -> tuple[float, list[str]]:
    optimizer.zero_grad()
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    norm = float(optimizer.clip_grad_norm_(1e9))
    optimizer.step()
    return norm, list(optimizer.metrics())


@pytest.mark.parametrize("through_torch", [False, True], ids=["load_state_dict", "set_optimizer_state_dict"])
@ranks(2)
def test_a_stage_still_knows_the_others_after_a_state_was_loaded(group: Any, through_torch: bool) -> Any:
    model, params = stage(group)
    optimizer = DecoupledAdamW(params, norm_group=group)
    norm, keys = step_of_stage(model, optimizer)
    assert norm == pytest.approx(math.sqrt(40)) and len(keys) == 4 * 5 + 2
    if through_torch:
        saved = get_optimizer_state_dict(model, optimizer)
        optimizer = DecoupledAdamW(params, norm_group=group)
        set_optimizer_state_dict(model, optimizer, saved)
    else:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert step_of_stage(model, optimizer) == (norm, keys)


@ranks(2)
def test_a_copy_of_a_stages_optimizer_says_that_it_has_lost_the_others(group: Any) -> None:
    optimizer = DecoupledAdamW(stage(group)[1], norm_group=group)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for ask in (lambda twin=twin: twin.clip_grad_norm_(1.0), twin.metrics):
            with pytest.raises(ValueError, match="expected norm_group, which this copy of an optimizer"):
                ask()


@both
@ranks(4)
def test_all_stages_skip_a_step_or_none_does(group: Any, kind: str) -> None:
    """Two stages, each on two ranks."""
    mesh = grid("pipeline", "dp")
    model, params = stage(mesh["pipeline"].get_group())
    optimizer = build(kind, params, mesh["dp"], norm_group=group)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = sum(p.sum() for p in model.parameters())
    if mesh["pipeline"].get_local_rank() == 0:
        loss = loss + math.inf * params[0][1][0, 0]
    scaler.scale(loss).backward()  # type: ignore[union-attr]
    before = copies(model)
    scaler.step(optimizer)
    scaler.update()
    assert not any(moved(model, before)) and optimizer.metrics()["skipped_steps"] == 1


@ranks(2)
def test_a_stage_that_trains_nothing_goes_along(group: Any) -> Any:
    model = Net().requires_grad_(group.rank() == 0)
    named = [(f"{group.rank()}.{name}", p) for name, p in model.named_parameters()]
    optimizer = DecoupledAdamW(named, norm_group=group)
    norms = []
    for lr in (1e-2, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        if group.rank() == 0:
            model(torch.ones(8)).backward()
        optimizer.step()
        norms.append(float(optimizer.clip_grad_norm_(1.0)))
        optimizer.zero_grad()
    return norms


@ranks(2)
def test_stages_that_give_one_name_to_different_parameters_are_refused(group: Any) -> None:
    layer = nn.Linear(2, 3 + group.rank())
    optimizer = DecoupledAdamW(layer.named_parameters(), norm_group=group)
    layer(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match=r"weight.*\[3, 2\] on rank 0.*\[4, 2\] on rank 1"):
        optimizer.clip_grad_norm_(1.0)


@both
@ranks(4)
def test_a_norm_group_without_the_ranks_that_have_other_parts_is_refused(_: Any, kind: str) -> None:
    """Two stages of two data-parallel ranks each; norms have to be added up over all four."""
    mesh = grid("pp", "dp")
    model = fully_shard(Net(), mesh=mesh["dp"]) if kind == "unsharded" else Net()
    names = {f"{mesh.get_local_rank('pp')}.{name}": p for name, p in model.named_parameters()}
    options = {} if kind == "unsharded" else {"process_group": mesh["dp"]}
    optimizer_class = DecoupledAdamW if kind == "unsharded" else ShardedDecoupledAdamW
    optimizer = optimizer_class(names.items(), norm_group=mesh["pp"], **options)
    model(torch.ones(8)).backward()
    with pytest.raises(ValueError, match=r"^norm_group: expected all ranks"):
        optimizer.clip_grad_norm_(1.0)


# --- loss scalers, and state before the first step ---


def under_fsdp1(group: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FSDP1 is deprecated
        return FullyShardedDataParallel(Net(), process_group=group, device_id=torch.device("cpu"))


@ranks(2)
def test_norms_under_fsdp1_need_to_be_told_the_group(group: Any) -> None:
    model = under_fsdp1(group)
    optimizer = DecoupledAdamW(model.named_parameters())
    backward(model)
    optimizer.step()
    for _ in range(2):
        for ask in (optimizer.metrics, lambda: optimizer.clip_grad_norm_(1.0)):
            with pytest.raises(ValueError, match=r"^expected norm_group, since FSDP1's parameters"):
                ask()
        optimizer.pre_reduce_metrics({})  # for which Composer's default group will do


def under_a_scaler(group: Any, bad_step: int | None, enabled: bool = True) -> list[Tensor]:
    """FSDP2, or one process. In one step the last rank meets an inf, which all have to hear of."""
    model, optimizer = placed(group, "unsharded") if group is not None else (Net(), None)
    optimizer = optimizer or DecoupledAdamW(model.named_parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.linspace(-1.0, 2.0 + step, 8))).backward()
        if step == bad_step and (group is None or group.rank() == group.size() - 1):
            local(next(model.parameters()).grad)[0, 0] = math.inf
        before, of_weights = of_this_rank(model, optimizer), copies(model)
        scaler.step(optimizer)
        scaler.update()
        if step == bad_step:
            assert all(map(torch.equal, before, of_this_rank(model, optimizer)))
        assert any(moved(model, of_weights)) == (step != bad_step)
    assert optimizer.metrics()["skipped_steps"] == (bad_step is not None)
    return copies(model)


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def of_this_rank(model: nn.Module, optimizer: DecoupledAdamW) -> list[Tensor]:
    """Copies of its weights and its state."""
    return [local(t.detach()).clone() for p in model.parameters() for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("bad_step", [None, 2])
def test_under_a_grad_scaler_all_ranks_step_or_none_does(bad_step: int | None) -> None:
    """A loss scale is a power of two, which the update divides by without rounding: the control has none."""
    alone = under_a_scaler(None, bad_step, bad_step is not None)
    for params in on_ranks(2, under_a_scaler, bad_step):
        assert all(map(torch.equal, params, alone))


@pytest.mark.parametrize("exchange", Exchange)
@ranks(2)
def test_a_loss_scaler_on_a_rank_without_gradients_is_an_error_on_all(group: Any, exchange: Exchange) -> None:
    """The other one's scaler reads p.grad, and waits until this rank has had its part of it."""
    model = Net()
    config = ShardingConfig(exchange=exchange)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
    scaler = torch.amp.GradScaler("cpu")
    loss = scaler.scale(model(torch.ones(8)))
    if group.rank() == 0:
        loss.backward()
    with pytest.raises(RuntimeError, match="ranks disagree about this step"):
        scaler.step(optimizer)


def test_saving_before_the_first_update_counts_no_step() -> None:
    """torch.distributed.checkpoint takes one of its own where there is no state."""
    model = Net()
    optimizer = DecoupledAdamW(model.named_parameters(), lr=1e-2)
    optimizer.step()
    saved = get_optimizer_state_dict(model, optimizer)["state"]
    assert [float(saved[name]["step"]) for name, _ in model.named_parameters()] == [0.0] * 4
    backward(model)
    optimizer.step()
    assert all(state["step"] == 1 for state in optimizer.state.values())


# --- clipping ---


@pytest.mark.parametrize(("kind", "num_ranks"), [("unsharded", 2), ("sharded", 4)])
@ranks()
def test_under_fsdp_a_clip_is_for_the_gradients_that_there_were(group: Any, kind: str) -> None:
    """After a clip that no step has used, and after one that a step has used."""
    model, optimizer = placed(group, kind)
    backward(model)
    optimizer.clip_grad_norm_(0.1)
    backward(model, 3.0)
    before = copies(model)
    with pytest.raises(RuntimeError, match="gradients were changed between clip_grad_norm_"):
        optimizer.step()
    with pytest.warns(UserWarning, match="clipped anew without what that clip made"):
        optimizer.clip_grad_norm_(0.1)
    assert not any(moved(model, before))
    optimizer.zero_grad()
    backward(model)
    optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    assert all(moved(model, before))
    backward(model)  # nobody called zero_grad
    optimizer.step()
    norm = norm_of_gradients(model)
    assert norm > 0.2 and float(optimizer.metrics()["l2_norm/grad/global"]) == pytest.approx(norm, rel=1e-6)


# --- HSDP ---


@ranks(4)
def test_parts_of_a_parameter_that_is_cut_along_two_axes_count_their_elements_apart(group: Any) -> None:
    """Or stochastic rounding would draw the same bits for two of them."""
    parts = distribute_tensor(torch.ones(8, 4), grid("rows", "columns"), [Shard(0), Shard(1)])
    [placement] = placements_of([nn.Parameter(parts)])
    assert placement.first_element == 8 * group.rank()


@pytest.mark.parametrize(
    ("how", "odd_one", "message"),
    [
        ("step", 0, "param_groups[0]['lr']"),
        ("clip", 3, "max_norm"),
        ("built with another lr", 3, "lr: expected a finite number >= 0"),
        ("built with a plain parameter more", 0, "expected process_group"),
    ],
)
@ranks(4)
def test_under_hsdp_one_rank_that_does_something_else_is_an_error_on_all_four(
    group: Any, how: str, odd_one: int, message: str
) -> None:
    """It changes nothing, and a step that all agree on is right then."""
    model, optimizer = placed(group, "sharded")
    is_odd = group.rank() == odd_one
    extra = [("extra", nn.Parameter(torch.ones(3)))] if is_odd else []
    before = copies(model)
    backward(model)
    with pytest.raises((RuntimeError, ValueError), match=re.escape(message)):
        if how == "step":
            optimizer.param_groups[0]["lr"] = 5e-3 if is_odd else 1e-2
            optimizer.step()
        elif how == "clip":
            optimizer.clip_grad_norm_(-1.0 if is_odd else 1.0)
        elif how == "built with another lr":
            ShardedDecoupledAdamW(model.named_parameters(), lr=-1.0 if is_odd else 1e-2)
        else:
            ShardedDecoupledAdamW([*model.named_parameters(), *extra])
    assert not any(moved(model, before)) and not any(state["step"] for state in optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 1e-2
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(norm_of_gradients(model))
    optimizer.step()
    assert all(moved(model, before))


@ranks(4)
def test_under_hsdp_a_step_has_few_copies_of_parameters_at_once(_: Any) -> None:
    """Two under way, and the one that is made."""
    mesh = grid("replicate", "shard")
    model = fully_shard(nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), mesh=mesh)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), config=ShardingConfig(bucket_cap_mb=ONE_EACH))
    buffers: list[weakref.ref[Tensor]] = []
    num_alive = []
    for bucket in optimizer._shards.buckets:

        def outgoing(make: Callable[[], Tensor] = bucket.weights.outgoing) -> Tensor:
            buffer = make()
            buffers.append(weakref.ref(buffer))
            num_alive.append(sum(each() is not None for each in buffers))
            return buffer

        bucket.weights.outgoing = outgoing  # type: ignore[method-assign]
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert num_alive == [1, 2, 3, 3, 3, 3, 3, 3]


@ranks(4)
def test_a_plain_parameter_beside_hsdp_whose_gradient_nobody_averages_is_refused_on_every_rank(_: Any) -> None:
    mesh = grid("replicate", "shard")
    model = Net()
    fully_shard(model, mesh=mesh, ignored_params={model.head.bias})
    with pytest.raises(ValueError, match=r"^head\.bias: expected a DTensor like body\.weight, got a plain parameter"):
        ShardedDecoupledAdamW(model.named_parameters(), process_group=mesh["replicate"])


@ranks(2)
def test_metrics_that_need_a_gradient_that_is_gone_are_an_error_on_all_ranks(group: Any) -> None:
    """In fp64 no kernel measures, and the second rank holds no element."""
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = ShardedDecoupledAdamW([("p", param)], process_group=group)
    param.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="a gradient of the last step is gone"):
        optimizer.metrics()
