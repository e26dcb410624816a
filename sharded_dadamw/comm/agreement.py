"""Ranks compare before they change parameters, so that a disagreement is an error everywhere, and on CPUs no hang.

Each rank describes what it is about to do, label by label. Ranks first exchange a digest of that; only where digests
differ do they exchange the descriptions themselves, find the first difference, and all raise the same error.

Here the digest travels in a gather of texts. At each step, ``schedule.handshake`` has it ride in one all-reduce.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import TypeVar

from sharded_dadamw.comm.calls import here
from sharded_dadamw.comm.collectives import Collectives

T = TypeVar("T")

Description = dict[str, str]
"""What a rank is about to do: label -> value, in the order in which differences should be reported."""

_ABSENT = "nothing"


class Refusal:
    """What one rank has to object, kept until the others can hear of it: they are waiting.

    As a context it catches whatever is raised inside; ``error`` is the first of that, or None.
    """

    def __init__(self) -> None:
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
    arguments: Mapping[str, object],
    refusal: Exception | None,
    *,
    advice: str = "build the same model and optimizer on every rank of the group",
) -> None:
    """Check that every rank's arguments are valid and equal. Collective, and host-blocking.

    They are compared as texts. With ``refusal`` this rank refuses its own, which then are ignored; it is raised here.

    Raises:
        ValueError: Another rank refuses its arguments, or ranks differ; names the first difference and both sides.
    """
    description = {"the call": here.call, **{label: str(value) for label, value in arguments.items()}}
    message = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
    answers = [json.loads(text) for text in collectives.gather_texts(json.dumps([_digest(description), message]))]
    if refusal is not None:
        raise refusal
    for rank, (_, refused) in enumerate(answers):
        if refused is not None:
            raise ValueError(f"rank {rank} refused its arguments of {here.call}: {refused}")
    if len({digest for digest, _ in answers}) > 1:
        raise ValueError(
            f"ranks were given different arguments in {here.call}; "
            f"{find_difference(collectives, description)}; {advice}"
        )


def on_all_or_none(collectives: Collectives, work: Callable[[], T]) -> T:
    """Return what this rank's ``work`` does, if it has not failed on any rank. Collective.

    Raises:
        Exception: What ``work`` raised on the first rank where it did: itself there, and elsewhere the nearest of
            OSError, ValueError and RuntimeError, naming the rank.
    """
    failure = None
    try:
        result = work()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    nearest = next((name for name, kind in _KINDS.items() if isinstance(failure, kind)), "RuntimeError")
    note = None if failure is None else [nearest, str(failure)]
    for rank, text in enumerate(collectives.gather_texts(json.dumps(note))):
        first = json.loads(text)
        if first is not None:
            if failure is not None and rank == collectives.rank:
                raise failure
            kind, message = first
            raise _KINDS[kind](f"rank {rank}, in {here.call}: {message}") from failure
    return result


_KINDS: dict[str, type[Exception]] = {"OSError": OSError, "ValueError": ValueError, "RuntimeError": RuntimeError}


def _digest(description: Description) -> str:
    return hashlib.blake2b(repr(list(description.items())).encode(), digest_size=16).hexdigest()


def find_difference(
    collectives: Collectives, description: Description, advice: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Exchange descriptions, and say where a rank first differs from rank 0, with advice on that label. Collective."""
    texts = collectives.gather_texts(json.dumps(description))
    reference, *others = (json.loads(text) for text in texts)
    for rank, other in enumerate(others, start=1):
        for expected, found in zip_longest(reference, other):
            # Where the lists part, one of the two labels is what only its own side has.
            label = found if expected is None or expected in other else expected
            ours, theirs = reference.get(label, _ABSENT), other.get(label, _ABSENT)
            if ours != theirs:
                text = f"the first difference is {label}: rank 0 has {ours}, rank {rank} has {theirs}"
                return f"{text}; {advice[label]}" if label in advice else text
    return None
