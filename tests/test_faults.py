"""Training goes on as if nothing had happened: real processes that are killed, a disk that is full, damaged files.

Every run here is laid beside one that nothing happened to. At the same number of ranks every loss, gradient norm and
learning rate has to be the same, bit for bit; at another, within what the order of a sum makes of them.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import START_AGAIN
from sharded_dadamw.checkpoint import checkpoints
from tests.forked import train
from tests.test_launch import ROUNDING, TEXT

pytestmark = pytest.mark.clients

NUM_STEPS = 24
EVERY = 4
OPTIONS = [
    *("--preset", "tiny", "--steps", str(NUM_STEPS), "--warmup", "4", "--lr", "5e-3", "--weight-decay", "1e-3"),
    *("--data", str(TEXT), "--sample-bytes", "0", "--no-plot", "--bucket-cap-mb", "0.1"),
    *("--checkpoint-every", str(EVERY), "--keep-last", "3"),
]


def curve(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    folder = tmp_path_factory.mktemp("faults") / "uninterrupted"
    ended = train(folder, *OPTIONS, ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [f"step_{at:08d}" for at in (16, 20, 24)]
    assert [step for step, *_ in curve(folder)] == list(range(NUM_STEPS))
    return curve(folder)


def fault(point: str, step: int, *ranks: int, start: int = 0) -> dict[str, Any]:
    return {"point": point, "step": step, "ranks": ranks, "start": start}


def test_whoever_dies_and_whenever_training_goes_on_by_itself_and_draws_the_same_curve(
    uninterrupted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    deaths = [
        (fault("backward", 2, 1), None),
        (fault("reduction", 5, 1), 4),
        (fault("update", 9, 0), 8),
        (fault("gather", 13, 1), 12),
        (fault("save", 15, 1), 12),
        (fault("rename", 15, 0), 12),
        (fault("step", 17, 0, 1), 16),
    ]
    faults = [death | {"start": start} for start, (death, _) in enumerate(deaths)]
    folder = tmp_path / "run"
    train(folder, *OPTIONS, ranks=2, faults=faults, start=0)
    for start, (_, step) in enumerate(deaths, start=1):
        ended = train(folder, *OPTIONS, ranks=2, faults=faults, start=start)
        said = [line for line in ended.output.splitlines() if line.startswith(("resumed from", "no complete"))]
        taken = "no complete" if step is None else f"resumed from {folder}/checkpoints/step_{step:08d}"
        assert len(said) == 1 and said[0].startswith(taken), ended.output
    assert ended.codes == [0, 0], ended.output
    assert curve(folder) == uninterrupted
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {f"step_{at:08d}" for at in (16, 20, 24)}  # and nothing that dead saves left


def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_checkpoint_and_a_start_more_goes_on(
    uninterrupted: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for asked, step in ((fault("TERM", 5, 1), 6), (fault("USR1", 13, 0), 14)):
        ended = train(folder, *OPTIONS, "--requeue", "--checkpoint-signal", "USR1", ranks=2, faults=[asked])
        assert ended.codes == [START_AGAIN] * 2, ended.output
        assert f"asked to stop, after {step} of {NUM_STEPS} steps" in ended.output
        assert names_of(folder)[-1] == f"step_{step:08d}"
    ended = train(folder, *OPTIONS, "--requeue", ranks=2, faults=[fault("TERM", NUM_STEPS - 1, 1)])
    assert ended.codes == [0, 0], ended.output  # there was nothing left to go on with
    assert curve(folder) == uninterrupted


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose disk was full for a while, and whose ranks were then all killed."""
    folder = tmp_path_factory.mktemp("faults") / "dead"
    full = [fault("disk is full", 2, 0, 1), fault("disk has room", 6, 0, 1)]
    ended = train(folder, *OPTIONS, ranks=2, faults=[*full, fault("step", 14, 0, 1)])
    assert ended.codes == [-signal.SIGKILL] * 2, ended.output
    (folder / "said").write_text(ended.output)
    return folder


def names_of(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder / "checkpoints")]


def test_a_full_disk_costs_a_checkpoint_and_a_warning(dead: Path, uninterrupted: list[tuple[Any, ...]]) -> None:
    output = (dead / "said").read_text()
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "step_00000004 was not written; rank " in warnings[0] and "File too large" in warnings[0]
    assert warnings[0].endswith("training goes on")
    assert names_of(dead) == ["step_00000008", "step_00000012"]
    assert curve(dead) == uninterrupted[:14]


@pytest.fixture
def copy(dead: Path, tmp_path: Path) -> Path:
    """The dead run, to be damaged and resumed."""
    return Path(shutil.copytree(dead, tmp_path / "run"))


def test_another_number_of_ranks_goes_on_where_all_were_killed(
    copy: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    ended = train(copy, "--resume", ranks=3)
    assert ended.codes == [0] * 3, ended.output
    assert f"resumed from {copy}/checkpoints/step_00000012" in ended.output
    assert curve(copy)[:12] == uninterrupted[:12]
    for (step, loss, norm, lr), (its_step, its_loss, its_norm, its_lr) in zip(curve(copy), uninterrupted, strict=True):
        assert (step, lr) == (its_step, its_lr)
        assert loss == pytest.approx(its_loss, abs=ROUNDING) and norm == pytest.approx(its_norm, rel=1e-3)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    copy: Path, uninterrupted: list[tuple[Any, ...]]
) -> None:
    truncate(copy / "checkpoints" / "step_00000012" / "__1_0.distcp")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # the machine stopped in the middle of a line
    ended = train(copy, "--resume", ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert "step_00000012/__1_0.distcp: expected" in ended.output and "bytes, got" in ended.output
    assert f"resumed from {copy}/checkpoints/step_00000008" in ended.output
    assert curve(copy) == uninterrupted


def test_another_text_than_the_run_began_with_is_refused(copy: Path) -> None:
    ended = train(copy, "--resume", "--data", __file__, ranks=1)
    assert ended.codes == [2]
    assert f"error: expected the text of the run in {copy}, got another on ranks [0] of 1" in ended.output


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(copy: Path) -> None:
    for path in (copy / "checkpoints").iterdir():
        truncate(path / "__0_0.distcp")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "config.json"}
    ended = train(copy, "--resume", ranks=2)
    assert ended.codes == [2, 2]
    assert "there is no complete one before it" in ended.output and "Traceback" not in ended.output
    assert before == {path: path.read_bytes() for path in before}
