"""The data verbs by messages of gloo: every rank sends each slice straight to its owner.

gloo's own reduce-scatter is an all-reduce inside, and its all-gather a ring. Both take longer than to move the
``(N-1)/N`` of the bytes that have to move, as does its all-to-all with a sum afterwards.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, BackendVerbs
from sharded_dadamw.comm.means import PIECE_BYTES, average, sum_dtype
from sharded_dadamw.comm.pending import Pending

_PIECES_IN_FLIGHT = 8
"""Pieces, over all peers, that may arrive while earlier ones are summed; at least two from each peer."""
_REDUCTIONS_RECEIVING = 4
"""Reductions under way that may hold scratch memory to receive into; starting one more finishes the oldest."""

_KINDS = {REDUCE_SCATTER: 1, ALL_GATHER: 2, ALL_REDUCE: 3}

_tags: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()
"""Of each process group, for all optimizers that use it: their verbs may overlap."""


class GlooVerbs(BackendVerbs):
    """gloo's own verbs for data, on CPUs. What is small travels in messages.

    Where ranks call different collectives of one kind, gloo takes one's bytes for the other's, and aborts the process
    that gets more of them than it expects. Messages have tags that tell them apart, so these ranks time out instead.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        # Beginning with the right neighbour, so that no receiver is everyone's first.
        self._peers = [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """See ``Collectives.all_reduce_``; in rank order."""
        if tensor.nbytes > PIECE_BYTES:
            super().all_reduce_(tensor, op)
            return
        combine: Callable[..., Tensor] = torch.maximum if op == dist.ReduceOp.MAX else torch.add
        with self.explaining():
            first, *rest = self._gather(tensor)
            for part in rest:
                combine(first, part, out=first)
            tensor.copy_(first)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """See ``BackendVerbs._gather``; copies, of any shape."""
        tag = self._next_tag(ALL_REDUCE, tensor.nbytes)
        gathered = [torch.empty_like(tensor) for _ in range(self.num_ranks)]
        gathered[self.rank].copy_(tensor)
        handles = [self._receive(gathered[peer], peer, tag) for peer in self._peers]
        handles += [self._send(gathered[self.rank], peer, tag) for peer in self._peers]
        _wait_for(handles)
        return gathered

    def _next_tag(self, name: str, nbytes: int) -> int:
        """A number for the messages of one verb, equal on all ranks that start the same verbs in the same order.

        Within a tag messages arrive in the order in which they were sent. Verbs overlap, and the receives of an earlier
        one may be posted after those of a later one, so each has a tag of its own. They are high ones, to keep clear of
        messages that the group's other users send. The low digits tell verbs apart that ranks start out of step.
        """
        number = next(_tags.setdefault(self.group, itertools.count()))
        return 2**30 + number % 2**18 * 2**12 + (_KINDS[name] + 3 * nbytes) % 4093

    def _send(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Send; ``tensor`` must not change until the handle has been waited for. Wait once: gloo hangs at a second."""
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)
        assert work is not None
        return work

    def _receive(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Receive into ``tensor``; wait once."""
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=tag)
        assert work is not None
        return work


class MessageVerbs(GlooVerbs):
    """Slices travel through gloo's connections, in pieces: the sum of one overlaps the transfer of the next."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(group, device)
        self._under_way: deque[Pending] = deque()
        self._reductions: deque[Pending] = deque()
        self._idle: dict[torch.dtype, list[Tensor]] = {}

    def _begin_mean(self, buffer: Tensor, out: Tensor, sent: torch.dtype, add: bool) -> Pending:
        """As ``reduce_scatter_mean``: ``(g_0 + g_1 + ...) / N`` in rank order, rounded once."""
        while len(self._reductions) >= _REDUCTIONS_RECEIVING:
            self._reductions.popleft().finish()
        slices, tag = self._slices(buffer), self._next_tag(REDUCE_SCATTER, buffer.nbytes)
        numel = PIECE_BYTES // sent.itemsize
        outs, own = torch.split(out, numel), torch.split(slices[self.rank], numel)
        ahead = max(2, _PIECES_IN_FLIGHT // max(1, len(self._peers)))
        # Whole pieces whatever the bucket, so that buckets of all sizes use the same memory again: touching fresh pages
        # costs more than summing into them.
        idle = self._idle.setdefault(sent, [])
        scratch = idle.pop() if idle else torch.empty(len(self._peers), ahead, numel, dtype=sent)
        arrivals = dict(zip(self._peers, scratch.unbind(), strict=True))
        total = torch.empty(min(numel, out.numel()), dtype=sum_dtype(sent, out.dtype))

        def arriving(index: int, peer: int) -> Tensor:
            return arrivals[peer][index % ahead, : own[index].numel()]

        def receive(index: int) -> list[dist.Work]:
            return [self._receive(arriving(index, peer), peer, tag) for peer in self._peers]

        receives = {index: receive(index) for index in range(min(ahead, len(own)))}
        # Piece by piece over all peers, so that each of them can start summing at once.
        pieces_of_peers = zip(*(torch.split(slices[peer].to(sent), numel) for peer in self._peers), strict=True)
        sends = [
            self._send(piece, peer, tag)
            for pieces in pieces_of_peers
            for piece, peer in zip(pieces, self._peers, strict=True)
        ]

        def finish() -> None:
            while receives:
                index = min(receives)
                _wait_for(receives[index])
                parts = [own[index] if rank == self.rank else arriving(index, rank) for rank in range(self.num_ranks)]
                average(parts, sent=sent, out=outs[index], total=total, add=add, divisor=self._divisor)
                if index + ahead < len(own):
                    receives[index + ahead] = receive(index + ahead)
                del receives[index]
            idle.append(scratch)

        verb = Pending(REDUCE_SCATTER, [finish], self.explaining, self._under_way, lambda: _wait_for(sends))
        self._reductions.append(verb)
        return verb

    def _begin_gather(self, buffer: Tensor, slices: Sequence[Tensor]) -> Pending:
        """As ``all_gather_``: received in place."""
        tag = self._next_tag(ALL_GATHER, buffer.nbytes)
        handles = [self._receive(slices[peer], peer, tag) for peer in self._peers]
        handles += [self._send(slices[self.rank], peer, tag) for peer in self._peers]
        return Pending(ALL_GATHER, [lambda: _wait_for(handles)], self.explaining, self._under_way)


def _wait_for(handles: Iterable[dist.Work]) -> None:
    for handle in handles:
        if not handle.is_completed():  # nor may it be waited for again, after an interrupt
            handle.wait()
