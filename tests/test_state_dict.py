"""State dicts, of fragments and whole: what torch's own functions make of them, what does not fit, and what nobody can.

That a run goes on through them on any number of ranks, in any layout, is in tests/test_checkpoint.py.
"""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

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
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sharded_dadamw import MainParameter, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.layout.boxes import boxes_of
from sharded_dadamw.update.precision import join
from tests import pool
from tests.harness import ranks
from tests.models import whole_state_dict
from tests.runs import FULL, LAW, Model, Parts, build, differences, fit, load, save, state_of, whole
from tests.simulated import on_ranks

LATE = 1
"""Number of the first parameter that is not frozen."""


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


def ours(group: Any, seed: int = 0, num_steps: int = 0, kind: str = "ours") -> Parts:
    parts = build(kind, group, seed, extras=("frozen", "late"))
    fit(*parts, num_steps)
    return parts


# --- what else can be done with a state dict, and what cannot ---


@ranks(3)
def test_fsdp2_with_torchs_adamw_loads_ours_and_we_load_theirs(group: Any, tmp_path: Path) -> None:
    """Through torch alone. Each side's decay is its own, so that `load_checkpoint` would refuse."""
    source, theirs, back = ours(group, 0, 4), ours(group, 1, 1, "fsdp2"), ours(group, 2)
    for number, (one, other) in enumerate(((source, theirs), (theirs, back))):
        save("torch", tmp_path / str(number), group, one)
        load("torch", tmp_path / str(number), group, other)
        assert differences(whole(*one[:2]), whole(*other[:2])) == []
        fit(*other, 1)


@pytest.mark.parametrize(("num_ranks", "full", "broadcast"), [(3, False, False), (3, True, False), (4, True, True)])
@ranks()
def test_a_copy_of_a_state_dict_takes_the_optimizer_back(group: Any, full: bool, broadcast: bool) -> None:
    """torch's functions on whole tensors, without files."""
    model, optimizer, schedule = ours(group, 0, 4)
    kept = broadcast and group.rank() == 0
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL if full else None))
    before = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    before = copy.deepcopy(before)
    fit(model, optimizer, schedule, 2)
    if full:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(model, optimizer, saved if kept or not broadcast else {}, options=options)
    else:
        set_optimizer_state_dict(model, optimizer, saved)
    after = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    assert before.keys() == after.keys()
    assert [differences(before[name], after[name]) for name in before] == [[]] * len(before)


@ranks(3)
def test_one_rank_gets_the_whole_state_on_request_and_once(group: Any) -> None:
    (model, optimizer, schedule), to = ours(group, 0, 4), 2
    with pytest.raises(ValueError, match=r"expected a rank in \[0, 3\), got 3"):
        optimizer.consolidate_state_dict(3)
    optimizer.consolidate_state_dict(to)
    saved = optimizer.state_dict()
    expected = whole(model, optimizer)
    if group.rank() == to:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        names = [name for name, _ in model.named_parameters()]
        for index, entries in torch.load(file, weights_only=True)["state"].items():
            assert all(torch.equal(value, expected[f"{names[index]}, {key}"]) for key, value in entries.items())
    else:
        with pytest.raises(RuntimeError, match="elements"):
            torch.save(saved, io.BytesIO())
    again = optimizer.state_dict()["state"][LATE]["exp_avg"]
    optimizer.consolidate_state_dict(to)
    fit(model, optimizer, schedule, 1)
    stepped = optimizer.state_dict()["state"][LATE]["exp_avg"]
    assert hasattr(again, "span") and hasattr(stepped, "span")  # what was consolidated is gone


def test_a_group_added_after_consolidating_is_in_the_state_dict() -> None:
    optimizer = ShardedDecoupledAdamW([nn.Parameter(torch.ones(3))])
    optimizer.consolidate_state_dict()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(()))]})
    optimizer.load_state_dict(optimizer.state_dict())


@ranks(2)
def test_consolidating_needs_memory_for_one_bucket_at_a_time(group: Any) -> None:
    _, optimizer, _ = ours(group)
    verbs, sizes = optimizer._shards.collectives, []
    gather = verbs.all_gather_
    verbs.all_gather_ = lambda buffer: sizes.append(buffer.nbytes) or gather(buffer)
    optimizer.consolidate_state_dict(1)
    of_each = [bucket.layout.numel * 4 for bucket in optimizer._shards.buckets]
    assert len(of_each) > 1 and sizes == [size for size in of_each for _ in range(2)]  # exp_avg, exp_avg_sq


