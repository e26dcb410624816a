"""The data verbs for gloo on CPU memory: every rank moves each slice straight to its owner.

gloo's own reduce-scatter is an all-reduce inside and its all-gather a ring, and both take longer than moving the
(N-1)/N bytes that have to move. Summing in rank order, in fp32 or wider, also makes the result independent of bucket
sizes, of the path through the network, and of which of the two classes here did it:

    DirectExchange    slices travel through gloo's connections
    MemoryExchange    ranks of one host read each other's memory; only notes travel: where to read, and that it is done
"""

from __future__ import annotations

import itertools
import json
import mmap
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from sharded_dadamw.comm import host_memory
from sharded_dadamw.comm.collectives import (
    ALL_GATHER,
    REDUCE_SCATTER,
    Handle,
    NativeVerbs,
    Queue,
    Verb,
    average_in_order,
    sent_dtype,
    sum_dtype,
)

_PIECE_BYTES = 1 << 20
"""Bytes received and summed at a time: small enough to be summed out of the cache it was received into."""
_PIECES_IN_FLIGHT = 8
"""Pieces, over all peers, that may arrive while earlier ones are summed (at least two from each peer)."""
_REDUCTIONS_RECEIVING = 4
"""Unfinished reductions that may hold scratch memory to receive into; starting one more finishes the oldest."""

_tags: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()
"""Of each process group, for all who use it: their verbs may overlap too."""


class Pairwise(NativeVerbs):
    """Data moves between pairs of ranks, in verbs that are finished in the order of their start."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Wrap a live process group that this rank is in, for tensors on ``device``."""
        super().__init__(group, device)
        # The other ranks, beginning with the right neighbour, so that no receiver is everyone's first.
        self.peers = [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]
        self._under_way = Queue()


