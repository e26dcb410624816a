"""What users of torch.optim rely on, on ShardedDecoupledAdamW: on one rank in-process, on two where ranks matter.

It shows what is kept and what is refused. Bits on many ranks are for tests/test_sharded.py.
"""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharded_dadamw import DecoupledAdamW, MainParameter, ShardedDecoupledAdamW, ShardingConfig
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.interchange import from_torch
from tests import pool
from tests.harness import (
    Pair,
    Params,
    assert_equal,
    backward_onto,
    give_gradients,
    loss_of,
    make,
    ranks,
    same_gradients,
    train_on,
    values_of,
)
from tests.models import BF16, TiedLanguageModel, draw_gradient

either_class = pytest.mark.parametrize("cls", [DecoupledAdamW, ShardedDecoupledAdamW])
whoever_reduces = pytest.mark.parametrize("reduces", [True, False], ids=["reduced here", "reduced by others"])


# --- the class ---


def test_it_is_a_torch_optimizer_with_the_defaults_and_groups_of_decoupled_adamw() -> None:
    pair = Pair()
    assert isinstance(pair.optimizer, Optimizer) and isinstance(pair.control, AdamW)
    assert pair.optimizer.defaults == pair.control.defaults
    assert set(pair.optimizer.param_groups[0]) == set(pair.control.param_groups[0])
    assert pair.optimizer.param_groups[0]["param_names"] == list(make())
    assert "ShardedDecoupledAdamW" in repr(pair.optimizer) and "lr: 0.003" in repr(pair.optimizer)


def test_parameters_stay_the_same_objects_with_the_same_values_as_contiguous_views() -> None:
    params = make("non-contiguous")
    before = {name: (p, p.detach().clone()) for name, p in params.items()}
    ShardedDecoupledAdamW(params.items())
    for name, p in params.items():
        assert p is before[name][0] and torch.equal(p, before[name][1]) and p.shape == before[name][1].shape
        assert p.is_leaf and p.requires_grad and p.is_contiguous() and type(p) is nn.Parameter


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, pickle.dumps], ids=["deepcopy", "copy", "pickle"])
def test_copying_is_refused_with_the_reason_and_what_to_do(copier: Callable[[Any], Any]) -> None:
    pair = Pair()
    with pytest.raises(TypeError, match=r"(?s)ShardedDecoupledAdamW.*state_dict"):
        copier(pair.optimizer)
    pair.train(0)


# --- step and zero_grad ---


