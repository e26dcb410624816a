"""A checkpoint has no world size: what torch.distributed.checkpoint saves at N ranks loads at M, in any layout.

Nor does it have a layout, so that CASES need not be all pairs of sizes and layouts: every size and layout is written
and read, at more and at fewer ranks, and where nothing changed the run goes on bit for bit.
"""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.layout.boxes import boxes_of
from tests import pool
from tests.harness import ranks
from tests.simulated import alone, on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4, betas=(0.9, 0.95), eps=1e-8)
FIRST = 1
"""Number of the first parameter that is not frozen."""
FULL = StateDictOptions(full_state_dict=True)


# --- boxes ---


@given(st.lists(st.integers(1, 6), max_size=4), st.data())
def test_boxes_are_disjoint_views_of_the_range_and_few(shape: list[int], data: Any) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, numbers.numel()))
    stop = data.draw(st.integers(start, numbers.numel()))
    boxes, seen = boxes_of(shape, start, stop), []
    for box in boxes:
        assert box.numel > 0 and box.start == len(seen)
        part = numbers
        for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        seen += part.flatten().tolist()
    assert seen == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


# --- layouts ---


class Model(nn.Module):
    """Odd sizes, so that fragments start and end inside of rows; one tied weight, one frozen."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32, *, degenerate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(13, 37, dtype=dtype)
        self.conv = nn.Conv1d(3, 5, 3, dtype=dtype)
        self.norm = nn.LayerNorm(37, dtype=dtype)
        self.outer = nn.Linear(37, 13, dtype=dtype)
        self.again = nn.Linear(13, 37, bias=False, dtype=dtype)
        self.again.weight = self.inner.weight
        self.frozen = nn.Parameter(torch.randn(3, dtype=dtype), requires_grad=False)
        self.late = nn.Parameter(torch.randn(7, 3, dtype=dtype))
        if degenerate:  # which FSDP2 does not take
            self.empty, self.scalar = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "scalar"):
            x = x * self.scalar + self.empty.sum()
        mixed = self.conv(torch.tanh(self.outer(self.norm(self.inner(x) + self.again(x)))).view(-1, 3, 13))
        return mixed.float().square().mean() + (self.late.float().sum() * self.frozen.float().sum()).tanh()


class Run(NamedTuple):
    model: nn.Module
    optimizer: Any
    group: Any


def ours(group: Any, seed: int, cap: float = 1e-3, dtype: torch.dtype = torch.float32, **settings: Any) -> Run:
    model = Model(seed, dtype)
    config = ShardingConfig(bucket_cap_mb=cap, **settings)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW, amsgrad=True, process_group=group, config=config)
    return Run(model, optimizer, group)


def ours_bf16(group: Any, seed: int, cap: float = 1e-3) -> Run:
    return ours(group, seed, cap, torch.bfloat16, main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)


def fsdp2(group: Any, seed: int, kind: Any = DecoupledAdamW) -> Run:
    model = fully_shard(Model(seed), mesh=DeviceMesh.from_group(group, "cpu", mesh_dim_names=(group.group_name,)))
    return Run(model, kind(model.named_parameters(), **LAW, amsgrad=True), group)


def hsdp(group: Any, seed: int) -> Run:
    """On four ranks 2 replicas of 2 shards, on fewer as many replicas of one shard; state is cut over the replicas."""
    if group.size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    else:
        names = (group.group_name, alone().group_name)
        ranks = torch.arange(group.size()).view(-1, 1)
        mesh = DeviceMesh.from_group([group, alone()], "cpu", mesh=ranks, mesh_dim_names=names)
    model = fully_shard(Model(seed), mesh=mesh)
    config = ShardingConfig(bucket_cap_mb=1e-3)
    return Run(model, ShardedDecoupledAdamW(model.named_parameters(), **LAW, amsgrad=True, config=config), group)


def plain(group: Any, seed: int) -> Run:
    model = Model(seed)
    return Run(model, DecoupledAdamW(model.named_parameters(), **LAW, amsgrad=True), group)


def in_groups(group: Any, seed: int, reordered: bool = False) -> Run:
    """Two groups, and parameters without elements or dims; or these the other way round, cut elsewhere."""
    model = Model(seed, degenerate=True)
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [(name, p) for name, p in named if p.ndim > 1]},
        {"params": [(name, p) for name, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr": 1e-3},
    ]
    if reordered:
        groups = [{**of_it, "params": of_it["params"][::-1]} for of_it in groups]
    config = ShardingConfig(bucket_cap_mb=2e-3 if reordered else 1e-3)
    optimizer = ShardedDecoupledAdamW(groups, **LAW, amsgrad=True, process_group=group, config=config)
    assert all(bucket.layout.shard_numel % (128 if reordered else 64) == 0 for bucket in optimizer._shards.buckets)
    return Run(model, optimizer, group)


LAYOUTS: dict[str, Callable[[Any, int], Run]] = {
    "ours": ours,
    "ours, bf16": ours_bf16,
    "FSDP2": fsdp2,
    "HSDP": hsdp,
    "plain": plain,
    "in groups": in_groups,
    "in groups, reordered": partial(in_groups, reordered=True),
}


def fit(run: Run, steps: range) -> None:
    """The same batch on every rank, so that the mean gradient is the same on any number of them, but for its rounding.

    From the third step on one parameter gets no gradient any more, so that step counts differ.
    """
    for step in steps:
        torch.manual_seed(step)
        run.model(torch.randn(6, 13, dtype=next(run.model.parameters()).dtype)).backward()
        if step >= 2:
            run.model.late.grad = None  # type: ignore[assignment]
        run.optimizer.step()
        run.optimizer.zero_grad()


def state_of(run: Run) -> dict[str, Any]:
    return {"model": get_model_state_dict(run.model), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}


def weights_of(run: Run) -> dict[str, Tensor]:
    """The weights, gathered; copies."""
    return copy.deepcopy(get_model_state_dict(run.model, options=FULL))


def whole(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimizer's state and the weights, gathered; copies."""
    return copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizer, options=FULL)), weights_of(run)


