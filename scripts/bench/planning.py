"""The plan of a checkpoint at a number of ranks that nobody has at hand, beside FSDP2's."""

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_load_plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from scripts.bench.harness import Benchmark, Report, ms
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.layout.bucket_layout import BucketLayout, plan_buckets
from sharded_dadamw.plan.parameters import parameters_of
from sharded_dadamw.state.fragment_tensor import FragmentTensor
from sharded_dadamw.state.piece import Piece

Shapes = dict[str, tuple[int, ...]]
Held = Callable[[str, int], tuple[int, int]]
"""First element and number of elements that a rank holds of a parameter."""


def ours(shapes: Shapes, num_ranks: int, cap_mb: float) -> Held:
    """What a rank holds under ShardedDecoupledAdamW."""
    numels = [math.prod(shape) for shape in shapes.values()]
    names, at = list(shapes), {}
    for indices in plan_buckets(numels, cap=int(cap_mb * 2**20) // 4):
        layout = BucketLayout(tuple(numels[index] for index in indices), num_ranks)
        at.update({names[index]: (layout, slot) for slot, index in enumerate(indices)})

    def held(name: str, rank: int) -> tuple[int, int]:
        layout, slot = at[name]
        part = layout.fragment(slot, rank)
        return part.param_start, part.numel

    return held


def fsdp2s(shapes: Shapes, num_ranks: int) -> Held:
    """What a rank holds under FSDP2: rows, since it cuts along dim 0."""

    def held(name: str, rank: int) -> tuple[int, int]:
        num_rows, *row = shapes[name]
        rows, first = Shard.local_shard_size_and_offset(num_rows, num_ranks, rank)
        return int(first) * math.prod(row), int(rows) * math.prod(row)

    return held


def state_of(rank: int, shapes: Shapes, held: Held, *, owned_steps: bool) -> dict[str, FragmentTensor]:
    """What a rank's `state_dict()` has, without memory; step counts for all ranks to write, or for their owners."""
    mesh, verbs = init_device_mesh("cpu", (dist.get_world_size(),)), Collectives()

    def fragment(key: str, shape: tuple[int, ...], start: int, numel: int, writes: bool = True) -> FragmentTensor:
        piece = Piece(key, torch.empty(numel, device="meta"), shape, shape, start, writes)
        return FragmentTensor.of(piece, like=torch.empty(shape, device="meta"), mesh=mesh, ranks=verbs)

    state = {}
    for name, shape in shapes.items():
        start, numel = held(name, rank)
        is_first = start == 0 and numel > 0
        state[f"state.{name}.step"] = fragment(name, (), 0, 1, writes=is_first or not owned_steps)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"state.{name}.{moment}"] = fragment(name, shape, start, numel)
    return state


def planned(state_on: Callable[[int], dict[str, FragmentTensor]]) -> dict[str, str]:
    """Have torch make the plan of all ranks, and of one that then loads; returns what that took."""
    plans, seconds = [], []
    for rank in range(dist.get_world_size()):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state_on(rank), None, rank == 0)
        start = time.perf_counter()
        plans.append(planner.create_local_plan())
        seconds.append(time.perf_counter() - start)
    started = time.perf_counter()
    _, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
    planned_all = time.perf_counter()
    create_default_local_load_plan(state_on(0), metadata)
    loading_s = time.perf_counter() - planned_all
    entries = metadata.state_dict_metadata.items()
    return {
        "chunks of exp_avg": f"{sum(len(entry.chunks) for key, entry in entries if key.endswith('exp_avg')):,}",
        "items": f"{sum(len(plan.items) for plan in plans):,}",
        "plan of one, ms": ms(torch.tensor(seconds)),
        "of all, s": f"{planned_all - started:.2f}",
        "metadata, MB": f"{len(pickle.dumps(metadata)) / 1e6:.2f}",
        "load plan of one, s": f"{loading_s:.3f}",
    }


@dataclass(frozen=True, kw_only=True)
class Planning(Benchmark):
    """Plan a save of Llama-3-8B's state on many ranks, cut as ours is and as FSDP2's.

    Every rank's part of an optimizer's state is described by tensors without memory, by the code that describes it in a
    run of ours; torch.distributed.checkpoint's own planner then makes the plan of all of them, which is what the
    coordinator does while all ranks wait. Bytes of metadata are those of the file that every rank reads first when it
    loads. Nothing is sent or written, so gathering the plans, which grows with their number, is not in it.
    """

    ranks: Annotated[int, typer.Option(min=2, help="Of the run that would save.")] = 1024
    bucket_cap_mb: Annotated[float, typer.Option(help="As in ShardingConfig, of fp32 parameters.")] = 16.0

    def run(self) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.ranks)
        shapes = {name: tuple(param.shape) for name, param in parameters_of("llama3-8b").items()}
        own = ours(shapes, self.ranks, self.bucket_cap_mb)
        theirs = fsdp2s(shapes, self.ranks)
        rows = [
            {"": "ShardedDecoupledAdamW", **planned(partial(state_of, shapes=shapes, held=own, owned_steps=True))},
            {"": "FSDP2 + AdamW", **planned(partial(state_of, shapes=shapes, held=theirs, owned_steps=False))},
        ]
        dist.destroy_process_group()
        self.publish(Report(rows, [f"{self.ranks:,} simulated ranks, {len(shapes)} parameters."]))
