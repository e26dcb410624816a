"""`DecoupledAdamW` on parameters that something else has sharded: each rank updates its local part."""

from typing import Any

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
from tests.pool import on_ranks


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
    return train(fully_shard(Block(), mesh=DeviceMesh.from_group(group, "cpu")))


def under_tensor_parallelism(group: Any) -> list[Tensor]:
    plan = {
        "norm": SequenceParallel(),  # its gradient is a partial sum on each rank
        "a": ColwiseParallel(input_layouts=Shard(1)),
        "b": RowwiseParallel(),
    }
    half = slice(4 * group.rank(), 4 * group.rank() + 4)  # sequence parallelism: each rank has its own positions
    return train(parallelize_module(Block(), DeviceMesh.from_group(group, "cpu"), plan), half)


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
