"""The one order in which micro-batches are added, whoever has computed them.

They are numbered over all ranks, and added as a binary counter carries: two neighbours of one size become one of twice
the size, and what is left at the end is added from the right. 12 of them are

    ((0+1) + (2+3)) + ((4+5) + (6+7))   +   ((8+9) + (10+11))

so the sum over an aligned group of 2, 4, 8 ... is a node of the tree on any number of ranks. Each node is rounded to
the dtype of the gradients.
"""

from __future__ import annotations


def carries(index: int, count: int) -> list[int]:
    """Which levels the micro-batch with this number, of ``count``, is added to, in this order.

    Level ``b`` then holds the sum over the last aligned ``2**b`` before it that waits. The result goes to the next
    level, ``len(carries(index, count))`` unless this is the last one, which is added to all that wait.
    """
    levels = [*range((index ^ (index + 1)).bit_length() - 1)]  # one for each binary 1 at its end
    if index + 1 == count:
        levels += [level for level in range(len(levels) + 1, count.bit_length()) if count >> level & 1]
    return levels


def fitting(micro_batches: int) -> list[int]:
    """The numbers of ranks on which so many micro-batches can be shared out: 1, and those that leave each 2**n."""
    shares = [1 << level for level in range(micro_batches.bit_length()) if micro_batches % (1 << level) == 0]
    return sorted({1, *(micro_batches // share for share in shares)})


def check_ranks(micro_batches: int, num_ranks: int, of_row: int) -> None:
    """Refuse a number of ranks, ``of_row`` of which are in a row of a 2-D mesh, on which the tree has other nodes.

    Raises:
        ValueError: It is none of those that fit; lists them.
    """
    fit = fitting(micro_batches)
    if num_ranks not in fit:
        raise ValueError(
            f"micro_batches: expected {micro_batches} to be shared out among {', '.join(map(str, fit))} ranks, which "
            f"leaves each a power of two or all, got {num_ranks} ranks"
        )
    if of_row < num_ranks and of_row & (of_row - 1):
        raise ValueError(
            f"micro_batches: expected rows of a 2-D mesh to have 1, 2, 4, 8 ... ranks, got {of_row}: their sums are no "
            "nodes of the tree in which micro-batches are added"
        )
