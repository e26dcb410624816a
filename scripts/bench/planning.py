"""What planning a save costs at a number of ranks that nobody has at hand, beside FSDP2's."""

import math
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_load_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from scripts.bench.harness import Benchmark, Report
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.layout.bucket_layout import BucketLayout, plan_buckets
from sharded_dadamw.plan.models import parameters_of
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.state.piece import Piece

MOMENTS = ("exp_avg", "exp_avg_sq")


def our_state(shapes: dict[str, tuple[int, ...]], num_ranks: int, cap_mb: float) -> Iterator[dict[str, Any]]:
    """What each rank's `state_dict()` has, rank by rank."""
    mesh, verbs = init_device_mesh("cpu", (num_ranks,)), Collectives()
    names, numels = list(shapes), [math.prod(shape) for shape in shapes.values()]
    buckets = plan_buckets(numels, cap=int(cap_mb * 2**20) // 4)
    layouts = [BucketLayout(tuple(numels[i] for i in indices), num_ranks) for indices in buckets]

    def wrapped(name: str, numel: int, shape: tuple[int, ...], start: int, writes: bool) -> FragmentTensor:
        fragment = torch.empty(numel, device="meta")
        like = torch.empty(shape, device="meta")
        piece = Piece(name, fragment, shape, shape, start, writes)
        return FragmentTensor.of(piece, like=like, mesh=mesh, ranks=verbs)

    for rank in range(num_ranks):
        state: dict[str, Any] = {}
        for indices, layout in zip(buckets, layouts, strict=True):
            for slot, index in enumerate(indices):
                name, part = names[index], layout.fragment(slot, rank)
                owns_first = part.numel > 0 and part.param_start == 0
                state[f"state.{name}.step"] = wrapped(name, 1, (), 0, owns_first)
                for moment in MOMENTS:
                    key = f"state.{name}.{moment}"
                    state[key] = wrapped(key, part.numel, shapes[name], part.param_start, True)
        yield state


def our_plans(shapes: dict[str, tuple[int, ...]], num_ranks: int, cap_mb: float) -> Iterator[tuple[SavePlan, float]]:
    """Each rank's own plan, and the seconds that it took."""
    for rank, state in enumerate(our_state(shapes, num_ranks, cap_mb)):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, None, rank == 0)
        start = time.perf_counter()
        plan = planner.create_local_plan()
        yield plan, time.perf_counter() - start


def fsdp2_plans(shapes: dict[str, tuple[int, ...]], num_ranks: int) -> Iterator[tuple[SavePlan, float]]:
    """The same for DTensors cut along dim 0, as torch plans them; every rank has every step count."""
    properties = TensorProperties(dtype=torch.float32)

    def item(key: str, shape: tuple[int, ...], offsets: list[int], sizes: list[int], kind: WriteItemType) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(shape))
        return WriteItem(index=MetadataIndex(key, chunk.offsets), type=kind, tensor_data=data)

    for rank in range(num_ranks):
        start = time.perf_counter()
        items = []
        for name, shape in shapes.items():
            items.append(item(f"state.{name}.step", (), [], [], WriteItemType.TENSOR))
            size, offset = Shard.local_shard_size_and_offset(shape[0], num_ranks, rank)
            rest = list(shape[1:])
            for moment in MOMENTS:
                offsets = [int(offset), *[0] * len(rest)]
                items.append(item(f"state.{name}.{moment}", shape, offsets, [int(size), *rest], WriteItemType.SHARD))
        yield SavePlan(items), time.perf_counter() - start


def plan(made: Iterator[tuple[SavePlan, float]], loading: dict[str, Any]) -> dict[str, float]:
    """Have torch make the plan of all ranks, and of one that then loads into `loading`; returns what that took.

    Returns:
        Chunks of `exp_avg` that are written, and items of all ranks' plans. Seconds for one rank's own plan, the median
        over ranks; for the plan of all, at the coordinator; for one rank's plan of its load. Bytes of metadata.
    """
    plans, seconds = zip(*made, strict=True)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    start = time.perf_counter()
    _, metadata = planner.create_global_plan(list(plans))
    global_s = time.perf_counter() - start
    entries = metadata.state_dict_metadata.items()
    start = time.perf_counter()
    create_default_local_load_plan(loading, metadata)
    return {
        "load_s": time.perf_counter() - start,
        "chunks": sum(len(entry.chunks) for key, entry in entries if key.endswith("exp_avg")),
        "items": sum(len(plan.items) for plan in plans),
        "local_s": float(torch.tensor(seconds, dtype=torch.float64).median()),
        "global_s": global_s,
        "metadata_bytes": len(pickle.dumps(metadata)),
    }


@dataclass(frozen=True, kw_only=True)
class Planning(Benchmark):
    """Plan a save of Llama-3-8B's state on many ranks, with ours and with FSDP2's.

    Every rank's part of an optimizer's state is described by tensors without memory, by the code that describes it in a
    run; torch.distributed.checkpoint's own planner then makes the plan of all of them, which is what the coordinator
    does while all ranks wait. Bytes of metadata are those of the file that every rank reads first when it loads.
    Nothing is sent or written, so gathering the plans, which grows with their number, is not in it.
    """

    ranks: Annotated[int, typer.Option(min=2, help="Of the run that would save.")] = 1024
    bucket_cap_mb: Annotated[float, typer.Option(help="As in ShardingConfig, of fp32 parameters.")] = 16.0

    def run(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.ranks)
        shapes = {name: tuple(param.shape) for name, param in parameters_of("llama3-8b").items()}
        ours = next(our_state(shapes, self.ranks, self.bucket_cap_mb))
        theirs = {key: _first(tensor, self.ranks) for key, tensor in ours.items()}
        found = {
            "ShardedDecoupledAdamW": plan(our_plans(shapes, self.ranks, self.bucket_cap_mb), ours),
            "FSDP2 + AdamW": plan(fsdp2_plans(shapes, self.ranks), theirs),
        }
        dist.destroy_process_group()
        titles = [
            "",
            "chunks of exp_avg",
            "items",
            "plan of one, ms",
            "of all, s",
            "metadata, MB",
            "load plan of one, s",
        ]
        rows = [
            [
                *(name, f"{one['chunks']:,}", f"{one['items']:,}", f"{one['local_s'] * 1e3:.1f}"),
                *(f"{one['global_s']:.2f}", f"{one['metadata_bytes'] / 1e6:.2f}", f"{one['load_s']:.3f}"),
            ]
            for name, one in found.items()
        ]
        lines = [f"{self.ranks:,} simulated ranks, {len(shapes)} parameters."]
        self.publish(Report(titles, rows, lines, {"found": found}))


def _first(tensor: Tensor, num_ranks: int) -> Tensor:
    """Rank 0's part under FSDP2, as a plain tensor would be planned; `step` is whole on every rank."""
    whole = torch.empty(tensor.shape, device="meta")
    if whole.dim() == 0:
        return whole
    mesh = init_device_mesh("cpu", (num_ranks,))
    size, _ = Shard.local_shard_size_and_offset(whole.shape[0], num_ranks, 0)
    return DTensor.from_local(
        whole[: int(size)], mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
