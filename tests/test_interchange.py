"""Optimizer state of others, made by their own packages, goes on here as it would have gone on there.

Each import is compared with its source bit for bit, and a step of our optimizer from there with the source's own next.
"""

import copy
import importlib
import importlib.util
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import AdamW

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sharded_dadamw.interchange import from_torch, to_torch
from sharded_dadamw.interchange.convert import Source, read_state, write_state
from sharded_dadamw.interchange.deepspeed import from_deepspeed
from sharded_dadamw.update.hyperparameters import Hyperparameters
from tests import forked, pool, runs
from tests.deepspeed_client import MODULES, RUNS, Tied
from tests.harm import Calls
from tests.simulated import on_ranks

FULL = StateDictOptions(full_state_dict=True)
THEIRS: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
CLOSE: dict[str, float] = dict(rtol=2e-6, atol=1e-8)  # the same law in another order of roundings

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process on its own, as is meant

State = Mapping[str, Any]
Tensors = dict[str, Tensor]


def build_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 5))


def backward(model: nn.Module, step: int, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    model(torch.randn(8, 7, generator=generator)).square().mean().backward()


def trained(optimizer: torch.optim.Optimizer, model: nn.Module, num_steps: int = 3) -> None:
    for step in range(num_steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    optimizer.zero_grad()


def stepped(kind: Any = AdamW, *, named: bool = True, num_steps: int = 3, **hyper: Any) -> tuple[nn.Module, Any]:
    """A model and an optimizer of its parameters, in the middle of training."""
    model = build_model()
    params = model.named_parameters() if named else model.parameters()
    optimizer = kind(params, **(hyper if "lr" in hyper else {**THEIRS, **hyper}))
    trained(optimizer, model, num_steps)
    return model, optimizer


def grads_of(model: nn.Module) -> Tensors:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def values_of(model: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def after_a_step(model: nn.Module, state: State, weights: Tensors, grads: Tensors) -> Tensors:
    """The fp32 values of a fresh model's parameters, given these weights, after a step of ours from this state."""
    model.load_state_dict(weights)
    params = dict(model.named_parameters())
    for name, grad in grads.items():
        params[name].grad_dtype = grad.dtype
    groups = [{"params": [(name, params[name]) for name in group["params"]]} for group in state["param_groups"]]
    amsgrad = state["param_groups"][0]["amsgrad"]
    optimizer = ShardedDecoupledAdamW(groups, lr=7.0, weight_decay=0.0, amsgrad=amsgrad)
    set_optimizer_state_dict(model, optimizer, copy.deepcopy(dict(state)), options=FULL)
    assert_same_state(get_optimizer_state_dict(model, optimizer, options=FULL), state)
    for name, grad in grads.items():
        params[name].grad = grad
    optimizer.step()
    after = get_optimizer_state_dict(model, optimizer, options=FULL)["state"]
    return {name: after[name].get("main_param", params[name].detach()) for name in after}


def assert_same_state(got: State, expected: State) -> None:
    assert got["state"].keys() == expected["state"].keys()
    for name, entries in expected["state"].items():
        assert got["state"][name].keys() == entries.keys(), name
        for key, value in entries.items():
            assert torch.equal(got["state"][name][key], value), f"{name}, {key}"
    for ours, theirs in zip(got["param_groups"], expected["param_groups"], strict=True):
        for key in ("lr", "initial_lr", "eps", "weight_decay", "amsgrad", "params"):
            assert ours[key] == theirs[key], key
        assert tuple(ours["betas"]) == tuple(theirs["betas"])


def assert_close(got: Tensors, expected: Tensors) -> None:
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def assert_goes_on(state: State, weights: Tensors, grads: Tensors, after: Tensors, model: nn.Module) -> None:
    """What the source did next is what our optimizer does next."""
    assert_close(after_a_step(model, state, weights, grads), after)
    assert any(not torch.equal(after[name], weights[name]) for name in grads)


# --- torch's AdamW and what keeps its format -------------------------------------------------------------------------


def test_state_of_torchs_adamw_goes_on_here() -> None:
    model, optimizer = stepped(named=False, amsgrad=True)
    state = from_torch(copy.deepcopy(optimizer.state_dict()), model.named_parameters())
    for index, name in enumerate(dict(model.named_parameters())):
        for key, value in optimizer.state_dict()["state"][index].items():
            assert torch.equal(state["state"][name][key], value)
    weights = values_of(model)
    backward(model, 3)
    grads = grads_of(model)
    optimizer.step()
    assert_goes_on(state, weights, grads, values_of(model), build_model())


def test_decay_is_the_same_at_every_lr_of_the_schedule() -> None:
    model = build_model()
    optimizer = AdamW(model.parameters(), **THEIRS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=10)
    for _ in range(3):
        trained(optimizer, model, 1)
        schedule.step()
    for _ in range(5):
        group = from_torch(optimizer.state_dict(), model.named_parameters())["param_groups"][0]
        theirs = optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"]
        assert Hyperparameters.from_group(group).decay == pytest.approx(theirs, rel=1e-12)
        schedule.step()


def test_a_group_without_a_schedule_takes_its_lr_for_the_peak_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _, optimizer = stepped()
    with caplog.at_level(logging.WARNING, "sharded_dadamw"):
        group = from_torch(optimizer.state_dict())["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"]) == (1e-2, pytest.approx(1e-3))
    assert "no initial_lr" in caplog.text and "0.01" in caplog.text
    group = from_torch(optimizer.state_dict(), peak_lr=5e-2)["param_groups"][0]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (1e-2, 5e-2, pytest.approx(5e-3))
    assert Hyperparameters.from_group(group).decay == pytest.approx(1e-2 * 0.1)


def test_names_are_the_state_dicts_or_those_that_are_given_without_wrappers() -> None:
    model, optimizer = stepped()
    expected = from_torch(optimizer.state_dict(), model.named_parameters())
    assert_same_state(from_torch(optimizer.state_dict()), expected)
    assert_same_state(from_torch(get_optimizer_state_dict(model, optimizer)), expected)
    wrapped = nn.ModuleDict({"module": model}).named_parameters()
    assert_same_state(from_torch(stepped(named=False)[1].state_dict(), wrapped), expected)


def test_parameters_that_were_never_stepped_start_from_zero() -> None:
    model = build_model()
    model[0].weight.requires_grad_(False)
    optimizer = AdamW(model.parameters(), **THEIRS)
    backward(model, 0)
    model[3].bias.grad = None
    optimizer.step()
    state = from_torch(optimizer.state_dict(), model.named_parameters())
    assert state["state"]["3.bias"]["step"] == 0 and not state["state"]["3.bias"]["exp_avg"].any()
    assert "0.weight" not in state["state"]  # is frozen


@pytest.mark.parametrize("package", ["torch", "fairscale"])
def test_consolidated_state_of_sharding_wrappers_goes_on_here(package: str) -> None:
    if package == "fairscale":
        pytest.importorskip("fairscale")
    state_dict, weights, grads, after = pool.on_ranks(2, train_sharded, package)[0]
    state = from_torch(state_dict, [(name, weights[name]) for name in grads])
    assert_goes_on(state, weights, grads, after, build_model())


def train_sharded(group: Any, package: str) -> Any:
    sharding, of_ranks = {"torch": ("ZeroRedundancyOptimizer", "process_group"), "fairscale": ("OSS", "group")}[package]
    where = importlib.import_module({"torch": "torch.distributed.optim", "fairscale": "fairscale.optim"}[package])
    model = build_model()
    optimizer = getattr(where, sharding)(model.parameters(), AdamW, **{of_ranks: group}, **THEIRS)
    trained(optimizer, model)
    optimizer.consolidate_state_dict(0)
    state_dict = copy.deepcopy(optimizer.state_dict()) if group.rank() == 0 else None
    weights = values_of(model)
    backward(model, 3)  # the same on all ranks, so nobody has to average it
    optimizer.step()
    return state_dict, weights, grads_of(model), values_of(model)


# --- DeepSpeed -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deepspeed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.deepspeed_client` left what it made."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install '.[deepspeed]'")
    folder = tmp_path_factory.mktemp("deepspeed")
    names = [*forked.names_for(1), *forked.names_for(2)]
    with forked.importer() as importer:
        ended = importer.run(MODULES, "tests.deepspeed_client:train_all", (folder,), names, folder / "logs")
    assert ended.codes == [0] * len(names), ended.output
    return folder


ROUND_ROBIN = "stage 2, bf16 round robin, 2 ranks"


@pytest.mark.clients
@pytest.mark.parametrize("name", [name for name in RUNS if name != ROUND_ROBIN])
def test_a_checkpoint_of_deepspeed_goes_on_here(deepspeed_folder: Path, name: str) -> None:
    state, weights = from_deepspeed(deepspeed_folder / name)
    truth = torch.load(deepspeed_folder / f"{name}.pt")
    run = RUNS[name]
    assert state["state"].keys() == truth["state"].keys()
    for parameter, entries in truth["state"].items():
        ours = dict(state["state"][parameter])
        assert ours.pop("step") == 3
        main = ours.pop("main_param") if run.dtype is torch.bfloat16 else weights[parameter]
        assert torch.equal(main, truth["fp32"][parameter])
        assert ours.keys() == entries.keys()
        assert all(torch.equal(ours[key], value) for key, value in entries.items())
    assert weights.keys() == truth["weights"].keys()
    assert all(torch.equal(weights[key], value) for key, value in truth["weights"].items())
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.0, pytest.approx(0.1 * 1e-2)]
    assert_goes_on(state, weights, truth["grads"], truth["next"], Tied().to(run.dtype))


@pytest.mark.clients
def test_deepspeeds_round_robin_is_undone(deepspeed_folder: Path) -> None:
    shuffled, weights = from_deepspeed(deepspeed_folder / ROUND_ROBIN)
    plain, same_weights = from_deepspeed(deepspeed_folder / "stage 2, bf16, 2 ranks")
    assert all(torch.equal(weights[name], value) for name, value in same_weights.items())
    assert_same_state(shuffled, plain)
    for name, entries in shuffled["state"].items():
        assert torch.equal(entries["main_param"].bfloat16(), weights[name])


class FakeDeepSpeed:
    """A folder as DeepSpeed writes it, but for its classes."""

    def __init__(self, folder: Path, num_ranks: int, *, alignment: int = 1, moments: bool = True) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(num_ranks)
        shapes = [{"a.weight": torch.Size([5, 3]), "b.weight": torch.Size([2, 2, 3])}, {"a.bias": torch.Size([1])}]
        paddings = [[-shape.numel() % alignment for shape in group.values()] for group in shapes]
        self.whole = {
            kind: {name: torch.randn(shape, generator=generator) for group in shapes for name, shape in group.items()}
            for kind in ("fp32", "exp_avg", "exp_avg_sq")
        }

        def flat(kind: str, group: int) -> Tensor:
            members = zip(shapes[group], paddings[group], strict=True)
            return torch.cat([padded(self.whole[kind][name].flatten(), num_more) for name, num_more in members])

        def part(kind: str, group: int, rank: int) -> Tensor:
            whole = flat(kind, group)
            return padded(whole, -len(whole) % (2 * num_ranks)).chunk(num_ranks)[rank].clone()

        def lean(group: int, rank: int) -> Tensor:
            """Without what pads the end."""
            before = rank * len(part("fp32", group, rank))
            return part("fp32", group, rank)[: max(0, len(flat("fp32", group)) - before)].clone()

        module = {name: value.bfloat16() for name, value in self.whole["fp32"].items()}
        self.model: dict[str, Any] = {
            "module": module | {"frozen": torch.ones(2), "tied.weight": module["a.weight"]},
            "param_shapes": shapes,
            "ds_config": {"optimizer": {"type": "AdamW", "params": {}}},
        }
        hyper = {**THEIRS, "amsgrad": False, "decoupled_weight_decay": True, "initial_lr": 2e-2}
        self.ranks: list[dict[str, Any]] = []
        for rank in range(num_ranks):
            state = {
                n: {"step": torch.tensor(4.0), **{kind: part(kind, n, rank) for kind in ("exp_avg", "exp_avg_sq")}}
                for n in (range(2) if moments else ())
            }
            groups = [{**hyper, "params": [n]} for n in range(2)]
            self.ranks.append(
                {
                    "base_optimizer_state": {"state": state, "param_groups": groups},
                    "single_partition_of_fp32_groups": [lean(n, rank) for n in range(2)],
                    "zero_stage": 2,
                    "partition_count": [num_ranks, num_ranks],
                    "param_alignment_paddings": paddings,
                }
            )

    def write(self) -> Path:
        tag = self.folder / "global_step4"
        tag.mkdir(parents=True)
        (self.folder / "latest").write_text("global_step4\n")
        torch.save(self.model, tag / "mp_rank_00_model_states.pt")
        for rank, state in enumerate(self.ranks):
            torch.save({"optimizer_state_dict": state}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        return self.folder


def padded(tensor: Tensor, num_more: int) -> Tensor:
    return nn.functional.pad(tensor, (0, num_more), value=9.0)


@pytest.mark.parametrize(("num_ranks", "alignment"), [(1, 8), (2, 1), (3, 8), (4, 1)])
def test_partitions_of_any_number_of_ranks_become_whole(num_ranks: int, alignment: int, tmp_path: Path) -> None:
    fake = FakeDeepSpeed(tmp_path, num_ranks, alignment=alignment)
    state, weights = from_deepspeed(fake.write())
    for name, entries in state["state"].items():
        assert entries["step"] == 4
        for key, kind in (("main_param", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            assert torch.equal(entries[key], fake.whole[kind][name])
    assert set(state["state"]) == {"a.weight", "b.weight", "a.bias"}
    assert set(weights) == {*state["state"], "frozen", "tied.weight"}
    assert state["param_groups"][0]["weight_decay"] == pytest.approx(2e-2 * 0.1)
    assert from_deepspeed(tmp_path / "global_step4")[0]["param_groups"] == state["param_groups"]


def test_a_deepspeed_checkpoint_before_the_first_step_has_zeros(tmp_path: Path) -> None:
    state, _ = from_deepspeed(FakeDeepSpeed(tmp_path, 2, moments=False).write())
    assert not any(entries["exp_avg"].any() or entries["step"].any() for entries in state["state"].values())


BASE = "base_optimizer_state"
SPOILT: list[tuple[Any, tuple[Any, ...], Any, str]] = [
    # in the files of which ranks, or the model's; where; what is put there; what the error says
    ((0, 1), ("zero_stage",), 3, "stage 1 or 2, got stage 3"),
    ("model", ("ds_config", "optimizer", "params", "adam_w_mode"), False, "adam_w_mode"),
    ((0, 1), (BASE, "state", 0), {"step": torch.tensor(4.0), "momentum_buffer": torch.ones(2)}, "another optimizer's"),
    ((1,), (BASE, "state", 0, "step"), torch.tensor(5.0), "same step on every rank"),
    ((1,), ("single_partition_of_fp32_groups", 0), torch.ones(1), r"of b\.weight: expected 12 elements from 15 on"),
    ((0, 1), (BASE,), [{}, {}], "elastic_checkpoint"),
    ((0,), (BASE, "param_groups", 0, "decoupled_weight_decay"), False, "got Adam's"),
]


@pytest.mark.parametrize(("ranks", "path", "value", "why"), SPOILT)
def test_what_deepspeed_saved_and_we_cannot_continue_is_refused(
    ranks: Any, path: tuple[Any, ...], value: Any, why: str, tmp_path: Path
) -> None:
    fake = FakeDeepSpeed(tmp_path, 2)
    *parents, last = path
    for target in [fake.model] if ranks == "model" else [fake.ranks[rank] for rank in ranks]:
        for key in parents:
            target = target[key]
        target[last] = value
    with pytest.raises(ValueError, match=why):
        from_deepspeed(fake.write())


def test_files_of_deepspeed_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    tag = FakeDeepSpeed(tmp_path, 3).write() / "global_step4"
    last = tag / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    shutil.copy(last, tag / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt")
    with pytest.raises(ValueError, match="files of 3 ranks, one of each, got 4"):
        from_deepspeed(tmp_path)
    (tag / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
    last.rename(tag / "zero_pp_rank_0_mp_rank_01_optim_states.pt")
    with pytest.raises(ValueError, match="tensor or pipeline"):
        from_deepspeed(tmp_path)
    (tag / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    with pytest.raises(ValueError, match="none of rank 2"):
        from_deepspeed(tmp_path)
    (tag / "mp_rank_00_model_states.pt").rename(tag / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match="stage 3"):
        from_deepspeed(tmp_path)
    with pytest.raises(ValueError, match="folder of DeepSpeed"):
        from_deepspeed(tmp_path / "nowhere")
    (tmp_path / "latest").write_text("global_st")
    with pytest.raises(ValueError, match="latest: expected the name of a folder beside it, got 'global_st'"):
        from_deepspeed(tmp_path)
    (tmp_path / "latest").write_bytes(b"\x80\xff")
    with pytest.raises(ValueError, match="latest: expected text, got"):
        from_deepspeed(tmp_path)


def test_a_deepspeed_folder_that_carries_code_is_refused(tmp_path: Path) -> None:
    fake = FakeDeepSpeed(tmp_path / "x", 1)
    fake.model["client"] = Calls(os.system, f"touch {tmp_path / 'marker'}")
    with pytest.raises(ValueError, match="no data"):
        from_deepspeed(fake.write())
    assert not (tmp_path / "marker").exists()


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def through_a_file(tmp_path: Path) -> Callable[..., Any]:
    """Saves anything by torch.save, and reads state of AdamW and weights out of it."""

    def read(contents: Any, **told: Any) -> Any:
        torch.save(contents, tmp_path / "x.pt")
        return read_state(tmp_path / "x.pt", Source.TORCH, **told)

    return read


@pytest.fixture
def ours() -> tuple[nn.Module, DecoupledAdamW]:
    """A model and our optimizer in two groups, in the middle of a schedule."""
    model = build_model()
    groups = [
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim > 1]},
        {"params": [(n, p) for n, p in model.named_parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = DecoupledAdamW(groups, lr=1e-2, weight_decay=5e-4, amsgrad=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.3, total_iters=20)
    for _ in range(3):
        trained(optimizer, model, 1)
        schedule.step()
    return model, optimizer


def test_torchs_adamw_goes_on_from_our_state(ours: tuple[nn.Module, DecoupledAdamW]) -> None:
    model, optimizer = ours
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    theirs = copy.deepcopy(model)
    split = [[p for p in theirs.parameters() if p.ndim > 1], [p for p in theirs.parameters() if p.ndim == 1]]
    adamw = AdamW([{"params": part} for part in split], amsgrad=True)
    adamw.load_state_dict(copy.deepcopy(to_torch(state)))
    assert adamw.param_groups[0]["weight_decay"] == pytest.approx(5e-4 / 1e-2)
    for each, its in ((theirs, adamw), (model, optimizer)):
        backward(each, 3)
        its.step()
    assert_close(values_of(model), values_of(theirs))


@pytest.mark.parametrize(("optimizer_class", "source"), [(DecoupledAdamW, Source.TORCH), (AdamW, Source.OURS)])
def test_a_checkpoint_that_says_which_law_wrote_it_is_not_read_by_another(
    optimizer_class: Any, source: Source, tmp_path: Path
) -> None:
    """Also of an optimizer derived from one of those: the weight decay would be off by a factor of lr."""
    model, optimizer = stepped(type("Derived", (optimizer_class,), {}), num_steps=1, lr=1e-2, weight_decay=5e-4)
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    with pytest.raises(ValueError, match=f"got one of {optimizer_class.__name__}, whose weight decay"):
        read_state(tmp_path, source)
    other = Source.OURS if source is Source.TORCH else Source.TORCH
    state, _ = read_state(tmp_path, other, peak_lr=1e-2 if other is Source.TORCH else None)
    assert state["param_groups"][0]["weight_decay"] == pytest.approx(5e-4 if other is Source.OURS else 5e-6)
    write_state(tmp_path / "again", state)
    with pytest.raises(ValueError, match="got one of DecoupledAdamW"):
        read_state(tmp_path / "again", Source.TORCH)


def test_decay_without_a_peak_cannot_be_exported(ours: tuple[nn.Module, DecoupledAdamW]) -> None:
    state = get_optimizer_state_dict(*ours, options=FULL)
    state["param_groups"][0] |= {"initial_lr": 0.0, "lr": 0.0}
    with pytest.raises(ValueError, match="initial_lr"):
        to_torch(state)


def test_a_folder_loads_by_stock_torch_into_a_live_optimizer(ours: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, optimizer = ours
    state = get_optimizer_state_dict(model, optimizer, options=FULL)
    write_state(tmp_path / "out", state, values_of(model))
    fresh = build_model().requires_grad_()
    groups = [{"params": [(n, p) for n, p in fresh.named_parameters() if (p.ndim > 1) is big]} for big in (True, False)]
    again = DecoupledAdamW(groups, amsgrad=True)
    live = {"optimizer": get_optimizer_state_dict(fresh, again), "model": fresh.state_dict()}
    dcp_load(live, checkpoint_id=tmp_path / "out", no_dist=True)
    set_optimizer_state_dict(fresh, again, live["optimizer"])
    assert_same_state(get_optimizer_state_dict(fresh, again, options=FULL), state)
    assert all(torch.equal(value, values_of(model)[name]) for name, value in values_of(fresh).items())
    back, weights = read_state(tmp_path / "out", Source.OURS)
    assert_same_state(back, state)
    assert all(torch.equal(weights[name], value) for name, value in values_of(model).items())
    with pytest.raises(ValueError, match="root: expected a folder of checkpoints"):  # or this one would stay the newest
        save_checkpoint(tmp_path / "out", step=1, model=model, optimizer=optimizer)
    files = list(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="new or empty"):
        write_state(tmp_path, state)
    assert list(tmp_path.rglob("*")) == files


def test_what_was_converted_is_loaded_in_one_call(through_a_file: Any, tmp_path: Path) -> None:
    model, optimizer, schedule = runs.build("AdamW", None, tie=True)
    runs.fit(model, optimizer, schedule, 3)
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state, weights = through_a_file(contents, names=[name for name, _ in model.named_parameters()])
    for name in ("anywhere", "run/step_00000070"):
        write_state(tmp_path / name, state, weights)
    assert checkpoints(tmp_path / "run") == [tmp_path / "run" / "step_00000070"]
    assert list(tmp_path.glob(".*")) == list((tmp_path / "run").glob(".*")) == []
    for path, step in ((tmp_path / "anywhere", 3), (tmp_path / "run", 70)):
        for told, values, gathered in on_ranks(2, load_in_one_call, path):
            assert told == (step, None)
            assert runs.differences(values, values_of(model)) == []
            assert_same_state(gathered, state)
    back, again = read_state(tmp_path / "run", Source.OURS)
    assert_same_state(back, state)
    assert again["decoder.weight"] is again["embedding.weight"]


def load_in_one_call(group: Any, path: Path) -> Any:
    parts = runs.build("ours", group, seed=1, tie=True)
    generators = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"scheduler: expected .* pass scheduler=None"):
        load_checkpoint(path, **runs.run(group, *parts))
    resumed = load_checkpoint(path, **runs.run(group, *parts[:2]))
    assert resumed is not None and torch.equal(torch.get_rng_state(), generators)
    told = (resumed.step, resumed.data)
    return told, values_of(parts[0]), get_optimizer_state_dict(*parts[:2], options=FULL)


# --- files -----------------------------------------------------------------------------------------------------------


def test_main_parameters_are_made_of_narrow_weights(through_a_file: Any) -> None:
    model = build_model().bfloat16()
    optimizer = AdamW(model.parameters(), **THEIRS)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    contents = {"net": model.state_dict(), "opt": optimizer.state_dict(), "epoch": 3}
    state, weights = through_a_file(contents)  # names by shape, since there is one group
    assert list(state["state"]) == list(dict(model.named_parameters()))
    for name, entries in state["state"].items():
        assert torch.equal(entries["main_param"], weights[name].float()) and entries["exp_avg"].dtype == torch.bfloat16


def test_names_that_cannot_be_told_are_asked_for(through_a_file: Any) -> None:
    model = build_model()
    named = dict(model.named_parameters())
    split = [[n for n in named if named[n].ndim > 1], [n for n in named if named[n].ndim == 1]]
    optimizer = AdamW([{"params": [named[n] for n in part]} for part in split], **THEIRS)
    trained(optimizer, model)
    contents = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    assert [
        group["params"] for group in through_a_file(contents, names=[*split[0], *split[1]])[0]["param_groups"]
    ] == split
    for names, said in (
        (None, "names for the 6 parameters"),
        ([*reversed(split[0]), *split[1]], r"state of 3\.weight in its shape, \[5, 12\], got \[12, 7\]"),
        (split[0], "as many parameters as the state has, 6, got 2"),
    ):
        with pytest.raises(ValueError, match=said):
            through_a_file(contents, names=names)


@pytest.mark.parametrize("named", [True, False])
def test_weights_are_those_that_belong_to_the_state(named: bool, through_a_file: Any, tmp_path: Path) -> None:
    model, optimizer = stepped(named=named)
    state, weights = optimizer.state_dict(), model.state_dict()
    average = {f"module.{name}": torch.full_like(tensor, 7.0) for name, tensor in weights.items()}
    wrong_shape = {name: torch.zeros(100, 100) for name in weights}
    metrics = {"histogram": torch.zeros(1 << 12)}
    for contents in (
        {"model": weights, "metrics": metrics},
        {"metrics": metrics, "model": weights, "same": dict(weights), "other": wrong_shape},
    ):
        _, found = through_a_file({**contents, "optimizer": state})
        assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    contents, path = {"ema": average, "model": weights, "optimizer": state}, tmp_path / "model.pt"
    with pytest.raises(ValueError, match=r"x\.pt: expected one set of weights .* at ema, model; save"):
        through_a_file(contents)
    torch.save(weights, path)
    _, found = through_a_file(contents, weights=path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=r"model\.pt: expected a model's state dict, got none|names for the 6"):
        through_a_file(contents, weights=path)


def test_state_dicts_in_lists_and_tuples_are_found(through_a_file: Any) -> None:
    model, optimizer = stepped(named=False)
    state, weights = optimizer.state_dict(), model.state_dict()
    lightning = {
        "state_dict": {f"model.{name}": tensor for name, tensor in weights.items()},
        "optimizer_states": [state],
        "lr_schedulers": [{"base_lrs": [1e-2], "last_epoch": 3}],
    }
    for contents in (lightning, [weights, state], {"model": weights, "all": ({"optimizers": (state,)}, 3)}):
        found, held = through_a_file(contents)
        prefix = "model." if contents is lightning else ""
        for index, (name, tensor) in enumerate(weights.items()):
            assert torch.equal(found["state"][prefix + name]["exp_avg"], state["state"][index]["exp_avg"])
            assert torch.equal(held[prefix + name], tensor)
    with pytest.raises(ValueError, match=r"got those at optimizer_states\.0, optimizer_states\.1"):
        through_a_file({"optimizer_states": [state, dict(state)]})


def test_numbers_of_numpy_and_in_tensors_are_numbers(through_a_file: Any) -> None:
    numpy = pytest.importorskip("numpy")
    state = stepped()[1].state_dict()
    expected = from_torch(state, peak_lr=0.25)
    (group,) = state["param_groups"]
    group |= {"lr": numpy.float64(group["lr"]), "betas": tuple(map(numpy.float64, group["betas"]))}
    group |= {"initial_lr": numpy.float32(0.25), "max_lr": torch.tensor(0.25)}
    group["weight_decay"] = torch.tensor(0.1).double()
    for entries in state["state"].values():
        entries["step"] = numpy.int64(entries["step"].item())
    found, _ = through_a_file(state)
    (group,) = found["param_groups"]
    assert {type(group[key]) for key in ("lr", "initial_lr", "max_lr", "weight_decay")} == {float}
    assert group["weight_decay"] == pytest.approx(0.1 * 0.25)
    expected["param_groups"][0]["weight_decay"] = group["weight_decay"]
    assert_same_state(found, expected)


GROUP_OF_ONE = {**THEIRS, "params": [0], "param_names": ["a"]}
IN_8_BITS = {"step": 1, "exp_avg_codes": torch.zeros(3), "exp_avg_scale": torch.zeros(1)}


def of_another_shape() -> dict[str, Any]:
    state_dict: dict[str, Any] = stepped()[1].state_dict()
    state_dict["state"][1]["exp_avg_sq"] = torch.ones(3)
    return state_dict


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: stepped(torch.optim.SGD, lr=0.1, momentum=0.9), "of AdamW, got a group without betas"),
        (lambda: stepped(torch.optim.Adam), "got Adam's"),
        (lambda: stepped(torch.optim.RAdam), "expected the hyperparameters of AdamW, got a group without amsgrad"),
        (lambda: stepped(maximize=True), "maximize"),
        # Before it was consolidated, as fairscale's and torch's would be, if they did not refuse to give it.
        (lambda: {"state": {0: {}, 1: {}}, "param_groups": [GROUP_OF_ONE]}, "consolidated"),
        (
            lambda: {"state": {"a": IN_8_BITS}, "param_groups": [{**THEIRS, "params": ["a"]}]},
            "got none of exp_avg, exp",
        ),
        (dict, "got something else"),
        (of_another_shape, r"state of 0\.bias, exp_avg_sq: expected shape \[12\], got \[3\]"),
    ],
)
def test_state_that_is_no_adamws_is_refused(make: Any, why: str) -> None:
    made = make()
    with pytest.raises(ValueError, match=why):
        from_torch(made if isinstance(made, dict) else made[1].state_dict())


@pytest.mark.parametrize("flat", [False, True])
def test_a_torch_checkpoint_folder_goes_on_here(flat: bool, tmp_path: Path) -> None:
    """As FSDP2 with AdamW leaves it, through torch's own functions; torchtitan's is flat."""
    model = build_model()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is big] for big in (True, False))
    optimizer = AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **THEIRS)
    trained(optimizer, model)
    expected = from_torch(get_optimizer_state_dict(model, optimizer))
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    dcp_save({"app": {"model": model.state_dict(), "optim": saved}}, checkpoint_id=tmp_path / "x", no_dist=True)
    state, weights = read_state(tmp_path / "x", Source.TORCH)
    assert_same_state(state, expected)
    assert_same_state(from_torch(saved), expected)
    assert all(torch.equal(weights[name], value) for name, value in values_of(model).items())


def test_a_torch_checkpoint_folder_has_all_its_elements_in_its_files(tmp_path: Path) -> None:
    """One element can stand for any number of them."""
    dcp_save({"x": torch.ones(1 << 12)}, checkpoint_id=tmp_path / "x", no_dist=True)
    metadata = FileSystemReader(tmp_path / "x").read_metadata()
    (info,) = metadata.storage_data.values()
    with (tmp_path / "x" / info.relative_path).open("wb") as file:
        torch.save(torch.ones(1).expand(1 << 12), file)
    info.length = (tmp_path / "x" / info.relative_path).stat().st_size
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="a tensor that is in the file"):
        read_state(tmp_path / "x", Source.TORCH)
