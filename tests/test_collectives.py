"""The verbs: what they compute, bit for bit, and how many bytes they put on the wire."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_dadamw import collectives
from sharded_dadamw.collectives import DirectExchange, NativeVerbs, OneRank, connect
from tests.pool import on_ranks

CPU = torch.device("cpu")


def local_gradient(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank)).to(dtype)


def mean_in_rank_order(num_ranks: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    total = local_gradient(0, numel, dtype).to(wide)
    for rank in range(1, num_ranks):
        total = total + local_gradient(rank, numel, dtype).to(wide)
    return (total / num_ranks).to(dtype)


def reduce_scatter(group: Any, shard_numel: int, dtype: torch.dtype, verbs: str, piece_bytes: int) -> Any:
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    ours = connect(group, CPU) if verbs == "direct" else NativeVerbs(group, CPU)
    buffer = local_gradient(rank, num_ranks * shard_numel, dtype)
    before = collectives._PIECE_BYTES
    collectives._PIECE_BYTES = piece_bytes
    try:
        ours.reduce_scatter_mean_(buffer).wait()
    finally:
        collectives._PIECE_BYTES = before
    return type(ours).__name__, buffer, ours.bytes_sent


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("piece_bytes", [512, 1 << 20])
def test_the_direct_exchange_averages_in_rank_order_bit_for_bit(
    num_ranks: int, dtype: torch.dtype, piece_bytes: int
) -> None:
    shard_numel = 64 * 37
    mean = mean_in_rank_order(num_ranks, num_ranks * shard_numel, dtype)
    for rank, (kind, buffer, sent) in enumerate(
        on_ranks(num_ranks, reduce_scatter, shard_numel, dtype, "direct", piece_bytes)
    ):
        start, stop = rank * shard_numel, (rank + 1) * shard_numel
        assert kind == "DirectExchange"
        assert torch.equal(buffer[start:stop], mean[start:stop])
        local = local_gradient(rank, num_ranks * shard_numel, dtype)
        assert torch.equal(buffer[:start], local[:start]), "other ranks' slices are left as they were"
        assert torch.equal(buffer[stop:], local[stop:])
        assert sent == (num_ranks - 1) * shard_numel * dtype.itemsize


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_backends_own_verbs_give_the_same_mean_within_the_rounding_of_another_order(num_ranks: int) -> None:
    shard_numel = 64 * 5
    mean = mean_in_rank_order(num_ranks, num_ranks * shard_numel, torch.float32)
    results = on_ranks(num_ranks, reduce_scatter, shard_numel, torch.float32, "native", 1 << 20)
    for rank, (_, buffer, sent) in enumerate(results):
        own = slice(rank * shard_numel, (rank + 1) * shard_numel)
        torch.testing.assert_close(buffer[own], mean[own], rtol=2**-22, atol=2**-22)  # N - 1 roundings of size 2^-24
        assert sent == (num_ranks - 1) * shard_numel * 4


def gather(group: Any, shard_numel: int, verbs: str) -> Any:
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    ours = connect(group, CPU) if verbs == "direct" else NativeVerbs(group, CPU)
    buffer = torch.full((num_ranks * shard_numel,), -1.0)
    buffer[rank * shard_numel : (rank + 1) * shard_numel] = torch.arange(shard_numel) + 1000.0 * rank
    ours.all_gather_(buffer).wait()
    return buffer, ours.bytes_sent


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("verbs", ["direct", "native"])
@pytest.mark.parametrize("shard_numel", [64, 64 * 9_001])
def test_an_all_gather_puts_every_slice_in_its_place(num_ranks: int, verbs: str, shard_numel: int) -> None:
    expected = torch.cat([torch.arange(shard_numel) + 1000.0 * rank for rank in range(num_ranks)])
    for buffer, sent in on_ranks(num_ranks, gather, shard_numel, verbs):
        assert torch.equal(buffer, expected)
        assert sent == (num_ranks - 1) * shard_numel * 4


def several_at_once(group: Any, verbs: str) -> Any:
    """Reductions and gathers of several buffers overlap, as they do in a step."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    ours = connect(group, CPU) if verbs == "direct" else NativeVerbs(group, CPU)
    numels = [num_ranks * 64 * k for k in (1, 70_000, 7, 0, 50_000)]  # the large ones arrive in more pieces than fly
    grads = [torch.full((numel,), float(rank + index)) for index, numel in enumerate(numels)]
    params = [torch.full((numel,), float(rank)) for numel in numels]
    handles = []
    for grad, param in zip(grads, params, strict=True):
        handles += [ours.reduce_scatter_mean_(grad), ours.all_gather_(param)]
    for handle in handles:
        handle.wait()
    return [grad.chunk(num_ranks)[rank] if grad.numel() else grad for grad in grads], params


@pytest.mark.parametrize("verbs", ["direct", "native"])
def test_collectives_that_overlap_do_not_mix_up_their_messages(verbs: str) -> None:
    for grads, params in on_ranks(3, several_at_once, verbs):
        for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
            assert torch.all(grad == 1.0 + index)
            assert torch.equal(param, torch.arange(3.0).repeat_interleave(param.numel() // 3))


def a_direct_exchange_holds(group: Any) -> int:
    """Bytes of scratch memory while a reduction is under way."""
    ours = connect(group, CPU)
    assert isinstance(ours, DirectExchange)
    buffer = torch.zeros(dist.get_world_size(group) * 8 * 2**20)
    reduction: Any = ours.reduce_scatter_mean_(buffer)
    held = sum(scratch.nbytes for scratch in reduction._arrivals.values()) + reduction._total.nbytes
    reduction.wait()
    ours.reduce_scatter_mean_(buffer).wait()
    kept = sum(scratch.nbytes for idle in ours._idle_scratch.values() for scratch in idle)
    assert kept == held, "the second reduction reuses the first one's scratch"
    return held


def test_scratch_memory_does_not_grow_with_the_buffer() -> None:
    for held in on_ranks(3, a_direct_exchange_holds):
        assert held <= (collectives._PIECES_IN_FLIGHT + 1) * collectives._PIECE_BYTES


def exchange_texts(group: Any) -> list[str]:
    return connect(group, CPU).gather_texts("äöü" * dist.get_rank(group))


def test_texts_of_different_lengths_arrive_whole_and_in_rank_order() -> None:
    for texts in on_ranks(3, exchange_texts):
        assert texts == ["", "äöü", "äöüäöü"]


def test_without_torch_distributed_there_is_one_rank_and_nothing_is_sent() -> None:
    ours = connect(None, CPU)
    assert isinstance(ours, OneRank)
    buffer = torch.arange(128.0)
    ours.reduce_scatter_mean_(buffer).wait()
    ours.all_gather_(buffer).wait()
    assert torch.equal(buffer, torch.arange(128.0))
    assert (ours.num_ranks, ours.bytes_sent, ours.gather_texts("x")) == (1, 0, ["x"])
