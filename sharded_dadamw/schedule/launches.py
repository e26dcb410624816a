"""In which order optimizers that share a process group launch reductions, which has to be the same on all ranks.

What a rank launches first on a group, the backend takes for what the others launch first there, whosever it is. One
optimizer has one order for its buckets. Which of several optimizers comes first is up to backward.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from sharded_dadamw.comm.collectives import Collectives

_numbers = itertools.count()
"""Of the optimizers of this process; those of one group are built in the same order on all its ranks."""

_changes: weakref.WeakKeyDictionary[dist.ProcessGroup, list[tuple[int, str]]] = weakref.WeakKeyDictionary()
"""The launches on each group where they change from one optimizer to another: its number, and the bucket."""


class Launches:
    """The launches of one optimizer, among those of the others on its process group."""

    def __init__(self, collectives: Collectives) -> None:
        group, self._number = collectives.everyone.group, next(_numbers)
        self._changes = [] if group is None else _changes.setdefault(group, [])

    def note(self, bucket: str) -> None:
        """Take note of a launch; more than once does no harm."""
        if not self._changes or self._changes[-1][0] != self._number:
            self._changes.append((self._number, bucket))

    @property
    def order(self) -> str:
        """In which order optimizers took turns, to be compared between ranks; empty where there was one."""
        numbers = sorted({number for number, _ in self._changes})  # there may be others, not on all of these ranks
        texts = [f"{bucket} of optimizer {numbers.index(number)}" for number, bucket in self._changes]
        return ", ".join(texts) if len(numbers) > 1 else ""

    def agree(self) -> None:
        """Forget them, since they were the same on all ranks."""
        self._changes.clear()

    def drop(self) -> None:
        """Forget those of this optimizer, whose gradients are dropped."""
        self._changes[:] = [change for change in self._changes if change[0] != self._number]
