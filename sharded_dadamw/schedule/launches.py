"""In which order optimizers that share a process group launch reductions, which has to be the same on all ranks.

What a rank launches first on a group, the backend takes for what the others launch first there, whosever it is. One
optimizer has one order for its buckets. Which of several optimizers comes first is up to backward.
"""

from __future__ import annotations

import itertools
import weakref

import torch.distributed as dist

from sharded_dadamw.comm.collectives import BackendVerbs, Collectives


class _OfAll:
    """The launches of all optimizers of a group, where they change from one to another: its number, and its bucket."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.changes: list[tuple[int, str]] = []


_of_all: weakref.WeakKeyDictionary[dist.ProcessGroup, _OfAll] = weakref.WeakKeyDictionary()


class Launches:
    """The launches of one optimizer, among those of the others on its process group."""

    def __init__(self, collectives: Collectives) -> None:
        """Number this optimizer. All ranks build the same ones in the same order."""
        everyone, self._of_all = collectives.everyone, _OfAll()
        if isinstance(everyone, BackendVerbs):
            self._of_all = _of_all.setdefault(everyone.group, self._of_all)
        self._number = next(self._of_all.numbers)

    def note(self, bucket: str) -> None:
        """Take note of a launch; more than once does no harm."""
        changes = self._of_all.changes
        if not changes or changes[-1][0] != self._number:
            changes.append((self._number, bucket))

    @property
    def order(self) -> str:
        """In which order optimizers took turns, to be compared between ranks; empty where there was one."""
        changes = self._of_all.changes
        numbers = sorted({number for number, _ in changes})  # others on this group may be of fewer ranks
        texts = [f"{bucket} of optimizer {numbers.index(number)}" for number, bucket in changes]
        return ", ".join(texts) if len(numbers) > 1 else ""

    def agree(self) -> None:
        """Forget them, since they were the same on all ranks."""
        self._of_all.changes.clear()

    def drop(self) -> None:
        """Forget those of this optimizer, whose gradients are dropped."""
        self._of_all.changes[:] = [change for change in self._of_all.changes if change[0] != self._number]
