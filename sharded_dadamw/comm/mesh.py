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

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import ALL_GATHER, REDUCE_SCATTER, BackendVerbs, Collectives
from sharded_dadamw.comm.means import sent_dtype, sum_dtype
from sharded_dadamw.comm.pending import Pending


class MeshVerbs(BackendVerbs):
    """The row's verbs and then the column's; what ranks agree on concerns all of them.

    ``rank`` and ``num_ranks`` are those of the row, and ``group`` has all ranks of the mesh.

    A mean goes over the row, is reduced over the column, and gathered there; it gets one further each time that another
    one begins. So none of it has to wait for the end of backward, on all ranks it happens in one order, and on an
    accelerator the host waits for nothing.
    """

    reductions_ahead = 3

    def __init__(self, row: Collectives, column: Collectives, everyone: BackendVerbs) -> None:
        """Cut buffers among the ranks of the row; those of the column have the same slice."""
        super().__init__(everyone.group, everyone.device)
        self.rank, self.num_ranks = row.rank, row.num_ranks
        self.gathers_by_itself = row.gathers_by_itself
        self._everyone = everyone
        self._row = row
        self._column = column
        self._under_way: deque[Pending] = deque()

    def add_in_tree(self, divisor: int) -> None:
        super().add_in_tree(divisor)
        self._row._divisor, self._column._divisor = 1, divisor

    @property
    def bytes_sent(self) -> int:
        return self._row.bytes_sent + self._column.bytes_sent

    @property
    def number(self) -> int:
        return self._column.rank * self.num_ranks + self.rank

    @property
    def everyone(self) -> Collectives:
        return self._everyone

    def new_buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._row.new_buffer(numel, dtype, device)

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        self._everyone.all_reduce_(tensor, op)

    def gather_texts(self, text: str) -> list[str]:
        return self._everyone.gather_texts(text)

    def check_alive(self) -> None:
        super().check_alive()
        self._row.check_alive()
        self._column.check_alive()

    def reduce_scatter_mean(
        self, buffer: Tensor, out: Tensor, *, add: bool = False, wire_dtype: torch.dtype | None = None
    ) -> Pending:
        """See ``Collectives.reduce_scatter_mean``: the mean over replicas of the means over shards.

        One of the replicas makes the mean of an element, so all have the same bits.
        """
        piece = -(-out.numel() // self._column.num_ranks)
        padded = piece * self._column.num_ranks
        is_in_place = not add and padded == out.numel()  # new memory costs a page fault for every 4 KiB

        def of_column(dtype: torch.dtype) -> Tensor:
            if is_in_place and dtype == out.dtype:
                return out
            return self._column.new_buffer(padded, dtype, buffer.device)

        with self._beginning(REDUCE_SCATTER):
            wide = sum_dtype(sent_dtype(buffer.dtype, wire_dtype), out.dtype)
            if self._divisor is not None:  # which rounds each node to the gradients' dtype
                wide = buffer.dtype
            of_row = [of_column(wide)]
            under_way = self._row.reduce_scatter_mean(buffer, of_row[0][: out.numel()], wire_dtype=wire_dtype)
        of_all: Tensor

        def reduce_over_replicas() -> None:
            nonlocal under_way, of_all
            under_way.wait()
            of_all = of_column(out.dtype)
            own = of_all[self._column.rank * piece :][:piece]
            under_way = self._column.reduce_scatter_mean(of_row[0], own, wire_dtype=wire_dtype)

        def gather_from_replicas() -> None:
            nonlocal under_way
            under_way.wait()
            of_row.clear()  # until now others may have read it
            under_way = self._column.all_gather_(of_all)

        def finish() -> None:
            under_way.wait()
            if add:
                out.add_(of_all[: out.numel()])
            elif of_all is not out:
                out.copy_(of_all[: out.numel()])

        # Ranks start the column's verbs in one order: a mean goes on only when all before it have gone further.
        if len(self._under_way) == self.reductions_ahead:
            self._under_way[0].finish()
        for earlier in self._under_way:
            earlier.go_on()
        parts = (reduce_over_replicas, gather_from_replicas, finish)
        return Pending(REDUCE_SCATTER, parts, self.explaining, self._under_way)

    def all_gather_(self, buffer: Tensor) -> Pending:
        with self._beginning(ALL_GATHER):
            return self._row.all_gather_(buffer)
