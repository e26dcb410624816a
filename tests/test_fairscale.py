"""fairscale shards our unsharded optimizer by whole parameters; ours shards by elements. Both train to the same bits.

`OSS(params, optim=DecoupledAdamW)` gives each parameter to one rank, ShardedDataParallel reduces its gradient there,
and OSS broadcasts the result. On two ranks theory says bit for bit the same as ours: fairscale adds g0/2 + g1/2 where
we divide g0 + g1 by 2, which rounds alike because halving is exact, a sum of two does not depend on the order, and the
update of an element does not depend on where it lies. Both models see the same batches; the only thing that could
differ is a matrix product that rounds differently at another address, so the widths here are multiples of the
alignment unit.
"""

import importlib
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


def trained(group: Any, with_fairscale: bool) -> dict[str, Tensor]:
    model = build_model()
    module, optimizer = model, None
    if with_fairscale:
        oss, wrapper = importlib.import_module("fairscale.optim"), importlib.import_module("fairscale.nn.data_parallel")
        optimizer = oss.OSS(model.parameters(), optim=DecoupledAdamW, group=group, amsgrad=True, **HYPER)
        module = wrapper.ShardedDataParallel(model, optimizer, process_group=group)
        assert type(optimizer.optim) is DecoupledAdamW
    else:
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), amsgrad=True, process_group=group, **HYPER)
    scheduler = LinearLR(optimizer, start_factor=0.2, total_iters=5)
    for step in range(8):
        # fairscale's own: the gradients are views of its buckets and must not become None
        (module if with_fairscale else optimizer).zero_grad()
        loss_of(module, step, group.rank()).backward()
        optimizer.step()
        scheduler.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_fairscale_over_decoupled_adamw_trains_to_the_same_bits_as_ours() -> None:
    theirs, ours = (on_ranks(2, trained, with_fairscale) for with_fairscale in (True, False))
    for name, start in build_model().named_parameters():
        assert not torch.equal(ours[0][name], start), f"{name} was not trained"
        for rank in range(2):
            assert torch.equal(ours[rank][name], ours[0][name]) and torch.equal(theirs[rank][name], ours[0][name]), name
