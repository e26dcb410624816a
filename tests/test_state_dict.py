"""Whole state dicts: the tensors of the unsharded optimizer, from and into any number of ranks and any layout.

Each form is loaded before and after the weights, at more ranks and at fewer, in pairs: a whole state knows no ranks.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import AdamW

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.precision import join
from tests.models import draw_gradient, make_groups, mean_in_rank_order, named, whole_state_dict
from tests.simulated import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4)
NUM_STEPS = 3
NUM_GRADIENTS = 4  # of which the mean is taken, whatever the number of ranks


def give_means(params: dict[str, nn.Parameter], step: int) -> None:
    for index, p in enumerate(params.values()):
        if p.requires_grad:
            p.grad = mean_in_rank_order([draw_gradient(p, step, rank, index) for rank in range(NUM_GRADIENTS)])


def train(optimizer: Any, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        give_means(params, step)
        optimizer.step()
        optimizer.zero_grad()


def build(group: Any, parameters: str, seed: int = 0, **settings: Any) -> tuple[dict[str, nn.Parameter], Any]:
    """Gradients are given as means, so that every number of ranks sees the same ones."""
    groups = make_groups(parameters, seed)
    config = ShardingConfig(bucket_cap_mb=1e-3, reduce_gradients=False, **settings)
    return named(groups), ShardedDecoupledAdamW(groups, **LAW, process_group=group, config=config)


def saved_on(
    group: Any, parameters: str, settings: dict[str, Any]
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """What a run saves, its weights then, and where it goes from there."""
    params, optimizer = build(group, parameters, **settings)
    train(optimizer, params, range(NUM_STEPS))
    saved = whole_state_dict(optimizer, group.size())
    then = [p.detach().clone() for p in params.values()]
    train(optimizer, params, range(NUM_STEPS, 2 * NUM_STEPS))
    return saved, then, [p.detach().clone() for p in params.values()]


def load(optimizer: Any, params: dict[str, Any], saved: dict[str, Any], weights: list[Tensor], first: str) -> None:
    if first == "optimizer":
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, weight in zip(params.values(), weights, strict=True):
            p.copy_(weight)
    if first == "weights":
        optimizer.load_state_dict(saved)


def resumed_on(
    group: Any, parameters: str, settings: dict[str, Any], saved: dict[str, Any], weights: list[Tensor], first: str
) -> list[Tensor]:
    params, optimizer = build(group, parameters, seed=1, **settings)
    load(optimizer, params, saved, weights, first)
    train(optimizer, params, range(NUM_STEPS, 2 * NUM_STEPS))
    return [p.detach().clone() for p in params.values()]


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("odd sizes", {}),
    "groups, one with amsgrad": ("several groups", {}),
    "bf16, fp32 main": ("bf16", {}),
    "bf16, remainder, bf16 moments": (
        "bf16",
        dict(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16),
    ),
    "mixed dtypes": ("mixed dtypes", {}),
    "frozen": ("frozen", {}),
}


@pytest.mark.parametrize(
    ("form", "saved_at", "loaded_at", "first"),
    [
        ("fp32", 1, 3, "weights"),
        ("groups, one with amsgrad", 2, 4, "optimizer"),
        ("bf16, fp32 main", 2, 2, "optimizer"),
        ("bf16, fp32 main", 3, 2, "weights"),
        ("bf16, remainder, bf16 moments", 3, 2, "optimizer"),
        ("bf16, remainder, bf16 moments", 2, 4, "weights"),
        ("mixed dtypes", 4, 1, "weights"),
        ("frozen", 2, 3, "optimizer"),
    ],
)
def test_a_run_goes_on_bit_for_bit_on_another_number_of_ranks(
    form: str, saved_at: int, loaded_at: int, first: str
) -> None:
    parameters, settings = FORMS[form]
    saved, weights, expected = on_ranks(saved_at, saved_on, parameters, settings)[-1]
    for resumed in on_ranks(loaded_at, resumed_on, parameters, settings, saved, weights, first):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, expected, strict=True))


def resumed_without_main(
    group: Any, settings: dict[str, Any], saved: dict[str, Any], weights: list[Tensor], first: str, num_steps: int
) -> list[Tensor]:
    """Main parameters and weights of a run that takes steps of its own, loads one that had no mains, and takes one."""
    params, optimizer = build(group, "bf16", seed=1, **settings)
    train(optimizer, params, range(10, 10 + num_steps))
    load(optimizer, params, saved, weights, first)
    train(optimizer, params, range(NUM_STEPS, NUM_STEPS + 1))
    state = whole_state_dict(optimizer, group.size())["state"]
    mains = [value for entries in state.values() for key, value in entries.items() if key.startswith("main_")]
    assert len(mains) == len(params)
    return [value.detach().clone() for value in (*mains, *params.values())]


@pytest.mark.parametrize(
    ("num_ranks", "has_stepped", "first", "main"),
    [
        (2, True, "optimizer", MainParameter.FP32),
        (1, False, "weights", MainParameter.FP32),
        (2, True, "weights", MainParameter.REMAINDER),
        (2, False, "optimizer", MainParameter.REMAINDER),
    ],
)
def test_of_a_main_parameter_nothing_is_left_after_a_load_that_has_none(
    num_ranks: int, has_stepped: bool, first: str, main: MainParameter
) -> None:
    """Not even where both runs' weights are the same in bf16; as from a fresh optimizer."""
    groups = make_groups("bf16", 1)
    params, control = named(groups), DecoupledAdamW(groups, **LAW)
    train(control, params, range(NUM_STEPS if has_stepped else 0))
    weights = [p.detach().clone() for p in params.values()]
    args = dict(main_parameter=main), control.state_dict(), weights, first
    fresh = on_ranks(num_ranks, resumed_without_main, *args, 0)[0]
    for resumed in on_ranks(num_ranks, resumed_without_main, *args, 2):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, fresh, strict=True))


