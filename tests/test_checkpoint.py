"""Whole runs saved and loaded in one call: bit for bit, by name, whole or not at all.

Layouts, forms of state and numbers of ranks meet in chosen pairs: a checkpoint knows nothing of who wrote it, so that
each need only be written once and read once, at a larger, a smaller and an odd number of ranks.
"""

import contextlib
import copy
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, SequentialLR

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sharded_dadamw.checkpoint.folder import Manifest
from sharded_dadamw.interchange import write_state
from tests import pool
from tests.harm import Calls
from tests.harness import ranks
from tests.runs import EXTRAS, LAW, Model, Parts, build, differences, fit, load, run, save, whole, wide
from tests.simulated import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are in some tests


def saved(root: Path, kind: str, num_steps: int, group: Any = None, **settings: Any) -> Parts:
    """A run that was saved after some steps."""
    parts = build(kind, group, **settings)
    fit(*parts, num_steps)
    save_checkpoint(root, step=num_steps, **run(group, *parts))
    return parts


def loaded(root: Path, kind: str, group: Any = None, **settings: Any) -> Parts:
    """Another run that goes on from there."""
    parts = build(kind, group, seed=1, **settings)
    load_checkpoint(root, **run(group, *parts))
    return parts


def assert_same(one: Sequence[Any], other: Sequence[Any]) -> None:
    assert differences(whole(*one[:2]), whole(*other[:2])) == []


F32, BF16 = torch.float32, torch.bfloat16

# --- saved and loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "AdamW"])
def test_a_run_that_has_not_begun_is_saved_without_state(kind: str, tmp_path: Path) -> None:
    parts, target = saved(tmp_path, kind, 0), build(kind, None, seed=1)
    fit(*target, 2)
    load_checkpoint(tmp_path, **run(None, *target))
    for each in (parts, target):
        torch.manual_seed(7)
        fit(*each, 2)
    assert_same(parts, target)


