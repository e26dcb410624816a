"""The run that is to be gone on with: which folder, what its options were, and whether those given now fit it.

torch is not imported here.
"""

import json
import os
import platform
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

RUNS = Path("runs")
CONFIG = "config.json"
METRICS = "metrics.jsonl"

OF_THIS_START = frozenset(("ranks", "max_restarts", "run_dir", "resume", "requeue"))
"""What an earlier run says nothing about."""
FREE = OF_THIS_START | {
    *("shard_within_host", "checkpoint_signal", "process_group_timeout", "bucket_cap_mb"),
    *("checkpoint", "checkpoint_every", "keep_last", "background"),
    *("log_every", "fingerprint_every", "sample_bytes", "plot"),
    "data",  # which may have moved, and is compared by its digest
}
"""What may change between a run and its resumption: the law, the weights and the global batches stay what they were."""


def job() -> str | None:
    """What torchrun's restarts of this process have in common with each other and with no other run."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    # Without an id of its own every run is called "none"; but our parent is the agent, which outlives its workers.
    return f"{platform.node()}:{os.getppid()}" if run_id == "none" else run_id


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json of a run says.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
        if not isinstance(config["settings"], dict) or not {"text", "resumed"} <= config.keys():
            raise TypeError("it lacks settings, text or resumed")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"expected {folder / CONFIG} to be the configuration of a run: {error}") from error
    return config


def folder_to_resume(resume: bool, requeue: bool, run_dir: Path | None) -> Path | None:
    """The run to go on with, or None where a new one is to begin.

    A process that torchrun has started again goes on with the run that its predecessor began, and with no other.

    Args:
        resume: whether to go on with an earlier run, whoever began it.
        requeue: the same, if there is one.
        run_dir: the run; None looks in `runs` for the latest.

    Raises:
        ValueError: one was asked for, and there is none.
    """
    begun = [run_dir] if run_dir is not None else list(RUNS.iterdir()) if RUNS.is_dir() else []
    begun = [folder for folder in begun if (folder / CONFIG).exists()]
    begun.sort(key=lambda folder: (folder / CONFIG).stat().st_mtime_ns, reverse=True)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:  # in the place of a process that died
        for folder in begun:
            config = read_config(folder)
            if job() in [start.get("job") for start in (config, *config["resumed"])]:
                return folder
    if requeue and begun:
        return begun[0]
    if not resume:
        return None
    if not begun:
        raise ValueError(f"expected a run to resume, got none in {run_dir or RUNS}; name its folder with --run-dir")
    return begun[0]


def plain(value: Any) -> Any:
    """An option's value as config.json has it."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def require_same(earlier: Mapping[str, Any], chosen: Mapping[str, Any], folder: Path) -> None:
    """Compare options with those of the run in `folder`.

    Raises:
        ValueError: some differ that decide what the run computes; names them all.
    """
    differences = [
        f"{option(name)} {earlier[name]}, got {plain(value)}"
        for name, value in chosen.items()
        if name in earlier and name not in FREE and plain(value) != earlier[name]
    ]
    if differences:
        raise ValueError(
            f"expected the options of the run in {folder} to be {'; '.join(differences)}; leave out these "
            "options, as a resumed run keeps its own, or begin another run"
        )


def option(name: str) -> str:
    """How an option is typed."""
    return f"--{name.replace('_', '-')}"
