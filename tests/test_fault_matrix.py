"""Whoever fails, and wherever: a run ends well, or every rank that is left says who and where. See fault_matrix."""

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import pytest

from sharded_dadamw import Exchange
from tests.fault_matrix import CELLS, TIMEOUT_S, faults_of, run_cell

pytestmark = pytest.mark.clients

LIMIT_S = 4 * TIMEOUT_S  # on a machine that may be busy
RUNS = list(zip(cycle([(2, Exchange.FASTEST), (4, Exchange.RANK_ORDER), (2, Exchange.BACKEND)]), CELLS[::2]))
"""Every second cell: each way to end at every second point, and each point with one way to end or two."""


def wrong(run: tuple[tuple[int, Exchange], tuple[str, str]]) -> list[str]:
    (num_ranks, exchange), cell = run
    return faults_of(cell, run_cell(num_ranks, cell, exchange), LIMIT_S)


def test_every_rank_that_is_left_says_who_and_where() -> None:
    with ThreadPoolExecutor(6) as pool:  # most of the time they wait
        doubtful = [run for run, what in zip(RUNS, pool.map(wrong, RUNS), strict=True) if what]
    # Where the machine is busy a rank may have come too late: once more, one at a time.
    assert not {run: what for run in doubtful if (what := wrong(run))}