@either_class
def test_step_runs_a_closure_with_gradients_enabled_and_returns_its_loss(cls: Any) -> None:
    model = TiedLanguageModel()
    optimizer = cls(model.parameters(), lr=1e-2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    before = model.loss(0).item()
    losses = [optimizer.step(closure=closure) for _ in range(20)]
    assert losses[0].item() == before
    assert losses[-1].item() < 0.8 * before
    give_gradients(dict(model.named_parameters()), 0)
    assert optimizer.step(lambda: 3.0) == 3.0


def zero_grads(params: Params, optimizer: Optimizer, how: str) -> None:
    zeroes = {"optimizer": optimizer, "model": nn.ParameterList(params.values())}.get(how.split()[0])
    if zeroes is not None:
        zeroes.zero_grad(set_to_none="none" in how)
    else:
        for p in params.values():
            p.grad = None


ZEROINGS = ["optimizer to none", "optimizer to zero", "model to none", "model to zero", "by hand"]


@pytest.mark.parametrize(
    ("how", "cls", "reduces"),
    [
        *((how, ShardedDecoupledAdamW, reduces) for how in ZEROINGS for reduces in (True, False)),
        ("optimizer to zero", DecoupledAdamW, False),
        ("model to none", DecoupledAdamW, False),
    ],
)
def test_however_gradients_are_zeroed_nothing_is_left_of_them_nor_of_their_clip(
    how: str, cls: Any, reduces: bool
) -> None:
    """After zeros an unused parameter has a zero gradient, and else none. A loop may clip, and then skip the step."""
    pair = Pair(config=ShardingConfig(reduce_gradients=reduces), lr=1e-2)
    if cls is DecoupledAdamW:
        pair.optimizer = cls(pair.params.items(), lr=1e-2, weight_decay=2e-4)
        pair.sides[0] = pair.params, pair.optimizer
    for params, _ in pair.sides:
        give_gradients(params, 0)
    pair.optimizer.clip_grad_norm_(1e-3)
    for params, optimizer in pair.sides:
        zero_grads(params, optimizer, how)
    if how == "model to zero" and not reduces:
        # Zeros that somebody else writes into gradients of somebody else look like any edit after the clip, which
        # must not pass silently. So this one is refused, with the way out.
        backward_onto(pair.params, 0)
        with pytest.raises(RuntimeError, match=r"zero_grad\(\)"):
            pair.optimizer.step()
        for _, optimizer in pair.sides:
            optimizer.zero_grad()
    for step in range(1, 4):
        unused = [name for index, name in enumerate(pair.params) if (step + index) % 3 == 0]
        for params, optimizer in pair.sides:
            backward_onto(params, step, without=unused)
            optimizer.step()
            zero_grads(params, optimizer, how)
        pair.check()


def test_used_gradients_are_refused_by_step_clip_and_backward_and_nothing_changes() -> None:
    pair = Pair()
    backward_onto(pair.params, 0)
    pair.give_control(0)
    pair.optimizer.step()
    pair.control.step()
    for again in (
        pair.optimizer.step,
        lambda: pair.optimizer.clip_grad_norm_(1.0),
        lambda: backward_onto(pair.params, 1),
    ):
        with pytest.raises(RuntimeError, match="zero_grad"):
            again()
    pair.check()
    pair.optimizer.zero_grad()
    pair.train(1)


@whoever_reduces
def test_fresh_gradients_over_used_ones_need_no_zero_grad_and_those_of_others_may_be_used_twice(reduces: bool) -> None:
    pair = Pair(config=ShardingConfig(reduce_gradients=reduces))
    for step in range(3):
        if reduces or step != 1:
            pair.give(step)
        pair.optimizer.step()
        pair.control.step()
        pair.check()


@either_class
def test_backward_through_a_graph_from_before_the_step_fails_instead_of_mixing_weights(cls: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = cls(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 4)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)]
)
@ranks()
def test_sparse_gradients_are_refused_before_anything_changes(group: Any, cls: Any) -> None:
    """Where others reduce them, too; where we do, tests/test_refusals.py says so on every rank."""
    table, dense = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    before = table.weight.detach().clone()
    settings = dict(config=ShardingConfig(reduce_gradients=False), process_group=group)
    optimizer = cls([dense, table.weight], **(settings if cls is ShardedDecoupledAdamW else {}))
    (table(torch.tensor([1, 2])) * dense).sum().backward()
    with pytest.raises((RuntimeError, ValueError), match=r"gradient of param_groups\[0\]\['params'\]\[1\]: .*sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before) and torch.equal(dense, torch.ones(3))


# --- inference mode ---


@same_gradients
@pytest.mark.parametrize(
    ("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)]
)
@ranks(run=pool.on_ranks)
def test_calls_in_inference_mode_change_nothing(group: Any, cls: Any) -> None:
    """Processes exchange gradients through memory that the first of them allocates, and later ones write into."""
    results = []
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        settings = {"process_group": group} if cls is ShardedDecoupledAdamW else {}
        optimizer = cls(model.named_parameters(), lr=1e-2, **settings)
        for step in range(3):
            loss_of(model, group.rank(), step).backward()
            with context():
                optimizer.clip_grad_norm_(0.1)
                optimizer.step()
                optimizer.zero_grad()
        train_on(model, optimizer, group.rank(), 3, 4)
        results.append(values_of(model))
    assert_equal(*results)


@either_class
def test_a_closure_runs_backward_as_its_caller_has_set_it(cls: Any) -> None:
    found = []

    def closure() -> float:
        found.append(torch._C._is_multithreading_enabled())
        return 0.0

    with torch.autograd.set_multithreading_enabled(False):
        cls([nn.Parameter(torch.ones(2))]).step(closure)
    assert found == [False]


# --- clips ---


@same_gradients
@pytest.mark.parametrize(
    ("what", "reduces"),
    [("there are none", True), ("they are cleared", True), ("they are cleared", False), ("one is replaced", False)],
)
@ranks(2)
def test_a_clip_is_for_the_gradients_there_are(group: Any, reduces: bool, what: str) -> None:
    """Where one is replaced, the others stay, and are zero."""
    pair = Pair(group, config=ShardingConfig(reduce_gradients=reduces))
    grads = {name: torch.full_like(p, 7.0 if name == "p1" else 0.0) for name, p in pair.params.items()}
    for name, p in pair.params.items():
        p.grad = None if what == "there are none" else grads[name].clone()
    pair.optimizer.clip_grad_norm_(1e-3)
    if what == "there are none":
        pair.give(0)
    elif what == "they are cleared":
        for name, p in pair.params.items():
            p.grad.zero_()  # type: ignore[union-attr]
            pair.control_params[name].grad = torch.zeros_like(p)
    else:
        pair.params["p1"].grad = grads["p1"].clone()
        with pytest.raises(RuntimeError, match=r"changed between clip_grad_norm_\(\) and step\(\)"):
            pair.optimizer.step()
        return
    pair.step()


# --- groups, freezing ---


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was() -> None:
    pair = Pair()
    extra, groups = nn.Parameter(torch.ones(3)), pair.optimizer.param_groups
    for bad, said in (
        ({"params": [("extra", extra)], "lr": -1.0}, r"lr.*-1\.0"),
        ({"params": [("again", pair.params["p0"])]}, "more than one parameter group"),
        ({"params": [("odd", nn.Parameter(torch.ones(3, dtype=torch.complex64)))]}, "odd.*complex64"),
        ({"params": [("view", nn.Parameter(pair.params["p1"].detach()[1:]))]}, "shares memory"),
        ({"params": [extra]}, "names"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            pair.optimizer.add_param_group(bad)
        assert len(groups) == 1
    pair.train(0)
    pair.optimizer.add_param_group({"params": [("extra", extra)]})
    assert len(groups) == 2


@pytest.mark.parametrize("clip", [False, True])
@ranks(2)
def test_a_parameter_that_is_unfrozen_later_is_trained_from_then_on(group: Any, clip: bool) -> list[float]:
    """Two are frozen from the start, and come along later; another is frozen for good."""
    pair, norms = Pair(group, "frozen", weight_decay=0.1), []
    for step in range(6):
        for params, _ in pair.sides:
            params["p0"].requires_grad_(step >= 2)
            params["p3"].requires_grad_(step >= 4)
            params["p5"].requires_grad_(step < 4)
        pair.give(step)
        if clip:
            gradients = [p.grad.double().flatten() for p in pair.control_params.values() if p.grad is not None]
            norms.append(pair.optimizer.clip_grad_norm_(1e6).item())
            assert norms[-1] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-6)
        pair.step()
    assert pair.optimizer.state[pair.params["p0"]]["step"].item() == 4
    return norms


# --- hooks ---


def test_step_hooks_run_once_per_step_around_it() -> None:
    pair = Pair()
    seen: list[bool] = []
    before = pair.params["p1"].detach().clone()

    def hook(optimizer: Optimizer, *_: Any) -> None:
        assert optimizer is pair.optimizer
        seen.append(torch.equal(pair.params["p1"], before))

    handles = [pair.optimizer.register_step_pre_hook(hook), register_optimizer_step_pre_hook(hook)]
    handles += [pair.optimizer.register_step_post_hook(hook), register_optimizer_step_post_hook(hook)]
    for step in range(2):
        give_gradients(pair.params, step)
        pair.optimizer.step()
        pair.optimizer.zero_grad()
        for handle in handles:
            handle.remove()
    assert seen == [True, True, False, False]


def test_state_dict_hooks_see_and_may_replace_the_state_dict() -> None:
    optimizer = Pair().optimizer
    seen: list[str] = []

    def post_save(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        shapes = [state_dict["state"][index]["exp_avg"].shape for index in sorted(state_dict["state"])]
        assert shapes == [p.shape for group in o.param_groups for p in group["params"]]
        return state_dict | {"state": {}, "note": "kept"}

    def pre_load(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert state_dict["note"] == "kept"
        return state_dict | {"param_groups": [group | {"lr": 0.125} for group in state_dict["param_groups"]]}

    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre save"))
    optimizer.register_state_dict_post_hook(post_save)
    optimizer.register_load_state_dict_pre_hook(pre_load)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post load"))
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "note"} and saved["state"] == {} and seen == ["pre save"]
    optimizer.load_state_dict(saved)
    assert seen == ["pre save", "post load"] and optimizer.param_groups[0]["lr"] == 0.125
    assert saved["param_groups"][0]["lr"] == 3e-3, "loading changed the caller's state dict"


# --- state dicts ---


@same_gradients
@ranks(3)
def test_a_shard_of_another_bucket_layout_is_refused_on_every_rank(group: Any) -> None:
    """Sizes for which the middle rank's fragment of `p` has the same length in both layouts, but starts elsewhere."""
    saved, optimizer = (
        ShardedDecoupledAdamW(
            [("a", nn.Parameter(torch.ones(64))), ("p", nn.Parameter(torch.ones(256)))],
            process_group=group,
            config=ShardingConfig(bucket_cap_mb=bucket_cap_mb),
        )
        for bucket_cap_mb in (1.0, 1e-6)
    )
    for p in saved.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    saved.step()
    with pytest.raises(ValueError, match=r"^state of "):
        optimizer.load_state_dict(saved.state_dict())
    assert not any(value.any() for entries in optimizer.state.values() for value in entries.values())


@either_class
def test_loading_does_not_alias_the_callers_tensors(cls: Any) -> None:
    """Who goes back to what is kept in memory may do so twice."""
    model = nn.Linear(8, 4)
    optimizer = cls(model.parameters(), lr=1e-2)
    train_on(model, optimizer, 0, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train_on(model, optimizer, 0, 1)
    assert str(saved) == str(before)


@either_class
def test_what_is_loaded_in_inference_mode_can_be_trained(cls: Any) -> None:
    """In fp64, which torch's own operations update: they refuse what inference mode has allocated."""
    results = []
    for context in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        model = nn.Linear(8, 4).double()
        optimizer = cls(model.parameters(), lr=1e-2)
        train_on(model, optimizer, 0, 0)
        saved = copy.deepcopy(optimizer.state_dict())
        with context():
            optimizer.load_state_dict(saved)
        train_on(model, optimizer, 0, 1)
        results.append(values_of(model))
    assert_equal(*results)


def test_loading_ones_own_state_takes_no_more_memory() -> None:
    """As torch.distributed.checkpoint does, which has read into it."""
    model = nn.Linear(8, 4)
    optimizer = DecoupledAdamW(model.parameters(), lr=1e-2)
    train_on(model, optimizer, 0, 0)
    own = optimizer.state[model.weight]["exp_avg"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[model.weight]["exp_avg"].data_ptr() == own.data_ptr()


def test_a_loaded_group_is_checked_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(3))
    ours = DecoupledAdamW([weight], weight_decay=1e-2)
    caplog.clear()
    DecoupledAdamW([weight]).load_state_dict(ours.state_dict())
    assert "weight_decay=0.01" in caplog.text
    theirs = AdamW([weight], weight_decay=0.0)
    theirs.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        DecoupledAdamW([weight]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("cls", "by_name"), [(DecoupledAdamW, True), (ShardedDecoupledAdamW, False)])
def test_the_decay_of_torchs_adamw_is_not_taken_for_ours(cls: Any, by_name: bool) -> None:
    model = nn.Linear(3, 2)
    theirs = AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    model(torch.ones(2, 3)).sum().backward()
    theirs.step()
    theirs.zero_grad()
    optimizer = cls(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['weight_decay'\].*0\.3.*from_torch"):
        if by_name:
            set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, theirs))
        else:
            optimizer.load_state_dict(theirs.state_dict())
    assert str(optimizer.state_dict()) == str(before)
    set_optimizer_state_dict(model, optimizer, from_torch(theirs.state_dict(), model.named_parameters()))
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(3e-3)
    with pytest.raises(ValueError, match="scales with lr"):
        from_torch(optimizer.state_dict(), model.named_parameters())


@either_class
def test_a_high_decay_of_ours_loads_however_its_group_came_to_be(cls: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = cls([model.weight], lr=1e-2)
    optimizer.load_state_dict(AdamW([model.weight], weight_decay=1e-4).state_dict())
    optimizer.add_param_group({"params": [model.bias], "decoupled_weight_decay": True})
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01
    other = cls([{"params": [model.weight]}, {"params": [model.bias]}], lr=1e-2)
    other.load_state_dict(optimizer.state_dict())
    assert [group["weight_decay"] for group in other.param_groups] == [0.01, 0.01]


@either_class
def test_a_loaded_group_may_lack_entries_and_gives_no_names(cls: Any) -> None:
    optimizer = cls([("mine", nn.Parameter(torch.ones(3)))])
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["weight_decay"]
    saved["param_groups"][0]["param_names"] = ["theirs"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == ["mine"]


def test_state_in_other_shapes_changes_nothing() -> None:
    sizes: dict[int, DecoupledAdamW] = {}
    for size in (2, 3):
        param = nn.Parameter(torch.ones(size))
        param.grad = torch.ones(size)
        sizes[size] = DecoupledAdamW([param], lr=size / 10)
        sizes[size].step()
    ours, before = sizes[2], repr(sizes[2].state_dict())
    with pytest.raises(ValueError, match="expected the parameter's shape"):
        ours.load_state_dict(sizes[3].state_dict())
    assert repr(ours.state_dict()) == before
    ours.step()


# --- edits from outside ---


EDITS: dict[str, Callable[[nn.Parameter, Tensor], object]] = {
    "copy_ under no_grad": lambda p, new: p.copy_(new),
    "p.data.copy_": lambda p, new: p.data.copy_(new),
    "one element": lambda p, new: p.view(-1)[-1:].fill_(0.5),
}


@pytest.mark.parametrize("parameters", ["bf16", "odd sizes"])
@pytest.mark.parametrize("how", EDITS)
@ranks(2)
def test_weights_edited_in_place_between_steps_are_the_ones_trained_on(group: Any, parameters: str, how: str) -> None:
    params = make(parameters)
    optimizer = ShardedDecoupledAdamW(params.items(), lr=1e-2, process_group=group)
    for step in range(3):
        give_gradients(params, step, group.rank())
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for index, p in enumerate(params.values()):
            EDITS[how](p, draw_gradient(p, 77, index))
    edited = {name: p.detach().clone() for name, p in params.items()}
    optimizer.param_groups[0]["lr"] = 1e-9  # so that the weights stay where they are, but for the edit
    give_gradients(params, 3, group.rank())
    optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p.detach(), edited[name], rtol=2e-2, atol=1e-6)
        if how != "one element":
            assert torch.equal(p, edited[name]) or p.dtype != BF16, f"{name}: the edit was lost"


# --- no_sync ---


def test_no_sync_nests_ends_with_an_exception_and_belongs_to_whoever_reduces() -> None:
    pair = Pair()
    give_gradients(pair.params, 0)
    with pair.optimizer.no_sync():
        with pair.optimizer.no_sync():
            pass
        for verb in (pair.optimizer.step, lambda: pair.optimizer.clip_grad_norm_(1.0)):
            with pytest.raises(RuntimeError, match="no_sync"):
                verb()
    with pytest.raises(KeyError), pair.optimizer.no_sync():
        raise KeyError
    pair.train(0)
    optimizer = ShardedDecoupledAdamW(make().items(), config=ShardingConfig(reduce_gradients=False))
    with pytest.raises(RuntimeError, match="reduce_gradients"), optimizer.no_sync():
        pass


# --- lifetime ---


@whoever_reduces
def test_deleting_the_optimizer_leaves_a_plain_model_and_deleting_both_frees_everything(reduces: bool) -> None:
    model, twin = TiedLanguageModel(), TiedLanguageModel()
    config = ShardingConfig(reduce_gradients=reduces, bucket_cap_mb=1e-3)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), config=config)
    scheduler = lr_scheduler.LinearLR(optimizer)
    for step in range(2):
        model.loss(step).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    objects = [weakref.ref(thing) for thing in (optimizer, model, model.norm.weight)]
    tensors = [v for entries in optimizer.state.values() for v in entries.values()]
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors if t.numel()]
    del optimizer, scheduler, tensors
    gc.collect()
    assert objects[0]() is None and all(storage.expired() for storage in storages)
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m.loss(1).backward()
        m.loss(2).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
        storages += [StorageWeakRef(t.untyped_storage()) for t in (p, p.grad) if t is not None]
    del model, m, p
    gc.collect()
    assert [ref() for ref in objects] == [None] * 3
    assert all(storage.expired() for storage in storages)


def test_a_model_trained_here_deep_copies_and_pickles_like_any_other() -> None:
    model = TiedLanguageModel()
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2)
    model.loss(0).backward()
    optimizer.step()
    optimizer.zero_grad()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.loss(5), model.loss(5))
        assert twin.head.weight is twin.embedding.weight
        twin.loss(5).backward()
        assert model.head.weight.grad is None, "the copy's backward reached the original"


