"""The pool itself: results in rank order, failures and hangs reported and survived."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankFailure, RankHang, on_ranks, outcomes, pool


def rank_and_sum(group: Any, offset: int) -> tuple[int, int, torch.Tensor]:
    total = torch.tensor([dist.get_rank(group) + offset])
    dist.all_reduce(total, group=group)
    return dist.get_rank(group), dist.get_world_size(group), total


def fail_on(group: Any, bad_ranks: list[int]) -> str:
    if dist.get_rank(group) in bad_ranks:
        raise ValueError(f"rank {dist.get_rank(group)} dislikes this")
    return "fine"


def leave_a_message_behind(group: Any) -> None:
    if dist.get_rank(group) == 0:
        dist.isend(torch.full((4,), 666.0), 1, group=group)
    raise ValueError("nobody received the message")


def exchange(group: Any) -> torch.Tensor:
    rank = dist.get_rank(group)
    if rank == 0:
        dist.send(torch.full((4,), 1.0), 1, group=group)
        return torch.full((4,), 1.0)
    received = torch.zeros(4)
    dist.recv(received, 0, group=group)
    return received


def wait_for_nobody(group: Any) -> None:
    if dist.get_rank(group) == 0:
        dist.recv(torch.zeros(1), 1, group=group)


def die(group: Any) -> None:
    if dist.get_rank(group) == 1:
        os._exit(3)


def give_a_lambda(group: Any) -> Any:
    return lambda: None


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_results_come_back_in_rank_order_from_a_group_of_that_size(num_ranks: int) -> None:
    results = on_ranks(num_ranks, rank_and_sum, 10)
    expected = sum(range(num_ranks)) + 10 * num_ranks
    assert [(rank, size, total.item()) for rank, size, total in results] == [
        (rank, num_ranks, expected) for rank in range(num_ranks)
    ]


def test_all_cases_share_the_same_workers() -> None:
    on_ranks(4, rank_and_sum, 0)
    workers = pool.pids
    for _ in range(20):
        on_ranks(4, rank_and_sum, 0)
    assert pool.pids == workers


def test_a_failure_names_the_rank_and_shows_its_traceback() -> None:
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 3 failed.*fail_on.*ValueError: rank 1 dislikes this"):
        on_ranks(3, fail_on, [1])
    seen = outcomes(3, fail_on, [0, 2])
    assert [(o.value, o.error) for o in seen] == [(None, "ValueError"), ("fine", None), (None, "ValueError")]
    assert seen[2].message == "rank 2 dislikes this"


def test_a_result_that_cannot_travel_is_a_failure_of_the_case() -> None:
    with pytest.raises(RankFailure, match="pickle"):
        on_ranks(2, give_a_lambda)
    assert len(on_ranks(2, rank_and_sum, 0)) == 2


def test_a_message_left_behind_by_a_failed_case_is_never_received_by_the_next_and_the_pool_lives_on() -> None:
    starts = pool.num_starts
    outcomes(2, leave_a_message_behind)
    for received in on_ranks(2, exchange):
        assert received.tolist() == [1.0] * 4
    assert pool.num_starts == starts


def test_a_hang_is_called_a_hang_shows_where_and_the_next_case_gets_fresh_workers() -> None:
    on_ranks(2, rank_and_sum, 0)
    before = pool.pids
    with pytest.raises(RankHang, match=r"(?s)hang: rank\(s\) \[0\].*wait_for_nobody"):
        on_ranks(2, wait_for_nobody, timeout_s=0.5)
    assert [rank for rank, _, _ in on_ranks(4, rank_and_sum, 0)] == [0, 1, 2, 3]
    assert not set(before) & set(pool.pids)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_dies_fails_the_case() -> None:
    with pytest.raises(RankFailure, match="rank 1 died, exit code 3"):
        on_ranks(2, die)
