"""fairscale shards our unsharded optimizer by whole parameters; ours shards by elements. Both train to the same bits.

`OSS(params, optim=DecoupledAdamW)` gives each parameter to one rank, ShardedDataParallel reduces its gradient there,
and OSS broadcasts the result. On two ranks theory says bit for bit the same as ours: fairscale adds g0/2 + g1/2 where
we divide g0 + g1 by 2, which rounds alike because halving is exact, a sum of two does not depend on the order, and the
update of an element does not depend on where it lies. Both models see the same batches; the only thing that could
differ is a matrix product that rounds differently at another address, so the widths here are multiples of the
alignment unit.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW
from tests.pool import on_ranks

pytest.importorskip("fairscale")
pytestmark = pytest.mark.clients

HYPER: dict[str, Any] = dict(lr=3e-3, weight_decay=5e-4)


def build_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64)
    )


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 64, generator=generator)
    return (model(x) - x.flip(1)).square().mean()


def train_with_fairscale(group: Any, num_steps: int) -> dict[str, Tensor]:
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim import OSS

    model = build_model()
    optimizer = OSS(model.parameters(), optim=DecoupledAdamW, group=group, amsgrad=True, **HYPER)
    wrapped = ShardedDataParallel(model, optimizer, process_group=group)
    scheduler = LinearLR(optimizer, start_factor=0.2, total_iters=5)
    for step in range(num_steps):
        wrapped.zero_grad()  # its own: the gradients are views of its buckets and must not become None
        loss_of(wrapped, step, group.rank()).backward()
        optimizer.step()
        scheduler.step()
    assert all(type(shard) is DecoupledAdamW for shard in [optimizer.optim])
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_with_ours(group: Any, num_steps: int) -> dict[str, Tensor]:
    model = build_model()
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), amsgrad=True, process_group=group, **HYPER)
    scheduler = LinearLR(optimizer, start_factor=0.2, total_iters=5)
    for step in range(num_steps):
        loss_of(model, step, group.rank()).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_fairscale_over_decoupled_adamw_trains_to_the_same_bits_as_ours() -> None:
    theirs = on_ranks(2, train_with_fairscale, 8)
    ours = on_ranks(2, train_with_ours, 8)
    start = {name: p.detach() for name, p in build_model().named_parameters()}
    for name in start:
        assert torch.equal(ours[0][name], ours[1][name]), f"{name} differs between our ranks"
        assert torch.equal(theirs[0][name], theirs[1][name]), f"{name} differs between fairscale's ranks"
        assert not torch.equal(ours[0][name], start[name]), f"{name} was not trained"
        difference = (ours[0][name] - theirs[0][name]).abs().max().item()
        assert torch.equal(ours[0][name], theirs[0][name]), f"{name} differs by up to {difference:.3g}"