# --- hyperparameters ---


def test_tensors_of_different_shapes_never_reach_the_kernel() -> None:
    whole, part = torch.zeros(256), torch.zeros(128)
    scalars: dict[str, Any] = dict(
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3, initial_lr=1e-3, weight_decay=0.0, eps=1e-8
    )
    with pytest.raises(ValueError, match=r"expected tensors of one shape.*\[256\].*\[128\]"):
        DecoupledAdamW.adamw([whole], [whole], [part], [whole], [], [torch.ones(())], **scalars)
    assert not whole.any()


@either_class
def test_an_lr_above_the_peak_is_warned_of_once(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = cls([{"params": [weights[0]], "lr": torch.tensor(0.1)}, {"params": [weights[1]]}], lr=0.1)
    for lr, num_warnings in ((0.1, 0), (0.1 + 1e-7, 0), (0.3, 1), (0.6, 1)):
        optimizer.param_groups[1]["lr"] = lr
        optimizer.step()
        assert caplog.text.count("above initial_lr") == num_warnings
    assert "param_groups[1]: lr=0.3 is above initial_lr=0.1" in caplog.text and "3 times" in caplog.text
    optimizer = cls([nn.Parameter(torch.ones(3))], lr=0.0)  # to be warmed up, but not by a scheduler
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert "param_groups[0]: lr=0.1 is above initial_lr=0," in caplog.text


@either_class
def test_a_first_step_without_any_gradient_is_warned_of(cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As after load_state_dict(assign=True), which leaves the model with other parameters than the optimizer has."""
    for assign, num_warnings in ((False, 0), (True, 1)):
        model = nn.Linear(3, 2)
        optimizer = cls(model.parameters(), lr=0.1)
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=assign)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert caplog.text.count("found no gradient") == num_warnings
    cls([nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(0))]).step()
    assert caplog.text.count("found no gradient") == 1


@same_gradients
@pytest.mark.parametrize(("cls", "num_ranks"), [(DecoupledAdamW, 1), (ShardedDecoupledAdamW, 2)])
@ranks()
def test_a_decay_of_one_or_more_is_an_error_on_every_rank_that_changes_nothing(group: Any, cls: Any) -> str:
    """As Lightning's lr_find brings about, which writes a tiny start into ``initial_lr``."""
    weight = nn.Parameter(torch.ones(5))
    options = {"process_group": group} if cls is ShardedDecoupledAdamW else {}
    optimizer = cls([("w", weight)], lr=1e-2, **options)
    optimizer.param_groups[0].update(initial_lr=1e-8, lr=5e-4)
    weight.grad = torch.ones(5)
    optimizer.step()
    optimizer.zero_grad()
    weight.grad = torch.ones(5)
    optimizer.param_groups[0]["lr"] = 1e-3
    before = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]: expected a decay per step below 1, got 1[^0].*initial_lr"
    ) as e:
        optimizer.step()
    assert torch.equal(weight, before[0]) and str(optimizer.state[weight]) == str(before[1])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, before[0])
    return str(e.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", math.nan), ("lr", -1e-3), ("weight_decay", math.inf), ("eps", math.nan), ("betas", (0.9, 1.0))],
)
@either_class
@ranks(2)
def test_a_number_that_a_schedule_left_without_meaning_is_an_error_that_changes_nothing(
    group: Any, cls: Any, name: str, value: Any
) -> None:
    """The constructor refuses them, too; a schedule that is run past its end gives a negative lr."""
    weight = nn.Parameter(torch.ones(5))
    optimizer = cls([weight], lr=1e-2, **({"process_group": group} if cls is ShardedDecoupledAdamW else {}))
    own = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    weight.grad = torch.full((5,), 1.0 + group.rank())
    with pytest.raises(ValueError, match=f"{name}: expected"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(5)) and not optimizer.state[weight]["step"].any()
    optimizer.param_groups[0][name] = own
    optimizer.step()
    optimizer.zero_grad()
    weight.grad = torch.full((5,), 1.0 + group.rank())
    optimizer.param_groups[0]["lr"] = -1e-12  # a rounding
    optimizer.step()
    assert weight.isfinite().all() and not torch.equal(weight, torch.ones(5))


