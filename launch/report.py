"""What a run shows on the screen: progress, the closing table, a sample.

Only rank 0's report has a folder; the others' is silent, so that the loop need not ask who it is.
"""

import contextlib
import importlib
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from launch.data import END_OF_FILE, Corpus
from launch.options import Settings
from launch.run_folder import RunFolder

LINES_WITHOUT_A_TERMINAL = 20


@dataclass(frozen=True)
class StepRecord:
    """One step as it is logged; `loss` is the mean over the ranks, `tokens_per_s` counts those of the global batch.

    `seconds` are the host's on this rank: of the `step`, of `forward_backward`, and of its contender's `parts`.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    fingerprint: dict[str, Any] | None
    tokens_per_s: float
    seconds: dict[str, float | None]


@dataclass(frozen=True)
class Summary:
    """What is known at the end of a run; bytes are of the rank that holds most, or of rank 0's last step."""

    num_parameters: int
    held_out_before: float
    held_out_after: float
    state_bytes: int
    wire_bytes: int | None
    hidden: dict[str, str]


class Report:
    """A run as its reader sees it; `folder` is None on the ranks that keep silent."""

    def __init__(self, settings: Settings, folder: RunFolder | None) -> None:
        self.settings = settings
        self.folder = folder
        self.console = Console(quiet=folder is None, highlight=False)
        self.records: list[StepRecord] = []
        self.losses: dict[int, float] = {}
        self._bar: Progress | None = None
        self._task = TaskID(0)

    @property
    def title(self) -> str:
        """The run in two words."""
        ranks = self.settings.ranks
        return f"{self.settings.optimizer}, {ranks} rank{'s' if ranks > 1 else ''}"

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def open(self, corpus: Corpus, num_parameters: int, device: torch.device) -> None:
        """Say what is about to be trained, on what and how, and how ranks differ; a collective."""
        settings = self.settings
        self.say(
            f"{num_parameters / 1e6:.2f} M parameters, {device.type}, {self.title}, {settings.steps} steps of "
            f"{settings.global_batch} x {settings.model.context} bytes"
        )
        self.say(
            f"text: {corpus.name}, {corpus.num_files:,} files, {len(corpus.training) / 1e6:.1f} MB to train on, "
            f"{len(corpus.held_out) / 1e6:.1f} MB held out"
        )
        surroundings = [""] * dist.get_world_size()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        mine = (
            f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
        )
        dist.all_gather_object(surroundings, mine)
        for rank, its in enumerate(surroundings) if len(set(surroundings)) > 1 else ():
            self.say(f"rank {rank}: {its}")

    def go_on(self, step: int, path: Path | None) -> None:
        """Say from where training goes on, with `step`, and leave in metrics.jsonl what was logged before it."""
        if self.folder is None:
            return
        self.losses = {line["step"]: line["loss"] for line in self.folder.rewind_metrics(step)}
        if path is None:
            self.say(f"no complete checkpoint in {self.folder.checkpoints} yet: beginning again")
        else:
            self.say(f"resumed from {path}, after {step} of {self.settings.steps} steps")

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Within it, records move a bar, or where there is no terminal print a line every twentieth of the way."""
        if not self.console.is_terminal:
            yield
            return
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self.console) as self._bar:
            self._task = self._bar.add_task("", total=self.settings.steps, completed=len(self.losses))
            yield

    def record(self, record: StepRecord, log: bool) -> None:
        """Keep a step for the closing table and show it; write it to metrics.jsonl if `log`."""
        self.records.append(record)
        self.losses[record.step] = record.loss
        if self.folder is None:
            return
        if log or record.fingerprint is not None:
            line = asdict(record)
            if record.fingerprint is None:
                del line["fingerprint"]
            self.folder.append_metrics(line)
        done, total = record.step + 1, self.settings.steps
        text = f"loss {record.loss:.3f}  lr {record.lr:.2e}  {record.tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif done * LINES_WITHOUT_A_TERMINAL // total > (done - 1) * LINES_WITHOUT_A_TERMINAL // total or done == 1:
            self.say(f"step {done:>{len(str(total))}}/{total}  {text}")

    def sample(self, text: bytes) -> None:
        """Show what the model writes; a terminal obeys control characters, so none but line ends pass."""
        shown = text.replace(END_OF_FILE, b"\n").strip().decode(errors="replace").expandtabs(4)
        self.console.rule("what the model writes")
        self.say("".join(letter if letter.isprintable() or letter == "\n" else "�" for letter in shown))
        self.console.rule()

    def close(self, summary: Summary) -> None:
        """Show the closing table; write summary.json and loss.png."""
        self.say(
            f"held-out loss: {summary.held_out_before:.3f} nats per byte before training, "
            f"{summary.held_out_after:.3f} after"
        )
        if self.folder is None:
            return
        parameter_bytes = self.settings.precision.parameter_bytes
        moment_bytes = 4 * (3 if self.settings.amsgrad else 2)
        unsharded = summary.num_parameters * (moment_bytes + 4 - parameter_bytes)  # what every rank would hold
        seconds = self.seconds_per_step()
        self.console.print(self._table(summary, unsharded, seconds))
        facts = asdict(summary) | {"unsharded_state_bytes": unsharded, "seconds_per_step": seconds}
        self.folder.write_json("summary.json", facts)
        if self.settings.plot:
            # matplotlib takes half a second to import, which no rank should pay before it trains.
            picture = importlib.import_module("launch.picture")
            picture.draw(
                self.folder.path / "loss.png",
                title=self.title,
                losses=self.losses,
                num_steps=self.settings.steps,
                held_out=(summary.held_out_before, summary.held_out_after),
                model_bytes=summary.num_parameters * parameter_bytes,
                state_bytes=(unsharded, summary.state_bytes),
            )

    def seconds_per_step(self) -> dict[str, float | None]:
        """Mean host seconds of a step and its parts, without the first steps, which also pay for warming up."""
        steady = self.records[len(self.records) // 20 + 1 :] or self.records
        means: dict[str, float | None] = {}
        for part in steady[0].seconds:
            known = [seconds for record in steady if (seconds := record.seconds[part]) is not None]
            means[part] = fmean(known) if known else None
        whole, both = means.pop("step") or 0.0, means.pop("forward_backward")
        means = {"forward+backward": both, **means}
        return means | {"rest": whole - sum(mean or 0.0 for mean in means.values()), "whole step": whole}

    def _table(self, summary: Summary, unsharded: int, seconds: dict[str, float | None]) -> Table:
        """The closing table: what, in this run, unsharded."""
        number, ranks = summary.num_parameters, self.settings.ranks
        wire = "not counted" if summary.wire_bytes is None else f"{summary.wire_bytes / number:.3f} bytes"
        # A ring all-reduce of the gradients, the least that replicas can do with.
        ring = 2 * (ranks - 1) / ranks * self.settings.precision.parameter_bytes
        table = Table("", self.title, "unsharded", title="per rank and step", title_justify="left")
        table.add_row("optimizer state", f"{summary.state_bytes / 1e6:.2f} MB", f"{unsharded / 1e6:.2f} MB")
        of_each = (f"{num_bytes / number:.3f} bytes" for num_bytes in (summary.state_bytes, unsharded))
        table.add_row("  per parameter", *of_each)
        table.add_row("sent, per parameter", wire, f"{ring:.3f} bytes (ring all-reduce)")
        for part, mean in seconds.items():
            table.add_row(f"time, {part}", summary.hidden.get(part, "") if mean is None else f"{1e3 * mean:.1f} ms")
        return table
