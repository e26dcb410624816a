"""`DecoupledAdamW` on parameters that something else has sharded: each rank updates its local part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sharded_dadamw import DecoupledAdamW
from tests.simulated import on_ranks


def mesh_of(group: Any) -> DeviceMesh:
    """A mesh of its own for each group: torch keeps what it knows of a mesh beyond the end of its group."""
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(self.norm(x))))


def train(model: nn.Module, part: slice = slice(None)) -> list[Tensor]:
    optimizer = DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
        model(x[:, part]).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def under_fsdp2(group: Any) -> list[Tensor]:
    return train(fully_shard(Block(), mesh=mesh_of(group)))


def under_tensor_parallelism(group: Any) -> list[Tensor]:
    plan = {
        "norm": SequenceParallel(),  # its gradient is a partial sum on each rank
        "a": ColwiseParallel(input_layouts=Shard(1)),
        "b": RowwiseParallel(),
    }
    half = slice(4 * group.rank(), 4 * group.rank() + 4)  # sequence parallelism: each rank has its own positions
    return train(parallelize_module(Block(), mesh_of(group), plan), half)


def test_fsdp2_shards_are_updated_as_the_whole_would_be() -> None:
    alone = train(Block())
    for params in on_ranks(2, under_fsdp2):
        for ours, expected in zip(params, alone, strict=True):
            # Both ranks see the same batch: the mean of two equal gradients is exact.
            assert torch.equal(ours, expected)


def test_tensor_parallel_parameters_and_the_replicated_ones_between_them_are_updated_as_the_whole_would_be() -> None:
    alone = train(Block())
    for params in on_ranks(2, under_tensor_parallelism):
        for ours, expected in zip(params, alone, strict=True):
            # Partial sums round in another order, and Adam's division passes that on.
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def with_a_grad_scaler(group: Any | None, bad_step: int | None) -> list[Tensor]:
    """Trains under a loss scaler; in one step the last rank meets an inf, which all others have to hear of."""
    model = Block()
    if group is not None:
        fully_shard(model, mesh=mesh_of(group))
    optimizer = DecoupledAdamW(model.named_parameters(), lr=1e-2, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean()).backward()
        before = [p.detach().clone() for p in model.parameters()]
        state = {key: {k: v.clone() for k, v in entries.items()} for key, entries in optimizer.state.items()}
        if step == bad_step and (group is None or group.rank() == group.size() - 1):
            grad = model.a.weight.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad)[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        for p, old in zip(model.parameters(), before, strict=True):
            unchanged = torch.equal(local(p), local(old))
            assert unchanged == (step == bad_step)
            if step == bad_step:
                assert all(torch.equal(local(v), local(state[p][k])) for k, v in optimizer.state[p].items())
    assert optimizer.metrics()["skipped_steps"] == (bad_step is not None)
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("bad_step", [None, 2])
def test_under_a_grad_scaler_all_ranks_step_or_none_does(bad_step: int | None) -> None:
    alone = with_a_grad_scaler(None, bad_step)
    for params in on_ranks(2, with_a_grad_scaler, bad_step):
        assert all(torch.equal(ours, expected) for ours, expected in zip(params, alone, strict=True))


def test_a_loss_scale_is_divided_out_within_the_update() -> None:
    """It is a power of two, so that rounds nothing."""
    scaled = with_a_grad_scaler(None, None)
    model = Block()
    optimizer = DecoupledAdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(ours, expected) for ours, expected in zip(scaled, model.parameters(), strict=True))


def first_step_at_lr_0(group: Any) -> list[float]:
    """The second rank's part of every gradient happens to be zeros."""
    model = fully_shard(Block(), mesh=mesh_of(group))
    optimizer = DecoupledAdamW(model.named_parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        if group.rank() == 0:
            p.grad.to_local().fill_(1.0)
    optimizer.step()
    return [float(optimizer.state[p]["step"]) for p in model.parameters()]


def test_a_warm_up_that_begins_at_lr_0_counts_its_first_step() -> None:
    for steps in on_ranks(2, first_step_at_lr_0):
        assert set(steps) == {1.0}
