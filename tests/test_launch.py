"""The launcher, run as people run it: real ranks, a tiny model, and what is left in the run folder."""

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.data import Corpus
from launch.model import GPT
from launch.options import PRESETS, Preset
from sharded_dadamw.checkpoint import checkpoints, load_checkpoint

CHECKOUT = Path(__file__).resolve().parent.parent
TRAIN = str(CHECKOUT / "launch" / "train.py")
NUM_STEPS = 24
TEXT = Path(argparse.__file__)  # one file of real code: reading the whole library takes longer than these runs
OPTIONS = [
    *("--preset", "tiny", "--steps", str(NUM_STEPS), "--warmup", "4", "--lr", "5e-3", "--weight-decay", "1e-3"),
    *("--data", str(TEXT), "--sample-bytes", "20"),
]

# One batch is summed in another order on two ranks than on one, and torch's fused kernel rounds the law in another
# order than a loop does: about 1e-7 of each gradient or parameter. AdamW divides by the gradient's own size, so every
# step amplifies such differences: measured over these 24 steps, 1e-6 of the loss and 1e-4 of the gradient's norm. A
# decay a tenth too strong moves the loss by 7e-4, no decay by 7e-3, no clipping by 0.1.
ROUNDING = 5e-5


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what it printed, its logged steps and its summary."""

    folder: Path
    output: str
    steps: list[dict[str, Any]]
    summary: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.steps]


def environment(**added: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"} | added


def call(*command: str, **added: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], env=environment(**added), capture_output=True, text=True, timeout=120, check=False
    )


def finished(folder: Path, output: str) -> Run:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(folder, output, [json.loads(line) for line in lines], json.loads((folder / "summary.json").read_text()))


def train_with_torchrun(folder: Path) -> Run:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ended = call(*torchrun, TRAIN, *OPTIONS, "--run-dir", str(folder))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return finished(folder, ended.stdout)


def train(folder: Path, *options: str, ranks: int) -> Run:
    """As torchrun would start the ranks, without waiting for torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, TRAIN, *OPTIONS, "--run-dir", str(folder), "--no-checkpoint", "--no-plot", *options]
    processes = [
        subprocess.Popen(
            command,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), **address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    return finished(folder, outputs[0])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_with_torchrun(tmp_path_factory.mktemp("runs") / "two")


def test_the_run_folder_holds_what_is_needed_to_read_the_run_and_to_go_on(two_ranks: Run) -> None:
    names = {path.name for path in two_ranks.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints"}
    config = json.loads((two_ranks.folder / "config.json").read_text())
    assert config["world_size"] == 2
    assert config["settings"]["optimizer"] == "sharded"
    assert config["versions"]["torch"] == torch.__version__
    assert (two_ranks.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in checkpoints(two_ranks.folder / "checkpoints")] == [f"step_{NUM_STEPS:08d}"]
    resumed = load_checkpoint(two_ranks.folder / "checkpoints", model=GPT(PRESETS[Preset.TINY]))
    assert resumed is not None and resumed.step == NUM_STEPS


def test_every_step_is_logged_with_its_loss_its_rate_and_its_time(two_ranks: Run) -> None:
    assert [step["step"] for step in two_ranks.steps] == list(range(NUM_STEPS))
    assert two_ranks.steps[3]["lr"] == max(step["lr"] for step in two_ranks.steps) == 5e-3
    for step in two_ranks.steps:
        assert step["grad_norm"] > 0
        assert step["tokens_per_s"] > 0
        seconds = step["seconds"]
        assert all(seconds[part] > 0 for part in ("forward_backward", "reduction", "update", "gather"))
        assert sum(value for name, value in seconds.items() if name != "step") <= seconds["step"]


def test_the_loss_falls_and_the_held_out_loss_with_it(two_ranks: Run) -> None:
    assert two_ranks.losses[0] > 5.2  # log(256) = 5.55: at first every byte is about as likely
    assert two_ranks.losses[-1] < 3.6
    assert two_ranks.summary["held_out_after"] < two_ranks.summary["held_out_before"] - 1.5


def test_the_table_shows_half_the_state_and_one_all_reduce_of_bytes_on_two_ranks(two_ranks: Run) -> None:
    summary = two_ranks.summary
    padding = 64 * 4 * 2 * 40  # at most a line of 64 per parameter
    assert summary["unsharded_state_bytes"] == 8 * summary["num_parameters"]
    half = summary["unsharded_state_bytes"] / 2
    assert half <= summary["state_bytes"] <= half + padding
    assert half <= summary["wire_bytes"] <= half + padding
    for words in ("optimizer state", "sent, per parameter", "time, gather", "held-out loss", "what the model writes"):
        assert words in two_ranks.output


def test_only_rank_0_speaks_and_without_a_terminal_it_prints_a_line_every_twentieth(two_ranks: Run) -> None:
    lines = [line for line in two_ranks.output.splitlines() if line.startswith("step ")]
    assert 20 <= len(lines) <= 21
    assert len(set(lines)) == len(lines)


def test_one_rank_started_without_torchrun_draws_the_curve_of_two(two_ranks: Run, tmp_path: Path) -> None:
    ended = call(TRAIN, *OPTIONS, "--run-dir", str(tmp_path), "--no-checkpoint", "--no-plot")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    alone = finished(tmp_path, ended.stdout)
    assert alone.losses == pytest.approx(two_ranks.losses, abs=ROUNDING)
    assert alone.summary["wire_bytes"] == 0


def test_accumulating_over_micro_batches_draws_the_same_curve(two_ranks: Run, tmp_path: Path) -> None:
    run = train(tmp_path, "--micro-batches", "4", "--bucket-cap-mb", "0.1", ranks=2)
    assert run.losses == pytest.approx(two_ranks.losses, abs=ROUNDING)


@pytest.mark.parametrize("optimizer", ["decoupled", "ddp-adamw", "torch-zero", "fairscale-oss"])
def test_every_other_optimizer_draws_the_same_curve(optimizer: str, two_ranks: Run, tmp_path: Path) -> None:
    run = train(tmp_path, "--optimizer", optimizer, ranks=2)
    assert run.losses == pytest.approx(two_ranks.losses, abs=ROUNDING)
    grad_norms = [step["grad_norm"] for step in two_ranks.steps]
    assert [step["grad_norm"] for step in run.steps] == pytest.approx(grad_norms, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--ranks", "2", "--micro-batches", "3", "--global-batch", "5"],
            "at least ranks x micro-batches = 2 x 3 = 6, got 5; use fewer of either",
        ),
        (["--data", "/no/such/place"], "expected --data to be a file or a folder, got /no/such/place"),
        (["--lr", "0"], "expected --lr to be above 0, got 0.0"),
        (["--optimizer", "adam"], "'sharded', 'decoupled', 'torch-zero', 'fairscale-oss', 'ddp-adamw'"),
        (["--stpes", "3"], "No such option: --stpes"),
    ],
)
def test_a_wrong_option_is_one_clear_error_before_torch_is_even_started(options: list[str], message: str) -> None:
    ended = call(str(CHECKOUT / "launch" / "options.py"), *options)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_is_never_written_over_another(two_ranks: Run) -> None:
    ended = call(str(CHECKOUT / "launch" / "options.py"), "--run-dir", str(two_ranks.folder))
    assert ended.returncode == 2
    assert (
        ended.stderr
        == f"error: expected --run-dir to hold no earlier run, got {two_ranks.folder}; name another folder, or go "
        "on with that run by --resume\n"
    )


def test_too_little_text_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"expected at least 1,300 bytes of text in .*short.txt, got 10 in 1 files"):
        Corpus(tmp_path / "short.txt", context=64)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_global_batch_does_not_depend_on_how_many_ranks_share_it(num_ranks: int) -> None:
    corpus = Corpus(TEXT, context=64)
    whole, _ = corpus.batch(0, 7, range(6), 6, 64, torch.device("cpu"))
    share = 6 // num_ranks
    shares = [
        corpus.batch(0, 7, range(rank * share, (rank + 1) * share), 6, 64, torch.device("cpu"))[0]
        for rank in range(num_ranks)
    ]
    assert torch.equal(torch.cat(shares), whole)
    assert not torch.equal(corpus.batch(0, 8, range(6), 6, 64, torch.device("cpu"))[0], whole)


def test_the_standard_librarys_sources_are_there_to_train_on() -> None:
    corpus = Corpus(None, context=64)
    assert corpus.num_files > 300
    assert len(corpus.training) > 3_000_000
    assert bytes(corpus.training.numpy()).count(b"\ndef ") > 1000