def by_name(run: Run) -> tuple[Any, Any, Any]:
    """State and weights, and the hyperparameters of each parameter."""
    state, weights = whole(run)
    hypers = {
        name: {key: value for key, value in of_it.items() if key not in ("params", "param_names")}
        for of_it in state["param_groups"]
        for name in of_it["params"]
    }
    return state["state"], weights, hypers


def save_at(group: Any, layout: str, path: str, through: str = "torch") -> Any:
    run = LAYOUTS[layout](group, 0)
    fit(run, range(4))
    if through == "torch":
        dcp.save(state_of(run), checkpoint_id=path, process_group=group)
    else:
        save_checkpoint(path, step=4, model=run.model, optimizer=run.optimizer, process_group=group)
    then = by_name(run)
    fit(run, range(4, 6))
    return then, weights_of(run)


def load_at(group: Any, layout: str, path: str, through: str = "torch") -> Any:
    run = LAYOUTS[layout](group, 1)
    fit(run, range(1))  # to be overwritten
    for of_it in run.optimizer.param_groups:
        of_it["lr"] = 7.0
    if through == "torch":
        state = state_of(run)
        dcp.load(state, checkpoint_id=path, process_group=group)
        set_model_state_dict(run.model, state["model"])
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    else:
        load_checkpoint(path, model=run.model, optimizer=run.optimizer, process_group=group)
    then = by_name(run)
    fit(run, range(4, 6))
    return then, weights_of(run)


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, whatever is nested in whatever."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, tuple):
        for ours_, theirs in zip(one, other, strict=True):
            assert_same(ours_, theirs)
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


