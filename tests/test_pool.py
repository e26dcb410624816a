"""The pool itself: results in rank order, failures and hangs reported and survived."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankFailure, RankHang, on_ranks, outcomes, pool


def rank_and_sum(group: Any) -> tuple[int, int, int]:
    total = torch.tensor([group.rank()])
    dist.all_reduce(total, group=group)
    return group.rank(), group.size(), int(total)


def fail_on(group: Any, bad_ranks: list[int]) -> Any:
    if group.rank() in bad_ranks:
        raise ValueError(f"rank {group.rank()} dislikes this")
    return "fine" if bad_ranks else lambda: None


def meet_anew(group: Any) -> int:
    return dist.new_group(list(range(group.size()))).size()


def wait_for_nobody(group: Any) -> None:
    if group.rank() == 0:
        dist.recv(torch.zeros(1), 1, group=group)


def die(group: Any) -> None:
    if group.rank() == 1:
        os._exit(3)


def test_results_come_back_in_rank_order_from_one_set_of_workers() -> None:
    on_ranks(4, rank_and_sum)
    workers = pool.pids
    for num_ranks in (1, 2, 3, 4):
        expected = [(rank, num_ranks, sum(range(num_ranks))) for rank in range(num_ranks)]
        assert on_ranks(num_ranks, rank_and_sum) == expected
    assert pool.pids == workers


def test_groups_made_by_a_few_ranks_do_not_part_the_names_of_later_ones() -> None:
    assert on_ranks(2, meet_anew) == [2, 2]
    assert on_ranks(4, meet_anew, timeout_s=10.0) == [4, 4, 4, 4]


def test_a_failure_names_the_rank_shows_its_traceback_and_the_next_case_gets_fresh_workers() -> None:
    on_ranks(4, rank_and_sum)
    before = pool.pids
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 3 failed.*fail_on.*ValueError: rank 1 dislikes this"):
        on_ranks(3, fail_on, [1])
    on_ranks(4, rank_and_sum)
    assert not set(before) & set(pool.pids)  # nobody may receive a message that was left behind
    seen = outcomes(3, fail_on, [0, 2])
    assert [(o.value, o.error) for o in seen] == [(None, "ValueError"), ("fine", None), (None, "ValueError")]
    with pytest.raises(RankFailure, match="pickle"):  # a result that cannot travel
        on_ranks(2, fail_on, [])


def test_a_hang_is_called_a_hang_shows_where_and_the_next_case_gets_fresh_workers() -> None:
    on_ranks(2, rank_and_sum)
    before = pool.pids
    with pytest.raises(RankHang, match=r"(?s)hang: rank\(s\) \[0\].*wait_for_nobody"):
        on_ranks(2, wait_for_nobody, timeout_s=0.5)
    assert [rank for rank, _, _ in on_ranks(4, rank_and_sum)] == [0, 1, 2, 3]
    assert not set(before) & set(pool.pids)


def test_a_worker_that_dies_fails_the_case() -> None:
    with pytest.raises(RankFailure, match="rank 1 died, exit code 3"):
        on_ranks(2, die)
