"""The launcher: real ranks, a tiny model, and what is left in the run folder. torchrun starts it in test_recipes.py."""

import argparse
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import launch.train
from launch.cluster import join, name_of_start
from launch.data import Corpus, share
from launch.model import GPT
from launch.options import PRESETS, Preset, Settings, read_settings
from launch.run_folder import RunFolder
from launch.train import Training
from sharded_dadamw.checkpoint import load_checkpoint
from sharded_dadamw.checkpoint.difference import difference
from tests import forked, simulated
from tests.pool import on_ranks

pytestmark = pytest.mark.clients

CHECKOUT = Path(__file__).resolve().parent.parent
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


def finished(folder: Path, output: str) -> Run:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(folder, output, [json.loads(line) for line in lines], json.loads((folder / "summary.json").read_text()))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "two"
    ended = forked.train(folder, *OPTIONS, ranks=2)
    assert ended.codes == [0, 0], ended.output
    return finished(folder, ended.output)


def test_the_run_folder_holds_what_is_needed_to_read_the_run_and_to_go_on(two_ranks: Run) -> None:
    names = {path.name for path in two_ranks.folder.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints"}
    config = json.loads((two_ranks.folder / "config.json").read_text())
    assert config["world_size"] == 2 and config["settings"]["optimizer"] == "sharded"
    assert config["versions"]["torch"] == torch.__version__
    assert (two_ranks.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    resumed = load_checkpoint(two_ranks.folder / "checkpoints", model=GPT(PRESETS[Preset.TINY]))
    assert resumed is not None and resumed.step == NUM_STEPS


def test_every_step_is_logged_with_its_rate_and_its_time_and_the_loss_falls(two_ranks: Run) -> None:
    assert [step["step"] for step in two_ranks.steps] == list(range(NUM_STEPS))
    assert two_ranks.steps[3]["lr"] == max(step["lr"] for step in two_ranks.steps) == 5e-3
    for step in two_ranks.steps:
        assert step["grad_norm"] > 0 and step["tokens_per_s"] > 0
        seconds = step["seconds"]
        assert all(seconds[part] > 0 for part in ("forward_backward", "reduction", "update", "gather"))
        assert sum(value for name, value in seconds.items() if name != "step") <= seconds["step"]
    assert two_ranks.losses[0] > 5.2  # log(256) = 5.55: at first every byte is about as likely
    assert two_ranks.losses[-1] < 3.6
    assert two_ranks.summary["held_out_after"] < two_ranks.summary["held_out_before"] - 1.5


def test_the_table_shows_half_the_state_and_one_all_reduce_of_bytes_on_two_ranks(two_ranks: Run) -> None:
    """Only rank 0 speaks, and without a terminal it prints a line every twentieth of the run."""
    summary = two_ranks.summary
    padding = 64 * 4 * 2 * 40  # at most a line of 64 per parameter
    assert summary["unsharded_state_bytes"] == 8 * summary["num_parameters"]
    half = summary["unsharded_state_bytes"] / 2
    assert half <= summary["state_bytes"] <= half + padding and half <= summary["wire_bytes"] <= half + padding
    for words in ("optimizer state", "sent, per parameter", "time, gather", "held-out loss", "what the model writes"):
        assert words in two_ranks.output
    lines = [line for line in two_ranks.output.splitlines() if line.startswith("step ")]
    assert 20 <= len(lines) == len(set(lines)) <= 21


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, []),
        (2, ["--micro-batches", "4", "--bucket-cap-mb", "0.1"]),
        *((2, ["--optimizer", name]) for name in ("decoupled", "ddp-adamw", "torch-zero", "fairscale-oss")),
    ],
)
def test_every_other_way_draws_the_same_curve(ranks: int, options: list[str], two_ranks: Run, tmp_path: Path) -> None:
    ended = forked.train(tmp_path / "run", *OPTIONS, "--no-checkpoint", "--no-plot", *options, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.output
    run = finished(tmp_path / "run", ended.outputs[0])
    assert run.losses == pytest.approx(two_ranks.losses, abs=ROUNDING)
    grad_norms = [step["grad_norm"] for step in two_ranks.steps]
    assert [step["grad_norm"] for step in run.steps] == pytest.approx(grad_norms, rel=1e-3)
    assert (run.summary["wire_bytes"] == 0) == (ranks == 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 2 --micro-batches 6 --global-batch 5", "at least the 6 micro-batches, got 5; use fewer of these, or"),
        ("--data /no/such/place", "expected --data to be a file or a folder, got /no/such/place"),
        ("--lr nan", "expected --lr to be above 0 and below 1e9, got nan"),
        ("--weight-decay 2", "expected --weight-decay to be a share below 1, got 2.0"),
        ("--seed 4294967296", "Invalid value for '--seed'"),
        ("--optimizer adam", "'sharded', 'decoupled', 'torch-zero', 'fairscale-oss', 'ddp-adamw'"),
        ("--stpes 3", "No such option: --stpes"),
        ("--requeue", "expected --run-dir beside --requeue"),
        ("--requeue --run-dir no --no-checkpoint", "expected checkpoints beside --requeue, without which every start"),
        ("--checkpoint-signal KILL", "expected --checkpoint-signal to be a signal, such as USR1, got KILL"),
        ("--checkpoint-signal SIGUSR1", "expected --checkpoint-signal to be a signal, such as USR1, got SIGUSR1"),
        ("--process-group-timeout 0", "expected --process-group-timeout to be above 0 and below 1e9, got 0.0"),
        ("--precision bfloat16 --optimizer ddp-adamw", "the sharded optimizer's, got --optimizer ddp-adamw"),
    ],
)
def test_a_wrong_option_is_one_clear_error(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_settings(options.split())
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and message in said.err


def test_who_cannot_find_or_still_waits_for_the_others_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait_for_others(_: float | None) -> None:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        raise TimeoutError

    monkeypatch.setattr(sys, "argv", ["train.py", "--run-dir", str(tmp_path / "run")])
    monkeypatch.setattr(launch.train, "join", wait_for_others)
    with pytest.raises(TimeoutError):
        launch.train.main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        launch.train.main()
    assert "WORLD_SIZE is 2, and MASTER_ADDR is not set: start all ranks by torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a file", "run"])