def then_and_later(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    then = wide(whole(*parts[:2]))
    torch.manual_seed(7)  # or ranks that the saved run did not have would see other batches
    fit(*parts, 3)
    return then, wide(whole(*parts[:2]))


def saved_at(group: Any, kind: str, root: Path, through: str, settings: dict[str, Any]) -> Any:
    parts = build(kind, group, **settings)
    fit(*parts, 4)
    if through == "load_checkpoint" and kind.startswith("ours"):
        parts[1].consolidate_state_dict()  # of which a checkpoint takes nothing
    save(through, root, group, parts)
    return then_and_later(parts)


def loaded_at(group: Any, kind: str, root: Path, through: str, settings: dict[str, Any]) -> Any:
    parts = build(kind, group, seed=1, **settings)
    fit(*parts, 1)  # to be overwritten
    for of_it in parts[1].param_groups:
        of_it["lr"] = 7.0
    load(through, root, group, parts)
    return then_and_later(parts)


FEW = ("frozen", "late")


@pytest.mark.parametrize(
    ("wrote", "num_saving", "reads", "num_loading", "dtype", "through"),
    [
        # A layout into itself, at as many ranks, at more and at fewer.
        *[(kind, 2, kind, 2, F32, "load_checkpoint") for kind in ("attached", "AdamW", "fsdp2")],
        *[("ours", n, "ours", m, F32, "torch") for n, m in [(1, 3), (4, 1)]],
        ("ours", 4, "ours", 3, F32, "load_checkpoint"),
        ("ours, remainder", 1, "ours, remainder", 4, BF16, "torch"),
        ("ours, remainder", 3, "ours, remainder", 2, BF16, "load_checkpoint"),
        ("ours", 1, "ours", 3, BF16, "load_checkpoint"),
        ("fsdp2, our law", 4, "fsdp2, our law", 1, F32, "torch"),
        # Main parameters change their form and lose no bit.
        ("ours, remainder", 2, "ours, fp32 main", 3, BF16, "load_checkpoint"),
        ("ours, fp32 main", 3, "ours, remainder", 1, BF16, "load_checkpoint"),
        # What is saved has no layout: it is enough that each is written for one other and read from one other.
        ("ours", 2, "fsdp2, our law", 3, F32, "torch"),
        ("fsdp2, our law", 2, "hsdp", 4, F32, "torch"),
        ("hsdp", 4, "DecoupledAdamW", 1, F32, "torch"),
        ("DecoupledAdamW", 1, "ours", 3, F32, "torch"),
        ("ours", 2, "hsdp", 4, F32, "load_checkpoint"),  # which spreads state over its replicas
        ("hsdp", 4, "ours", 3, F32, "load_checkpoint"),
        ("DecoupledAdamW", 2, "ours", 3, F32, "load_checkpoint"),
        ("fsdp2, our law", 2, "ours", 3, F32, "load_checkpoint"),
        # The parameters of a group may come in another order, in other buckets, cut on other multiples.
        ("ours, in groups", 2, "ours, reordered", 2, F32, "torch"),
        ("ours, in groups", 3, "ours, reordered", 1, F32, "load_checkpoint"),
        # Whole tensors in a file of torch.save, loaded before the weights or after them.
        ("ours", 1, "ours", 3, F32, "whole, weights first"),
        ("ours, in groups", 2, "ours, in groups", 4, F32, "whole"),
        ("ours, in groups", 4, "ours, in groups", 1, F32, "whole, weights first"),
        ("ours", 3, "ours", 2, BF16, "whole, weights first"),
        ("ours, remainder", 2, "ours, remainder", 4, BF16, "whole, weights first"),
        ("ours", 3, "DecoupledAdamW", 1, F32, "whole"),  # whose state is what was consolidated
        ("AdamW", 1, "ours", 2, F32, "whole"),
    ],
)
def test_a_run_goes_on_on_any_number_of_ranks_in_any_layout(
    wrote: str,
    num_saving: int,
    reads: str,
    num_loading: int,
    dtype: torch.dtype,
    through: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"dtype": dtype, "extras": tuple(EXTRAS) if wrote == "ours, in groups" else FEW}
    expected, later = on_ranks(num_saving, saved_at, wrote, tmp_path, through, settings)[0]
    has_main = dtype is BF16 or wrote == "ours, in groups"
    assert any(key.endswith(", main_param") for key in expected) == has_main
    if reads == "ours, reordered":
        monkeypatch.setattr("sharded_dadamw.layout.bucket_layout.ALIGNMENT", 128)
    for loaded, loaded_later in on_ranks(num_loading, loaded_at, reads, tmp_path, through, settings):
        assert differences(expected, loaded) == []
        if (wrote.startswith("ours") and reads.startswith("ours")) or (wrote, num_saving) == (reads, num_loading):
            assert differences(later, loaded_later) == []  # for nothing rounds otherwise


@pytest.mark.parametrize(
    ("wrote", "reads", "command"),
    [
        ("AdamW", "ours", "convert {}/step_00000002 NEW --from torch"),
        ("AdamW", "DecoupledAdamW", "convert {}/step_00000002 NEW --from torch"),
        ("ours", "AdamW", "convert {}/step_00000002 NEW.pt --from sharded-dadamw"),
        ("Adam", "ours", "got that of torch.optim.adam.Adam in {}/step_00000002; nothing is known"),
        ("ours", "Adam", "expected that of torch.optim.adam.Adam, got that of ShardedDecoupledAdamW"),
        ("AdamW", "named AdamW", "convert {}/step_00000002 NEW --from torch"),
    ],
)
@ranks(2)
def test_weight_decay_that_means_something_else_is_refused(
    group: Any, wrote: str, reads: str, command: str, tmp_path: Path
) -> None:
    source, target = saved(tmp_path, wrote, 2, group), build(reads, group, seed=1)
    before = whole(*target[:2])
    with pytest.raises(ValueError, match="weight_decay: expected that of") as error:
        load_checkpoint(tmp_path, **run(group, *target))
    assert command.format(tmp_path) in str(error.value)
    assert differences(before, whole(*target[:2])) == []
    for of_it in source[1].param_groups:
        of_it["weight_decay"] = 0.0  # which means the same everywhere
    save_checkpoint(tmp_path, step=3, **run(group, *source))
    load_checkpoint(tmp_path, **run(group, *target))
    assert_same(source, target)


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        ("ours, remainder", "ours, no main"),
        ("ours, fp32 main", "ours, no main"),
        ("ours, remainder", "ours"),
        ("ours, fp32 main", "DecoupledAdamW"),
    ],
)
@ranks(2)
def test_where_no_main_parameter_is_kept_it_is_the_fp32_weight_or_left_out_with_a_word(
    group: Any, wrote: str, reads: str, tmp_path: Path
) -> None:
    expected = wide(whole(*saved(tmp_path, wrote, 3, group, dtype=BF16)[:2]))
    keys = [key for key in expected if key.endswith(", main_param")]
    mains = {key.removesuffix(", main_param"): expected.pop(key) for key in keys}
    if reads == "ours, no main":
        with pytest.warns(UserWarning, match=rf"main parameters of {len(mains)} parameters, such as embedding\.weight"):
            target = loaded(tmp_path, reads, group, dtype=BF16)
    else:
        target = loaded(tmp_path, reads, group)
        expected |= mains
    found = {key: value.float() for key, value in whole(*target[:2]).items()}
    assert differences({key: value.float() for key, value in expected.items()}, found) == []