CASES = [
    # A layout into itself, at the same size, at more ranks and at fewer.
    *(("ours", n, "ours", m) for n, m in [(3, 3), (1, 3), (4, 1)]),
    *(("ours, bf16", n, "ours, bf16", m) for n, m in [(2, 2), (1, 4), (4, 3)]),
    *(("FSDP2", n, "FSDP2", m) for n, m in [(2, 2), (4, 1)]),
    *(("HSDP", n, "HSDP", m) for n, m in [(4, 4), (2, 4)]),
    # What is saved has no layout: it is enough that each is written for one other and read from one other.
    ("ours", 2, "FSDP2", 3),
    ("FSDP2", 2, "HSDP", 4),
    ("HSDP", 4, "plain", 1),
    ("plain", 1, "ours", 3),
    ("ours", 3, "HSDP", 4),
    # The parameters of a group may come in another order, in other buckets, cut on other multiples.
    ("in groups", 2, "in groups, reordered", 2),
    ("in groups", 1, "in groups, reordered", 3),
]


@pytest.mark.parametrize(
    ("one", "saved_at", "other", "loaded_at", "through"),
    [*((*case, "torch") for case in CASES), ("in groups", 3, "in groups, reordered", 1, "load_checkpoint")],
)
def test_a_run_goes_on_at_any_world_size_in_any_layout(
    one: str, saved_at: int, other: str, loaded_at: int, through: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, later = on_ranks(saved_at, save_at, one, str(tmp_path), through)[0]
    if "reordered" in other:
        monkeypatch.setattr("sharded_dadamw.layout.bucket_layout.ALIGNMENT", 128)
    for loaded, loaded_later in on_ranks(loaded_at, load_at, other, str(tmp_path), through):
        assert_same(loaded, expected)
        if (one, saved_at) == (other.removesuffix(", reordered"), loaded_at):
            assert_same(loaded_later, later)
        else:  # the sum of N equal gradients, over N, is rounded where N is no power of two
            for name, weight in later.items():
                tolerance = dict(rtol=2e-2, atol=1e-3) if weight.dtype is torch.bfloat16 else dict(rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(loaded_later[name], weight, **tolerance)


# --- other people's optimizers ---


@ranks(3)
def test_fsdp2_with_torchs_adamw_loads_ours_and_we_load_theirs(group: Any, tmp_path: Path) -> None:
    """Ours loads into theirs strictly. Theirs has no `initial_lr` without a scheduler, so ours loads it partially."""
    source = ours(group, 0)
    fit(source, range(4))
    dcp.save(state_of(source), checkpoint_id=f"{tmp_path}/ours", process_group=group)
    theirs = fsdp2(group, 1, AdamW)
    fit(theirs, range(1))
    state = state_of(theirs)
    dcp.load(state, checkpoint_id=f"{tmp_path}/ours", process_group=group)
    set_optimizer_state_dict(theirs.model, theirs.optimizer, state["optimizer"])
    assert_same(whole(theirs)[0]["state"], whole(source)[0]["state"])
    fit(theirs, range(4, 5))
    dcp.save(state_of(theirs), checkpoint_id=f"{tmp_path}/theirs", process_group=group)
    back = ours(group, 2)
    state = state_of(back)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=f"{tmp_path}/theirs", planner=planner, process_group=group)
    set_optimizer_state_dict(back.model, back.optimizer, state["optimizer"])
    assert_same(whole(back)[0]["state"], whole(theirs)[0]["state"])


# --- what else can be done with a state dict, and what cannot ---


@pytest.mark.parametrize(("num_ranks", "full", "broadcast"), [(3, False, False), (3, True, False), (4, True, True)])
@ranks()
def test_a_copy_of_a_state_dict_takes_the_optimizer_back(group: Any, full: bool, broadcast: bool) -> None:
    """torch's functions on whole tensors, without files."""
    run = ours(group, 0)
    fit(run, range(4))
    kept = broadcast and group.rank() == 0
    saved = get_optimizer_state_dict(run.model, run.optimizer, options=FULL if full else None)
    saved = copy.deepcopy(saved)
    before = whole(run)
    fit(run, range(4, 6))
    if full:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(run.model, run.optimizer, saved if kept or not broadcast else {}, options=options)
    else:
        set_optimizer_state_dict(run.model, run.optimizer, saved)
    assert_same(whole(run)[0]["state"], before[0]["state"])


@ranks(3)
def test_one_rank_gets_the_whole_state_on_request_and_once(group: Any) -> None:
    run, to = ours(group, 0), 2
    with pytest.raises(ValueError, match=r"expected a rank in \[0, 3\), got 3"):
        run.optimizer.consolidate_state_dict(3)
    fit(run, range(4))
    run.optimizer.consolidate_state_dict(to)
    saved = run.optimizer.state_dict()
    expected = whole(run)[0]
    if group.rank() == to:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        names = [name for g in expected["param_groups"] for name in g["params"]]
        assert_same({names[index]: entries for index, entries in saved["state"].items()}, expected["state"])
    else:
        with pytest.raises(RuntimeError, match="elements"):
            torch.save(saved, io.BytesIO())
    again = run.optimizer.state_dict()["state"][FIRST]["exp_avg"]
    run.optimizer.consolidate_state_dict(to)
    fit(run, range(4, 5))
    stepped = run.optimizer.state_dict()["state"][FIRST]["exp_avg"]
    assert hasattr(again, "span") and hasattr(stepped, "span")  # what was consolidated is gone


def test_a_group_added_after_consolidating_is_in_the_state_dict() -> None:
    optimizer = ShardedDecoupledAdamW([nn.Parameter(torch.ones(3))])
    optimizer.consolidate_state_dict()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(()))]})
    optimizer.load_state_dict(optimizer.state_dict())