class DirectExchange(Pairwise):
    """Slices travel through the backend's connections: memory need not be shared, and the bytes are the fewest."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """See :class:`Pairwise`."""
        super().__init__(group, device)
        self._receiving: deque[Verb] = deque()
        self._idle_scratch: dict[tuple[torch.dtype, int], list[Tensor]] = {}

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean`: ``(g_0 + g_1 + ...) / N`` in rank order, rounded once."""
        while len(self._receiving) >= _REDUCTIONS_RECEIVING:
            self._under_way.finish_until(self._receiving.popleft())
        with record_function(REDUCE_SCATTER):
            slices = self._slices(buffer)
            sent = sent_dtype(buffer.dtype, wire_dtype)
            reduction = _DirectReduction(self, slices, out, sent=sent, add=add, tag=self.next_tag())
            self.bytes_sent += len(self.peers) * slices[0].numel() * sent.itemsize
        verb = self._under_way.start(REDUCE_SCATTER, reduction.finish, reduction.await_sends)
        self._receiving.append(verb)
        return verb

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`: received in place, no copies."""
        with record_function(ALL_GATHER):
            slices, tag = self._slices(buffer), self.next_tag()
            handles = [self.receive(slices[peer], peer, tag) for peer in self.peers]
            handles += [self.send(slices[self.rank], peer, tag) for peer in self.peers]
            self.bytes_sent += len(self.peers) * slices[self.rank].nbytes
        return self._under_way.start(ALL_GATHER, lambda: _wait_for(handles))

    def next_tag(self) -> int:
        """A number for the messages of one verb, equal on all ranks since they start verbs in the same order.

        Within a tag messages arrive in the order in which they were sent. Verbs overlap, and the receives of an earlier
        one may be posted after those of a later one, so each needs a tag of its own. They are high ones, to keep clear
        of messages that the group's other users send.
        """
        return 2**30 + next(_tags.setdefault(self.group, itertools.count())) % 2**30

    def send(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Send; ``tensor`` must not change until the handle has been waited for. Wait once: gloo hangs at a second."""
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, peer: int, tag: int) -> dist.Work:
        """Receive into ``tensor``; wait once."""
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=tag)
        assert work is not None
        return work

    def borrow_scratch(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Uninitialised memory [numel]; give it back, since touching fresh pages costs more than summing into them."""
        idle = self._idle_scratch.get((dtype, numel))
        return idle.pop() if idle else torch.empty(numel, dtype=dtype)

    def return_scratch(self, scratch: Tensor) -> None:
        """Give borrowed memory back for the next verb."""
        self._idle_scratch.setdefault((scratch.dtype, scratch.numel()), []).append(scratch)


class _DirectReduction:
    """One reduce-scatter under way: all sends are posted, receives roll through a few pieces of scratch memory."""

    def __init__(
        self, group: DirectExchange, slices: Sequence[Tensor], out: Tensor, *, sent: torch.dtype, add: bool, tag: int
    ) -> None:
        numel = _PIECE_BYTES // sent.itemsize
        self._group = group
        self._tag = tag
        self._add = add
        self._own_pieces = torch.split(slices[group.rank], numel)
        self._out_pieces = torch.split(out, numel)
        # Whole pieces whatever the bucket, so that buckets of all sizes share the same scratch memory.
        ahead = max(2, _PIECES_IN_FLIGHT // max(1, len(group.peers)))
        self._arrivals = {peer: group.borrow_scratch(sent, ahead * numel).view(ahead, -1) for peer in group.peers}
        self._total = group.borrow_scratch(sum_dtype(sent, out.dtype), numel)
        self._narrow = None if slices[0].dtype == sent else group.borrow_scratch(sent, numel)
        self._receives = [self._receive_piece(index) for index in range(min(ahead, len(self._own_pieces)))]
        # Piece by piece over all peers, so that each of them can start summing at once.
        outgoing = zip(*(torch.split(slices[peer].to(sent), numel) for peer in group.peers), strict=True)
        self._sends = [
            group.send(piece, peer, tag) for pieces in outgoing for piece, peer in zip(pieces, group.peers, strict=True)
        ]

    def _arriving(self, index: int, peer: int) -> Tensor:
        buffers = self._arrivals[peer]
        return buffers[index % len(buffers)][: self._own_pieces[index].numel()]

    def _receive_piece(self, index: int) -> list[dist.Work]:
        return [self._group.receive(self._arriving(index, peer), peer, self._tag) for peer in self._group.peers]

    def finish(self) -> None:
        for index, (own, out) in enumerate(zip(self._own_pieces, self._out_pieces, strict=True)):
            _wait_for(self._receives[index])
            parts = [
                own if rank == self._group.rank else self._arriving(index, rank)
                for rank in range(self._group.num_ranks)
            ]
            narrow = None if self._narrow is None else self._narrow[: out.numel()]
            average_in_order(parts, out=out, total=self._total[: out.numel()], add=self._add, narrow=narrow)
            following = len(self._receives)
            if following < len(self._own_pieces):
                self._receives.append(self._receive_piece(following))
        for scratch in (*self._arrivals.values(), self._total, self._narrow):
            if scratch is not None:
                self._group.return_scratch(scratch.view(-1))

    def await_sends(self) -> None:
        """Wait until peers have received, which they may do long after us."""
        _wait_for(self._sends)


class MemoryExchange(Pairwise):
    """Ranks of one host read what they need from each other's memory.

    Starting a verb tells the peers where this rank's buffer lies. Finishing it reads theirs, lets them know, and waits
    until they have read ours. ``new_buffer`` gives memory that peers can read; what lies elsewhere is copied first.
    """

    gathers_by_itself = False

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        arena: host_memory.Arena,
        arenas: Sequence[mmap.mmap],
        notes: host_memory.Notes,
    ) -> None:
        """See :class:`Pairwise`.

        Args:
            group: The ranks.
            device: The CPU.
            arena: Of this process.
            arenas: Of every rank's process, as mapped here.
            notes: Between this rank and the others.
        """
        super().__init__(group, device)
        self._arena = arena
        self.arenas = tuple(arenas)
        self.notes = notes
        self.num_meetings = 0
        self.num_left = dict.fromkeys(self.peers, 0)
        self._scratch: dict[tuple[torch.dtype, int], Tensor] = {}

    def new_buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See :meth:`Collectives.new_buffer`."""
        assert device.type == "cpu"
        return self._arena.new_buffer(numel, dtype)

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean`: ``(g_0 + g_1 + ...) / N`` in rank order, rounded once.

        No wire is involved. Values are rounded as if there were one, as they are read, and counted so.
        """
        sent = sent_dtype(buffer.dtype, wire_dtype)
        with record_function(REDUCE_SCATTER):
            readable = self._readable(buffer, self.peers)
            meeting = _Meeting(self, readable)
            self.bytes_sent += len(self.peers) * out.numel() * sent.itemsize

        def finish() -> None:
            parts = [buffer if rank == self.rank else meeting.buffer_of(rank) for rank in range(self.num_ranks)]
            own_slices = (self._slices(part)[self.rank] for part in parts)
            numel = _PIECE_BYTES // buffer.element_size()
            total = self._scratch_of(sum_dtype(sent, out.dtype), numel)
            narrow = None if sent == buffer.dtype else self._scratch_of(sent, numel)
            for piece, *pieces in zip(*(torch.split(each, numel) for each in (out, *own_slices)), strict=True):
                here = slice(piece.numel())
                rounded = None if narrow is None else narrow[here]
                average_in_order(pieces, out=piece, total=total[here], add=add, narrow=rounded)
            meeting.leave()
            if readable is not buffer:  # nobody else keeps it until the peers have read it
                meeting.await_end()

        return self._under_way.start(REDUCE_SCATTER, finish, meeting.await_end)

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`."""
        with record_function(ALL_GATHER):
            readable = self._readable(buffer, [self.rank])
            meeting = _Meeting(self, readable)
            slices = self._slices(buffer)
            self.bytes_sent += len(self.peers) * slices[self.rank].nbytes

        def finish() -> None:
            for peer in self.peers:
                slices[peer].copy_(self._slices(meeting.buffer_of(peer))[peer])
            meeting.leave()
            if readable is not buffer:
                meeting.await_end()

        return self._under_way.start(ALL_GATHER, finish, meeting.await_end)

    def _scratch_of(self, dtype: torch.dtype, numel: int) -> Tensor:
        """The same memory [numel] each time, since touching fresh pages costs more than summing into them."""
        if (dtype, numel) not in self._scratch:
            self._scratch[dtype, numel] = torch.empty(numel, dtype=dtype)
        return self._scratch[dtype, numel]

    def offset_of(self, buffer: Tensor) -> int:
        """Where peers find what :meth:`_readable` returned."""
        offset = self._arena.offset_of(buffer)
        assert offset is not None or not buffer.numel()
        return offset or 0

    def _readable(self, buffer: Tensor, ranks: Iterable[int]) -> Tensor:
        """The buffer, or one that has its slices of some ranks, in memory that peers can read."""
        assert buffer.is_contiguous()
        if self._arena.offset_of(buffer) is not None:
            return buffer
        copied = self._arena.new_buffer(buffer.numel(), buffer.dtype)  # of which only pages that are written exist
        theirs, ours = self._slices(copied), self._slices(buffer)
        for rank in ranks:
            theirs[rank].copy_(ours[rank])
        return copied


