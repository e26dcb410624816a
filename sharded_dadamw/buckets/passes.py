"""Gradients of several backward passes of one rank, added in the order of ``sharded_dadamw.comm.tree``.

Autograd would add them one after the other. Instead each is taken out of ``p.grad`` as it comes, and waits in the
buffer of its level until its neighbour is there; so there are at most log2 of the passes more buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_dadamw.comm.tree import carries


class Passes:
    """The passes of one bucket's gradients within a step.

    Attributes:
        number: How many there are.
        counts: Per slot how many of its gradients have come.
    """

    def __init__(self, number: int, num_slots: int, new_views: Callable[[], Sequence[Tensor]]) -> None:
        """``new_views`` allocates a flat buffer, and returns the place of each slot's gradient in it."""
        self.number = number
        self.counts = [0] * num_slots
        self._new_views = new_views
        self._levels: list[Sequence[Tensor]] = []

    def forget(self) -> None:
        """Begin anew."""
        self.counts = [0] * len(self.counts)

    def free(self) -> None:
        """Give back the memory of gradients that wait."""
        self._levels.clear()

    def is_last(self, slot: int) -> bool:
        """Whether the next gradient of a slot completes it."""
        return self.counts[slot] % self.number == self.number - 1  # of the last step all have come

    def add(self, slot: int, grad: Tensor, total: Tensor | None) -> None:
        """Add a gradient to those that wait; with the last one, the sum of all goes into ``total``."""
        levels = carries(self.counts[slot], self.number)
        self.counts[slot] += 1
        into = self._level(len(levels))[slot] if total is None else total
        if not levels:
            into.copy_(grad)
        for level in levels:
            left = self._level(level)[slot]
            grad = torch.add(left, grad, out=into if level == levels[-1] else left)

    def _level(self, level: int) -> Sequence[Tensor]:
        while len(self._levels) <= level:
            self._levels.append(self._new_views())
        return self._levels[level]
