"""Simulated ranks: they do what gloo's do, and say so when they cannot."""

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import pool
from tests.pool import RankFailure, RankHang
from tests.simulated import on_ranks, outcomes

# torch 2.13 renamed the two verbs and deprecates the names that 2.11 has.
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def values(group: Any, *shape: int) -> torch.Tensor:
    """Small integers, so that sums are the same in any order."""
    draw = torch.Generator().manual_seed(group.rank())
    return torch.randint(-9, 10, shape, generator=draw).float()


def reduced(group: Any) -> list[Any]:
    results = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        dist.all_reduce(x := values(group, 3, 2), op=op, group=group)
        results.append(x)
    dist.reduce(x := values(group, 5), group_dst=1, group=group)
    results.append(x if group.rank() == 1 else None)
    reduce_scatter(x := torch.empty(2, 3), values(group, 2 * group.size(), 3), group=group)
    dist.reduce_scatter(y := torch.empty(3), list(values(group, group.size(), 3)), group=group)
    return [*results, x, y]


def moved(group: Any) -> list[Any]:
    rank, num_ranks = group.rank(), group.size()
    dist.broadcast(a := values(group, 4), group_src=2, group=group)
    all_gather(b := torch.empty(2 * num_ranks, 3), values(group, 2, 3), group=group)
    dist.all_gather(c := [torch.empty(2) for _ in range(num_ranks)], values(group, 2), group=group)
    dist.all_to_all_single(d := torch.empty(2 * num_ranks), values(group, 2 * num_ranks), group=group)
    mine, theirs = [1 + rank] * num_ranks, [1 + other for other in range(num_ranks)]
    dist.all_to_all_single(e := torch.empty(sum(theirs)), values(group, sum(mine)), theirs, mine, group=group)
    f = [torch.empty(2) for _ in range(num_ranks)] if rank == 1 else None
    dist.gather(values(group, 2), f, group_dst=1, group=group)
    parts = list(values(group, num_ranks, 2)) if rank == 0 else None
    dist.scatter(g := torch.empty(2), parts, group_src=0, group=group)
    dist.barrier(group=group)
    return [a, b, c, d, e, f, g]


def started_and_then_waited_for(group: Any) -> list[Any]:
    a, b = values(group, 4), torch.empty(4 * group.size())
    works = [
        dist.all_reduce(a, group=group, async_op=True),
        all_gather(b, values(group, 4), group=group, async_op=True),
    ]
    for work in reversed(works) if group.rank() == 0 else works:
        work.wait()
    return [a, b]


@pytest.mark.parametrize("case", [reduced, moved, started_and_then_waited_for])
def test_collectives_are_those_of_gloo(case: Callable[[Any], list[Any]]) -> None:
    expected = pool.on_ranks(4, case)
    for seed in (None, 0, 1):
        for of_rank, on_the_rank in zip(on_ranks(4, case, seed=seed), expected, strict=True):
            assert repr(of_rank) == repr(on_the_rank)  # which shows all digits of such numbers


def in_use(group: Any) -> tuple[list[float], list[float]]:
    """Writes into what it sends, and reads what it gets, before the collective is over."""
    sent, got = torch.ones(1), torch.zeros(2)
    work = all_gather(got, sent, group=group, async_op=True)
    early = got.tolist()
    sent.fill_(7.0)
    work.wait()
    return early, got.tolist()


def test_a_buffer_that_is_read_or_written_too_early_is_seen_to_be() -> None:
    assert on_ranks(2, in_use) == [([0.0, 0.0], [7.0, 7.0])] * 2


def fail_on_one(group: Any) -> None:
    if group.rank() == 1:
        raise ValueError("rank 1 dislikes this")


def leave_out_a_collective(group: Any, fails: bool) -> None:
    if group.rank() == 1:
        if fails:
            raise ValueError("rank 1 dislikes this")
    else:
        dist.barrier(group)


def wait_in_another_order(group: Any) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for pair in pairs if group.rank() else reversed(pairs):
        dist.barrier(pair)


def test_a_failure_names_the_rank_and_shows_its_traceback() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 3 failed.*fail_on_one.*ValueError: rank 1 dislikes this"):
        on_ranks(3, fail_on_one)


def test_ranks_that_wait_forever_are_told_at_once_and_each_shows_where() -> None:
    with pytest.raises(RankHang, match=r"(?s)rank 1 had finished.*rank 0 hangs here.*leave_out_a_collective.*barrier"):
        on_ranks(3, leave_out_a_collective, False)
    with pytest.raises(RankHang, match=r"(?s)rank 1 had failed.*dislikes this.*rank 0 hangs.*rank 2 hangs"):
        on_ranks(3, leave_out_a_collective, True)
    with pytest.raises(RankHang, match=r"(?s)rank 0 hangs here.*in_another_order.*rank 1 hangs here.*in_another_order"):
        on_ranks(2, wait_in_another_order)


def differ(group: Any, in_size: bool) -> None:
    if in_size or group.rank() == 0:
        dist.all_reduce(torch.ones(3 + group.rank()), group=group)
    else:
        dist.broadcast(torch.ones(3), 0, group=group)


@pytest.mark.parametrize("in_size", [False, True])
def test_ranks_that_start_different_collectives_are_all_told_so(in_size: bool) -> None:
    for outcome in outcomes(2, differ, in_size):
        assert "0: 'all-reduce" in outcome.message and "1: '" in outcome.message, outcome


_may_stop = False


def never_wait(group: Any) -> None:
    while not _may_stop:
        time.sleep(0.001)


def test_a_rank_that_neither_ends_nor_waits_is_a_hang() -> None:
    global _may_stop
    with pytest.raises(RankHang, match=r"(?s)rank 0 hangs here.*never_wait"):
        on_ranks(1, never_wait, timeout_s=0.1)
    _may_stop = True


_order: list[int] = []


def take_turns(group: Any) -> None:
    for _ in range(4):
        _order.append(group.rank())
        dist.barrier(group)


def test_a_case_is_the_same_each_time_and_a_seed_chooses_another_interleaving() -> None:
    orders = []
    for seed in (None, None, 0, 0, *range(1, 9)):
        _order.clear()
        on_ranks(3, take_turns, seed=seed)
        orders.append(tuple(_order))
    assert orders[0] == orders[1], "without a seed"
    assert orders[2] == orders[3], "with a seed"
    assert len(set(orders[2:])) > 4, "with others"


def touch_what_is_one_per_process(group: Any) -> list[Any]:
    torch.manual_seed(group.rank())
    if group.rank() == 0:
        warnings.simplefilter("once")
    dist.barrier(group)
    drawn = torch.rand(2)
    dist.barrier(group)
    return [drawn, torch.rand(2), warnings.filters[0][0]]


def test_what_is_one_per_process_is_one_per_rank_and_the_tests_is_as_it_was() -> None:
    state, filters = torch.get_rng_state(), list(warnings.filters)
    for rank, (first, second, action) in enumerate(on_ranks(3, touch_what_is_one_per_process)):
        expected = torch.rand(4, generator=torch.Generator().manual_seed(rank))
        assert torch.equal(torch.cat([first, second]), expected)
        assert (action == "once") == (rank == 0)
    assert torch.equal(torch.get_rng_state(), state) and warnings.filters == filters