_HERE, _DONE = 0, 1
"""Kinds of notes: where in the sender's arena a buffer lies, and that the sender has read all it wants."""


class _Meeting:
    """While it lasts, all ranks may read each other's buffers.

    Meetings begin in the same order on all ranks, and each rank leaves them in that order, so notes need no numbers.
    """

    def __init__(self, group: MemoryExchange, buffer: Tensor) -> None:
        """Tell the peers where this rank's buffer is."""
        self._group = group
        self._buffer = buffer  # peers read it, so it has to live until they have
        group.num_meetings += 1
        self._number = group.num_meetings
        offset = group.offset_of(buffer)
        for peer in group.peers:
            group.notes.send(peer, _HERE, offset)

    def buffer_of(self, peer: int) -> Tensor:
        """The peer's buffer, once it is there; ask once for each."""
        offset = self._group.notes.receive(peer, _HERE)
        return host_memory.tensor_at(self._group.arenas[peer], offset, self._buffer.numel(), self._buffer.dtype)

    def leave(self) -> None:
        """Tell the peers that this rank has read their buffers."""
        for peer in self._group.peers:
            self._group.notes.send(peer, _DONE, 0)

    def await_end(self) -> None:
        """Wait until they have read ours."""
        for peer in self._group.peers:
            while self._group.num_left[peer] < self._number:
                self._group.notes.receive(peer, _DONE)
                self._group.num_left[peer] += 1


def _wait_for(handles: Iterable[dist.Work]) -> None:
    for handle in handles:
        handle.wait()


def map_each_other(group: dist.ProcessGroup, device: torch.device) -> MemoryExchange | None:
    """Have all ranks of a group map each other's memory. Collective, on CPU memory.

    Args:
        group: The ranks.
        device: The CPU.

    Returns:
        None, on all ranks, where one of them cannot: they run on several hosts or in containers of their own, or not on
        Linux.
    """
    verbs = NativeVerbs(group, device)
    peers = [rank for rank in range(verbs.num_ranks) if rank != verbs.rank]
    timeout_s: float = group._get_backend(device).options._timeout.total_seconds()
    invitation = ""
    can_map = False
    try:
        arena = host_memory.arena_of_this_process()
        notes = host_memory.Notes(peers, timeout_s)
        invitation = json.dumps([arena.invitation(), notes.invitation()])
    except Exception:  # whatever it is, there is another way, and the other ranks are waiting to hear of it
        pass
    invitations = verbs.gather_texts(invitation)
    if not all(invitations):
        return None
    try:
        to_memory, to_notes = zip(*map(json.loads, invitations), strict=True)
        arenas = [host_memory.map_arena(each) for each in to_memory]
        for peer in peers:
            notes.accept(peer, to_notes[peer], called=verbs.rank)
        can_map = True
    except Exception:  # as above
        pass
    if not all(verbs.gather_texts("yes" if can_map else "")):
        return None
    notes.seal()
    return MemoryExchange(group, device, arena, arenas, notes)
