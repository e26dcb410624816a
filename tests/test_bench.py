"""The benchmarks can be started, and take turns fairly. What they measure is no test."""

from collections import Counter
from itertools import pairwise

import pytest
from typer.testing import CliRunner

from scripts.bench.__main__ import BENCHMARKS, app
from scripts.bench.harness import interleave


@pytest.mark.parametrize("command", [benchmark.__name__.lower() for benchmark in BENCHMARKS])
def test_every_command_says_what_it_measures_and_takes_no_option_it_does_not_know(command: str) -> None:
    helped = CliRunner().invoke(app, [command, "--help"])
    assert helped.exit_code == 0 and "--out" in helped.output
    assert CliRunner().invoke(app, [command, "--no-such-option"]).exit_code == 2


def test_everybody_has_one_turn_in_a_round_and_not_always_after_the_same_neighbour() -> None:
    turns: list[tuple[int, int]] = []

    def contender(number: int, index: int) -> list[float]:
        turns.append((index, number))
        return [float(10 * index + number)]

    samples = interleave([lambda index, n=n: contender(n, index) for n in range(3)], rounds=6, warmup=2)
    assert samples[:, :, 0].tolist() == [[10.0 * index + number for number in range(3)] for index in range(2, 8)]
    assert Counter(turns) == {(index, number): 1 for index in range(8) for number in range(3)}
    before_1 = {one for (index, one), after in pairwise(turns) if after == (index, 1)}
    assert before_1 == {0, 2}