@pytest.mark.parametrize(
    ("cls", "entry", "said"),
    [
        *(
            (cls, {switch: True}, f"{switch}: expected False, got True")
            for cls in (DecoupledAdamW, ShardedDecoupledAdamW)
            for switch in ("maximize", "differentiable")
        ),
        *(
            (ShardedDecoupledAdamW, {"amsgrad": asked}, f"amsgrad.*expected {not asked}.*got {asked}")
            for asked in (True, False)
        ),
    ],
)
def test_a_switch_of_a_group_that_was_turned_is_an_error_that_changes_nothing(
    cls: Any, entry: dict[str, bool], said: str
) -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = cls([("w", weight)], lr=1e-2, amsgrad=not entry.get("amsgrad", True))
    optimizer.param_groups[0].update(entry)
    weight.grad = torch.ones(5)
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert torch.equal(weight, torch.ones(5)) and not optimizer.state[weight]["exp_avg"].any()


@either_class
def test_an_initial_lr_that_was_taken_away_is_the_lr_of_the_next_step(cls: Any) -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = cls([("w", weight)], lr=1e-2)
    del optimizer.param_groups[0]["initial_lr"]
    optimizer.param_groups[0]["lr"] = 4e-3
    weight.grad = torch.ones(5)
    optimizer.step()
    assert optimizer.param_groups[0]["initial_lr"] == 4e-3


