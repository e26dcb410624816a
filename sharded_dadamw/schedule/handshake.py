"""What ranks compare before each step, in one all-reduce of nine integers.

They are a digest of what a rank is about to do, a loss scaler's flag and scale, the smallest and the largest factor by
which averaged gradients were multiplied, and a sum over gradients. Only where ranks differ do they exchange
descriptions, and all raise the same error.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.agreement import Description, find_difference
from sharded_dadamw.comm.collectives import Collectives

LOSS_SCALE = "the loss scale"
FACTOR = "the factors by which gradients were multiplied"
ORDER = "the order in which optimizers of one process group have averaged gradients"
"""Labels about which there is more to say."""

_ADVICE = {
    LOSS_SCALE: "use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(process_group=...) with "
    "scaler.unscale_(optimizer) before each step, which agrees on what ranks have found",
    FACTOR: "gradients may only be multiplied by one number that is the same on every rank: use "
    "optimizer.clip_grad_norm_() in place of torch's, and give all loss scalers one scale; for any other change have "
    "DistributedDataParallel average them, and pass ShardingConfig(reduce_gradients=False)",
    ORDER: "what one of them sent was taken for another's, so drop the gradients of all; evaluate models in one order "
    "on every rank, or have them averaged in step() by ShardingConfig(overlap=False) with full gradients",
}

_DIGEST, _FOUND_INF, _SCALE, _LARGEST, _SMALLEST, _SUM = 0, 2, 3, 5, 6, 7
"""Places among the nine; behind digest, scale and sum there is the same number with the other sign."""

_CONSENT = "whether it can be done"
_NUMBER = "the number of the optimizer, as they were built"
_BITS_OF_INF = 0x7FF0000000000000


_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()
"""Of each process group, for all optimizers whose ranks it has."""


class Handshake:
    """What ranks tell each other ahead of a step or a clip.

    On CPU a disagreement raises before a parameter changes. On an accelerator reading the answer would wait for the
    device, so it is read at the next step. Ranks that disagree about gradients or hyperparameters then get wrong
    numbers for one step but no hang, since every rank takes part in every bucket's collectives whatever its gradients.
    A rank that refuses a step raises at once there, and leaves the others to the backend's timeout.

    Attributes:
        sums_differ: Whether the sums that ranks gave last differ; None while that is not known, or where all were 0.
    """

    def __init__(self, collectives: Collectives, device: torch.device, *, after_refusal: Callable[..., None]) -> None:
        """Compare what ranks are about to do; answers arrive on ``device``.

        ``after_refusal(differ=...)`` is called on every rank before the refusal is raised. Where ranks do not differ,
        their averages are still equal.
        """
        self._collectives = collectives
        group = collectives.group
        self._number = 0 if group is None else next(_numbers.setdefault(group, itertools.count()))
        self._after_refusal = after_refusal
        self._device = device
        self.sums_differ: bool | None = None
        self._unread: tuple[Tensor, torch.cuda.Event, Callable[[], Description], float, bool] | None = None

    def check(
        self,
        describe: Callable[[], Description],
        key: bytes,
        *,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        factors: Sequence[Tensor],
        tolerance: float,
        sums: Tensor | None,
        updates: bool,
        refusal: Exception | None,
    ) -> Tensor | None:
        """Compare what every rank is about to do in this step. Collective.

        Args:
            describe: Makes the description, now or later; called only where an error message needs it.
            key: Bytes that differ where descriptions differ.
            found_inf: This rank's 0-d non-finite flag, or None where no loss scaler asked.
            grad_scale: This rank's 0-d loss scale, > 0, or None where gradients are not scaled.
            factors: fp64 [k] each, >= 0: by what averages were multiplied since they were made; nan if unknown.
            tolerance: By how much factors may differ relatively, between ranks and on one.
            sums: 0-d int64, >= 0, to be compared for ``sums_differ``, where it is of interest to all ranks.
            updates: Whether it changes parameters, as a clip does not.
            refusal: The error with which this rank refuses the step, or None; raised here.

        Returns:
            0-d fp32 on the device, 1 where the step is void: where any rank's flag is set, and where scales or factors
            differ. None where this rank has none of them.

        Raises:
            RuntimeError: Another rank refuses, or ranks differ; names the first difference and both sides. Everywhere.
        """
        self._read_previous()
        key = b"%d %s" % (self._number, key)
        if refusal is not None:
            text = f"refused ({type(refusal).__name__}: {refusal})"
            describe, key = (lambda: {_CONSENT: text}), text.encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        # Positive floats are ordered like their bits; of factors there are the largest and the smallest, 0 and inf
        # where there are none.
        nothing = [0, -_BITS_OF_INF]
        note = torch.tensor([digest, -digest, 0, 0, 0, *nothing, 0, 0], dtype=torch.int64).to(
            self._device, non_blocking=True
        )
        if found_inf is not None:
            note[_FOUND_INF] = (found_inf != 0).to(torch.int64).reshape(())
        if grad_scale is not None:
            note[_SCALE] = grad_scale.to(torch.float64).reshape(1).view(torch.int64)[0]
            note[_SCALE + 1] = -note[_SCALE]
        if factors:
            known = torch.cat([*factors, factors[0].new_full((1,), torch.nan)])
            note[_LARGEST] = known.nan_to_num(nan=0.0, posinf=torch.inf).amax().reshape(1).view(torch.int64)[0]
            note[_SMALLEST] = -known.nan_to_num(nan=torch.inf, posinf=torch.inf).amin().reshape(1).view(torch.int64)[0]
        if sums is not None:
            note[_SUM], note[_SUM + 1] = sums, -sums
        self._collectives.all_reduce_(note, dist.ReduceOp.MAX)
        difference = None
        if note.is_cuda:
            self._read_later(note, describe, tolerance, updates)
        else:
            difference = self._difference(note, describe, tolerance)
        if difference is not None or refusal is not None:
            self._after_refusal(differ=difference is not None)
            raise refusal or RuntimeError(
                f"ranks disagree about this step; {difference}; no parameter or state has been changed, but drop "
                "gradients that backward has averaged by optimizer.zero_grad()"
            )
        if found_inf is None and grad_scale is None and not factors:
            return None
        return ((note[_FOUND_INF] != 0) | _differ(note, tolerance)).to(torch.float32)

    def _read_later(self, note: Tensor, describe: Callable[[], Description], tolerance: float, updates: bool) -> None:
        host = torch.empty(note.shape, dtype=note.dtype, pin_memory=True)
        host.copy_(note, non_blocking=True)
        arrived = torch.cuda.current_stream(self._device).record_event()  # which need not be the current device
        self._unread = (host, arrived, describe, tolerance, updates)

    def _read_previous(self) -> None:
        # It waits for the answer of the step before, which has long come, or of a clip of this one, behind backward.
        # Whether it has come must not differ between ranks, since a disagreement makes them exchange descriptions.
        if self._unread is not None:
            host, arrived, describe, tolerance, has_updated = self._unread
            self._unread = None
            arrived.synchronize()
            if (difference := self._difference(host, describe, tolerance)) is not None:
                self._after_refusal(differ=True)
                what = "step" if has_updated else "clip_grad_norm_()"
                outcome = "was taken with wrong numbers, so go back to a checkpoint"
                if not has_updated or _are_equal(host, _DIGEST):  # scales or factors differed, which made it void
                    outcome = "has changed nothing"
                raise RuntimeError(f"ranks disagreed about the {what} before this call; {difference}; that {outcome}")

    def _difference(self, note: Tensor, describe: Callable[[], Description], tolerance: float) -> str | None:
        """The first difference between ranks, or None; collective where there is one."""
        if note[_SUM]:
            self.sums_differ = not _are_equal(note, _SUM)
        if _are_equal(note, _DIGEST) and not _differ(note, tolerance):
            return None
        description = {_CONSENT: "agreed", _NUMBER: str(self._number), **describe()}
        difference = find_difference(self._collectives, description, _ADVICE)
        # Or else every rank has changed gradients in the same way, but not by one number.
        return difference or f"{FACTOR} are {description.get(FACTOR)} on every rank; {_ADVICE[FACTOR]}"


def _are_equal(note: Tensor, place: int) -> Tensor:
    """Whether ranks gave the same number; the maximum of all h and that of all -h are equal in size only then."""
    return note[place] == -note[place + 1]


def _differ(note: Tensor, tolerance: float) -> Tensor:
    """Whether ranks have different loss scales, or have changed gradients by different factors, by what they sent."""
    largest, smallest = (part.view(torch.float64)[0] for part in (note[_LARGEST, None], -note[_SMALLEST, None]))
    are_equal_now = (note[_SUM] != 0) & _are_equal(note, _SUM)  # as DistributedDataParallel leaves those of step 1
    return ~_are_equal(note, _SCALE) | ((largest > smallest * (1 + tolerance)) & ~are_equal_now)