@ranks(2)
def test_one_ranks_fragment_never_passes_for_the_whole(group: Any) -> None:
    model, optimizer, _ = ours(group)
    state = optimizer.state_dict()["state"]
    moment: Any = state[LATE]["exp_avg"]
    assert moment.shape == model.get_parameter("late").shape and moment.dtype == torch.float32
    assert "exp_avg" in repr(moment)
    for use in (
        lambda: moment + 1,
        lambda: moment.mul_(2),
        lambda: torch.equal(moment, moment),
        lambda: moment.to_local(),
        lambda: moment.tolist(),
        lambda: moment.to(torch.float64),
        lambda: moment.data,
        lambda: moment.T,
        lambda: moment.copy_(state[LATE + 1]["exp_avg"]),
        lambda: moment[0],
        lambda: pickle.dumps(moment),
        lambda: torch.save(optimizer.state_dict(), io.BytesIO()),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)elements \[\d+:\d+\] of \d+.*consolidate_state_dict\(\)"):
            use()


def test_on_one_rank_the_state_is_plain_and_torch_save_takes_it() -> None:
    model = Model(extras=("frozen", "late"))
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["state"]
    assert saved[LATE]["exp_avg"].shape == model.get_parameter("late").shape and saved[LATE]["step"].shape == ()


# --- what does not fit ---


SPOILT: dict[str, tuple[Tensor | None, str]] = {
    # what is in the place of exp_avg_sq, and what the error says of it in a whole state dict
    "a missing entry": (None, "expected entries .*exp_avg_sq.*, got "),
    "another shape": (torch.zeros(12), r"expected \[11\], got \[12\]"),
    "a wider dtype": (torch.zeros(11, dtype=torch.float64), "float64, which would be rounded"),
    "integers": (torch.full((11,), 2**24 + 1), "int64, which would be rounded"),
}


@pytest.mark.parametrize("through", ["torch", "whole"])
@pytest.mark.parametrize("kind", SPOILT)
@ranks(2)
def test_what_does_not_fit_is_named_and_the_live_state_is_as_it_was(
    group: Any, kind: str, through: str, tmp_path: Path
) -> None:
    model, optimizer, schedule = ours(group, 0, 2)
    target = ours(group, 1, 1)
    before = whole(*target[:2])
    put, said = SPOILT[kind]
    if through == "torch":
        state = state_of(model, optimizer, schedule)
        entries = state["optimizer"]["state"]["middle.0.bias"]
    else:
        state = whole_state_dict(optimizer, 2)
        entries = state["state"][[name for name, _ in model.named_parameters()].index("middle.0.bias")]
    del entries["exp_avg_sq"]
    entries |= {} if put is None else {"exp_avg_sq": put}
    if through == "torch":
        dcp.save(state, checkpoint_id=tmp_path, process_group=group)
        with pytest.raises((CheckpointException, RuntimeError, ValueError), match=r"middle\.0\.bias.*exp_avg_sq"):
            load("torch", tmp_path, group, target)
    else:
        with pytest.raises(ValueError, match=rf"state of middle\.0\.bias.*{said}"):
            target[1].load_state_dict(state)
    after = whole(*target[:2])
    kept = [key for key in before if ", " in key]  # weights come first, as torch's functions have it
    assert differences({key: before[key] for key in kept}, {key: after[key] for key in kept}) == []


@pytest.mark.parametrize(
    ("saves", "loads", "said"),
    [
        ("AdamW", "ours", r"amsgrad'\]: expected False, got True"),
        ("ours, remainder", "ours", "expected main_param, got main_remainder; choose the main_parameter"),
        ("ours", "ours, remainder", "expected main_remainder, got main_param; choose the main_parameter"),
    ],
)
def test_state_of_another_form_is_refused_and_changes_nothing(saves: str, loads: str, said: str) -> None:
    source, target = (build(kind, None, dtype=torch.bfloat16) for kind in (saves, loads))
    fit(*source, 1)
    fit(*target, 1)
    saved = source[1].state_dict()
    if saves == "AdamW":
        saved["param_groups"][0]["amsgrad"] = True
    before = whole(*target[:2])
    with pytest.raises(ValueError, match=said):
        target[1].load_state_dict(saved)
    assert differences(before, whole(*target[:2])) == []


