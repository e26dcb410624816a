"""Ranks compare notes before they exchange data, so that a disagreement is an error everywhere and a hang nowhere.

Each rank states what it is about to do as a list of labelled claims. Ranks first exchange a digest of that list; only
where digests differ do they exchange the claims themselves, find the first difference, and all raise the same error.

At construction the digest travels in a gather of texts. At each step it rides, with a loss scaler's flag and scale, in
one all-reduce of six integers: max(h) and max(-h) are equal in size only where all h are equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import Collectives

Claims = dict[str, str]
"""What a rank is about to do: label -> value, in the order in which differences should be reported."""

_THE_STEP = "this step"

_ABSENT = "nothing"


def require_agreement(collectives: Collectives, claims: Claims, refusal: Exception | None) -> None:
    """Check at construction that every rank's arguments are valid and equal. Collective, and host-blocking.

    Args:
        collectives: The group.
        claims: What this rank is about to build; ignored where ``refusal`` is given.
        refusal: The error with which this rank refuses its own arguments, or None.

    Raises:
        Exception: ``refusal`` itself, on the ranks that have one.
        ValueError: Another rank refuses its arguments, or claims differ; names the first difference and both sides.
    """
    message = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
    answers = [json.loads(text) for text in collectives.gather_texts(json.dumps([_digest(claims), message]))]
    if refusal is not None:
        raise refusal
    for rank, (_, refused) in enumerate(answers):
        if refused is not None:
            raise ValueError(f"rank {rank} refused its arguments: {refused}")
    if len({digest for digest, _ in answers}) > 1:
        raise ValueError(
            f"ranks were given different things to build; {_find_difference(collectives, claims)}; "
            "build the same model and optimizer on every rank of the group"
        )


def everyone(collectives: Collectives, work: Callable[[], Any]) -> list[Any]:
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
    """The ranks' comparison of notes at each step.

    On CPU a disagreement raises before any data moves. On an accelerator reading the answer would wait for the device,
    so it is read at the next step. Ranks that disagree about gradients or hyperparameters then get wrong numbers for
    one step but no hang, since every rank takes part in every bucket's collectives whatever its gradients. A rank that
    refuses a step raises at once there, and leaves the others to the backend's timeout.

    Attributes:
        scalers_have_parted: Whether the loss scalers of the ranks have been seen to find, or to hold, different things,
            so that gradients of different ranks are not on one scale until they are brought there.
    """

    def __init__(self, collectives: Collectives, device: torch.device, *, reconcile: Callable[[], None]) -> None:
        """Compare notes.

        Args:
            collectives: The ranks.
            device: Where the answer arrives.
            reconcile: Called on every rank before a disagreement is raised.
        """
        self.scalers_have_parted = False
        self._collectives = collectives
        self._reconcile = reconcile
        self._device = device
        self._unread: tuple[Tensor, torch.cuda.Event, Callable[[], Claims], bool] | None = None

    def check(
        self,
        claims: Callable[[], Claims],
        key: bytes,
        *,
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        are_reduced: bool,
        takes_one_scale: bool,
        refusal: Exception | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compare what every rank is about to do in this step. Collective.

        Args:
            claims: Makes the claims, now or later; called only where an error message needs them.
            key: Bytes that differ where the claims differ.
            found_inf: This rank's 0-d non-finite flag, or None where no loss scaler asked.
            grad_scale: This rank's 0-d loss scale, > 0, or None where gradients are not scaled.
            are_reduced: Whether backward has had gradients averaged, each on its rank's own scale.
            takes_one_scale: Whether it is too late to bring gradients to one scale, so that other scales on other ranks
                are a disagreement. The same on all ranks whose keys are equal.
            refusal: The error with which this rank refuses the step, or None.

        Returns:
            ``found_inf`` and ``grad_scale`` for the group, 0-d fp32 on the device: 1 where any rank's flag is set, or
            averages are void since their parts had different scales; and the smallest scale of a rank. None where this
            rank has no scaler, or no scale.

        Raises:
            Exception: ``refusal`` itself, on the ranks that have one.
            RuntimeError: Another rank refuses, or claims differ; names the first difference and both sides. On every
                rank.
        """
        self._read_previous()
        if refusal is not None:
            text = f"refused ({type(refusal).__name__}: {refusal})"
            claims, key = (lambda: {_THE_STEP: text}), text.encode()
        digest = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
        had_parted = self.scalers_have_parted
        note = torch.tensor([digest, -digest, 0, 0, 0, 0], dtype=torch.int64).to(self._device, non_blocking=True)
        if found_inf is not None:
            note[2] = (found_inf != 0).to(torch.int64).reshape(())
            note[3] = -note[2]
        if grad_scale is not None:
            # Positive floats are ordered like their bits.
            note[4] = grad_scale.to(torch.float32).reshape(1).view(torch.int32)[0]
            note[5] = -note[4]
        self._collectives.all_reduce_(note, dist.ReduceOp.MAX).wait()
        if note.is_cuda:
            self._read_later(note, claims, takes_one_scale)
        else:
            difference = self._difference(note, claims, takes_one_scale)
            if difference is not None or refusal is not None:
                self._reconcile()
            if difference is not None and refusal is None:
                raise RuntimeError(
                    f"ranks disagree about this step; {difference}; no parameter or state has been changed"
                )
        if refusal is not None:
            raise refusal
        if found_inf is not None or grad_scale is not None:
            is_void = note[2] != 0
            if are_reduced or takes_one_scale:
                is_void = torch.ones_like(is_void) if had_parted and are_reduced else is_void | (note[4] != -note[5])
            found_inf = is_void.to(torch.float32)
        return found_inf, None if grad_scale is None else (-note[5:]).to(torch.int32).view(torch.float32)[0]

    def _read_later(self, note: Tensor, claims: Callable[[], Claims], takes_one_scale: bool) -> None:
        host = torch.empty(note.shape, dtype=note.dtype, pin_memory=True)
        host.copy_(note, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread = (host, event, claims, takes_one_scale)

    def _read_previous(self) -> None:
        # It waits for the answer of the step before, which has long come: whether it has must not differ between ranks,
        # since a disagreement makes them exchange claims.
        if self._unread is not None:
            host, arrived, claims, takes_one_scale = self._unread
            self._unread = None
            arrived.synchronize()
            if (difference := self._difference(host, claims, takes_one_scale)) is not None:
                self._reconcile()
                raise RuntimeError(
                    f"ranks disagreed about the step before this one; {difference}; that step was taken with wrong "
                    "numbers, so go back to a checkpoint"
                )

    def _difference(self, note: Tensor, claims: Callable[[], Claims], takes_one_scale: bool) -> str | None:
        """The first difference between ranks, or None; collective where there is one."""
        digest, negated_digest, flag, negated_flag, scale, negated_scale = note.tolist()
        scales_differ = scale != -negated_scale
        self.scalers_have_parted |= flag != -negated_flag or scales_differ
        if digest == -negated_digest and not (scales_differ and takes_one_scale):
            return None
        return _find_difference(self._collectives, {_THE_STEP: "accepted", **claims()})


def _digest(claims: Claims) -> str:
    return hashlib.blake2b(repr(list(claims.items())).encode(), digest_size=16).hexdigest()


def _find_difference(collectives: Collectives, claims: Claims) -> str:
    """Exchange claims that are known to differ, and name the first difference. Collective."""
    return _first_difference([json.loads(text) for text in collectives.gather_texts(json.dumps(claims))])


def _first_difference(claims_of_ranks: list[Claims]) -> str:
    """The first claim on which a rank differs from rank 0, with both values and that rank."""
    reference = claims_of_ranks[0]
    for rank, claims in enumerate(claims_of_ranks):
        for expected, found in zip_longest(reference, claims):
            # Where the lists part, one of the two labels is what only its own side has.
            label = found if expected is None or expected in claims else expected
            ours, theirs = reference.get(label, _ABSENT), claims.get(label, _ABSENT)
            if ours != theirs:
                return f"the first difference is {label}: rank 0 has {ours}, rank {rank} has {theirs}"
    raise AssertionError("digests differ but claims do not")