def test_a_run_folder_that_cannot_be_written_is_one_sentence(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "run" / "config.json").mkdir(parents=True)  # so that rank 0 alone cannot write what it has to
    ended = forked.train(tmp_path / place, *OPTIONS, ranks=2)
    assert ended.codes == [2, 2], ended.output
    expected = f"error: expected --run-dir to be a folder that every rank can write, got {tmp_path / place}: "
    assert expected in ended.output and ended.output.count("error: ") == 1 and "Traceback" not in ended.output


def test_a_full_disk_leaves_whole_lines_of_metrics_and_loses_none(tmp_path: Path) -> None:
    folder, (soft, hard) = RunFolder(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(5):
        is_full = 1 < step < 4
        resource.setrlimit(resource.RLIMIT_FSIZE, (30 if is_full else soft, hard))
        try:
            with pytest.raises(OSError) if is_full else contextlib.nullcontext():
                folder.append_metrics({"step": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        assert lines == [f'{{"step": {number}}}\n' for number in range(2 if is_full else step + 1)]


def settings_for(*options: str) -> Settings:
    return read_settings(["--run-dir", *options])


def test_a_run_is_resumed_with_the_options_it_began_with(two_ranks: Run) -> None:
    folder = str(two_ranks.folder)
    settings = settings_for(folder, "--resume", "--log-every", "7", "--ranks", "4")
    began = replace(settings_for(folder + "-other", *OPTIONS), micro_batches=4)
    changed = {"run_dir": two_ranks.folder, "resume": True, "log_every": 7, "ranks": 4}
    assert settings == replace(began, **changed)
    assert settings_for(folder, "--resume", *OPTIONS) == replace(began, run_dir=two_ranks.folder, resume=True)


def test_what_cannot_be_resumed_or_written_over_says_so(
    tmp_path: Path, two_ranks: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(two_ranks.folder)
    config = json.loads((two_ranks.folder / "config.json").read_text())
    config["settings"]["optimizer"] = "torch-zero"
    (tmp_path / "config.json").write_text(json.dumps(config))
    others = ["--lr", "1", "--optimizer", "decoupled", "--no-plot", "--amsgrad"]
    differ = "--optimizer sharded, got decoupled; --lr 0.005, got 1.0; --amsgrad False, got True; leave out"
    for options, said in (
        ([folder], f"expected --run-dir to hold no earlier run, got {folder}; name another folder, or go on with that"),
        ([folder, "--resume", *others], differ),
        ([str(tmp_path), "--resume", "--optimizer", "torch-zero"], "--optimizer torch-zero cannot resume"),
        ([str(tmp_path / "none"), "--resume"], "expected a run to resume, got none in"),
    ):
        with pytest.raises(SystemExit):
            settings_for(*options)
        assert said in capsys.readouterr().err


def test_without_a_folder_the_latest_run_is_resumed(
    two_ranks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at, name in enumerate(("b", "c", "a")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(two_ranks.folder / "config.json", tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "config.json", (at, at))
    (tmp_path / "runs" / "d").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_settings(["--resume"]).run_dir == Path("runs") / "a"
    assert read_settings([]).run_dir is None


def test_ranks_that_torchrun_starts_again_resume_their_own_run_and_no_other(
    two_ranks: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, job in (("mine", "1"), ("others", "2")):
        config = json.loads((two_ranks.folder / "config.json").read_text())
        config["resumed"].append({"job": job})
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for run_id, run_dir in (("1", Path("runs/mine")), ("2", Path("runs/others")), ("3", None), ("none", None)):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
        settings = read_settings([])
        assert settings.run_dir == run_dir and settings.resume == (run_dir is not None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "3")
    with pytest.raises(SystemExit):
        settings_for(str(two_ranks.folder))


class Stopped(Exception):
    pass


def part_of_a_run(_: Any, settings: Settings, stop: int | None = None) -> list[tuple[Any, ...]]:
    """Train up to a step; returns the curve so far."""
    training = Training(settings, Corpus.read(TEXT, settings.model.context), torch.device("cpu"))
    train_step = training.train_step

    def step_or_stop(step: int) -> Any:
        if step == stop:
            raise Stopped
        return train_step(step)

    training.train_step = step_or_stop  # type: ignore[method-assign]
    with contextlib.suppress(Stopped):
        training.run()
    metrics = Path(str(settings.run_dir)) / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def test_a_run_that_goes_on_with_fewer_ranks_has_the_weights_of_one_that_nothing_happened_to(tmp_path: Path) -> None:
    whole = Settings(
        preset=Preset.TINY,
        steps=7,
        warmup=2,
        lr=5e-3,
        data=TEXT,
        global_batch=6,  # which micro-batches do not divide
        sample_bytes=0,
        plot=False,
        background=False,
        fingerprint_every=2,
        run_dir=tmp_path / "whole",
        checkpoint_every=2,
    )
    (expected,) = simulated.on_ranks(1, part_of_a_run, whole, None)
    parts = replace(whole, run_dir=tmp_path / "parts", micro_batches=whole.num_micro_batches)
    for num_ranks, stop in ((4, 3), (2, 5), (1, None)):
        found = simulated.on_ranks(num_ranks, part_of_a_run, replace(parts, ranks=num_ranks), stop)
        parts = replace(parts, resume=True)
    assert found[0] == expected
    for name in ("checkpoints", "metrics.jsonl"):
        assert difference(tmp_path / "whole" / name, tmp_path / "parts" / name) is None


def read_on_hosts_of_two(_: Any, source: Path) -> tuple[int, list[str], str]:
    """How often this rank read the text, what there is of it, and how it was refused for a model that is too large."""
    rank, refusal, held = dist.get_rank(), "", []
    os.environ["LOCAL_RANK"] = str(rank % 2)
    read = Corpus.read
    with mock.patch.object(Corpus, "read", side_effect=read) as reads:
        corpus = Corpus.read_once_per_host(source, 64)
        held = [hashlib.sha256(text.numpy()).hexdigest() for text in (corpus.training, corpus.held_out)]
        num_reads = reads.call_count
    try:
        Corpus.read_once_per_host(source, 10**9 if rank == 2 else 64)
    except ValueError as error:
        refusal = str(error)
    return num_reads, [*held, corpus.digest, corpus.name], refusal


def test_the_first_rank_of_each_host_reads_the_text_for_all_of_them() -> None:
    reads, held, refusals = zip(*on_ranks(4, read_on_hosts_of_two, TEXT), strict=True)
    assert reads == (1, 0, 1, 0)
    assert held[0] == held[1] == held[2] == held[3]
    assert all(refusal.startswith("expected at least 20,000,000,020 bytes") for refusal in refusals)


def test_ranks_agree_on_a_name_of_their_start_whatever_earlier_ones_left_in_the_store() -> None:
    store = dist.HashStore()
    store.set("question of rank 2", "that of a dead rank")
    names = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            asked = [threads.submit(name_of_start, store, rank, 3, timedelta(seconds=20)) for rank in (2, 0, 1)]
            names.append({name.result() for name in asked})
    assert [len(each) for each in names] == [1, 1] and names[0] != names[1]
    with pytest.raises(TimeoutError, match="expected 2 ranks to start, got 1"):
        name_of_start(store, 0, 2, timedelta(seconds=0.1))


def test_an_exchange_fails_after_as_many_seconds_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch.object(dist, "init_process_group") as init:
        join(7.0)
        join(None)
    assert [call.kwargs["timeout"] for call in init.call_args_list] == [timedelta(seconds=7), None]


def test_too_little_text_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"expected at least 1,300 bytes of text in .*short.txt, got 10 in 1 files"):
        Corpus.read(tmp_path / "short.txt", context=64)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_global_batch_does_not_depend_on_how_many_ranks_share_it(num_ranks: int) -> None:
    corpus = Corpus.read(TEXT, context=64)
    whole, _ = corpus.batch(0, 7, range(6), 6, 64, torch.device("cpu"))
    rows = [share(range(6), rank, num_ranks) for rank in range(num_ranks)]
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    shares = [corpus.batch(0, 7, mine, 6, 64, torch.device("cpu"))[0] for mine in rows]
    assert torch.equal(torch.cat(shares), whole)
    assert not torch.equal(corpus.batch(0, 8, range(6), 6, 64, torch.device("cpu"))[0], whole)