def test_the_unsharded_optimizer_leaves_main_parameters_out_and_what_it_saves_then_loads_again() -> None:
    sharded, plain = (build(kind, None, dtype=torch.bfloat16) for kind in ("ours, remainder", "DecoupledAdamW"))
    fit(*sharded, 2)
    plain[1].load_state_dict(copy.deepcopy(sharded[1].state_dict()))
    assert not any("main_remainder" in entries for entries in plain[1].state.values())
    sharded[1].load_state_dict(plain[1].state_dict())
    for entries in sharded[1].state.values():
        assert entries["step"] == 2 and not entries["main_remainder"].any()


def test_a_state_that_never_stepped_starts_from_scratch() -> None:
    parts = build("ours", None, dtype=torch.bfloat16)
    fit(*parts, 1)
    parts[1].load_state_dict(build("AdamW", None)[1].state_dict())
    for entries in parts[1].state.values():
        assert all(not value.any() for key, value in entries.items() if key != "main_param")


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
    source, (model, optimizer, _) = ours(group, 0, 2), ours(group, 1, 3)
    state = state_of(*source)["optimizer"]
    del state["state"]["middle.3.weight"]["exp_avg"]
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, process_group=group)
    before, wanted = whole(model, optimizer), whole(*source[:2])
    asked = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(asked, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True), process_group=group)
    assert differences(whole(model, optimizer), before) == []  # the files are read, and nothing has changed yet
    set_optimizer_state_dict(model, optimizer, asked["optimizer"])
    wanted["middle.3.weight, exp_avg"] = before["middle.3.weight, exp_avg"]
    assert [key for key in differences(whole(model, optimizer), wanted) if ", " in key] == []


# --- on DTensors ---


def full_mains(group: Any, layout: str, main: MainParameter) -> dict[str, Tensor]:
    """By name the main parameters, whole, of a model whose parameters are DTensors."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 3)).bfloat16()
    sharing = {}
    if layout == "HSDP":
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(output_layouts=Replicate())})
        sharing = {"process_group": mesh["dp"]}
    config = ShardingConfig(main_parameter=main)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), **LAW, config=config, **sharing)
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step)).bfloat16()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    if main is MainParameter.FP32:
        return {name: entries["main_param"] for name, entries in state.items()}
    assert all(entries["main_remainder"].dtype is torch.int16 for entries in state.values())
    params = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: join(p.detach(), state[name]["main_remainder"]) for name, p in params.items()}


@pytest.mark.parametrize("layout", ["HSDP", "tensor parallel"])
@ranks(4)
def test_remainders_of_dtensors_come_whole_bit_for_bit(group: Any, layout: str) -> None:
    """No backend sends int16."""
    expected, found = (full_mains(group, layout, main) for main in (MainParameter.FP32, MainParameter.REMAINDER))
    assert differences(expected, found) == []


# --- asynchronous saves ---


def save_behind_training(group: Any, path: str) -> Any:
    """Threads need a group of their own, or their messages would meet those of training."""
    apart = dist.new_group(list(range(group.size())))
    parts = ours(group, 0, 2)
    then = whole(*parts[:2])
    future: Any = dcp.async_save(state_of(*parts), checkpoint_id=path, process_group=apart)
    fit(*parts, 2)
    future.result()
    return then


def load_from_torch(group: Any, path: Path) -> Any:
    parts = ours(group, 1)
    load("torch", path, group, parts)
    return whole(*parts[:2])


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    then = pool.on_ranks(4, save_behind_training, str(tmp_path))[0]
    for loaded in on_ranks(3, load_from_torch, tmp_path):
        assert differences(loaded, then) == []


def count_chunks(group: Any) -> list[int]:
    """Items that each rank asks to be written."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"optimizer": state_of(*ours(group))["optimizer"]["state"]}, None, False)
    items = planner.create_local_plan().items
    assert all(item.tensor_data is not None and 0 not in item.tensor_data.chunk.sizes for item in items)
    return [len([item for item in items if item.index.fqn.endswith(key)]) for key in ("exp_avg", "step")]


def test_each_element_is_written_once_and_steps_by_one_rank_each() -> None:
    counted = on_ranks(4, count_chunks)
    num_params = len(list(Model(extras=("late",)).parameters()))
    assert sum(steps for _, steps in counted) == num_params
    assert sum(chunks for chunks, _ in counted) <= num_params + 4 * 5
