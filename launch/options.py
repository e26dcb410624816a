"""What may be asked of a training run, checked before anything starts; torch is not imported here.

`python launch/options.py ...` checks options, or shows them for `--help`, in a fraction of a second: a wrong one is
then a line on the screen, not a trace from each of the ranks.
"""

import contextlib
import functools
import importlib.util
import io
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

if importlib.util.find_spec("typer") and importlib.util.find_spec("rich"):
    import typer
else:
    sys.exit("error: launch/ needs typer and rich; run, in the checkout: pip install -e '.[launch]'")

if not __package__:
    # Run as a script: import from the checkout that holds this file, whatever the working directory.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.earlier import METRICS, OF_THIS_START, folder_to_resume, option, read_config, require_same


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; `context` is the number of tokens it reads at once."""

    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    width: int


class Preset(StrEnum):
    """Models by their size in parameters."""

    TINY = "tiny"
    SMALL = "3m"
    MEDIUM = "30m"
    LARGE = "125m"


PRESETS: dict[Preset, GPTConfig] = {
    Preset.TINY: GPTConfig(vocab_size=256, context=64, num_layers=2, num_heads=2, width=64),
    Preset.SMALL: GPTConfig(vocab_size=256, context=128, num_layers=4, num_heads=8, width=256),
    Preset.MEDIUM: GPTConfig(vocab_size=256, context=256, num_layers=10, num_heads=8, width=512),
    Preset.LARGE: GPTConfig(vocab_size=256, context=512, num_layers=13, num_heads=14, width=896),
}


class Choice(StrEnum):
    """The optimizers a run can be made with; each trains the same model on the same data under the same law."""

    SHARDED = "sharded"
    DECOUPLED = "decoupled"
    TORCH_ZERO = "torch-zero"
    FAIRSCALE_OSS = "fairscale-oss"
    DDP_ADAMW = "ddp-adamw"


class Precision(StrEnum):
    """Of parameters and gradients; moments are fp32, and the update keeps what bf16 lacks of an fp32 parameter."""

    FP32 = "float32"
    BF16 = "bfloat16"

    @property
    def parameter_bytes(self) -> int:
        """Of one value."""
        return 4 if self is Precision.FP32 else 2


@dataclass(frozen=True)
class Settings:
    """Train a GPT on bytes of Python code (or of your own text) and show what sharding the optimizer saved."""

    ranks: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="WORLD_SIZE",
            show_envvar=False,
            show_default=False,
            help="Ranks to train on, one process each. [default: 2]",
        ),
    ] = 1
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0,
            envvar="TORCHELASTIC_MAX_RESTARTS",
            show_envvar=False,
            help="How often to start all ranks again after one has died; they go on from the newest checkpoint.",
        ),
    ] = 0
    optimizer: Annotated[Choice, typer.Option(help="Which optimizer to train with.")] = Choice.SHARDED
    preset: Annotated[Preset, typer.Option(help="Size of the model in parameters.")] = Preset.SMALL
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 450
    data: Annotated[
        Path | None,
        typer.Option(help="Text to train on, a file or a folder. [default: the standard library's sources]"),
    ] = None
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Share of a matrix that decays per step at the peak; torch's, times the lr.")
    ] = 1e-4
    warmup: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up, before a cosine to a tenth.")] = 40
    global_batch: Annotated[int, typer.Option(min=1, help="Sequences per step, over all ranks.")] = 16
    micro_batches: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts of a global batch, a backward pass each, that ranks share out. The sharded optimizer's weights "
            "depend on these and not on the ranks. [default: 4, or the ranks if 4 cannot be shared out]",
        ),
    ] = None
    clip: Annotated[float, typer.Option(min=0, help="Largest global gradient norm; 0 does not clip.")] = 1.0
    amsgrad: Annotated[bool, typer.Option("--amsgrad", help="Keep the largest second moment.")] = False
    precision: Annotated[
        Precision, typer.Option(help="Of parameters and gradients; beside bfloat16 the other 16 bits are state.")
    ] = Precision.FP32
    shard_within_host: Annotated[
        bool,
        typer.Option("--shard-within-host", help="Shard over the ranks of a host; every host has all of the state."),
    ] = False
    bucket_cap_mb: Annotated[
        float | None, typer.Option(help="Bucket size of the sharded optimizer. [default: the optimizer's]")
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the weights, the batches and the sample.")
    ] = 0
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.jsonl.")] = 1
    fingerprint_every: Annotated[
        int,
        typer.Option(min=0, help="Steps between fingerprints in metrics.jsonl, which also compare replicas; 0: none."),
    ] = 0
    sample_bytes: Annotated[int, typer.Option(min=0, help="Length of the closing sample.")] = 400
    run_dir: Annotated[Path | None, typer.Option(help="Folder to write. [default: runs/DATE-TIME-OPTIMIZER]")] = None
    plot: Annotated[bool, typer.Option(help="Write loss.png.")] = True
    checkpoint: Annotated[bool, typer.Option(help="Write checkpoints, on the way and at the end.")] = True
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100
    keep_last: Annotated[int, typer.Option(min=1, help="How many checkpoints to keep.")] = 2
    background: Annotated[bool, typer.Option(help="Write checkpoints beside training.")] = True
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --run-dir, or the latest in runs/, from its newest checkpoint, on any number "
            "of ranks. Its options need not be repeated.",
        ),
    ] = False
    requeue: Annotated[
        bool,
        typer.Option("--requeue", help="Go on with the run in --run-dir if one was begun there, and else begin it."),
    ] = False
    checkpoint_signal: Annotated[
        str,
        typer.Option(help="Signal to any rank, beside TERM, that ends all with a checkpoint and exit code 75."),
    ] = "TERM"
    process_group_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which an exchange has failed. [default: torch's]")
    ] = None

    def __post_init__(self) -> None:
        """Raise ValueError, in words for whoever typed it, for options that do not fit each other or the machine."""
        if self.num_micro_batches % self.ranks:
            raise ValueError(
                f"expected --micro-batches to be a multiple of the {self.ranks} ranks, got {self.num_micro_batches}"
            )
        if self.global_batch < self.num_micro_batches:
            raise ValueError(
                f"expected --global-batch to be at least the {self.num_micro_batches} micro-batches, got "
                f"{self.global_batch}; use fewer of these, or fewer ranks"
            )
        for name in ("lr", "bucket_cap_mb", "process_group_timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise ValueError(f"expected {option(name)} to be above 0 and below 1e9, got {value}")
        if self.weight_decay >= 1:
            raise ValueError(f"expected --weight-decay to be a share below 1, got {self.weight_decay}")
        if self.data is not None and not self.data.exists():
            raise ValueError(f"expected --data to be a file or a folder, got {self.data}, which does not exist")
        if self.optimizer is Choice.FAIRSCALE_OSS and importlib.util.find_spec("fairscale") is None:
            raise ValueError(
                "--optimizer fairscale-oss needs fairscale; run, in the checkout: pip install -e '.[fairscale]'"
            )
        if self.plot and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib; run, in the checkout: pip install -e '.[launch]', or --no-plot")
        if self.fingerprint_every and self.optimizer not in (Choice.SHARDED, Choice.DECOUPLED):
            raise ValueError(f"--fingerprint-every needs --optimizer sharded or decoupled, got {self.optimizer}")
        if self.resume and not self.can_resume:
            raise ValueError(
                f"--optimizer {self.optimizer} cannot resume, since no rank can save its part of the state without "
                "gathering all of it; use sharded, decoupled or ddp-adamw"
            )
        # The other ranks may look only after rank 0 has begun to write there.
        if self.run_dir is not None and not self.resume and is_rank_zero() and os.path.exists(self.run_dir / METRICS):
            raise ValueError(
                f"expected --run-dir to hold no earlier run, got {self.run_dir}; name another folder, or go on with "
                "that run by --resume"
            )

        if self.requeue and self.run_dir is None:
            raise ValueError("expected --run-dir beside --requeue, so that every start finds the same run")
        if self.requeue and not (self.checkpoint and self.can_resume):
            raise ValueError(
                f"expected checkpoints beside --requeue, without which every start begins again, got --optimizer "
                f"{self.optimizer}{'' if self.checkpoint else ' --no-checkpoint'}"
            )
        signals = signal.Signals.__members__.keys() - {"SIGKILL", "SIGSTOP"}  # which no process hears of
        if f"SIG{self.checkpoint_signal}" not in signals:
            raise ValueError(f"expected --checkpoint-signal to be a signal, such as USR1, got {self.checkpoint_signal}")
        if self.optimizer is not Choice.SHARDED and (self.precision is Precision.BF16 or self.shard_within_host):
            raise ValueError(
                "--precision bfloat16 and --shard-within-host are the sharded optimizer's, got --optimizer "
                f"{self.optimizer}"
            )

    @property
    def model(self) -> GPTConfig:
        """The preset's shape."""
        return PRESETS[self.preset]

    @property
    def num_micro_batches(self) -> int:
        """How many micro-batches a step has; more where a run goes on with ranks that cannot share as many."""
        wanted = self.micro_batches or (self.ranks if 4 % self.ranks or self.global_batch < 4 else 4)
        each, rest = divmod(wanted, self.ranks)
        if not self.resume or (rest == 0 and (self.ranks == 1 or each.bit_count() == 1)):
            return wanted
        shared = self.ranks << math.ceil(math.log2(max(1.0, wanted / self.ranks)))
        return shared if shared <= self.global_batch else self.ranks

    @property
    def can_resume(self) -> bool:
        """Whether the optimizer's state can be saved by each rank for itself."""
        return self.optimizer not in (Choice.TORCH_ZERO, Choice.FAIRSCALE_OSS)


