"""One training step of the sharded optimizer beside that of its peers."""

import os
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from launch.contenders import Sharded, largest_over_ranks
from launch.options import Precision
from scripts.bench import harness
from scripts.bench.harness import Clock, Device, Report, Spread
from scripts.bench.peers import KINDS, Contest, Name, build

# What is measured of one contender's steps in one round, per step, in seconds and bytes; over ranks the largest counts.
# cpu_s is what the process's threads used of the cores: the figure that survives a busy machine. host_s is what
# clipping and step() took until they returned; forward_backward_s and optimizer_s are the device's own time.
COLUMNS = (
    *("step_s", "forward_backward_s", "optimizer_s", "host_s", "reduce_s", "update_s", "gather_s"),
    *("cpu_s", "wire_bytes", "rest_bytes", "peak_bytes"),
)
PARTS = ("reduce_s", "update_s", "gather_s")


@dataclass(frozen=True, kw_only=True)
class Step(Contest):
    """Time a training step of the sharded optimizer and of its peers, interleaved in one run.

    Every contender holds its own copy of one model, with the same initial weights, and trains it on the same batches
    under the same update rule. In every round each of them takes a few steps in a row. What counts are the ratios
    within a round; absolute times are this machine's. Whatever a contender still has under way after its last step of a
    round is waited for on its own time, though in training it would hide behind the next forward: that is as much as it
    can lose by being measured.
    """

    packages = ("numba", "triton", "fairscale", "deepspeed")

    warmup: Annotated[int, typer.Option(min=0, help="Rounds before those.")] = 2
    steps: Annotated[int, typer.Option(min=1, help="Steps that a contender takes in a row.")] = 3
    clip: Annotated[float, typer.Option(min=0, help="Largest global gradient norm; 0 does not clip.")] = 0.0
    device: Annotated[Device | None, typer.Option(help="By default a GPU per rank, if there are so many.")] = None

    def torch_device(self, local_rank: int = 0) -> torch.device:
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks))
        has_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= num_here
        on_gpu = has_gpus if self.device is None else self.device is Device.CUDA
        return torch.device("cuda", local_rank) if on_gpu else harness.CPU

    @property
    def baseline(self) -> Name:
        """Whom the others are compared with."""
        return Name.DDP_ADAMW if Name.DDP_ADAMW in self.names else self.names[0]

    def measure(self) -> Report:
        device = self.torch_device(int(os.environ["LOCAL_RANK"]))
        trials: list[Trial] = []
        missing: dict[Name, str] = {}
        for name in self.names:
            try:
                trials.append(Trial(name, self, device))
            except ImportError as error:
                missing[name] = str(error)
        harness.say(f"contenders: {', '.join(trial.name for trial in trials)}")
        samples = harness.interleave(trials, self.rounds, self.warmup, device)
        losses = torch.tensor([trial.losses for trial in trials], dtype=torch.float64, device=device)
        dist.all_reduce(losses)
        losses = losses.cpu() / self.ranks
        found = {}
        base = [trial.name for trial in trials].index(self.baseline)
        for number, trial in enumerate(trials):
            rounds = dict(zip(COLUMNS, samples[:, number].T.tolist(), strict=True))
            difference = (losses[number] - losses[base]).abs() / losses[base].abs()
            at_sockets = samples[:, number, COLUMNS.index("wire_bytes")].median().item()
            found[trial.name] = {
                "description": KINDS[trial.name].description,
                "ratio": asdict(Spread.of(samples[:, number, 0] / samples[:, base, 0])),
                "state_bytes": largest_over_ranks(trial.contender.state_bytes, device),
                "sent": trial.sent(at_sockets),
                "loss_difference": difference.max().item(),
                "losses": losses[number].tolist(),
                "rounds": rounds,
            }
        return self.report(found, missing)

    def report(self, found: dict[Name, dict[str, Any]], missing: dict[Name, str]) -> Report:
        """One row per contender asked for."""
        on_gpu = self.torch_device().type == "cuda"
        titles = [
            *("contender", "step ms", f"ratio to {self.baseline}: median [quartiles] (range)"),
            *("forward+backward ms", "optimizer ms", "CPU ms", "state MB per rank", "sent B per parameter"),
            *("largest loss difference", *(("host ms", "GPU MB at rest, at most") if on_gpu else ())),
        ]
        rows = []
        for name in self.names:
            if name in missing:
                rows.append([name, "not installed", missing[name], *[""] * (len(titles) - 3)])
                continue
            one = found[name]
            median = {title: torch.tensor(rounds).median().item() for title, rounds in one["rounds"].items()}
            ratio, optimizer = Spread(**one["ratio"]), f"{1e3 * median['optimizer_s']:.1f}"
            if KINDS[name].settings is not None:
                optimizer += f" ({'+'.join(f'{1e3 * median[part]:.1f}' for part in PARTS)})"
            row = [
                *(name, f"{1e3 * median['step_s']:.1f}", f"{ratio} ({ratio.min:.2f}-{ratio.max:.2f})"),
                *(f"{1e3 * median['forward_backward_s']:.1f}", optimizer, f"{1e3 * median['cpu_s']:.1f}"),
                *(f"{one['state_bytes'] / 1e6:.1f}", one["sent"]),
                "-" if name is self.baseline else f"{one['loss_difference']:.1e}" if one["loss_difference"] else "0",
            ]
            if on_gpu:
                row += [f"{1e3 * median['host_s']:.1f}"]
                row += [f"{median['rest_bytes'] / 1e6:.0f}, {median['peak_bytes'] / 1e6:.0f}"]
            rows.append(row)
        lines = [
            f"{self.model_in_words}, {self.steps} steps per round; {self.set_up}",
            "Wrappers reduce gradients within backward, and so do ours unless there is no overlap. In brackets, what "
            "is left for step() of reduction + update + gather, on the host; attached, gathers end in the next "
            "forward. CPU: what all threads of the rank used of the cores in a step; it hardly feels a busy machine.",
            "Sent: data bytes of this rank's TCP connections. In memory: counted by the optimizer, since ranks of one "
            "host read each other's memory and no socket sees it.",
        ]
        if self.dtype is Precision.BF16:
            lines.append(f"Main parameters of ours: {self.main_parameter}; others have none.")
        if self.clip:
            lines.append(f"Gradients are clipped to a global norm of {self.clip:g}, within the optimizer's time.")
        if on_gpu:
            lines.append("Host: until clipping and step() have returned. Other times are between events on the GPU.")
        return Report(titles, rows, lines, {"baseline": self.baseline, "contenders": found, "not_installed": missing})