# --- max_grad_norm ---


@pytest.mark.parametrize("scaling", ["", "scaled", "unscaled before"])
@either_class
def test_clips_add_up_for_one_step_and_the_tighter_of_two_wins(cls: Any, scaling: str) -> None:
    """By norms of unscaled gradients; and through a proxy, as some hand the optimizer out."""
    for max_grad_norm, by_hand, expected in (
        (0.5, (0.25,), 0.25),
        (0.5, (2.0,), 0.5),
        (0.5, (), 0.5),
        (None, (0.5, 0.2), 0.2),
        (None, (1e9,), 4.0),
    ):
        weight = nn.Parameter(torch.zeros(4))
        optimizer = cls([weight], max_grad_norm=max_grad_norm)
        optimizer = optimizer if scaling else Proxy(optimizer)
        scaler = GradScaler("cpu", init_scale=8.0, enabled=bool(scaling))
        for clips, told in ((by_hand, expected), ((), max_grad_norm or 4.0)):  # the second step knows of no clip
            weight.grad = scaler.scale(torch.full((4,), 2.0))
            left = 4.0
            if scaling == "unscaled before" or clips:
                scaler.unscale_(optimizer)
            for max_norm in clips:
                assert optimizer.clip_grad_norm_(max_norm).item() == pytest.approx(left, rel=1e-5)
                left = min(left, max_norm)
            scaler.step(optimizer)
            scaler.update()
            metrics = optimizer.metrics()
            assert metrics["l2_norm/grad/global"] == pytest.approx(told, rel=1e-5)
            if max_grad_norm is not None:
                assert metrics["grad_norm"] == pytest.approx(left, rel=1e-5)
                assert metrics["clip_coefficient"] == pytest.approx(told / 4.0, rel=1e-5)
            optimizer.zero_grad()


