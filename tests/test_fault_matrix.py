"""Whoever fails, and wherever: a run ends well, or every rank that is left says who and where. See fault_matrix."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sharded_dadamw import Exchange
from tests.fault_matrix import CELLS, TIMEOUT_S, faults_of, run_cell

pytestmark = pytest.mark.clients

LIMIT_S = 4 * TIMEOUT_S  # on a machine that may be busy
CASES = [(2, Exchange.FASTEST), (4, Exchange.RANK_ORDER), (2, Exchange.BACKEND)]


@pytest.mark.parametrize("place", range(len(CASES)))  # each takes its part of the cells
def test_every_rank_that_is_left_says_who_and_where(place: int) -> None:
    num_ranks, exchange = CASES[place]
    cells = CELLS[place :: len(CASES)]
    with ThreadPoolExecutor(3) as pool:
        ends = pool.map(lambda cell: run_cell(num_ranks, cell, exchange), cells)
        wrong = [cell for cell, ended in zip(cells, ends, strict=True) if faults_of(cell, ended, LIMIT_S)]
    # Where the machine is busy a rank may have come too late: once more, one at a time.
    again = {cell: faults_of(cell, run_cell(num_ranks, cell, exchange), LIMIT_S) for cell in wrong}
    assert not {cell: what for cell, what in again.items() if what}