def is_rank_zero() -> bool:
    """Whether this process speaks for the run; a process that torchrun did not start does."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: object) -> NoReturn:
    """End the process as one that was asked for something it cannot do; only rank 0 says why."""
    if is_rank_zero():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from a command line, and from the run that it resumes.

    On `--help` or a wrong option, print and leave by SystemExit.
    """
    chosen = parse(arguments, {})
    try:
        folder = folder_to_resume(chosen["resume"], chosen["requeue"], chosen["run_dir"])
        if folder is not None:
            earlier = read_config(folder)["settings"]
            chosen = parse(arguments, {name: earlier[name] for name in earlier.keys() - OF_THIS_START})
            require_same(earlier, chosen, folder)
            chosen |= {"resume": True, "run_dir": folder}
        return Settings(**chosen)
    except ValueError as error:
        fail(error)


def parse(arguments: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a command line says, by the names of Settings, with `defaults` in the place of Settings' own."""
    found: list[dict[str, Any]] = []
    app = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["--help", "-h"], "default_map": dict(defaults)},
    )

    # The dataclass's fields are the command's options.
    @app.command()
    @functools.wraps(Settings, updated=())
    def collect(**chosen: Any) -> None:
        found.append(chosen)

    with contextlib.ExitStack() as muted:
        if not is_rank_zero():
            muted.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            app(list(arguments), prog_name="scripts/train.sh")
        except SystemExit:
            if not found:
                raise
    return found[0]


if __name__ == "__main__":
    read_settings(sys.argv[1:])