@pytest.mark.parametrize(
    ("num_steps", "through", "reads"),
    [
        *[(2, "load_checkpoint", reads) for reads in ("ours", "ours, remainder")],
        *[(2, "whole", "ours"), (0, "whole, weights first", "ours")],
        *[(2, "whole, weights first", "ours, remainder"), (0, "whole", "ours, remainder")],
    ],
)
@ranks(2)
def test_a_main_parameter_of_which_nothing_was_saved_is_the_weight(
    group: Any, num_steps: int, through: str, reads: str, tmp_path: Path
) -> None:
    """Also in an optimizer that has trained already, so that its main parameters are another run's."""
    source = build("DecoupledAdamW", group, dtype=BF16)
    fit(*source, num_steps)
    save(through, tmp_path, group, source)
    dist.barrier(group)
    fresh, target = (build(reads, group, seed=1, dtype=BF16) for _ in range(2))
    fit(*target, 3)
    for parts in (fresh, target):
        load(through, tmp_path, group, parts)
    if not through.startswith("whole"):  # else edits of weights come into main parameters with the next step
        found = wide(whole(*target[:2]))
        mains = {key.removesuffix(", main_param"): found[key] for key in found if key.endswith(", main_param")}
        assert len(mains) == len(list(target[0].parameters()))
        assert all(torch.equal(main, found[name].float()) for name, main in mains.items())
    for parts in (fresh, target):
        torch.manual_seed(7)
        fit(*parts, 1)
    assert differences(wide(whole(*fresh[:2])), wide(whole(*target[:2]))) == []


@pytest.mark.parametrize("kind", ["ours", "AdamW"])
def test_state_of_what_is_frozen_by_now_is_kept(kind: str, tmp_path: Path) -> None:
    model, optimizer, schedule = build(kind, None)
    fit(model, optimizer, schedule, 2)
    frozen = model.get_parameter("decoder.weight").requires_grad_(False)
    fit(model, optimizer, schedule, 1)
    save_checkpoint(tmp_path, step=3, model=model, optimizer=optimizer)
    expected = whole(model, optimizer)
    assert expected["decoder.weight, step"] == 2 and expected["decoder.weight, exp_avg"].any()
    model.requires_grad_(True)
    fit(model, optimizer, schedule, 2)
    frozen.requires_grad_(False)
    load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert differences(expected, whole(model, optimizer)) == [] and not frozen.requires_grad


def test_state_of_what_was_frozen_from_the_start_is_left_out_with_a_word(tmp_path: Path) -> None:
    expected = whole(*saved(tmp_path, "ours", 2)[:2])
    again = Model(seed=1)
    again.decoder.weight.requires_grad_(False)
    other = ShardedDecoupledAdamW(again.named_parameters(), **LAW)
    with pytest.warns(UserWarning, match=r"state of 1 parameters, such as decoder\.weight, is left out"):
        load_checkpoint(tmp_path, model=again, optimizer=other)
    kept = {key: value for key, value in expected.items() if not key.startswith("decoder.weight, ")}
    assert differences(kept, whole(again, other)) == []


