"""The verbs between ranks, and the only place that calls torch.distributed.

Every verb starts its work and returns a handle; ``wait()`` makes the result visible. Flat buffers hold one equal slice
per rank, and both data verbs work in place on them:

    reduce_scatter_mean_(buffer)    own slice <- mean over ranks of that slice; the other slices are left as they were
    all_gather_(buffer)             other slices <- their owners' own slices

Three groups of ranks, one interface: :class:`OneRank` (nothing to exchange), :class:`DirectExchange` (gloo on CPU) and
:class:`NativeVerbs` (NCCL, and gloo on accelerator memory).
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.nn  # [Note: whose group it is]
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# torch 2.13 renamed the two verbs and deprecates the names that 2.11 has.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_PIECE_BYTES = 1 << 20
"""Bytes received and summed at a time: small enough to be summed out of the cache it was received into."""
_PIECES_IN_FLIGHT = 8
"""Pieces, over all peers, that may arrive while earlier ones are summed (at least two from each peer)."""


class Handle(Protocol):
    """Something under way. The result may be used, and the buffers written again, after ``wait``."""

    def wait(self) -> object:
        """Block the host (gloo) or the current stream (NCCL) until it is done."""


class _Done:
    def wait(self) -> None:
        pass


class Collectives(ABC):
    """A shard group: the ranks that share one set of buckets, and what they can do together.

    Attributes:
        rank: This rank's number in the group.
        num_ranks: Size of the group.
        bytes_sent: Data bytes this rank has put on the wire in reduce-scatters and all-gathers so far. The few bytes
            per step by which ranks compare notes, and the broadcast at construction, are not in it.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        """Only subclasses are ever built, by :func:`connect`."""
        self.rank = rank
        self.num_ranks = num_ranks
        self.bytes_sent = 0

    def _slices(self, buffer: Tensor) -> tuple[Tensor, ...]:
        assert buffer.dim() == 1 and buffer.numel() % self.num_ranks == 0, "a flat buffer of equal slices"
        return buffer.chunk(self.num_ranks) if buffer.numel() else (buffer,) * self.num_ranks

    @abstractmethod
    def check_alive(self) -> None:
        """Raise RuntimeError when the process group has been destroyed."""

    @abstractmethod
    def are_all_of(self, group: dist.ProcessGroup) -> bool:
        """Whether a group has the same ranks."""

    @abstractmethod
    def include(self, group: dist.ProcessGroup) -> bool:
        """Whether all ranks of a group are among these."""

    @abstractmethod
    def reduce_scatter_mean_(self, buffer: Tensor) -> Handle:
        """Replace this rank's slice of ``buffer`` [num_ranks * n] by its mean over ranks."""

    @abstractmethod
    def all_gather_(self, buffer: Tensor) -> Handle:
        """Replace the other ranks' slices of ``buffer`` [num_ranks * n] by what their owners hold."""

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Handle:
        """Reduce a small tensor over all ranks, in place on each."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by that of the group's rank 0."""

    @abstractmethod
    def gather_texts(self, text: str) -> list[str]:
        """One text of each rank, in rank order, on every rank. For set-up and error paths."""


