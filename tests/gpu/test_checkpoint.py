"""State dicts and checkpoints of a model on a GPU: they hold the same bytes as its state, and load on any device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from sharded_dadamw import MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig, StateResidency
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from tests.gpu.probes import DEVICE, FIRST_CASE_TIMEOUT_S
from tests.harness import nccl_group
from tests.pool import on_ranks

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4, amsgrad=True)
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, remainder": dict(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16),
    "bf16, fp32 main": dict(moments=Moments.BF16),
    "state in host memory": dict(state_residency=StateResidency.HOST),
}


def build(group: Any, seed: int, device: str, case: str) -> tuple[nn.Module, ShardedDecoupledAdamW]:
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if case.startswith("bf16") else torch.float32
    model = nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 5)).to(device, dtype)
    config = ShardingConfig(bucket_cap_mb=1e-3, **SETTINGS[case])
    return model, ShardedDecoupledAdamW(model.named_parameters(), **LAW, process_group=group, config=config)


def fit(model: nn.Module, optimizer: ShardedDecoupledAdamW, steps: range, device: str) -> None:
    for step in steps:
        torch.manual_seed(step)
        x = torch.randn(8, 13).to(device, next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model: nn.Module, optimizer: ShardedDecoupledAdamW) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    found = {
        f"{key} of {name}": value.to("cpu", copy=True)
        for name, of_one in state.items()
        for key, value in of_one.items()
    }
    return found | {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


def save(group: Any, path: str, case: str, asynchronous: bool, over_nccl: bool) -> dict[str, Tensor]:
    group = nccl_group() if over_nccl else group
    model, optimizer = build(group, 0, DEVICE, case)
    fit(model, optimizer, range(3), DEVICE)
    then = whole(model, optimizer)
    saving = save_checkpoint(
        path, step=3, model=model, optimizer=optimizer, process_group=group, asynchronous=asynchronous
    )
    fit(model, optimizer, range(3, 5), DEVICE)  # which must not change what is being written
    saving.wait()
    return then


def load(group: Any, path: str, case: str, device: str) -> dict[str, Tensor]:
    model, optimizer = build(group, 1, device, case)
    fit(model, optimizer, range(1), device)
    assert load_checkpoint(path, model=model, optimizer=optimizer, process_group=group) is not None
    found = whole(model, optimizer)
    fit(model, optimizer, range(3, 5), device)
    return found


@pytest.mark.parametrize("device", [DEVICE, "cpu"])
@pytest.mark.parametrize(("num_ranks", "asynchronous", "over_nccl"), [(1, False, True), (4, True, False)])
@pytest.mark.parametrize("case", SETTINGS)
def test_what_is_saved_from_a_gpu_loads_there_and_on_a_cpu(
    case: str, num_ranks: int, asynchronous: bool, over_nccl: bool, device: str, tmp_path: Path
) -> None:
    path = str(tmp_path)
    saved = on_ranks(num_ranks, save, path, case, asynchronous, over_nccl, timeout_s=FIRST_CASE_TIMEOUT_S)[0]
    for loaded in on_ranks(1, load, path, case, device, timeout_s=FIRST_CASE_TIMEOUT_S):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], value) for key, value in saved.items())
