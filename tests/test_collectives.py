"""The verbs: what they compute, bit for bit, how many bytes they move, and what they leave behind.

Every transport runs every dtype, size and verb, on numbers of ranks that differ: a sum in rank order does not know its
dtype, nor an all-gather whose memory it fills.
"""

import gc
import os
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile

from sharded_dadamw.comm import shared_memory
from sharded_dadamw.comm.calls import RankError
from sharded_dadamw.comm.collectives import Collectives, RankOrderVerbs
from sharded_dadamw.comm.connect import connect
from sharded_dadamw.comm.messages import GlooVerbs, MessageVerbs
from sharded_dadamw.comm.pending import Pending
from sharded_dadamw.comm.shared_memory import SharedMemoryVerbs
from sharded_dadamw.config import Exchange
from tests.harness import ranks
from tests.pool import on_ranks

CPU = torch.device("cpu")
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
DTYPES: list[tuple[torch.dtype, torch.dtype, torch.dtype | None]] = [  # local, of the mean, on the way
    (F32, F32, None),
    (F32, F32, BF16),
    (F32, F32, F16),
    (BF16, BF16, None),
    (BF16, F32, None),
]
IN_RANK_ORDER = ["memory", "messages", "ordered all-to-all"]
ALL_VERBS = [*IN_RANK_ORDER, "native"]


def verbs_of(group: Any, verbs: str) -> Collectives:
    made: dict[str, Callable[[], Collectives]] = {
        "memory": lambda: connect(group, CPU),
        "messages": lambda: connect(group, CPU, exchange=Exchange.RANK_ORDER),
        "native": lambda: connect(group, CPU, exchange=Exchange.BACKEND),
        "ordered all-to-all": lambda: RankOrderVerbs(group, CPU),  # which connect() takes where there is no gloo
    }
    kinds = {"memory": SharedMemoryVerbs, "messages": MessageVerbs, "native": GlooVerbs}
    ours = made[verbs]()
    if dist.get_world_size(group) > 1:
        assert type(ours) is kinds.get(verbs, RankOrderVerbs)
    return ours


def local_gradient(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(rank))
    if dtype is BF16:
        gradient[:1] = 2.0**17  # which fp16 does not have
    return gradient.to(dtype)


def mean_in_rank_order(num_ranks: int, numel: int, dtype: torch.dtype, out: torch.dtype, wire: torch.dtype) -> Tensor:
    parts = [local_gradient(rank, numel, dtype).to(wire) for rank in range(num_ranks)]
    total, *rest = [part.to(torch.promote_types(dtype, F32)) for part in parts]
    for part in rest:
        total = total + part
    return (total / num_ranks).to(out)


@pytest.mark.parametrize("verbs", ALL_VERBS)
@pytest.mark.parametrize(
    ("num_ranks", "shard_numel", "dtypes", "add", "where"),
    [
        (1, 64 * 37, DTYPES[0], False, "in place"),
        (3, 64 * 9_456, DTYPES[0], False, "in place"),  # in several pieces
        (2, 64 * 18_456, DTYPES[3], False, "in place"),
        (3, 64 * 37, DTYPES[3], False, "in place"),
        (3, 64 * 37, (F16, F16, None), False, "in place"),
        (4, 64 * 4_456, (F64, F64, None), False, "in place"),
        *((3, 77, dtypes, add, "elsewhere") for dtypes in DTYPES[1:] for add in (False, True)),
        (2, 77, DTYPES[0], False, "elsewhere"),
        (3, 77, DTYPES[0], True, "elsewhere"),
        (1, 77, DTYPES[1], True, "elsewhere"),
        (2, 77, (BF16, BF16, F16), False, "elsewhere"),  # a wire that is not narrower is ignored
        (2, 77, (F64, F64, BF16), True, "elsewhere"),
        (3, 77, DTYPES[0], False, "private"),
    ],
    ids=str,
)
@ranks(run=on_ranks)
def test_the_mean_is_summed_in_rank_order_bit_for_bit(
    group: Any, verbs: str, shard_numel: int, dtypes: Any, add: bool, where: str
) -> None:
    """In place, in other memory, or of memory that peers cannot read. The backend's own verbs add in another order."""
    dtype, out_dtype, wire = dtypes
    sent_as = wire if wire is not None and wire.itemsize < dtype.itemsize else dtype
    ours = verbs_of(group, verbs)
    buffer = local_gradient(ours.rank, ours.num_ranks * shard_numel, dtype)
    if where != "private":
        buffer = ours.new_buffer(buffer.numel(), dtype, CPU).copy_(buffer)
    before, own = buffer.clone(), slice(ours.rank * shard_numel, (ours.rank + 1) * shard_numel)
    out = buffer[own] if where == "in place" else torch.full((shard_numel,), 0.1, dtype=out_dtype)
    ours.reduce_scatter_mean(buffer, out, add=add, wire_dtype=wire).wait()
    if where == "in place":
        before[own] = out
    assert torch.equal(buffer, before), "the local values stay as they are"
    expected = mean_in_rank_order(ours.num_ranks, buffer.numel(), dtype, out_dtype, sent_as)[own]
    if add:
        expected = torch.full_like(expected, 0.1) + expected
    if verbs == "native":
        tolerance = 2**-6 if min(dtype.itemsize, sent_as.itemsize) == 2 else 2**-21
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    else:
        assert torch.equal(out, expected)
    assert ours.bytes_sent == (ours.num_ranks - 1) * shard_numel * sent_as.itemsize


