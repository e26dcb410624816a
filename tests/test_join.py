"""Ranks with uneven data under torch.distributed.algorithms.Join bring zeros, or an error comes on all."""

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sharded_dadamw import Exchange, GradientResidency, ShardedDecoupledAdamW, ShardingConfig
from tests import simulated
from tests.harness import FULL, SHARDED, ranks
from tests.models import InOrder
from tests.pool import on_ranks


def train(group: Any, joins: bool, num_batches: tuple[int, ...], clip: str, is_attached: bool, config: Any) -> Tensor:
    """Three epochs; the second is even. Without ``joins`` whoever is out of data has a loss of zero times itself."""
    rank = dist.get_rank(group)
    model = InOrder(3 if min(num_batches) else 2, (0, 1), 8)  # the third layer never gets a gradient
    max_grad_norm = 0.5 if clip == "in step" else None
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(), lr=1e-2, process_group=group, config=config, max_grad_norm=max_grad_norm
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    if is_attached:
        optimizer.attach(model)

    def backward(seed: int, factor: float) -> None:
        optimizer.zero_grad()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * seed + rank))
        (model(x).square().mean() * factor).backward()
        if clip in ("call", "dropped"):
            optimizer.clip_grad_norm_(0.5)

    seed = 0
    for sizes in (num_batches, (2,) * len(num_batches), num_batches):
        mine, most = sizes[rank], max(sizes)
        if clip == "dropped":  # before its step
            backward(seed, 1.0)
            optimizer.zero_grad()
        with Join([optimizer], scheduler=scheduler) if joins else nullcontext():
            for index in range(mine if joins else most):
                backward(seed + index, 1.0 if index < mine else 0.0)
                optimizer.step()
                scheduler.step()
        seed += most
    optimizer.synchronize()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("clip", "residency", "is_attached", "exchange", "num_batches"),
    [
        ("no", FULL, False, Exchange.RANK_ORDER, (4, 1)),
        ("no", FULL, False, Exchange.RANK_ORDER, (3, 0)),  # the first step finds a rank without data
        ("call", SHARDED, True, Exchange.RANK_ORDER, (2, 4)),
        ("in step", FULL, True, Exchange.BACKEND, (1, 3, 2)),
        ("dropped", SHARDED, True, Exchange.BACKEND, (3, 1)),
    ],
)
def test_a_rank_without_data_brings_zeros(
    clip: str, residency: GradientResidency, is_attached: bool, exchange: Exchange, num_batches: tuple[int, ...]
) -> None:
    config = ShardingConfig(gradient_residency=residency, exchange=exchange, bucket_cap_mb=0.0005)
    joined, control = (
        simulated.on_ranks(len(num_batches), train, joins, num_batches, clip, is_attached, config)
        for joins in (True, False)
    )
    for each in joined:
        assert torch.equal(each, control[0])


@ranks(2, on_ranks)
def test_after_an_error_within_join_training_goes_on(group: Any) -> Any:
    """Rank 0's second step has another lr than what rank 1, without data, repeats."""
    model = InOrder(3, (0, 1), 8)
    config = ShardingConfig(gradient_residency=SHARDED)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=config)

    def step() -> None:
        model(torch.ones(1, 8) + group.rank()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(RuntimeError, match=r"ranks disagree about this step.*lr") as caught, Join([optimizer]):
        for number in range(2 - group.rank()):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
            step()
    optimizer.param_groups[0]["lr"] = 1e-2
    optimizer.zero_grad()
    for _ in range(2):
        step()
    return str(caught.value), [p.tolist() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")
@pytest.mark.parametrize(
    ("case", "num_mine", "said"),
    [
        ("no scheduler", 1, "['lr']"),
        ("a clip that was never seen", 0, "the call"),
        ("a layer without gradients, and no step before", 0, "the gradient of layers.2.weight"),
        ("DDP averages", 1, "Join([optimizer])"),
        ("DDP averages", 0, "Join([optimizer])"),
        ("DDP averages, too", 1, "Join([optimizer])"),
        ("DDP averages, too", 0, "Join([optimizer])"),
    ],
)
@ranks(2, on_ranks)
def test_what_zeros_cannot_make_right_is_an_error_on_every_rank(
    group: Any, case: str, num_mine: int, said: str
) -> None:
    module = InOrder(3 if "layer" in case else 2, (0, 1), 8)
    model = DistributedDataParallel(module, process_group=group) if "DDP" in case else module
    config = ShardingConfig(reduce_gradients=case != "DDP averages")
    optimizer = ShardedDecoupledAdamW(module.named_parameters(), lr=1e-2, process_group=group, config=config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    joins = [model, optimizer] if isinstance(model, DistributedDataParallel) else [optimizer]
    with pytest.raises(RuntimeError, match=re.escape(said)), Join(joins):
        for step in range(num_mine if dist.get_rank(group) else 3):
            optimizer.zero_grad()
            model(torch.full((2, 8), step + 1.0 + dist.get_rank(group))).square().mean().backward()
            if case == "a clip that was never seen":
                optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            scheduler.step()