@ranks(2)
def test_consolidating_needs_memory_for_one_bucket_at_a_time(group: Any) -> None:
    run = ours(group, 0)
    verbs, sizes = run.optimizer._shards.collectives, []
    gather = verbs.all_gather_
    verbs.all_gather_ = lambda buffer: sizes.append(buffer.nbytes) or gather(buffer)
    run.optimizer.consolidate_state_dict(1)
    num_tensors = 3  # exp_avg, exp_avg_sq, max_exp_avg_sq
    assert len(sizes) > num_tensors
    # Buckets are smaller here than the largest parameter.
    assert max(sizes) <= max(p.nbytes for p in run.model.parameters()) + 2 * 64 * 4


@ranks(2)
def test_one_ranks_fragment_never_passes_for_the_whole(group: Any) -> None:
    run = ours(group, 0)
    moment: Any = run.optimizer.state_dict()["state"][FIRST]["exp_avg"]
    assert moment.shape == run.model.late.shape and moment.dtype == torch.float32 and "exp_avg" in repr(moment)
    for use in (
        lambda: moment + 1,
        lambda: moment.mul_(2),
        lambda: torch.equal(moment, moment),
        lambda: moment.to_local(),
        lambda: moment.tolist(),
        lambda: moment.to(torch.float64),
        lambda: moment.data,
        lambda: moment.T,
        lambda: moment.copy_(run.optimizer.state_dict()["state"][FIRST + 1]["exp_avg"]),
        lambda: moment[0],
        lambda: pickle.dumps(moment),
        lambda: torch.save(run.optimizer.state_dict(), io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)elements \[\d+:\d+\] of \d+.*consolidate_state_dict\(\)"):
            use()


def test_on_one_rank_the_state_is_plain_and_torch_save_takes_it() -> None:
    model = Model(0)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["state"]
    assert saved[FIRST]["exp_avg"].shape == model.late.shape and saved[FIRST]["step"].shape == ()


# --- what does not fit ---


@pytest.mark.parametrize("kind", ["a missing entry", "another shape", "a wider dtype", "integers"])
@ranks(2)
def test_what_does_not_fit_is_named_and_the_live_state_is_as_it_was(group: Any, kind: str, tmp_path: Path) -> None:
    source = ours(group, 0)
    fit(source, range(2))
    state = state_of(source)
    entries = state["optimizer"]["state"]["inner.bias"]
    if kind == "a missing entry":
        del entries["exp_avg_sq"]
    elif kind == "another shape":
        entries["exp_avg_sq"] = torch.zeros(38)
    elif kind == "a wider dtype":
        entries["exp_avg_sq"] = torch.zeros(37, dtype=torch.float64)
    elif kind == "integers":
        entries["exp_avg_sq"] = torch.full((37,), 2**24 + 1)
    dcp.save(state, checkpoint_id=tmp_path, process_group=group)
    target = ours(group, 1)
    fit(target, range(1))
    before = whole(target)
    state = state_of(target)
    with pytest.raises((CheckpointException, RuntimeError, ValueError)) as error:
        dcp.load({"optimizer": state["optimizer"]}, checkpoint_id=tmp_path, process_group=group)
        set_optimizer_state_dict(target.model, target.optimizer, state["optimizer"])
    assert_same(whole(target), before)
    assert "inner.bias" in str(error.value) and "exp_avg_sq" in str(error.value)


@ranks(2)
def test_a_fragment_of_another_shape_is_refused(group: Any) -> None:
    """As many elements in another shape."""
    one, other = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
    wide, tall = (ShardedDecoupledAdamW(m.named_parameters(), **LAW, process_group=group) for m in (one, other))
    with pytest.raises(ValueError, match=r"of \[6, 4\], got.*of \[4, 6\]"):
        wide.load_state_dict(tall.state_dict())


@ranks(2)
def test_a_partial_load_leaves_the_rest_alone(group: Any, tmp_path: Path) -> None:
    """Entries that a partial load leaves out stay what they are."""
    source, target = ours(group, 0), ours(group, 1)
    fit(source, range(2))
    fit(target, range(3))
    state = state_of(source)["optimizer"]
    del state["state"]["outer.weight"]["exp_avg"]
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, process_group=group)
    before, wanted = whole(target)[0]["state"], whole(source)[0]["state"]
    asked = {"optimizer": get_optimizer_state_dict(target.model, target.optimizer)}
    dcp.load(asked, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True), process_group=group)
    assert_same(whole(target)[0]["state"], before)  # the files are read, and nothing has changed yet
    set_optimizer_state_dict(target.model, target.optimizer, asked["optimizer"])
    after = whole(target)[0]["state"]
    kept = after["outer.weight"].pop("exp_avg")
    wanted["outer.weight"].pop("exp_avg")
    assert torch.equal(kept, before["outer.weight"]["exp_avg"])
    assert_same(after, wanted)