# --- integers ---


@either_class
def test_frozen_integers_are_left_alone(cls: Any, tmp_path: Path) -> None:
    def build(value: int) -> tuple[Any, Any]:
        model: Any = nn.Linear(3, 2)
        model.packed = nn.Parameter(torch.full((3,), value, dtype=torch.uint8), requires_grad=False)
        model.mask = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
        kind = {} if cls is DecoupledAdamW else {"config": ShardingConfig(main_parameter=MainParameter.REMAINDER)}
        return model.bfloat16(), cls(
            [{"params": [(name, p)]} for name, p in reversed(list(model.named_parameters()))], lr=1e-2, **kind
        )

    model, optimizer = build(7)
    packed, at = model.packed, model.packed.data_ptr()
    model(torch.ones(2, 3, dtype=torch.bfloat16)).sum().backward()
    assert optimizer.clip_grad_norm_(0.1) > 1.0
    optimizer.step()
    assert not [key for key in optimizer.metrics() if "packed" in key]
    assert model.packed is packed and packed.data_ptr() == at and packed.tolist() == [7, 7, 7]

    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1)
    other_model, other = build(9)
    load_checkpoint(tmp_path, model=other_model, optimizer=other)
    assert other_model.packed.tolist() == [7, 7, 7] and not other_model.packed.requires_grad
    assert str(get_optimizer_state_dict(other_model, other)) == str(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(other.state_dict()["state"]) == 2


# --- proxies ---


class Proxy:
    """What Lightning and Fabric hand out: the optimizer's attributes, a class made from its, and its own ``step``."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update(optimizer.__dict__)
        self.__class__ = type("Proxy", (Proxy, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)