def test_groups_in_another_order_are_refused_and_one_may_be_empty(tmp_path: Path) -> None:
    def make(order: str) -> tuple[nn.Module, Any, Any]:
        model = Model(seed=len(order))
        groups: dict[str, Any] = {
            "a": {"params": [*model.parameters()][:2], "lr": 1e-1},
            "b": {"params": [*model.parameters()][2:], "lr": 1e-3},
            "c": {"params": [], "lr": 7.0},
        }
        optimizer = DecoupledAdamW([groups[name] for name in order])
        return model, optimizer, LambdaLR(optimizer, lambda step: 1 / (1 + step))

    source = make("abc")
    fit(*source, 2)
    save_checkpoint(tmp_path, step=2, **run(None, *source))
    target = make("cba")
    before = whole(*target[:2])
    with pytest.raises(ValueError, match=r"param_groups\[0\]: .* the groups of the saved one, in that order"):
        load_checkpoint(tmp_path, **run(None, *target))
    assert differences(before, whole(*target[:2])) == []
    target = make("abc")
    load_checkpoint(tmp_path, **run(None, *target))
    assert_same(source, target)  # the rates of groups too


def test_weights_alone_load_without_an_optimizer(tmp_path: Path) -> None:
    """Chunks of up to a MiB are read at once, and larger ones by torch from their part of the file."""
    model, other = nn.Linear(600, 600), nn.Linear(600, 600)
    save_checkpoint(tmp_path, step=1, model=model, optimizer=AdamW(model.parameters()))
    assert load_checkpoint(tmp_path, model=other) is not None
    assert differences(model.state_dict(), other.state_dict()) == []


def test_torchs_own_functions_read_it(tmp_path: Path) -> None:
    parts = saved(tmp_path, "AdamW", 2, tie=True)
    model, optimizer, _ = build("AdamW", None, seed=1, tie=True)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    assert {"embedding.weight", "decoder.weight"} <= state["model"].keys()
    del state["optimizer"]["param_groups"]
    dcp.load(state, checkpoint_id=tmp_path / "step_00000002", no_dist=True)
    for name, entries in state["optimizer"]["state"].items():
        live = get_optimizer_state_dict(*parts[:2])["state"][name]
        assert all(torch.equal(entries[key], value) for key, value in live.items())
    assert differences(state["model"], get_model_state_dict(parts[0])) == []


def test_a_parameter_that_never_had_a_gradient_stays_without_state(tmp_path: Path) -> None:
    parts = build("AdamW", None)
    for p in list(parts[0].parameters())[1:]:
        p.grad = torch.ones_like(p)
    parts[1].step()
    parts[1].zero_grad()
    save_checkpoint(tmp_path, step=1, **run(None, *parts))
    again = build("AdamW", None, seed=1)
    fit(*again, 1)
    load_checkpoint(tmp_path, **run(None, *again))
    first, *others = again[0].parameters()
    assert first not in again[1].state and all(again[1].state[p]["step"] == 1 for p in others)


# --- random generators and data --------------------------------------------------------------------------------------


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def own_generators(group: Any, root: Path) -> list[float]:
    rank = dist.get_rank(group)
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    drawn()
    model, optimizer, _ = build("AdamW", group)
    save_checkpoint(root, step=1, **run(group, model, optimizer), data=rank)
    return drawn()


def restored_generators(group: Any, root: Path) -> tuple[list[float], list[Any], Any]:
    model, optimizer, _ = build("AdamW", group)
    drawn()
    resumed = load_checkpoint(root, **run(group, model, optimizer))
    assert resumed is not None
    now = drawn()
    try:
        return now, list(resumed.data_of_ranks), resumed.data
    except ValueError as error:
        return now, list(resumed.data_of_ranks), str(error)


def test_every_rank_gets_its_generators_and_its_place_in_the_data_back_and_a_new_rank_its_own(tmp_path: Path) -> None:
    expected = on_ranks(2, own_generators, tmp_path)
    more = on_ranks(4, restored_generators, tmp_path)
    assert [now for now, _, _ in more[:2]] == expected
    numbers = [number for now, _, _ in more for number in now]
    assert len(set(numbers)) == len(numbers)
    assert on_ranks(4, restored_generators, tmp_path) == more
    assert on_ranks(1, restored_generators, tmp_path)[0][0] == expected[0]
    assert [data for _, _, data in on_ranks(2, restored_generators, tmp_path)] == [0, 1]
    for _, all_data, refusal in more:
        assert all_data == [0, 1] and "expected the same from each of the 2 ranks" in refusal


