"""Ranks compare before they change parameters, so that a disagreement is an error everywhere, and on CPUs no hang.

Each rank describes what it is about to do, label by label. Ranks first exchange a digest of that; only where digests
differ do they exchange the descriptions themselves, find the first difference, and all raise the same error.

At construction the digest travels in a gather of texts. At each step it rides, with a loss scaler's flag and scale and
with what became of averaged gradients, in one all-reduce of nine integers: max(h) and max(-h) are equal in size only
where all h are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives

Description = dict[str, str]
"""What a rank is about to do: label -> value, in the order in which differences should be reported."""

LOSS_SCALE = "the loss scale"
FACTOR = "the factors by which gradients were multiplied"
"""Labels about which there is more to say."""

_ADVICE = {
    LOSS_SCALE: "use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(process_group=...) with "
    "scaler.unscale_(optimizer) before each step, which agrees on what ranks have found",
    FACTOR: "gradients may only be multiplied by one number that is the same on every rank: use "
    "optimizer.clip_grad_norm_() in place of torch's, and give all loss scalers one scale; for any other change have "
    "DistributedDataParallel average them, and pass ShardingConfig(reduce_gradients=False)",
}

_BITS_OF_INF = 0x7FF0000000000000

_THE_STEP = "this step"

_ABSENT = "nothing"


class Refusal:
    """What one rank has to object, kept until the others can hear of it: they are waiting.

    As a context it catches whatever is raised inside.

    Attributes:
        error: The first error, or None.
    """

    def __init__(self) -> None:
        """Object to nothing so far."""
        self.error: Exception | None = None

    def __enter__(self) -> None:
        """Begin to catch."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        """Keep the error, unless there is one already."""
        if isinstance(error, Exception):
            self.error = self.error or error
        return isinstance(error, Exception)


def require_agreement(
    collectives: Collectives,
    description: Description,
    refusal: Exception | None,
    *,
    advice: str = "build the same model and optimizer on every rank of the group",
) -> None:
    """Check that every rank's arguments are valid and equal. Collective, and host-blocking.

    Args:
        collectives: The group.
        description: What this rank was given; ignored where ``refusal`` is given.
        refusal: The error with which this rank refuses its own arguments, or None.
        advice: What to do where they differ.

    Raises:
        Exception: ``refusal`` itself, on the ranks that have one.
        ValueError: Another rank refuses its arguments, or ranks differ; names the first difference and both sides.
    """
    message = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
    answers = [json.loads(text) for text in collectives.gather_texts(json.dumps([_digest(description), message]))]
    if refusal is not None:
        raise refusal
    for rank, (_, refused) in enumerate(answers):
        if refused is not None:
            raise ValueError(f"rank {rank} refused its arguments: {refused}")
    if len({digest for digest, _ in answers}) > 1:
        raise ValueError(
            f"ranks were given different arguments; {_find_difference(collectives, description)}; {advice}"
        )


def on_all_or_none(collectives: Collectives, work: Callable[[], Any]) -> list[Any]:
    """Do something that may fail on any rank, and go on only if it has not failed on one. Collective.

    Args:
        collectives: The ranks.
        work: This rank's part; returns what all ranks are to know of it, as JSON has it.

    Returns:
        What ``work`` returned on each rank, in rank order.

    Raises:
        Exception: What ``work`` raised on the first rank where it did: itself there, and elsewhere the nearest of
            OSError, ValueError and RuntimeError, naming the rank.
    """
    failure, result = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    note = None if failure is None else [_kind_of(failure), str(failure)]
    answers = [json.loads(text) for text in collectives.gather_texts(json.dumps([note, result]))]
    for rank, (first, _) in enumerate(answers):
        if first is not None:
            if failure is not None and rank == collectives.rank:
                raise failure
            kind, message = first
            raise _KINDS[kind](f"rank {rank}: {message}") from failure
    return [result for _, result in answers]


_KINDS: dict[str, type[Exception]] = {"OSError": OSError, "ValueError": ValueError, "RuntimeError": RuntimeError}


def _kind_of(error: Exception) -> str:
    return next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "RuntimeError")


class StepAgreement:
    """The ranks' handshake at each step.

    On CPU a disagreement raises before a parameter changes. On an accelerator reading the answer would wait for the
    device, so it is read at the next step. Ranks that disagree about gradients or hyperparameters then get wrong
    numbers for one step but no hang, since every rank takes part in every bucket's collectives whatever its gradients.
    A rank that refuses a step raises at once there, and leaves the others to the backend's timeout.

    Attributes:
        sums_differ: Whether the sums that ranks gave last differ; None while that is not known, or where all were 0.
    """

    def __init__(self, collectives: Collectives, device: torch.device, *, refuse: Callable[..., None]) -> None:
        """Compare what ranks are about to do.

        Args:
            collectives: The ranks.
            device: Where the answer arrives.
            refuse: Called on every rank before a refusal is raised, with ``differ=True`` where ranks differ; what all
                refuse alike leaves their averages alike.
        """
        self._collectives = collectives
        self._refuse = refuse
        self._device = device
        self.sums_differ: bool | None = None
        self._unread: tuple[Tensor, torch.cuda.Event, Callable[[], Description], float] | None = None

    def check(
        self,
        describe: Callable[[], Description],
        key: bytes,
        *,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        factors: Sequence[Tensor] = (),
        tolerance: float = 0.0,
        sums: Tensor | None = None,
        refusal: Exception | None,
    ) -> Tensor | None:
        """Compare what every rank is about to do in this step. Collective.

        Args:
            describe: Makes the description, now or later; called only where an error message needs it.
            key: Bytes that differ where descriptions differ.
            found_inf: This rank's 0-d non-finite flag, or None where no loss scaler asked.
            grad_scale: This rank's 0-d loss scale, > 0, or None where gradients are not scaled.
            factors: fp64 [k] each, >= 0: by what factors averages were multiplied since they were made; nan where that
                cannot be told.
            tolerance: By how much factors may differ relatively, between ranks and on one.
            sums: 0-d int64, >= 0, to be compared for ``sums_differ``, where it is of interest to all ranks.
            refusal: The error with which this rank refuses the step, or None.

        Returns:
            0-d fp32 on the device, 1 where the step is void: where any rank's flag is set, and where scales or factors
            differ. None where this rank has none of them.

        Raises:
            Exception: ``refusal`` itself, on the ranks that have one.
            RuntimeError: Another rank refuses, or ranks differ; names the first difference and both sides. On
                every rank.
        """
        self._read_previous()
        if refusal is not None:
            text = f"refused ({type(refusal).__name__}: {refusal})"
            describe, key = (lambda: {_THE_STEP: text}), text.encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        # Positive floats are ordered like their bits; of factors there are the largest and the smallest, 0 and inf
        # where there are none.
        nothing = [0, -_BITS_OF_INF]
        note = torch.tensor([digest, -digest, 0, 0, 0, *nothing, 0, 0], dtype=torch.int64).to(
            self._device, non_blocking=True
        )
        if found_inf is not None:
            note[2] = (found_inf != 0).to(torch.int64).reshape(())
        if grad_scale is not None:
            note[3] = grad_scale.to(torch.float64).reshape(1).view(torch.int64)[0]
            note[4] = -note[3]
        if factors:
            known = torch.cat([*factors, factors[0].new_full((1,), torch.nan)])
            note[5] = known.nan_to_num(nan=0.0, posinf=torch.inf).amax().reshape(1).view(torch.int64)[0]
            note[6] = -known.nan_to_num(nan=torch.inf, posinf=torch.inf).amin().reshape(1).view(torch.int64)[0]
        if sums is not None:
            note[7], note[8] = sums, -sums
        self._collectives.all_reduce_(note, dist.ReduceOp.MAX)
        difference = None
        if note.is_cuda:
            self._read_later(note, describe, tolerance)
        else:
            difference = self._difference(note, describe, tolerance)
        if difference is not None or refusal is not None:
            self._refuse(differ=difference is not None)
            raise refusal or RuntimeError(
                f"ranks disagree about this step; {difference}; no parameter or state has been changed, but drop "
                "gradients that backward has averaged by optimizer.zero_grad()"
            )
        if found_inf is None and grad_scale is None and not factors:
            return None
        return ((note[2] != 0) | _differ(note, tolerance)).to(torch.float32)

    def _read_later(self, note: Tensor, describe: Callable[[], Description], tolerance: float) -> None:
        host = torch.empty(note.shape, dtype=note.dtype, pin_memory=True)
        host.copy_(note, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread = (host, event, describe, tolerance)

    def _read_previous(self) -> None:
        # It waits for the answer of the step before, which has long come: whether it has must not differ between ranks,
        # since a disagreement makes them exchange descriptions.
        if self._unread is not None:
            host, arrived, describe, tolerance = self._unread
            self._unread = None
            arrived.synchronize()
            if (difference := self._difference(host, describe, tolerance)) is not None:
                self._refuse(differ=True)
                was_void = host[0] == -host[1]
                outcome = (
                    "has changed nothing" if was_void else "was taken with wrong numbers, so go back to a checkpoint"
                )
                raise RuntimeError(f"ranks disagreed about the step before this one; {difference}; that step {outcome}")

    def _difference(self, note: Tensor, describe: Callable[[], Description], tolerance: float) -> str | None:
        """The first difference between ranks, or None; collective where there is one."""
        if note[7]:
            self.sums_differ = bool(note[7] != -note[8])
        if note[0] == -note[1] and not _differ(note, tolerance):
            return None
        return _find_difference(self._collectives, {_THE_STEP: "accepted", **describe()})


def _differ(note: Tensor, tolerance: float) -> Tensor:
    """Whether ranks have different loss scales, or have changed averages by different factors, by what they sent."""
    largest, smallest = note[5:6].view(torch.float64)[0], (-note[6:7]).view(torch.float64)[0]
    return (note[3] != -note[4]) | (largest > smallest * (1 + tolerance))


def _digest(description: Description) -> str:
    return hashlib.blake2b(repr(list(description.items())).encode(), digest_size=16).hexdigest()


def _find_difference(collectives: Collectives, description: Description) -> str:
    """Exchange descriptions that are known to differ, and name the first difference. Collective."""
    return _first_difference([json.loads(text) for text in collectives.gather_texts(json.dumps(description))])


def _first_difference(descriptions: list[Description]) -> str:
    """The first label on which a rank differs from rank 0, with both values and that rank."""
    reference = descriptions[0]
    for rank, description in enumerate(descriptions):
        for expected, found in zip_longest(reference, description):
            # Where the lists part, one of the two labels is what only its own side has.
            label = found if expected is None or expected in description else expected
            ours, theirs = reference.get(label, _ABSENT), description.get(label, _ABSENT)
            if ours != theirs:
                advice = f"; {_ADVICE[label]}" if label in _ADVICE else ""
                return f"the first difference is {label}: rank 0 has {ours}, rank {rank} has {theirs}{advice}"
    # Every rank has changed gradients in the same way, but not by one number.
    return f"{FACTOR} are {reference.get(FACTOR, _ABSENT)} on every rank; {_ADVICE[FACTOR]}"
