"""One training step of the sharded optimizer beside that of its peers."""

import os
import socket
import struct
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from launch.contenders import Sharded, largest_over_ranks
from launch.options import Precision
from scripts.bench import harness
from scripts.bench.harness import Clock, OnDevice, Report, ms, spread
from scripts.bench.peers import KINDS, Contest, build

# What is measured of one contender's steps in one round, per step, in seconds and bytes; over ranks the largest counts.
# cpu_s is what the process's threads used of the cores: the figure that survives a busy machine. host_s is what
# clipping and step() took until they returned; forward_backward_s and optimizer_s are the device's own time.
COLUMNS = (
    *("step_s", "forward_backward_s", "optimizer_s", "host_s", "reduce_s", "update_s", "gather_s"),
    *("cpu_s", "socket_bytes", "counted_bytes", "rest_bytes", "peak_bytes"),
)
PARTS = ("reduce_s", "update_s", "gather_s")


@dataclass(frozen=True, kw_only=True)
class Step(OnDevice, Contest):
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

    def measure(self) -> Report:
        trials: dict[str, Trial] = {}
        missing: dict[str, str] = {}
        for name in self.names:
            try:
                trials[name] = Trial(name, self)
            except ImportError as error:
                missing[name] = str(error)
        harness.say(f"contenders: {', '.join(trials)}")
        samples = self.interleave(list(trials.values()))
        losses = torch.tensor([trial.losses for trial in trials.values()], dtype=torch.float64).to(self.torch_device)
        dist.all_reduce(losses)
        losses = losses.cpu() / self.ranks
        rows, found = [], {}
        baseline = next(iter(trials))
        for number, (name, trial) in enumerate(trials.items()):
            of_one = dict(zip(COLUMNS, samples[:, number].T, strict=True))
            difference = float(((losses[number] - losses[0]).abs() / losses[0].abs()).max())
            state_bytes = largest_over_ranks(trial.contender.state_bytes, self.torch_device)
            row = {
                "contender": name,
                "step ms": ms(of_one["step_s"]),
                f"ratio to {baseline}: median [quartiles]": spread(samples[:, number, 0] / samples[:, 0, 0]),
            }
            rows.append(row | self.cells(of_one, KINDS[name].settings is not None, state_bytes, difference))
            found[name] = {"losses": losses[number].tolist(), "rounds": {key: of_one[key].tolist() for key in COLUMNS}}
        rows += [{"contender": name, "step ms": f"not installed: {reason}"} for name, reason in missing.items()]
        return Report(rows, self.lines, {"contenders": found, "not_installed": missing})

    def cells(self, measured: dict[str, Tensor], is_ours: bool, state_bytes: int, difference: float) -> dict[str, str]:
        """Of a contender's row, of what was measured in each round."""
        parts = f" ({'+'.join(ms(measured[part]) for part in PARTS)})" if is_ours else ""
        typical = {key: harness.median(values) for key, values in measured.items()}
        sent, counted = (typical[key] / self.num_parameters for key in ("socket_bytes", "counted_bytes"))
        cells = {
            "forward+backward ms": ms(measured["forward_backward_s"]),
            "optimizer ms": ms(measured["optimizer_s"]) + parts,
            "CPU ms": ms(measured["cpu_s"]),
            "state MB per rank": f"{state_bytes / 1e6:.1f}",
            "sent B per parameter": f"{sent:.2f}" + (f" ({counted:.2f})" if is_ours else ""),
            "largest loss difference": f"{difference:.1e}" if difference else "0",
        }
        if self.torch_device.type == "cuda":
            cells["host ms"] = ms(measured["host_s"])
            cells["GPU MB at rest, at most"] = f"{typical['rest_bytes'] / 1e6:.0f}, {typical['peak_bytes'] / 1e6:.0f}"
        return cells

    @property
    def lines(self) -> list[str]:
        """What is under the table."""
        lines = [
            f"{self.model_in_words}, {self.steps} steps per round; {self.set_up}",
            "Wrappers reduce gradients within backward, and so do ours unless there is no overlap. In brackets, what "
            "is left for step() of reduction + update + gather, on the host; attached, gathers end in the next "
            "forward. CPU: what all threads of the rank used of the cores in a step; it hardly feels a busy machine.",
            "Sent: data bytes of this rank's TCP connections, as the kernel counts them; in brackets by ours, whose "
            "bytes go through memory between ranks of one host.",
        ]
        if self.dtype is Precision.BF16:
            kept = "16 bits of a remainder" if self.remainder else "fp32 main parameters"
            lines.append(f"Ours keeps {kept}; others keep none.")
        if self.clip:
            lines.append(f"Gradients are clipped to a global norm of {self.clip:g}, within the optimizer's time.")
        if self.torch_device.type == "cuda":
            lines.append("Host: until clipping and step() have returned. Other times are between events on the GPU.")
        return lines


class Trial:
    """A contender on this rank; called with the number of a round it takes its steps.

    Attributes:
        losses: Of all its steps.
    """

    def __init__(self, name: str, plan: Step) -> None:
        self._allocated = partial(allocated, plan.torch_device)
        before = self._allocated()
        self.contender = build(name, plan, plan.clip)
        self.losses: list[float] = []
        self._plan = plan
        self._rest_bytes = self._allocated() - before

    def __call__(self, index: int) -> list[float]:
        """Take the steps of a round; returns what one cost, under COLUMNS."""
        contender, plan, clock = self.contender, self._plan, Clock(self._plan.torch_device)
        cost = dict.fromkeys(COLUMNS, 0.0)
        batches = [plan.batch_of(index * plan.steps + number) for number in range(plan.steps)]
        before = self._allocated()
        if clock.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        sent_before = bytes_sent_by_sockets()
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
            if plan.clip:
                contender.clip_grad_norm_(plan.clip)
            contender.optimizer.step()
            cost["host_s"] += time.perf_counter() - returned
            laps.append((start, after_backward, clock.mark()))
            if isinstance(contender, Sharded):
                cost["counted_bytes"] += contender.optimizer.last_step.wire_bytes
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
        dist.barrier()  # until then a rank may still be draining what it has handed to the kernel
        cost["socket_bytes"] = bytes_sent_by_sockets() - sent_before
        self.losses += [float(loss) for loss in losses]
        del losses, loss
        cost = {title: value / plan.steps for title, value in cost.items()}
        if clock.on_gpu:
            cost["peak_bytes"] = self._rest_bytes + torch.cuda.max_memory_allocated() - before
        self._rest_bytes += self._allocated() - before  # others' come and go in between
        cost["rest_bytes"] = self._rest_bytes
        return list(cost.values())


def allocated(device: torch.device) -> int:
    """Bytes that tensors take of a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


# In struct tcp_info (linux/tcp.h): where tcpi_bytes_sent and, behind it, tcpi_bytes_retrans lie, and where they end.
TCP_INFO_BYTES_SENT = 200
TCP_INFO_SIZE = 216


def bytes_sent_by_sockets() -> int:
    """Data bytes that this process has sent over the TCP connections it holds open; 0 where that is not known.

    The kernel counts them, whichever library sends, so the measure is the same for everybody. It includes the headers
    of gloo's messages.
    """
    if sys.platform != "linux":
        return 0
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
            return 0  # Linux before 4.19
        sent, resent = struct.unpack_from("=QQ", info, TCP_INFO_BYTES_SENT)
        total += sent - resent
    return total