def test_it_is_the_unsharded_optimizers_state_on_every_rank() -> None:
    groups = make_groups("several groups", 0)
    params = named(groups)
    control = DecoupledAdamW(groups, **LAW)
    train(control, params, range(NUM_STEPS))
    expected = control.state_dict()
    for saved, _, _ in on_ranks(3, saved_on, "several groups", {}):
        assert saved["param_groups"] == expected["param_groups"]
        assert saved["state"].keys() == expected["state"].keys()
        for index, entries in expected["state"].items():
            assert saved["state"][index].keys() == entries.keys()
            assert all(torch.equal(saved["state"][index][key], value) for key, value in entries.items())


def test_the_unsharded_optimizer_leaves_main_parameters_out_and_what_it_saves_then_loads_again() -> None:
    settings = dict(main_parameter=MainParameter.REMAINDER)
    saved, _, _ = on_ranks(2, saved_on, "bf16", settings)[0]
    assert "main_remainder" in saved["state"][0]
    groups = make_groups("bf16", 0)
    control = DecoupledAdamW(groups, **LAW)
    control.load_state_dict(saved)
    assert all("main_remainder" not in entries for entries in control.state.values())
    _, optimizer = build(None, "bf16", **settings)
    optimizer.load_state_dict(control.state_dict())
    for entries in optimizer.state.values():
        assert entries["step"] == NUM_STEPS and not entries["main_remainder"].any()


def test_the_state_of_torchs_adamw_loads() -> None:
    groups = make_groups("odd sizes", 0)
    params = named(groups)
    control = AdamW(groups, **LAW)
    train(control, params, range(NUM_STEPS))
    ours, optimizer = build(None, "odd sizes")
    optimizer.load_state_dict(control.state_dict())
    for mine, theirs in zip(ours.values(), params.values(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], control.state[theirs]["exp_avg"].flatten())
        assert optimizer.state[mine]["step"] == NUM_STEPS
    assert optimizer.param_groups[0]["initial_lr"] == LAW["lr"]


def test_a_state_that_never_stepped_starts_from_scratch() -> None:
    params, optimizer = build(None, "bf16")
    train(optimizer, params, range(1))
    optimizer.load_state_dict(AdamW(make_groups("bf16", 0), **LAW).state_dict())
    for entries in optimizer.state.values():
        assert all(not value.any() for key, value in entries.items() if key != "main_param")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("entry", "p3.*exp_avg"),
        ("shape", r"p1, exp_avg: expected .*\[13, 3\].*\[5\]"),
        ("dtype", "p1.*float64"),
        ("integers", "p1, exp_avg: .*int64, which would be rounded"),
        ("amsgrad", "amsgrad"),
    ],
)
def test_a_whole_state_that_does_not_fit_is_refused_by_name_and_changes_nothing(kind: str, said: str) -> None:
    params, optimizer = build(None, "odd sizes")
    train(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    train(optimizer, params, range(1, 2))
    if kind == "entry":
        del saved["state"][3]["exp_avg"]
    elif kind == "shape":
        saved["state"][1]["exp_avg"] = torch.zeros(5)
    elif kind == "dtype":
        saved["state"][1]["exp_avg_sq"] = saved["state"][1]["exp_avg_sq"].double()
    elif kind == "integers":
        saved["state"][1]["exp_avg"] = torch.full_like(saved["state"][1]["exp_avg"], 2**24 + 1, dtype=torch.int64)
    else:
        saved["param_groups"][0]["amsgrad"] = True
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(saved)
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before["state"][index][key]) for key, value in entries.items())


# --- on DTensors ---


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


def whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
    return full.clone()


def full_mains(group: Any, layout: str, main: MainParameter) -> dict[str, Tensor]:
    """By name the main parameters, whole, of a model whose parameters are DTensors."""
    model: nn.Module = Model().bfloat16()
    sharing = {}
    if layout == "HSDP":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(output_layouts=Replicate())})
        sharing = {"process_group": mesh["dp"]}
    config = ShardingConfig(main_parameter=main)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW, config=config, **sharing)
    for step in range(NUM_STEPS):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))["state"]
    if main is MainParameter.FP32:
        return {name: entries["main_param"] for name, entries in full.items()}
    remainders = {name: entries["main_remainder"] for name, entries in full.items()}
    assert all(remainder.dtype is torch.int16 for remainder in remainders.values())
    return {name: join(whole(p), remainders[name]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["HSDP", "tensor parallel"])
def test_remainders_of_dtensors_come_whole_bit_for_bit(layout: str) -> None:
    """No backend sends int16."""
    expected = on_ranks(4, full_mains, layout, MainParameter.FP32)[0]
    for mains in on_ranks(4, full_mains, layout, MainParameter.REMAINDER):
        assert mains.keys() == expected.keys()
        assert all(torch.equal(main, expected[name]) for name, main in mains.items())


def test_a_remainder_is_not_taken_for_a_main_parameter_or_the_reverse() -> None:
    saved, _, _ = on_ranks(2, saved_on, "bf16", dict(main_parameter=MainParameter.REMAINDER))[0]
    _, optimizer = build(None, "bf16")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"expected main_param, got main_remainder; choose the main_parameter"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"]
    for index, entries in before["state"].items():
        assert all(torch.equal(after[index][key], value) for key, value in entries.items())
