"""Simulated ranks: they notice what gloo's would, and say so at once. That they do as gloo's, other tests show."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankFailure, RankHang
from tests.simulated import on_ranks, outcomes


def use_too_early(group: Any) -> tuple[list[float], list[float]]:
    """Writes into what it sends, and reads what it gets, before the collective is over."""
    sent, got = torch.ones(1), [torch.zeros(1) for _ in range(2)]
    work = dist.all_gather(got, sent, group=group, async_op=True)
    early = torch.cat(got).tolist()
    sent.fill_(7.0)
    work.wait()
    return early, torch.cat(got).tolist()


def test_a_buffer_that_is_read_or_written_too_early_is_seen_to_be() -> None:
    assert on_ranks(2, use_too_early) == [([0.0, 0.0], [7.0, 7.0])] * 2


def leave_out_a_collective(group: Any, fails: bool, others_wait: bool = True) -> None:
    if group.rank() == 1 and fails:
        raise ValueError("rank 1 dislikes this")
    if group.rank() != 1 and others_wait:
        dist.barrier(group)


def never_wait(_: Any) -> None:
    while not _may_stop:
        time.sleep(0.001)


_may_stop = False


def test_ranks_that_wait_forever_or_never_are_told_and_each_shows_where() -> None:
    global _may_stop
    with pytest.raises(RankHang, match=r"(?s)rank 1 had finished.*rank 0 hangs here.*leave_out_a_collective.*barrier"):
        on_ranks(3, leave_out_a_collective, False)
    with pytest.raises(RankHang, match=r"(?s)rank 1 had failed.*dislikes this.*rank 0 hangs.*rank 2 hangs"):
        on_ranks(3, leave_out_a_collective, True)
    with pytest.raises(
        RankFailure, match=r"(?s)rank 1 of 2 failed.*leave_out_a_coll.*ValueError: rank 1 dislikes this"
    ):
        on_ranks(2, leave_out_a_collective, True, False)
    with pytest.raises(RankHang, match=r"(?s)rank 0 hangs here.*never_wait"):
        on_ranks(1, never_wait, timeout_s=0.1)
    _may_stop = True


def differ(group: Any, in_size: bool) -> None:
    if in_size or group.rank() == 0:
        dist.all_reduce(torch.ones(3 + group.rank()), group=group)
    else:
        dist.broadcast(torch.ones(3), 0, group=group)


@pytest.mark.parametrize("in_size", [False, True])
def test_ranks_that_start_different_collectives_are_all_told_so(in_size: bool) -> None:
    for outcome in outcomes(2, differ, in_size):
        assert "0: 'all-reduce" in outcome.message and "1: '" in outcome.message, outcome


_order: list[int] = []


def take_turns(group: Any) -> None:
    torch.manual_seed(group.rank())
    for _ in range(4):
        _order.append(group.rank())
        dist.barrier(group)
    drawn = torch.rand(2, generator=torch.Generator().manual_seed(group.rank()))
    assert torch.equal(torch.rand(2), drawn), "random numbers are one per process, and so one per rank"


def test_a_case_is_the_same_each_time_and_a_seed_chooses_another_interleaving() -> None:
    orders = []
    for seed in (None, None, 0, 0, *range(1, 9)):
        _order.clear()
        on_ranks(3, take_turns, seed=seed)
        orders.append(tuple(_order))
    assert orders[0] == orders[1], "without a seed"
    assert orders[2] == orders[3], "with a seed"
    assert len(set(orders[2:])) > 4, "with others"