class OneRank(Collectives):
    """A group of size one: everything is here already."""

    def __init__(self) -> None:
        """A group that needs no torch.distributed."""
        super().__init__(rank=0, num_ranks=1)

    def check_alive(self) -> None:
        """See :meth:`Collectives.check_alive`."""

    def are_all_of(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.are_all_of`."""
        return dist.get_world_size(group) == 1

    def include(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.include`."""
        return dist.get_world_size(group) == 1

    def reduce_scatter_mean_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean_`."""
        return _Done()

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`."""
        return _Done()

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Handle:
        """See :meth:`Collectives.all_reduce_`."""
        return _Done()

    def broadcast_(self, tensor: Tensor) -> None:
        """See :meth:`Collectives.broadcast_`."""

    def gather_texts(self, text: str) -> list[str]:
        """See :meth:`Collectives.gather_texts`."""
        return [text]


class NativeVerbs(Collectives):
    """The backend's own collectives.

    [Note: whose group it is] torch.distributed owns process groups until ``destroy_process_group``; we refer to one
    weakly. Another owner would keep gloo's threads running after that, until the interpreter exits, and a thread that
    then still wants to release a Python object aborts the process. ``torch.distributed.nn`` becomes such an owner when
    it is imported while there is a default group, which it takes for the defaults of its functions, and torch's
    optimizers import it when the first one is built; so it is imported here, which is usually earlier.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Wrap a live process group that this rank is in, for tensors on ``device``."""
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group_reference = weakref.ref(group)  # [Note: whose group it is]
        self._device = device

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; raises as :meth:`check_alive` where nothing is left of it."""
        group = self._group_reference()
        if group is None:
            raise _was_destroyed()
        return group

    def check_alive(self) -> None:
        """See :meth:`Collectives.check_alive`."""
        if not _is_alive(self.group):
            raise _was_destroyed()

    def are_all_of(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.are_all_of`."""
        return set(dist.get_process_group_ranks(group)) == set(dist.get_process_group_ranks(self.group))

    def include(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.include`."""
        return set(dist.get_process_group_ranks(group)) <= set(dist.get_process_group_ranks(self.group))

    def reduce_scatter_mean_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean_`. The order of the sum is the backend's."""
        own = self._slices(buffer)[self.rank]
        averages = buffer.is_cuda and dist.get_backend(self.group) == "nccl"
        op = dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM
        work = _reduce_scatter(own, buffer, op=op, group=self.group, async_op=True)
        self.bytes_sent += (self.num_ranks - 1) * own.nbytes
        return work if averages else _ThenDivide(work, own, self.num_ranks)

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`."""
        own = self._slices(buffer)[self.rank]
        work: Handle = _all_gather(buffer, own, group=self.group, async_op=True)
        self.bytes_sent += (self.num_ranks - 1) * own.nbytes
        return work

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Handle:
        """See :meth:`Collectives.all_reduce_`."""
        work: Handle = dist.all_reduce(tensor, op=op, group=self.group, async_op=True)
        return work

    def broadcast_(self, tensor: Tensor) -> None:
        """See :meth:`Collectives.broadcast_`."""
        dist.broadcast(tensor, group=self.group, group_src=0)

    def gather_texts(self, text: str) -> list[str]:
        """See :meth:`Collectives.gather_texts`. torch's own gather of objects would need NumPy."""
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self._device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.num_ranks)]
        dist.all_gather(sizes, torch.tensor([mine.numel()], device=self._device), group=self.group)
        lengths = [int(size) for size in sizes]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self._device)
        padded[: mine.numel()] = mine
        texts = [torch.empty_like(padded) for _ in range(self.num_ranks)]
        dist.all_gather(texts, padded, group=self.group)
        return [bytes(text[:length].tolist()).decode() for text, length in zip(texts, lengths, strict=True)]


class _ThenDivide:
    """A sum under way that becomes a mean."""

    def __init__(self, work: Handle, total: Tensor, divisor: int) -> None:
        self._work, self._total, self._divisor = work, total, divisor

    def wait(self) -> None:
        self._work.wait()
        self._total.div_(self._divisor)


