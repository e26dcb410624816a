"""Runs to be saved and loaded: a model of odd shapes in every layout, and all that it has by name.

Every rank draws the same data and the same dropout from torch's own generator, which is part of the run. So every rank
has the mean gradient already, and where nobody averages, a run takes the same bits on any number of ranks.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.update.precision import join

LAW: dict[str, Any] = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=2e-4)
FULL = StateDictOptions(full_state_dict=True)

Parts = tuple[nn.Module, Any, Any]
"""Model, optimizer, schedule."""

EXTRAS: dict[str, Tensor] = {
    "frozen": torch.empty(3),
    "late": torch.empty(7, 3, 2),  # has no gradient from the third step on, so that step counts differ
    "empty": torch.empty(0, 4),  # which FSDP2 does not take, nor the next
    "scalar": torch.empty(()),
    "in_bf16": torch.empty(5, 3, dtype=torch.bfloat16),
    "in_fp64": torch.empty(7, dtype=torch.float64),
}


class Model(nn.Module):
    """Fragments start and end inside of rows; a buffer, dropout, and on request a tied weight and extra parameters."""

    def __init__(
        self, *, seed: int = 0, tie: bool = False, dtype: torch.dtype = torch.float32, extras: Sequence[str] = ()
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(13, 6)
        self.middle = nn.Sequential(nn.Linear(6, 11), nn.BatchNorm1d(11), nn.Dropout(0.25), nn.Linear(11, 6))
        self.decoder = nn.Linear(6, 13, bias=False)
        for name in extras:
            self.register_parameter(name, nn.Parameter(EXTRAS[name].clone(), requires_grad=name != "frozen"))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator).to(p.dtype)
        if tie:
            self.decoder.weight = self.embedding.weight
        self.extras = extras
        if dtype is not torch.float32:
            self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.middle(self.embedding(tokens)))
        for name in self.extras:
            logits = logits + self.get_parameter(name).sum().tanh().to(logits.dtype)
        return logits


def fit(model: nn.Module, optimizer: Any, schedule: Any, num_steps: int) -> None:
    for _ in range(num_steps):
        model(torch.randint(13, (8,))).float().square().mean().backward()
        if hasattr(model, "late") and schedule.last_epoch >= 2:
            model.late.grad = None
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, remainder": {"main_parameter": MainParameter.REMAINDER, "moments": Moments.BF16},
    "ours, fp32 main": {"main_parameter": MainParameter.FP32, "moments": Moments.BF16},
    "ours, no main": {"main_parameter": MainParameter.NONE, "moments": Moments.BF16},
    # Two groups, or the same with their parameters in another order and in other buckets.
    "ours, in groups": {},
    "ours, reordered": {"bucket_cap_mb": 2e-3},
}

PLAIN: dict[str, Any] = {
    "DecoupledAdamW": DecoupledAdamW,
    "AdamW": AdamW,
    "Adam": Adam,
    "named AdamW": type("AdamW", (DecoupledAdamW,), {}),
}


def groups_of(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    pairs = list(model.named_parameters())
    if kind not in ("ours, in groups", "ours, reordered"):
        return [{"params": pairs}]
    flat, others = [[pair for pair in pairs if (pair[1].ndim <= 1) is is_flat] for is_flat in (True, False)]
    order = -1 if kind == "ours, reordered" else 1
    own = {"weight_decay": 0.0, "lr": 1e-3}
    return [{"params": others[::order], "amsgrad": True}, {"params": flat[::order], **own}]


def build(kind: str, group: Any, seed: int = 0, **model_settings: Any) -> Parts:
    model: nn.Module = Model(seed=seed, **model_settings)
    optimizer: Any
    if kind in ("fsdp2", "fsdp2, our law"):
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,)))
        optimizer = (AdamW if kind == "fsdp2" else DecoupledAdamW)(model.named_parameters(), **LAW)
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
    elif kind in ("fsdp1", "fsdp1, flat"):
        device = torch.device("cpu")
        is_flat = kind == "fsdp1, flat"
        model = FullyShardedDataParallel(model, group, use_orig_params=not is_flat, device_id=device)
        optimizer = AdamW(model.parameters(), **LAW)
    elif kind == "attached":
        config = ShardingConfig(bucket_cap_mb=1e-3)
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW, process_group=group, config=config)
        optimizer.attach(model)
    elif kind in OURS:
        config = ShardingConfig(**{"bucket_cap_mb": 1e-3, "reduce_gradients": False, **OURS[kind]})
        optimizer = ShardedDecoupledAdamW(groups_of(model, kind), **LAW, process_group=group, config=config)
    else:
        params = model.named_parameters() if kind == "DecoupledAdamW" else model.parameters()
        optimizer = PLAIN[kind](params, **LAW)
    return model, optimizer, CosineAnnealingLR(optimizer, T_max=10)


def run(group: Any, model: nn.Module, optimizer: Any, schedule: Any = None) -> dict[str, Any]:
    """The arguments that saving and loading share."""
    return {"model": model, "optimizer": optimizer, "scheduler": schedule, "process_group": group}


def state_of(model: nn.Module, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """What torch.distributed.checkpoint is given."""
    optimizer_state = get_optimizer_state_dict(model, optimizer)
    return {"model": get_model_state_dict(model), "optimizer": optimizer_state, "schedule": schedule.state_dict()}


def save(through: str, root: Path, group: Any, parts: Parts) -> None:
    model, optimizer, schedule = parts
    if through == "torch":
        dcp.save(state_of(*parts), checkpoint_id=root, process_group=group)
    elif through.startswith("whole"):
        if isinstance(optimizer, ShardedDecoupledAdamW):
            optimizer.consolidate_state_dict()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        if group.rank() == 0:
            torch.save(state, root / "whole.pt")
    else:
        save_checkpoint(root, step=2, **run(group, *parts), data={"sample": 16})


def load(through: str, root: Path, group: Any, parts: Parts) -> None:
    model, optimizer, schedule = parts
    if through == "torch":
        state = state_of(*parts)
        dcp.load(state, checkpoint_id=root, process_group=group)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    elif through.startswith("whole"):
        state = torch.load(root / "whole.pt", weights_only=True)
        loads = [lambda: model.load_state_dict(state["model"]), lambda: optimizer.load_state_dict(state["optimizer"])]
        for take in loads if through == "whole, weights first" else reversed(loads):
            take()
        schedule.load_state_dict(state["schedule"])
    else:
        resumed = load_checkpoint(root, **run(group, *parts))
        assert resumed is not None and resumed.data == {"sample": 16}


def whole(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Everything of a run that has a name, as whole tensors; and what is in the groups."""
    weights = get_model_state_dict(model, options=FULL)
    entries = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    state = {f"{name}, {key}": value for name, of_it in entries.items() for key, value in of_it.items()}
    hypers = {
        f"group {index}, {key}": group[key]
        for index, group in enumerate(optimizer.param_groups)
        for key in ("lr", "weight_decay")
    }
    return {key: torch.as_tensor(value).detach().clone() for key, value in {**weights, **state, **hypers}.items()}


def wide(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything of a run, with main parameters in fp32 whatever their form is."""
    found = dict(whole)
    for key in [key for key in whole if key.endswith(", main_remainder")]:
        name = key.removesuffix(", main_remainder")
        found[f"{name}, main_param"] = join(found[name], found.pop(key))
    return found


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what has other bits, another shape or another dtype."""
    assert one.keys() == other.keys()
    return [key for key in one if one[key].dtype is not other[key].dtype or not torch.equal(one[key], other[key])]