class Trial:
    """A contender on this rank; called with the number of a round it takes its steps.

    Attributes:
        losses: Of all its steps.
    """

    def __init__(self, name: Name, plan: Step, device: torch.device) -> None:
        before = allocated(device)
        self.name = name
        self.contender = build(name, plan, device, plan.clip)
        self.losses: list[float] = []
        self._plan = plan
        self._device = device
        self._clock = Clock(device)
        self._rest_bytes = allocated(device) - before

    def __call__(self, index: int) -> list[float]:
        """Take the steps of a round; returns what one cost, under COLUMNS."""
        contender, clock, steps = self.contender, self._clock, self._plan.steps
        cost = dict.fromkeys(COLUMNS, 0.0)
        batches = [self._plan.batch_of(index * steps + number, self._device) for number in range(steps)]
        before = allocated(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        sent_before = self._bytes_sent()
        clock.settle()
        dist.barrier()
        started, cpu_before = time.perf_counter(), time.process_time()
        losses: list[Tensor] = []
        laps = []
        for tokens, targets in batches:
            start = clock.mark()
            loss = contender.model(tokens, targets)
            loss.backward()
            after_backward, returned = clock.mark(), time.perf_counter()
            if self._plan.clip:
                contender.clip_grad_norm_(self._plan.clip)
            contender.optimizer.step()
            cost["host_s"] += time.perf_counter() - returned
            laps.append((start, after_backward, clock.mark()))
            if isinstance(contender, Sharded):
                for part in PARTS:
                    cost[part] += getattr(contender.optimizer.last_step, part)
            contender.zero_grad()
            losses.append(loss.detach())
        contender.synchronize()
        clock.settle()
        cost["step_s"] = time.perf_counter() - started
        cost["cpu_s"] = time.process_time() - cpu_before
        for start, after_backward, after_step in laps:
            cost["forward_backward_s"] += clock.seconds(start, after_backward)
            cost["optimizer_s"] += clock.seconds(after_backward, after_step)
        cost["wire_bytes"] = self._bytes_sent() - sent_before
        self.losses += [float(loss) for loss in losses]
        del losses, loss
        cost = {title: value / steps for title, value in cost.items()}
        if self._device.type == "cuda":
            cost["peak_bytes"] = self._rest_bytes + torch.cuda.max_memory_allocated(self._device) - before
        self._rest_bytes += allocated(self._device) - before  # others' come and go in between
        cost["rest_bytes"] = self._rest_bytes
        return list(cost.values())

    def _bytes_sent(self) -> int:
        if self._device.type != "cpu":
            return 0
        dist.barrier()  # until then a rank may still be draining what it has handed to the kernel
        return bytes_sent_by_sockets() or 0

    def sent(self, at_sockets: float) -> str:
        """Bytes per parameter that a rank sends in a step, and who says so."""
        plan = self._plan
        share = (plan.ranks - 1) / plan.ranks
        expected = KINDS[self.name].wire_units * share * plan.torch_dtype.itemsize
        counted = (self.contender.wire_bytes or 0) / plan.num_parameters
        if self._device.type != "cpu" or bytes_sent_by_sockets() is None:
            return f"{counted:.2f} (counted)" if isinstance(self.contender, Sharded) else f"{expected:.2f} (computed)"
        seen = at_sockets / plan.num_parameters
        # What the optimizer moved, and the sockets have not seen.
        is_shared = counted > 0 and expected - seen > counted / 2
        return f"{seen:.2f} + {counted:.2f} in memory" if is_shared else f"{seen:.2f}"


def allocated(device: torch.device) -> int:
    """Bytes that tensors take of a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# In struct tcp_info (linux/tcp.h): where tcpi_bytes_sent and, behind it, tcpi_bytes_retrans lie, and where they end.
TCP_INFO_BYTES_SENT = 200
TCP_INFO_SIZE = 216


def bytes_sent_by_sockets() -> int | None:
    """Data bytes that this process has sent over the TCP connections it holds open; None where that is not known.

    The kernel counts them, whichever library sends, so the measure is the same for everybody. It includes the headers
    of gloo's messages.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
        except OSError:
            continue  # closed since it was listed
        if len(info) < TCP_INFO_SIZE:
            return None  # Linux before 4.19
        sent, resent = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
        total += sent - resent
    return total