# --- names -----------------------------------------------------------------------------------------------------------


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def in_the_middle(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any, Any], nn.Module]:
    def apply(model: Any, group: Any) -> nn.Module:
        model.middle = wrap(model.middle)
        return model

    return apply


WRAPPERS: dict[str, Callable[[Any, Any], nn.Module]] = {
    "none": lambda model, group: model,
    "DDP of compile": lambda model, group: DistributedDataParallel(compiled(model), process_group=group),
    "DataParallel": lambda model, group: nn.DataParallel(model),
    "checkpointing": in_the_middle(checkpoint_wrapper),
    "a compiled part": in_the_middle(compiled),
}


def wrapped(kind: str, group: Any, seed: int) -> tuple[nn.Module, Any]:
    model = WRAPPERS[kind](Model(seed=seed, tie=True), group)
    return model, AdamW(model.named_parameters(), **LAW)


@pytest.mark.parametrize("outer", list(WRAPPERS)[1:])
@ranks(1)
def test_names_are_those_of_the_bare_model_whatever_it_is_wrapped_in(group: Any, outer: str, tmp_path: Path) -> None:
    """Saved from the bare model, loaded into a wrapped one, saved from that, and loaded into a bare one."""
    model, optimizer = wrapped("none", group, 0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other, its = wrapped(outer, group, 1)
    save_checkpoint(tmp_path, step=1, **run(group, model, optimizer))
    load_checkpoint(tmp_path, **run(group, other, its))
    save_checkpoint(tmp_path, step=2, **run(group, other, its))
    last, of_last = wrapped("none", group, 2)
    load_checkpoint(tmp_path, **run(group, last, of_last))
    assert_same((model, optimizer), (last, of_last))


@pytest.mark.parametrize(("kind", "tie"), [("fsdp1", False), ("fsdp1, flat", True)])
@ranks(4, pool.on_ranks)  # all of them: torch 2.11 knows FSDP1's state in the default group only
def test_what_fsdp1_shards_loads_there_and_without(group: Any, kind: str, tie: bool, tmp_path: Path) -> None:
    saved(tmp_path, kind, 2, group, tie=tie)
    save_checkpoint(tmp_path, step=3, **run(group, *loaded(tmp_path, kind, group, tie=tie)))
    first, last = (loaded(tmp_path / f"step_0000000{step}", "AdamW", group, tie=tie) for step in (2, 3))
    assert [entries["step"].item() for entries in first[1].state.values()] == [2.0] * len(list(first[0].parameters()))
    assert_same(first, last)


def test_tied_weights_are_stored_once_under_all_their_names(tmp_path: Path) -> None:
    parts, path = saved(tmp_path, "AdamW", 1, tie=True), tmp_path / "step_00000001"
    assert Manifest.read(path).aliases == [["embedding.weight", "decoder.weight"]]
    metadata = dcp.FileSystemReader(path).read_metadata()
    assert metadata.storage_meta is not None and metadata.storage_meta.checkpoint_id == path.name  # of no machine
    for entry in ("model.{}", "optimizer.state.{}.exp_avg"):
        places = [
            (info.relative_path, info.offset)
            for index, info in metadata.storage_data.items()
            if index.fqn in (entry.format("embedding.weight"), entry.format("decoder.weight"))
        ]
        assert len(places) == 2 and len(set(places)) == 1
    again = loaded(path, "AdamW", tie=True)
    assert again[0].decoder.weight is again[0].embedding.weight
    assert_same(parts, again)
    for name in ("embedding.weight", "decoder.weight"):  # of which others save one
        weights = {key: value + 1 for key, value in parts[0].state_dict().items() if key != name}
        write_state(tmp_path / name, {"state": {}, "param_groups": []}, weights)
        load_checkpoint(tmp_path / name, model=again[0])
        assert torch.equal(again[0].decoder.weight, parts[0].decoder.weight + 1)
    untied = Model(seed=1)
    load_checkpoint(path, model=untied)
    assert torch.equal(untied.decoder.weight, parts[0].decoder.weight)


# --- what does not fit -----------------------------------------------------------------------------------------------


def misfit(kind: str) -> tuple[Any, Any]:
    model: Any = Model(seed=1, tie=kind == "tie")
    if kind == "missing":
        model.extra = nn.Linear(2, 3)
    elif kind == "left over":
        del model.decoder
    elif kind == "shape":
        model.decoder = nn.Linear(6, 17, bias=False)
    elif kind == "dtype":
        model.decoder.bfloat16()
    elif kind == "integers":
        model.middle[1].num_batches_tracked = torch.zeros((), dtype=BF16)
    params = list(model.parameters())
    if kind == "groups":
        return model, AdamW([{"params": params[:1]}, {"params": params[1:]}], **LAW)
    return model, AdamW(params[1:] if kind == "group members" else params, **LAW, amsgrad=kind == "more state")


MISFITS = {
    "missing": r"model: .*2 missing, the first is extra.weight",
    "left over": r"model: .*1 left over, the first is decoder.weight",
    "shape": r"model.decoder.weight: expected torch.float32 \[17, 6\], got torch.float32 \[13, 6\]",
    "dtype": r"model.decoder.weight: expected torch.bfloat16 \[13, 6\], got torch.float32",
    "integers": r"num_batches_tracked: expected torch\.bfloat16 \[\], got torch\.int64",
    "tie": r"embedding.weight and decoder.weight are tied, and two different weights",
    "groups": r"param_groups: expected 2, got 1",
    "group members": r"embedding.weight is in this group",
    "more state": r"embedding.weight: expected .*max_exp_avg_sq",
    "less state": r"embedding.weight: expected entries .* got .*max_exp_avg_sq",
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    model: nn.Module = Model()
    optimizer = AdamW(model.parameters(), **LAW, amsgrad=kind == "less state")
    fit(model, optimizer, CosineAnnealingLR(optimizer, T_max=10), 2)
    save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer)
    model, optimizer = misfit(kind)
    if kind not in ("missing", "shape", "more state"):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.5)
        optimizer.step()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=MISFITS[kind]):
        load_checkpoint(tmp_path, model=model, optimizer=optimizer)
    assert differences(weights, model.state_dict()) == []
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0.0, atol=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scheduler_of_another_kind_and_one_of_which_nothing_was_saved_are_refused(tmp_path: Path) -> None:
    parts = saved(tmp_path, "AdamW", 2)
    save_checkpoint(tmp_path / "without", step=1, model=parts[0], optimizer=parts[1])
    with pytest.raises(ValueError, match=r"scheduler: expected .* to hold the state of one"):
        load_checkpoint(tmp_path / "without", **run(None, *parts))
    model, optimizer, cosine = build("AdamW", None, seed=1)
    schedule = SequentialLR(optimizer, [cosine, MultiStepLR(optimizer, [3])], milestones=[2])
    fit(model, optimizer, schedule, 1)
    before, of_schedule = whole(model, optimizer), copy.deepcopy(schedule.state_dict())
    with pytest.raises(ValueError, match=r"scheduler: the state in .*step_00000002 is not one of SequentialLR"):
        load_checkpoint(tmp_path, **run(None, model, optimizer, schedule))
    assert differences(whole(model, optimizer), before) == [] and schedule.state_dict() == of_schedule