@pytest.mark.parametrize("verbs", ALL_VERBS)
@pytest.mark.parametrize(
    ("num_ranks", "shard_numel", "in_new_buffer"),
    [(1, 63, True), (2, 64 * 9_001, True), (3, 63, False), (3, 64 * 9_001, False), (4, 63, True)],
)
@ranks(run=on_ranks)
def test_an_all_gather_puts_every_slice_in_its_place(
    group: Any, verbs: str, shard_numel: int, in_new_buffer: bool
) -> None:
    ours = verbs_of(group, verbs)
    rank, num_ranks = ours.rank, ours.num_ranks
    numel = num_ranks * shard_numel
    buffer = ours.new_buffer(numel, F32, CPU) if in_new_buffer else torch.empty(numel)
    buffer.fill_(-1.0)
    buffer[rank * shard_numel : (rank + 1) * shard_numel] = torch.arange(shard_numel) + 1000.0 * rank
    ours.all_gather_(buffer).wait()
    expected = torch.cat([torch.arange(shard_numel) + 1000.0 * each for each in range(num_ranks)])
    assert torch.equal(buffer, expected) and ours.bytes_sent == (num_ranks - 1) * shard_numel * 4


@pytest.mark.parametrize("verbs", ALL_VERBS)
@ranks(3, on_ranks)
def test_small_tensors_are_summed_in_rank_order_and_their_maxima_taken(group: Any, verbs: str) -> None:
    ours = verbs_of(group, verbs)
    own = torch.tensor([[1.0, 5.0, 2.0**24], [2.0, -1.0, 1.0], [4.0, 3.0, 1.0]])[ours.rank]
    total, largest = own.clone(), own.clone()
    ours.all_reduce_(total, dist.ReduceOp.SUM)
    ours.all_reduce_(largest, dist.ReduceOp.MAX)
    assert total[:2].tolist() == [7.0, 7.0] and largest.tolist() == [4.0, 5.0, 2.0**24]
    assert total[2] == 2.0**24 or verbs == "ordered all-to-all", "in another order the ones would count"


@pytest.mark.parametrize("verbs", ALL_VERBS)
@pytest.mark.parametrize("order", ["first first", "last first", "as each rank likes"])
@ranks(3, on_ranks)
def test_verbs_that_overlap_can_be_waited_for_twice_and_in_any_order(group: Any, verbs: str, order: str) -> None:
    """Reductions and gathers of several buffers overlap, as they do in a step; each must give what it would alone."""
    ours = verbs_of(group, verbs)
    rank, num_ranks = ours.rank, ours.num_ranks
    numels = [num_ranks * 64 * k for k in (1, 25_000, 7, 0, 12_500, 3)]  # large ones arrive in more pieces than fly
    grads = [ours.new_buffer(numel, F32, CPU).fill_(rank + index) for index, numel in enumerate(numels)]
    params = [ours.new_buffer(numel, F32, CPU).fill_(rank) for numel in numels]
    handles = []
    for grad, param in zip(grads, params, strict=True):
        own = grad.chunk(num_ranks)[rank] if grad.numel() else grad
        handles += [ours.reduce_scatter_mean(grad, own), ours.all_gather_(param)]
    if order == "last first" or (order == "as each rank likes" and rank % 2):
        handles.reverse()
    for handle in [*handles, *handles]:
        handle.wait()
    for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad.numel():
            assert torch.all(grad.chunk(num_ranks)[rank] == index + (num_ranks - 1) / 2)
            assert all(torch.all(part == sender) for sender, part in enumerate(param.chunk(num_ranks)))


