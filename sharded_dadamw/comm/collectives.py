"""The verbs between ranks.

The data verbs start their work and return a ``Pending``, whose ``wait()`` ends it. Flat buffers hold one equal
slice per rank:

    reduce_scatter_mean(buffer, out)    out <- mean over ranks of this rank's slice, in place or not
    all_gather_(buffer)                 other slices <- their owners' own slices

``Collectives`` is one rank, for which everything is there already. ``BackendVerbs`` are the backend's own
verbs, and ``RankOrderVerbs`` are those with sums in rank order. ``messages`` and ``shared_memory`` serve CPUs,
``mesh`` joins two axes, and ``connect`` chooses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # see BackendVerbs
from torch import Tensor
from torch.profiler import record_function

from sharded_dadamw.comm.calls import Meetings, RankError, here, last_met, left
from sharded_dadamw.comm.means import average, mean_in_tree, sent_dtype, sum_dtype
from sharded_dadamw.comm.pending import DONE, Pending
from sharded_dadamw.comm.tree import check_ranks

# torch 2.13 renamed the two verbs and deprecates the names that 2.11 has.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

REDUCE_SCATTER = "sharded_dadamw::reduce_scatter"
ALL_GATHER = "sharded_dadamw::all_gather"
ALL_REDUCE = "sharded_dadamw::all_reduce"
"""What the verbs are called in a profiler's trace, where they start and where they finish."""


class Collectives:
    """A shard group: the ranks that share one set of buckets, and what they can do together. Here, a group of one.

    ``sharded_dadamw.comm.connect.connect`` builds what serves a group best.

    Attributes:
        rank: This rank's number in the group.
        num_ranks: Size of the group.
        gathers_by_itself: Whether an all-gather goes on while this rank does something else. Where it does not, others
            may have to wait until this rank finishes it.
        reductions_ahead: How many means to begin before one is waited for, so that no link has to idle.
    """

    gathers_by_itself = True
    reductions_ahead = 1
    _divisor: int | None = None

    def __init__(self, rank: int = 0, num_ranks: int = 1) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self._bytes_sent = 0

    @property
    def bytes_sent(self) -> int:
        """Data bytes this rank has handed to others so far, in reduce-scatters and all-gathers alone."""
        return self._bytes_sent

    def new_buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zero-filled memory [numel], where the data verbs are fastest with it. Not collective."""
        return torch.zeros(numel, dtype=dtype, device=device)

    def add_in_tree(self, divisor: int) -> None:
        """From now on have ``reduce_scatter_mean`` add in the order of ``comm.tree``, and divide by this number.

        Raises:
            ValueError: As many micro-batches cannot be shared out among these ranks.
        """
        check_ranks(divisor, self.everyone.num_ranks, self.num_ranks)
        self._divisor = divisor

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of ``everyone``; None where this rank is alone without one."""
        return None

    @property
    def number(self) -> int:
        """This rank's number among ``everyone``: of a 2-D mesh row by row."""
        return self.rank

    @property
    def everyone(self) -> Collectives:
        """All ranks that hold the same parameters, those that hold the same shards included."""
        return self

    def _slices(self, buffer: Tensor) -> tuple[Tensor, ...]:
        assert buffer.dim() == 1 and buffer.numel() % self.num_ranks == 0, "a flat buffer of equal slices"
        return buffer.chunk(self.num_ranks) if buffer.numel() else (buffer,) * self.num_ranks

    def check_alive(self) -> None:
        """Raise RuntimeError when the process group has been destroyed."""

    def explaining(self) -> AbstractContextManager[None]:
        """A context for what other ranks have to come to, in which a RankError says who did not."""
        return nullcontext()

    def are_all_of(self, group: dist.ProcessGroup) -> bool:
        """Whether a group has the same ranks as ``everyone``."""
        return self._ranks == ranks_of(group)

    def include(self, group: dist.ProcessGroup) -> bool:
        """Whether all ranks of a group are among ``everyone``."""
        return self._ranks >= ranks_of(group)

    @property
    def _ranks(self) -> frozenset[int]:
        return frozenset([dist.get_rank()])

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Pending:
        """Begin to average this rank's slice of the ranks' buffers.

        Args:
            buffer: [num_ranks * n], this rank's values; left as they are, but for ``out`` where that is a part of it.
            out: [n], gets the mean, rounded once. Exactly this rank's slice of ``buffer``, or other memory; in the
                dtype of ``buffer`` or a wider one.
            add: Increase ``out`` by the rounded mean instead.
            wire_dtype: Where it is narrower than ``buffer``, every rank's values are rounded to it before they are
                added, this rank's own too: who owns an element must make no difference.
        """
        if self._divisor is not None:
            mean_in_tree([buffer], divisor=self._divisor, out=out, add=add)
            return DONE
        mean = buffer.to(sent_dtype(buffer.dtype, wire_dtype)).to(out.dtype)
        if add:
            out.add_(mean)
        elif mean.data_ptr() != out.data_ptr():
            out.copy_(mean)
        return DONE

    def all_gather_(self, buffer: Tensor) -> Pending:
        """Replace the other ranks' slices of ``buffer`` [num_ranks * n] by what their owners hold."""
        return DONE

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduce a small tensor in place, over ``everyone``. This blocks as ``Pending.wait`` does."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by that of rank 0 of ``everyone``."""

    def gather_texts(self, text: str) -> list[str]:
        """One text of each rank of ``everyone``, in rank order, on every rank. For set-up and errors."""
        return [text]


