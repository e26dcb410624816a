"""Everything that wants a GPU, in one command."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from scripts.bench import harness
from scripts.bench.harness import Device, OnDevice, Report

STEP = "step --ranks 1 --preset 125m --context 512 --batch 8 --rounds 10 --warmup 2 --steps 3"
RIVALS = "--contenders ddp-adamw,adamw,sharded-attached,sharded,sharded-zero2,decoupled"
BF16 = "--dtype bfloat16 --remainder"
PARTS = {
    "tests": "pytest tests/gpu -q -p no:cacheprovider",
    "kernel": "kernel --numel 64 --rounds 6 --no-peers",
    "parameters": "parameters --counts 1000,5000 --layers 700 --rounds 20",
    "fingerprint": "fingerprint --mib 1024",
    "step-fp32": f"{STEP} {RIVALS}",
    "step-bf16": f"{STEP} {RIVALS} {BF16}",
    "step-bf16-clip": f"{STEP} {RIVALS} {BF16} --clip 1",
    "offload": f"{STEP} --contenders sharded,sharded-host",
    "offload-bf16": f"{STEP} --contenders sharded,sharded-host {BF16}",
}
"""What each part runs, in the order of what is wanted most."""
SMALLEST = {
    "kernel": "--numel 0.1 --threads 1 --rounds 2",
    "parameters": "--counts 10,20 --layers 3 --rounds 2",
    "fingerprint": "--mib 1 --rounds 2",
    "step": "--preset tiny --context 16 --batch 1 --rounds 2 --warmup 1 --steps 1",
}
"""By command: with what the device CPU is tried out; of options given twice the last counts."""
LIMIT_S = 200
NUM_LINES = 40
"""Of what a part printed."""


@dataclass(frozen=True, kw_only=True)
class Gpu(OnDevice):
    """Run the tests of tests/gpu and every measurement that wants a GPU, within nine minutes.

    Each part is a process of its own, and writes its results as soon as it has ended: a JSON file and a markdown table
    of its name, and what it printed as NAME.log. The table of all parts so far is gpu.json and gpu.md.
    """

    packages = ("triton", "numba")

    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("gpu-results")
    parts: Annotated[str, typer.Option(help="Which, separated by commas.")] = ",".join(PARTS)
    device: Annotated[Device, typer.Option(help="cpu: everything in the smallest size, to try it out.")] = Device.CUDA
    seconds: Annotated[int, typer.Option(min=1, help="When to stop.")] = 530

    def __post_init__(self) -> None:
        if unknown := [part for part in self.parts.split(",") if part not in PARTS]:
            raise typer.BadParameter(f"expected --parts to be of {', '.join(PARTS)}, got {', '.join(unknown)}")
        if self.device is Device.CUDA and not torch.cuda.is_available():
            raise typer.BadParameter("expected a GPU for --device cuda, got none; --device cpu tries everything out")

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the part under way ends as well
        self.out.mkdir(parents=True, exist_ok=True)
        started, rows, printed_by = time.monotonic(), [], {}
        for part in self.parts.split(","):
            begun = time.monotonic()
            limit_s = min(LIMIT_S, self.seconds - (begun - started))
            command, outcome, printed_by[part] = self.run_part(part, limit_s)
            seconds = time.monotonic() - begun
            harness.say(*printed_by[part], f"--- {part}: {outcome} after {seconds:.0f} s")
            rows.append({"part": part, "command": command, "s": f"{seconds:.0f}", "outcome": outcome})
            report = Report(rows, record={"printed": printed_by})
            self.write(report, self.out / "gpu.json")
        harness.say(*report.table)

    def run_part(self, part: str, limit_s: float) -> tuple[str, str, list[str]]:
        """Run a part in a process group of its own; returns its command, how it ended, and the last that it printed."""
        command, *options = PARTS[part].split()
        if command == "pytest":
            arguments = ["-m", command, *options, *(["-n", "6"] if importlib.util.find_spec("xdist") else [])]
        else:
            arguments = ["-m", "scripts.bench", command, *options, "--device", self.device.value]
            arguments += SMALLEST[command].split() if self.device is Device.CPU else []
            arguments += ["--out", str((self.out / f"{part}.json").resolve())]
        shown = " ".join(["python", *arguments])
        if limit_s <= 0:
            return shown, "not begun: no time was left", []
        log = self.out / f"{part}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=harness.CHECKOUT, stdout=file, stderr=file, start_new_session=True
            )
            try:
                code = process.wait(limit_s)
                outcome = "ended well" if code == 0 else f"exit status {code}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit_s:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return shown, outcome, log.read_text(errors="replace").splitlines()[-NUM_LINES:]