@pytest.mark.parametrize("verbs", ["memory", "messages"])
@ranks(2, on_ranks)
def test_handles_that_nobody_waits_for_do_not_stand_in_the_way(group: Any, verbs: str) -> None:
    """More reductions are started than may receive at once, and all but the last are waited for by nobody."""
    ours = verbs_of(group, verbs)
    buffers = [ours.new_buffer(ours.num_ranks * 300_000, F32, CPU).fill_(ours.rank) for _ in range(12)]
    outs = [torch.empty(300_000) for _ in buffers]
    last = [ours.reduce_scatter_mean(buffer, out) for buffer, out in zip(buffers, outs, strict=True)][-1]
    last.wait()
    assert float(torch.stack(outs).mean()) == 0.5


@pytest.mark.parametrize("verbs", ["memory", "messages"])
@ranks(2, on_ranks)
def test_no_number_of_verbs_under_way_is_too_large(group: Any, verbs: str) -> None:
    """As many verbs as a model may have parameters, begun by each rank before any is finished."""
    ours = verbs_of(group, verbs)
    buffers = [torch.full((2,), float(ours.rank + index)) for index in range(1500)]
    for handle in [ours.all_gather_(buffer) for buffer in buffers]:
        handle.wait()
    assert all(buffer.tolist() == [index, index + 1] for index, buffer in enumerate(buffers))


@ranks(3, on_ranks)
def test_scratch_memory_grows_neither_with_the_buffer_nor_with_the_number_of_reductions(group: Any) -> None:
    """How much memory, in bytes, twelve reductions of a large buffer under way take beside it."""
    ours = verbs_of(group, "messages")
    buffer = torch.zeros(ours.num_ranks * 4 * 2**20)
    own = buffer.chunk(ours.num_ranks)[ours.rank]
    most, empty = [0], torch.empty
    alive: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        alive.append(weakref.ref(made.untyped_storage()))
        most[0] = max(most[0], sum(its.nbytes() for ref in alive if (its := ref()) is not None))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        for handle in [ours.reduce_scatter_mean(buffer, own) for _ in range(12)]:
            handle.wait()
    assert 0 < most[0] <= 5 * 9 * 2**20  # and not twelve times 32 MiB


@pytest.mark.parametrize("verbs", ALL_VERBS)
@ranks(2, on_ranks)
def test_two_exchanges_of_one_group_do_not_mix_up_their_messages(group: Any, verbs: str) -> None:
    """The verbs of two optimizers overlap."""
    both = [verbs_of(group, verbs) for _ in range(2)]
    buffers = [each.new_buffer(2 * 3_000_000, F32, CPU).fill_(each.rank + k) for k, each in enumerate(both)]
    outs = [torch.empty(3_000_000) for _ in both]  # of which most arrive once they are waited for
    pairs = list(zip(both, buffers, outs, strict=True))
    handles = [ours.reduce_scatter_mean(buffer, out) for ours, buffer, out in pairs]
    for handle in handles:
        handle.wait()
    assert torch.all(outs[0] == 0.5) and torch.all(outs[1] == 1.5)


@pytest.mark.parametrize("verbs", ["memory", "native"])
@ranks(2, on_ranks)
def test_a_profilers_trace_shows_where_verbs_start_and_where_they_finish(group: Any, verbs: str) -> None:
    ours = verbs_of(group, verbs)
    buffer = ours.new_buffer(ours.num_ranks * 64, F32, CPU)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        handles = [ours.reduce_scatter_mean(buffer, torch.empty(64)), ours.all_gather_(buffer)]
        for handle in handles:
            handle.wait()
    names = [event.name for event in trace.events() or ()]
    assert names.count("sharded_dadamw::reduce_scatter") == names.count("sharded_dadamw::all_gather") == 2


