"""Times the parts of a step on the host, and counts the bytes it sends."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sharded_dadamw.comm.collectives import Collectives


@dataclass(frozen=True, slots=True)
class StepCost:
    """What the most recent step cost this rank.

    Attributes:
        reduce_s: Host seconds spent launching and waiting for reductions outside of backward, those of
            ``clip_grad_norm_`` included.
        update_s: Host seconds in the update. On an accelerator the time to launch it, unless state is in host memory.
        gather_s: Host seconds launching and waiting for all-gathers within the step. What is left in flight
            (``attach``) is waited for later, and not counted.
        wire_bytes: Gradient and parameter bytes this rank sent.
    """

    reduce_s: float
    update_s: float
    gather_s: float
    wire_bytes: int


class StepClock:
    """Adds up the host seconds of a step, lap by lap, by their part; ``last`` is what the step before has cost."""

    def __init__(self, collectives: Collectives) -> None:
        self.last = StepCost(0.0, 0.0, 0.0, 0)
        self._collectives = collectives
        self.skip_bytes()
        self._seconds = {"reduce_s": 0.0, "update_s": 0.0, "gather_s": 0.0}
        self._mark = 0.0

    def start(self) -> None:
        """Begin a lap."""
        self._mark = time.perf_counter()

    def lap(self, part: str) -> None:
        """End a lap, which belongs to a part, and begin the next."""
        mark = time.perf_counter()
        self._seconds[part] += mark - self._mark
        self._mark = mark

    def stop(self) -> None:
        """End the last lap, which published parameters, and the step; begin the next."""
        self.lap("gather_s")
        self.last = StepCost(**self._seconds, wire_bytes=self._collectives.bytes_sent - self._sent_before)
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self.skip_bytes()

    def skip_bytes(self) -> None:
        """Count no bytes that have been sent so far."""
        self._sent_before = self._collectives.bytes_sent