class DirectExchange(NativeVerbs):
    """Data verbs for gloo on CPU memory: every rank sends each slice straight to its owner.

    gloo's own reduce-scatter is an all-reduce inside and its all-gather a ring, and both take longer than moving the
    (N-1)/N bytes that have to move. Summing what arrives in rank order, in fp32 or wider, also makes the result
    independent of bucket sizes and of the path through the network.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Wrap a live process group that this rank is in, for tensors on ``device``."""
        super().__init__(group, device)
        # The other ranks, beginning with the right neighbour, so that no receiver is everyone's first.
        self.peers = [(self.rank + distance) % self.num_ranks for distance in range(1, self.num_ranks)]
        self._tag = 0
        self._idle_scratch: dict[tuple[torch.dtype, int], list[Tensor]] = {}

    def reduce_scatter_mean_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean_`: ``(g_0 + g_1 + ... ) / N`` in rank order, rounded once."""
        return _DirectReduction(self, self._slices(buffer), self._next_tag())

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`: received in place, no copies."""
        slices, tag = self._slices(buffer), self._next_tag()
        receives = [self.receive(slices[peer], peer, tag) for peer in self.peers]
        return _All([*receives, *(self.send(slices[self.rank], peer, tag) for peer in self.peers)])

    def _next_tag(self) -> int:
        """A number for the messages of one verb, equal on all ranks since they call verbs in the same order.

        Within a tag messages arrive in the order in which they were sent. Verbs overlap, and the receives of an earlier
        one may be posted after those of a later one, so each needs a tag of its own. They are high ones, to keep clear
        of messages that the group's other users send.
        """
        self._tag = (self._tag + 1) % 2**30
        return 2**30 + self._tag

    def borrow_scratch(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Uninitialised memory [numel]; give it back, since touching fresh pages costs more than summing into them."""
        idle = self._idle_scratch.get((dtype, numel))
        return idle.pop() if idle else torch.empty(numel, dtype=dtype)

    def return_scratch(self, scratch: Tensor) -> None:
        """Give borrowed memory back for the next verb."""
        self._idle_scratch.setdefault((scratch.dtype, scratch.numel()), []).append(scratch)

    def send(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Send; ``tensor`` must not change until the handle has been waited for. Wait once: gloo hangs at a second."""
        self.bytes_sent += tensor.nbytes
        work = dist.isend(tensor, group=self.group, group_dst=peer, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Handle:
        """Receive into ``tensor``; wait once."""
        work = dist.irecv(tensor, group=self.group, group_src=peer, tag=tag)
        assert work is not None
        return work


class _All:
    def __init__(self, handles: Sequence[Handle]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


class _DirectReduction:
    """One reduce-scatter under way: all sends are posted, receives roll through a few pieces of scratch memory."""

    def __init__(self, group: DirectExchange, slices: Sequence[Tensor], tag: int) -> None:
        own = slices[group.rank]
        numel = _PIECE_BYTES // own.element_size()
        self._group = group
        self._tag = tag
        self._own_pieces = torch.split(own, numel)
        # Whole pieces whatever the bucket, so that buckets of all sizes share the same scratch memory.
        ahead = max(2, _PIECES_IN_FLIGHT // max(1, len(group.peers)))
        self._arrivals = {peer: group.borrow_scratch(own.dtype, ahead * numel).view(ahead, -1) for peer in group.peers}
        self._total = group.borrow_scratch(torch.promote_types(own.dtype, torch.float32), numel)
        self._receives = [self._receive_piece(index) for index in range(min(ahead, len(self._own_pieces)))]
        # Piece by piece over all peers, so that each of them can start summing at once.
        outgoing = zip(*(torch.split(slices[peer], numel) for peer in group.peers), strict=True)
        self._sends = [
            group.send(piece, peer, tag) for pieces in outgoing for piece, peer in zip(pieces, group.peers, strict=True)
        ]

    def _arriving(self, index: int, peer: int) -> Tensor:
        buffers = self._arrivals[peer]
        return buffers[index % len(buffers)][: self._own_pieces[index].numel()]

    def _receive_piece(self, index: int) -> list[Handle]:
        return [self._group.receive(self._arriving(index, peer), peer, self._tag) for peer in self._group.peers]

    def wait(self) -> None:
        for index, own in enumerate(self._own_pieces):
            for receive in self._receives[index]:
                receive.wait()
            parts = [
                own if rank == self._group.rank else self._arriving(index, rank)
                for rank in range(self._group.num_ranks)
            ]
            _mean_in_order(parts, out=own, total=self._total[: own.numel()])
            following = len(self._receives)
            if following < len(self._own_pieces):
                self._receives.append(self._receive_piece(following))
        for send in self._sends:
            send.wait()
        for scratch in (*self._arrivals.values(), self._total):
            self._group.return_scratch(scratch.view(-1))


def _mean_in_order(parts: Sequence[Tensor], *, out: Tensor, total: Tensor) -> None:
    """Write the mean of ``parts``, summed in their order, into ``out`` [n], which may be one of them.

    ``total`` [n] is scratch memory in the dtype of the sum; it is where narrow gradients are added in fp32.
    """
    first, *rest = parts
    if rest and first.dtype == total.dtype:
        torch.add(first, rest.pop(0), out=total)  # one pass less than copying the first
    else:
        total.copy_(first)
    for part in rest:
        total.add_(part)
    if out.dtype == total.dtype:
        torch.div(total, len(parts), out=out)
    else:
        out.copy_(total.div_(len(parts)))


def connect(
    process_group: dist.ProcessGroup | DeviceMesh | None, device: torch.device, *, called: str = "process_group"
) -> Collectives:
    """The best verbs for a group of ranks and the device their buffers live on.

    Args:
        process_group: A group that this rank is in, a 1-D mesh, or None for the default group; None without an
            initialised torch.distributed means one rank.
        device: Where parameters live.
        called: The argument's name in messages.

    Raises:
        TypeError: It is none of these.
        ValueError: The mesh has more than one axis, or the group does not have this rank, is destroyed, or cannot reach
            the device's memory.
    """
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return OneRank()
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"{called}: expected a group or a mesh with one axis, got {process_group.ndim} axes "
                f"{process_group.mesh_dim_names}; pass one axis, such as mesh['dp'], or a group of all their ranks"
            )
        process_group = process_group.get_group()
    if process_group is None:
        process_group = dist.group.WORLD
        assert process_group is not None
    if isinstance(process_group, int) and process_group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"{called}: expected a group with this rank in it, got {process_group}, which new_group() returns on "
            "the ranks outside; build the optimizer on the group's own ranks only"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"{called}: expected a ProcessGroup, a 1-D DeviceMesh or None, got {process_group!r}")
    if not _is_alive(process_group):
        raise ValueError(f"{called}: expected a live process group, got one that has been destroyed")
    backend = dist.get_backend_config(process_group)
    if f"{device.type}:" not in backend:
        raise ValueError(
            f"{called}: expected a backend for parameters on {device.type}, got {backend}; move the model to the "
            "backend's device before building the optimizer"
        )
    direct = device.type == "cpu" and "cpu:gloo" in backend
    return DirectExchange(process_group, device) if direct else NativeVerbs(process_group, device)


def common_group(choices: Sequence[Sequence[dist.ProcessGroup]]) -> dist.ProcessGroup | None:
    """The largest group of which each choice has one with the same ranks, or None."""
    ranks = [{frozenset(dist.get_process_group_ranks(group)) for group in groups} for groups in choices]
    common = set.intersection(*ranks) if ranks else set()
    groups = {frozenset(dist.get_process_group_ranks(group)): group for group in choices[0]} if choices else {}
    return groups[max(common, key=len)] if common else None


def connect_over(
    groups: Sequence[dist.ProcessGroup], device: torch.device, *, also: Collectives | None = None
) -> Collectives:
    """The verbs of all ranks among which parameters are spread.

    Args:
        groups: One for each axis of a mesh along which parameters are sharded; may be none, or the same one repeatedly.
        device: Where parameters live.
        also: A further axis, whose ranks are the answer where there is no other.

    Raises:
        ValueError: There are several axes, and they are not all there is: no one group is known to hold their product.
    """
    by_ranks = {frozenset(dist.get_process_group_ranks(group)): group for group in groups}
    by_ranks = {ranks: group for ranks, group in by_ranks.items() if len(ranks) > 1}
    if also is not None and all(also.are_all_of(group) for group in by_ranks.values()):
        return also
    if isinstance(also, NativeVerbs):
        by_ranks[frozenset(dist.get_process_group_ranks(also.group))] = also.group
    if not by_ranks:
        return OneRank()
    largest = max(by_ranks, key=len)
    if all(ranks <= largest for ranks in by_ranks):
        return connect(by_ranks[largest], device)
    sizes = sorted(len(ranks) for ranks in by_ranks)
    if math.prod(sizes) != dist.get_world_size():
        raise ValueError(
            f"parameters are sharded along axes of {sizes} ranks, which are not all {dist.get_world_size()} ranks; "
            "pass norm_group, the ranks over which norms are to be added up"
        )
    return connect(None, device)


def _was_destroyed() -> RuntimeError:
    return RuntimeError("the optimizer's process group has been destroyed; build a new optimizer on a live group")


def _is_alive(group: dist.ProcessGroup) -> bool:
    try:
        dist.get_backend(group)
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True
