"""Whole state dicts: what they leave out, what does not fit, and the bits of DTensors.

That a run goes on through them on any number of ranks is in tests/test_checkpoint.py.
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

from sharded_dadamw import DecoupledAdamW, MainParameter, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.update.precision import join
from tests.models import draw_gradient, make_groups, named
from tests.simulated import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4)
NUM_STEPS = 3


def train(optimizer: Any, params: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, p in enumerate(params.values()):
            p.grad = draw_gradient(p, step, index)
        optimizer.step()
        optimizer.zero_grad()


def build(parameters: str, **settings: Any) -> tuple[dict[str, nn.Parameter], Any]:
    groups = make_groups(parameters, 0)
    return named(groups), ShardedDecoupledAdamW(groups, **LAW, config=ShardingConfig(bucket_cap_mb=1e-3, **settings))


def test_the_unsharded_optimizer_leaves_main_parameters_out_and_what_it_saves_then_loads_again() -> None:
    params, optimizer = build("bf16", main_parameter=MainParameter.REMAINDER)
    train(optimizer, params, range(NUM_STEPS))
    saved = copy.deepcopy(optimizer.state_dict())
    assert "main_remainder" in saved["state"][0]
    control = DecoupledAdamW(make_groups("bf16", 0), **LAW)
    control.load_state_dict(saved)
    assert all("main_remainder" not in entries for entries in control.state.values())
    optimizer.load_state_dict(control.state_dict())
    for entries in optimizer.state.values():
        assert entries["step"] == NUM_STEPS and not entries["main_remainder"].any()


def test_a_state_that_never_stepped_starts_from_scratch() -> None:
    params, optimizer = build("bf16")
    train(optimizer, params, range(1))
    optimizer.load_state_dict(AdamW(make_groups("bf16", 0), **LAW).state_dict())
    for entries in optimizer.state.values():
        assert all(not value.any() for key, value in entries.items() if key != "main_param")


def test_a_remainder_is_not_taken_for_a_main_parameter_or_the_reverse() -> None:
    saved = build("bf16", main_parameter=MainParameter.REMAINDER)[1].state_dict()
    _, optimizer = build("bf16")
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"expected main_param, got main_remainder; choose the main_parameter"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()["state"]
    for index, entries in before["state"].items():
        assert all(torch.equal(after[index][key], value) for key, value in entries.items())


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
    params, optimizer = build("odd sizes")
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