class BackendVerbs(Collectives):
    """The backend's own collectives.

    torch.distributed owns process groups until ``destroy_process_group``; we refer to one weakly. Another owner would
    keep gloo's threads running after that, until the interpreter exits, and a thread that then still wants to release a
    Python object aborts the process. ``torch.distributed.nn`` becomes such an owner when it is imported while there is
    a default group, which it takes for the defaults of its functions. torch's optimizers import it when the first one
    is built, so this module imports it, which is usually earlier.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group_reference = weakref.ref(group)
        self._meetings = Meetings(self.rank, self.num_ranks)
        self.device = device
        # Not get_backend(), which is "undefined" or a list where nobody named this one.
        self._averages = "cuda:nccl" in dist.get_backend_config(group) and device.type == "cuda"

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group; raises as ``check_alive`` where nothing is left of it."""
        group = self._group_reference()
        if group is None:
            raise _was_destroyed()
        return group

    def check_alive(self) -> None:
        if not is_alive(self.group):
            raise _was_destroyed()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        with self._translating():
            yield
        group = self._group_reference()
        if group is None:
            return  # it was destroyed meanwhile, and what was under way has come all the same
        last_met[group] = here.call  # no function is called, for a Ctrl-C would find the verb to be half done
        if left and group in left:
            self._meetings.take_back(group)

    @contextmanager
    def _translating(self) -> Iterator[None]:
        if self._meetings.failure:
            raise RankError(self._meetings.failure)  # who missed one verb would take another's data for the next
        try:
            yield
        except RankError:
            raise
        except torch.OutOfMemoryError:  # whose class loops go by, and which no other rank is to blame for
            if self.num_ranks > 1:
                self._meetings.failure = (
                    f"rank {self.rank} ran out of memory in {here.call}, from where others went on; start again from a "
                    "checkpoint"
                )
            raise
        except RuntimeError as error:
            self.check_alive()
            raise self._meetings.explain(self.group, error) from error

    @contextmanager
    def _beginning(self, name: str) -> Iterator[None]:
        with record_function(name), self._translating():
            yield

    @property
    def _ranks(self) -> frozenset[int]:
        return ranks_of(self.group)

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Pending:
        with self._beginning(REDUCE_SCATTER):
            sent = sent_dtype(buffer.dtype, wire_dtype)
            mean = self._begin_mean(buffer, out, sent, add)
            self._bytes_sent += (self.num_ranks - 1) * out.numel() * sent.itemsize
        return mean

    def _begin_mean(self, buffer: Tensor, out: Tensor, sent: torch.dtype, add: bool) -> Pending:
        """As ``reduce_scatter_mean``, of values in ``sent``. The order of the sum, and its dtype, are the backend's."""
        values = buffer.to(sent)
        # The backend may write to where nothing else has to be kept, and in the dtype that it is given.
        target = out if out.dtype == sent and not add else torch.empty_like(out, dtype=sent)
        op = dist.ReduceOp.AVG if self._averages else dist.ReduceOp.SUM
        work = _reduce_scatter(target, values, op=op, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            mean = target.to(out.dtype)
            if not self._averages:
                mean.div_(self.num_ranks)
            if add:
                out.add_(mean)
            elif target is not out:
                out.copy_(mean)

        return Pending(REDUCE_SCATTER, [finish], self.explaining)

    def all_gather_(self, buffer: Tensor) -> Pending:
        with self._beginning(ALL_GATHER):
            slices = self._slices(buffer)
            gather = self._begin_gather(buffer, slices)
            self._bytes_sent += (self.num_ranks - 1) * slices[self.rank].nbytes
        return gather

    def _begin_gather(self, buffer: Tensor, slices: Sequence[Tensor]) -> Pending:
        """As ``all_gather_``, of a buffer with these slices."""
        work = _all_gather(buffer, slices[self.rank], group=self.group, async_op=True)
        return Pending(ALL_GATHER, [work.wait], self.explaining)

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        with self.explaining():
            dist.all_reduce(tensor, op=op, group=self.group)

    def broadcast_(self, tensor: Tensor) -> None:
        with self.explaining():
            dist.broadcast(tensor, group=self.group, group_src=0)

    def gather_texts(self, text: str) -> list[str]:
        """See ``Collectives.gather_texts``. torch's own gather of objects would need NumPy."""
        mine = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        with self.explaining():
            lengths = [int(size) for size in self._gather(torch.tensor([mine.numel()], device=self.device))]
            padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
            padded[: mine.numel()] = mine
            texts = self._gather(padded)
        return [bytes(text[:length].tolist()).decode() for text, length in zip(texts, lengths, strict=True)]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor [n] of each rank of ``everyone``, in rank order."""
        gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, tensor, group=self.group)
        return gathered


class RankOrderVerbs(BackendVerbs):
    """The backend's own collectives, but sums are made here, in rank order.

    Every rank gets the others' values of its slice, and adds them in fp32 or wider: the same bits on any network, at
    the same number of bytes, but with a second buffer while it is under way.
    """

    def _begin_mean(self, buffer: Tensor, out: Tensor, sent: torch.dtype, add: bool) -> Pending:
        """As ``reduce_scatter_mean``: ``(g_0 + g_1 + ...) / N`` in rank order, rounded once."""
        values = buffer.to(sent)
        arrivals = torch.empty_like(values)
        work: dist.Work = dist.all_to_all_single(arrivals, values, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            total = torch.empty_like(out, dtype=sum_dtype(sent, out.dtype))
            average(self._slices(arrivals), sent=sent, out=out, total=total, add=add, divisor=self._divisor)

        return Pending(REDUCE_SCATTER, [finish], self.explaining)


def ranks_of(group: dist.ProcessGroup) -> frozenset[int]:
    """The global ranks of a process group."""
    return frozenset(dist.get_process_group_ranks(group))


def _was_destroyed() -> RuntimeError:
    return RuntimeError("the optimizer's process group has been destroyed; build a new optimizer on a live group")


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether it has not been destroyed."""
    try:
        dist.get_backend(group)
    except (ValueError, RuntimeError, AssertionError):
        return False
    return True