# --- replicas and shards ---------------------------------------------------------------------------------------------


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    names = ("stage", "replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return mesh["replicate", "shard"] if len(shape) == 3 else mesh


SHARDS_OF_A_MESH = (77, 80, 77)
"""Elements of them, which replicas can share out evenly or not."""


def mean_over_both_axes(first: int, shape: tuple[int, ...], k: int, shard: int, dtypes: Any) -> Tensor:
    """A shard of the k-th mean, whose ranks begin at `first`."""
    dtype, out_dtype, wire = dtypes
    num_replicas, num_shards = shape[-2:]
    sent, numel = wire or dtype, SHARDS_OF_A_MESH[k]
    mean = torch.zeros(numel)
    for replica in range(num_replicas):
        ranks = range(first + replica * num_shards, first + (replica + 1) * num_shards)
        parts = [local_gradient(r + 10 * k, numel * num_shards, dtype).to(sent).float() for r in ranks]
        of_shards = sum(parts[1:], start=parts[0]) / num_shards
        mean = mean + of_shards.to(sent if num_replicas > 1 and wire else F32)[numel * shard :][:numel]
    return (mean / num_replicas).to(out_dtype)


@pytest.mark.parametrize("choice", [Exchange.FASTEST, Exchange.RANK_ORDER])
@pytest.mark.parametrize(
    ("shape", "dtypes", "add"),
    [
        ((2, 2), DTYPES[1], True),
        ((2, 2), DTYPES[4], False),
        ((2, 2), DTYPES[3], False),
        ((2, 2), DTYPES[3], True),
        ((4, 1), DTYPES[1], False),
        ((2, 2, 1), DTYPES[0], False),
        ((1, 4), DTYPES[0], True),
    ],
    ids=str,
)
@ranks(4, on_ranks)
def test_a_mesh_averages_over_shards_and_then_over_replicas(
    _: Any, shape: tuple[int, ...], choice: Exchange, dtypes: Any, add: bool
) -> None:
    dtype, out_dtype, wire = dtypes
    sent, num_replicas, num_shards = wire or dtype, *shape[-2:]
    ours = connect(mesh_of(shape), CPU, exchange=choice)
    rank, num_texts, is_in_place = dist.get_rank(), len(ours.gather_texts("")), not add and dtype == out_dtype
    assert ours.rank == rank % num_shards and num_texts == num_replicas * num_shards
    outs, buffers = [], []
    for k, numel in enumerate(SHARDS_OF_A_MESH):
        buffer = ours.new_buffer(numel * num_shards, dtype, CPU)
        buffer.copy_(local_gradient(rank + 10 * k, numel * num_shards, dtype))
        own = buffer[ours.rank * numel :][:numel]
        outs.append(own if is_in_place else torch.full((numel,), 0.1, dtype=out_dtype))
        buffers.append(buffer)
    handles = [
        ours.reduce_scatter_mean(buffer, out, add=add, wire_dtype=wire)
        for buffer, out in zip(buffers, outs, strict=True)
    ]
    for handle in handles[:: -1 if rank % 2 else 1]:
        handle.wait()
        handle.wait()
    first = rank - rank % num_texts
    for k, out in enumerate(outs):
        expected = mean_over_both_axes(first, shape, k, ours.rank, dtypes)
        assert torch.equal(out, torch.full_like(expected, 0.1) + expected if add else expected)
    ours.all_gather_(buffers[0]).wait()
    if is_in_place:
        row = [mean_over_both_axes(first, shape, 0, shard, dtypes) for shard in range(num_shards)]
        assert torch.equal(buffers[0], torch.cat(row))
    within = (num_shards - 1) * (sum(SHARDS_OF_A_MESH) * sent.itemsize + SHARDS_OF_A_MESH[0] * dtype.itemsize)
    pieces = sum(-(-numel // num_replicas) for numel in SHARDS_OF_A_MESH)
    between = (num_replicas - 1) * pieces * ((wire or F32).itemsize + out_dtype.itemsize)
    assert ours.bytes_sent == within + between


@ranks(4, on_ranks)
def test_a_mesh_with_one_replica_needs_no_verbs_of_its_own(_: Any) -> None:
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("stage", "replicate", "shard"))
    assert connect(mesh["replicate", "shard"], CPU).num_ranks == 2
    mesh = DeviceMesh("cpu", [[0, 1, 2]], mesh_dim_names=("replicate", "shard"))  # of which every rank has to know
    if dist.get_rank() < 3:
        assert isinstance(connect(mesh, CPU), SharedMemoryVerbs)


# --- memory that ranks share -----------------------------------------------------------------------------------------


def refuse(*_: Any) -> Any:
    raise OSError("not on this rank")


WAYS: dict[str, tuple[Any, str, Any]] = {
    "memory": (os, "memfd_create", refuse),
    "way to others' files": (os, "readlink", refuse),
    "permission to open them": (os, "open", refuse),
    "host in common": (shared_memory, "_BOOT_ID", Path("/proc/sys/kernel/osrelease")),
    "container in common": (os, "readlink", lambda _: "somebody else's file"),
}


@pytest.mark.parametrize("missing", WAYS)
@ranks(3, on_ranks)
def test_where_one_rank_cannot_share_memory_all_ranks_send_messages(group: Any, missing: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank(group) == 1:
            patch.setattr(*WAYS[missing])
        ours = connect(group, CPU)
    ours.gather_texts("in step")
    assert type(ours) is MessageVerbs


def shared_pages() -> int:
    """MiB of memory that this process shares, in all files together."""
    gc.collect()
    with open("/proc/self/smaps") as lines:
        sizes, ours = 0, False
        for line in lines:
            if "-" in line.split()[0]:
                ours = "sharded_dadamw" in line
            elif ours and line.startswith("Rss:"):
                sizes += int(line.split()[1])
    return sizes >> 10


@ranks(2, on_ranks)
def test_memory_goes_back_when_the_last_tensor_on_it_dies(group: Any) -> None:
    ours = verbs_of(group, "memory")
    at_first = shared_pages()
    counts = []

    def count() -> None:
        counts.append(shared_pages() - at_first)

    buffer = ours.new_buffer(2**20, F32, CPU).fill_(0.0)
    count()
    parameter = torch.nn.Parameter(torch.empty(2, 2))
    parameter.data = buffer.fill_(1.0)[:4].view(2, 2)
    count()
    del buffer
    count()
    assert parameter.sum() == 4.0
    address = parameter.data_ptr()
    del parameter
    count()
    again = ours.new_buffer(2**20, F32, CPU)
    assert again.data_ptr() == address, "the range is used again"
    assert not again.any(), "and zero again"
    again.fill_(1.0).share_memory_()  # which moves it
    count()
    assert torch.all(again == 1.0)
    ours.all_gather_(again).wait()
    assert counts == [4, 4, 4, 0, 0]


@ranks(2, on_ranks)
def test_buffers_are_cut_from_what_is_free(group: Any) -> None:
    ours = verbs_of(group, "memory")

    def page(buffer: Tensor) -> int:
        return (buffer.data_ptr() - start) // 4096

    first, second, third = (ours.new_buffer(numel, F32, CPU) for numel in (5000, 1, 1024))
    start = first.data_ptr()
    places = [page(each) for each in (first, second, third)]
    del first, second
    places += [page(ours.new_buffer(numel, F32, CPU)) for numel in (6 * 1024, 6 * 1024 + 1)]
    with pytest.raises(MemoryError, match="bytes in a row are left of"):
        ours.new_buffer(2**60, torch.uint8, CPU)
    assert places == [0, 5, 6, 0, 7], "in pages from the first of them"


@ranks(2, on_ranks)
def test_a_forked_child_does_not_take_its_parents_memory_away(group: Any) -> None:
    ours = verbs_of(group, "memory")
    buffer = ours.new_buffer(1000, F32, CPU).fill_(3.0)
    child = os.fork()
    if child == 0:
        del buffer, ours
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    gathered = ours.new_buffer(2, F32, CPU)
    gathered[ours.rank] = 1.0
    ours.all_gather_(gathered).wait()  # nor is the parent gone because the child is
    assert buffer.mean() * gathered.mean() == 3.0


def handles_of_the_system() -> tuple[int, int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        mapped = sum("sharded_dadamw" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), mapped


@ranks(2, on_ranks)
def test_connections_take_no_file_descriptors_and_leave_no_mappings_behind(group: Any) -> None:
    fds, of_others = handles_of_the_system()
    kept = []
    for _ in range(100):
        kept.append(verbs_of(group, "memory"))
        kept[-1].all_gather_(kept[-1].new_buffer(64 * kept[-1].num_ranks, F32, CPU)).wait()
    with_them, _ = handles_of_the_system()
    kept.clear()
    without, mapped = handles_of_the_system()
    assert [with_them - fds, without - fds, mapped - of_others] == [0, 0, 0]


@pytest.mark.parametrize("verbs", ["memory", "messages"])
@ranks(4, on_ranks, timeout_s=30.0)
def test_waiting_for_a_rank_that_has_left_is_an_error_each_time_and_no_hang(_: Any, verbs: str) -> None:
    group = dist.new_group([0, 1])
    if dist.get_rank() < 2:
        ours, said = verbs_of(group, verbs), []
        if ours.rank == 0:
            buffer = ours.new_buffer(128, F32, CPU)
            handle = ours.reduce_scatter_mean(buffer, buffer[:64])
            for _ in range(2):
                with pytest.raises(RuntimeError) as error:
                    handle.wait()
                said.append(str(error.value))
            assert said[0] == said[1]
        dist.destroy_process_group(group)


@ranks(2, on_ranks)
def test_what_is_under_way_comes_though_the_group_has_been_destroyed(_: Any) -> None:
    """As where training ends with parameters in flight, and somebody reads them afterwards, or nobody."""
    group = dist.new_group([0, 1])
    ours = verbs_of(group, "native")
    values = torch.tensor([1.0, 2.0]) * (torch.arange(2) == ours.rank)
    handle = ours.all_gather_(values)
    dist.destroy_process_group(group)
    del group
    handle.wait()
    assert values.tolist() == [1.0, 2.0]


@ranks(4, on_ranks)
def test_no_wait_is_longer_than_the_groups_timeout(_: Any) -> None:
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    if dist.get_rank() < 2:
        ours = verbs_of(group, "memory")
        if dist.get_rank() == 0:
            said = r"^rank 1 did not come to.*\(rank 1 has not come for 1 s\)$"
            with pytest.raises(RuntimeError, match=said):
                ours.all_gather_(torch.zeros(2)).wait()
    dist.barrier()


@ranks(2, on_ranks)
def test_ranks_that_are_out_of_step_hear_of_it(group: Any) -> None:
    ours = verbs_of(group, "memory")
    handle = ours.all_gather_(torch.zeros(2 + 2 * ours.rank))
    own, other, rank = 8 + 8 * ours.rank, 16 - 8 * ours.rank, 1 - ours.rank
    said = f"rank {rank} has begun an all-gather of {other} bytes, and rank {ours.rank} an all-gather of {own} bytes"
    with pytest.raises(RuntimeError, match=said):
        handle.wait()


# --- the rest --------------------------------------------------------------------------------------------------------


@ranks(3, on_ranks)
def test_texts_of_different_lengths_arrive_whole_and_in_rank_order(group: Any) -> None:
    assert connect(group, CPU).gather_texts("äöü" * dist.get_rank(group)) == ["", "äöü", "äöüäöü"]


def test_without_torch_distributed_there_is_one_rank_and_nothing_is_sent() -> None:
    ours = connect(None, CPU)
    buffer = torch.arange(128.0)
    ours.reduce_scatter_mean(buffer, buffer).wait()
    ours.all_gather_(buffer).wait()
    assert torch.equal(buffer, torch.arange(128.0))
    out = torch.ones(128, dtype=F64)
    ours.reduce_scatter_mean(buffer + 2**-12, out, add=True, wire_dtype=BF16).wait()
    assert torch.equal(out, torch.arange(1.0, 129.0).double() + (torch.arange(128) == 0) * 2**-12)
    assert not ours.new_buffer(3, BF16, CPU).any()
    assert (ours.num_ranks, ours.bytes_sent, ours.gather_texts("x")) == (1, 0, ["x"])


@pytest.mark.parametrize("num_ranks", [1, 2])
@ranks()
def test_who_runs_out_of_memory_hears_that_and_after_it_exchanges_nothing(group: Any) -> None:
    """Where others may have gone on, that is; alone it may try again with a smaller batch."""
    ours = RankOrderVerbs(group, CPU)
    buffer = torch.ones(2 * ours.num_ranks)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"), ours.explaining():
        raise torch.OutOfMemoryError("CUDA out of memory")
    if ours.num_ranks == 1:
        ours.reduce_scatter_mean(buffer, buffer[:2]).wait()
    else:
        with pytest.raises(RankError, match=rf"^rank {ours.rank} ran out of memory in .*from a checkpoint$"):
            ours.reduce_scatter_mean(buffer, buffer[:2])


def test_a_verb_may_be_waited_for_within_its_own_wait() -> None:
    """As by a signal handler that reads a parameter in flight."""
    queue: deque[Pending] = deque()
    calls = []

    def finish(name: str) -> None:
        calls.append(name)
        if len(calls) == 1:
            last.wait()

    first, last = (Pending(name, [partial(finish, name)], nullcontext, queue) for name in ("first", "last"))
    first.wait()
    last.wait()
    assert calls == ["first", "first", "last"] and not queue