@pytest.mark.parametrize("what", ["step", "keep_last", "scheduler", "data"])
@ranks(2)
def test_ranks_that_disagree_are_told_and_none_hangs(group: Any, what: str, tmp_path: Path) -> None:
    parts = build("ours", group)
    rank = dist.get_rank(group)
    arguments = {"step": 1, "keep_last": 2, "data": None, **run(group, *parts)}
    if what == "data":
        arguments["data"] = object() if rank == 1 else 0
    else:
        arguments[what] = {"step": rank + 1, "keep_last": 2 - rank, "scheduler": parts[2] if rank else None}[what]
    with pytest.raises(ValueError, match=what):
        save_checkpoint(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"step": -1}, "step: "),
        ({"step": 1.5}, "step: "),
        ({"keep_last": 0}, "keep_last: "),
        ({"asynchronous": "x"}, "asyn"),
        ({"model": nn.Linear(2, 2)}, "optimizer: expected parameters of the model, got 8 that it does not have"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    parts = build("AdamW", None)
    with pytest.raises(ValueError, match=said):
        save_checkpoint(tmp_path, **{"step": 1, **run(None, *parts), **arguments})


@pytest.mark.parametrize("what", ["model", "optimizer"])
@ranks(2)
def test_what_is_wrong_on_one_rank_is_told_on_all(group: Any, what: str, tmp_path: Path) -> None:
    parts = saved(tmp_path, "ours", 1, group)
    arguments = run(group, *parts)
    if dist.get_rank(group) == 1:
        arguments[what] = {"model": None, "optimizer": 5}[what]
    before, said = whole(*parts[:2]), f"{what}: expected a torch"
    with pytest.raises((ValueError, TypeError), match=said):
        load_checkpoint(tmp_path, **arguments)
    with pytest.raises((ValueError, TypeError), match=said):
        save_checkpoint(tmp_path, step=2, **arguments)
    assert differences(before, whole(*parts[:2])) == [] and [f.name for f in checkpoints(tmp_path)] == ["step_00000001"]


class WithExtraState(nn.Linear):
    def __init__(self, state: Any) -> None:
        super().__init__(2, 2)
        self.state = state
        self.got: Any = "nothing"

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.got = state


@pytest.mark.parametrize("state", [{"a": {}}, {"a": 1, "b": [{"c": 2.0}]}, 5, None])
def test_extra_state_of_modules_comes_back(state: Any, tmp_path: Path) -> None:
    model, again = WithExtraState(state), WithExtraState(state)
    save_checkpoint(tmp_path, step=1, model=model, optimizer=AdamW(model.parameters()))
    load_checkpoint(tmp_path, model=again)
    assert again.got == state


LOST: list[tuple[str, str, list[Any]]] = [
    # where it stands, what the error says of it, and what could not be read back, safely or as it is
    (
        "extra state",
        "model, _extra_state: expected dicts with something in them",
        [{"a": {}, "b": 1}, {"a": {"b": {}}, "c": 1}, [{}, {"c": 2.0}], [1, {}], [[{}]]],
    ),
    ("note", r"param_groups\[0\]\['note'\]: .*an empty one", [{}, [{}, 1]]),
    ("note", r"param_groups\[0\]\['note'\]: .*expected texts as keys", [{0: "x", 1: "y"}]),
    (
        "data",
        "data and scheduler: expected numbers, texts, tensors",
        [Calls(os.system, "touch ran-code"), {"at": [object()]}, lambda: 0],
    ),
]


@pytest.mark.parametrize(
    ("where", "said", "value"), [(where, said, value) for where, said, values in LOST for value in values]
)
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(
    where: str, said: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {where: value}
    model = WithExtraState(given.get("extra state"))
    optimizer = AdamW([{"params": list(model.parameters()), "note": given.get("note")}])
    with pytest.raises(ValueError, match=said):
        save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer, data=given.get("data"))
    assert list(tmp_path.iterdir()) == []


def on_storage_of_its_own(group: Any, root: Path) -> str:
    own = root / str(dist.get_rank(group))
    own.mkdir()
    parts = build("ours", group)
    with contextlib.chdir(own), pytest.raises(OSError) as refusal:
        save_checkpoint("run", step=1, **run(group, *parts))
    return str(refusal.value)


def test_ranks_that_do_not_share_storage_are_told(tmp_path: Path) -> None:
    for message in pool.on_ranks(2, on_storage_of_its_own, tmp_path):
        assert "rank 1: expected to see" in message and "storage that all ranks share" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = DecoupledAdamW(model.named_parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    data = {"sample": np.int64(7), "weights": [np.float32(0.5)], "done": np.bool_(True)}
    parts = {"model": model, "optimizer": optimizer, "scheduler": schedule}
    save_checkpoint(tmp_path, step=np.int64(3), data=data, **parts)  # type: ignore[arg-type]
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    resumed = load_checkpoint(tmp_path, **parts)  # type: ignore[arg-type]
    assert resumed is not None and resumed.step == 3
    assert resumed.data == {"sample": 7, "weights": [0.5], "done": True}
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["lr"] == 5e-3