# --- asynchronous saves ---


def save_behind_training(group: Any, path: str) -> Any:
    """Threads need a group of their own, or their messages would meet those of training."""
    apart = dist.new_group(list(range(group.size())))
    run = ours(group, 0)
    fit(run, range(2))
    then = by_name(run)
    future: Any = dcp.async_save(state_of(run), checkpoint_id=path, process_group=apart)
    fit(run, range(2, 4))
    future.result()
    return then


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    then = pool.on_ranks(4, save_behind_training, str(tmp_path))[0]
    for loaded, _ in on_ranks(3, load_at, "ours", str(tmp_path)):
        assert_same(loaded, then)


def count_chunks(group: Any) -> list[int]:
    """Items that each rank asks to be written."""
    run = ours(group, 0, cap=16.0)
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"optimizer": get_optimizer_state_dict(run.model, run.optimizer)["state"]}, None, False)
    items = planner.create_local_plan().items
    assert all(item.tensor_data is not None and 0 not in item.tensor_data.chunk.sizes for item in items)
    return [len([item for item in items if item.index.fqn.endswith(key)]) for key in ("exp_avg", "step")]


def test_each_element_is_written_once_and_steps_by_one_rank_each() -> None:
    counted = on_ranks(4, count_chunks)
    num_params = len([p for p in Model(0).parameters() if p.requires_grad])
    assert sum(steps for _, steps in counted) == num_params
    assert sum(chunks for chunks, _ in counted) <= num_params + 4 * 5
