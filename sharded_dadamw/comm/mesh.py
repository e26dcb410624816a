"""Shards on some ranks and replicas of them on others: the verbs of a mesh with two axes.

                    axis "shard"
                +---------+---------+
    axis        | shard 0 | shard 1 |    reduce-scatter within a row, then all-reduce the slice within its column;
    "replicate" +---------+---------+    all-gather within a row
                | shard 0 | shard 1 |
                +---------+---------+

So state is spread over few ranks, such as those of one host, and what crosses to the others is a slice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from sharded_dadamw.comm.collectives import (
    ALL_GATHER,
    REDUCE_SCATTER,
    Collectives,
    Handle,
    Queue,
    sent_dtype,
    sum_dtype,
)


class HybridVerbs(Collectives):
    """Data moves along the two axes of a mesh; what ranks have to agree on concerns all of them.

    ``rank`` and ``num_ranks`` are those of the shard axis.
    """

    def __init__(self, shards: Collectives, replicas: Collectives, everyone: Collectives) -> None:
        """Put two axes together.

        Args:
            shards: The ranks among which buffers are cut into slices.
            replicas: The ranks that have the same slice as this one.
            everyone: All ranks of both axes.
        """
        super().__init__(shards.rank, shards.num_ranks)
        self._shards = shards
        self._replicas = replicas
        self._everyone = everyone
        self._under_way = Queue()
        self.gathers_by_itself = shards.gathers_by_itself

    @property
    def everyone(self) -> Collectives:
        """See :attr:`Collectives.everyone`."""
        return self._everyone

    def new_buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See :meth:`Collectives.new_buffer`."""
        return self._shards.new_buffer(numel, dtype, device)

    def check_alive(self) -> None:
        """See :meth:`Collectives.check_alive`."""
        for ranks in (self._shards, self._replicas, self._everyone):
            ranks.check_alive()

    def are_all_of(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.are_all_of`."""
        return self._everyone.are_all_of(group)

    def include(self, group: dist.ProcessGroup) -> bool:
        """See :meth:`Collectives.include`."""
        return self._everyone.include(group)

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Handle:
        """See :meth:`Collectives.reduce_scatter_mean`: the mean over replicas of the means over shards.

        Those of the shard axis are not rounded in between, but to ``wire_dtype``. One of the replicas makes the mean of
        an element, so all have the same bits.
        """
        wide = sum_dtype(sent_dtype(buffer.dtype, wire_dtype), out.dtype)
        num_replicas = self._replicas.num_ranks
        with record_function(REDUCE_SCATTER):
            padded = -(-out.numel() // num_replicas) * num_replicas
            of_shards = self._replicas.new_buffer(padded, wide, buffer.device)
            first = self._shards.reduce_scatter_mean(buffer, of_shards[: out.numel()], wire_dtype=wire_dtype)
            self._count()

        def finish() -> None:
            first.wait()
            of_all = self._replicas.new_buffer(padded, out.dtype, buffer.device)
            piece = padded // num_replicas
            own = of_all[self._replicas.rank * piece :][:piece]
            self._replicas.reduce_scatter_mean(of_shards, own, wire_dtype=wire_dtype).wait()
            self._replicas.all_gather_(of_all).wait()
            self._count()
            if add:
                out.add_(of_all[: out.numel()])
            else:
                out.copy_(of_all[: out.numel()])

        # Ranks start the verbs among replicas as they finish those among shards, and have to do so in one order.
        return self._under_way.start(REDUCE_SCATTER, finish)

    def all_gather_(self, buffer: Tensor) -> Handle:
        """See :meth:`Collectives.all_gather_`."""
        with record_function(ALL_GATHER):
            gather = self._shards.all_gather_(buffer)
            self._count()
        return gather

    def _count(self) -> None:
        self.bytes_sent = self._shards.bytes_sent + self._replicas.bytes_sent

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Handle:
        """See :meth:`Collectives.all_reduce_`; over all ranks of the mesh."""
        return self._everyone.all_reduce_(tensor, op)

    def broadcast_(self, tensor: Tensor) -> None:
        """See :meth:`Collectives.broadcast_`; to all ranks of the mesh."""
        self._everyone.broadcast_(tensor)

    def gather_texts(self, text: str) -> list[str]:
        """See :meth:`Collectives.gather_texts`; of all ranks of the mesh."""
        return self._everyone.gather_texts(text)
