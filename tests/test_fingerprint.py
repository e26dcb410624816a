"""The 64-bit sums of tensors, of optimizers, in checkpoints, and of replicas that have drifted."""

import json
import math
import struct
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_dadamw import DecoupledAdamW, MainParameter, Moments, ShardedDecoupledAdamW, ShardingConfig, StateResidency
from sharded_dadamw.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sharded_dadamw.checkpoint.difference import difference
from sharded_dadamw.checkpoint.difference import fingerprints as saved_fingerprints
from sharded_dadamw.checkpoint.folder import Manifest
from sharded_dadamw.kernels import fingerprint, numba_fingerprint, triton_fingerprint
from sharded_dadamw.kernels.fingerprint import Span
from sharded_dadamw.layout.indices import rows_of
from sharded_dadamw.state.fingerprint import Fingerprint
from sharded_dadamw.update.precision import split
from tests.layouts import LAYOUTS, Model, grid
from tests.models import draw_gradient, make_groups, named
from tests.runs import build, fit, run
from tests.simulated import on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:gradients are the same on all ranks")  # as they are here

WORD = 2**64


def key(number: int) -> int:
    x = (number + 1) * 0x9E3779B97F4A7C15 % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31 | 1


def term(bits: int, index: int, half: int = 16) -> int:
    """The formula of docs/same_run.md in Python's integers."""
    return (bits ^ bits >> half) * key(index % 64) * key(64 + index // 64)


def pattern(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def sum_by_hand(values: Tensor) -> int:
    """Of a whole tensor, which is fp32 or narrower."""
    return sum(term(pattern(value), index) for index, value in enumerate(values.reshape(-1).tolist())) % WORD


SUMS: dict[str, Callable[[Sequence[Span]], Tensor]] = {
    "numba": numba_fingerprint.sums_of,
    "torch": lambda spans: torch.stack([*map(fingerprint.sum_by_torch, spans)]),
    "triton": triton_fingerprint.sums_of,
}


def sum_of_parts(cuts: list[Span], by: str) -> int:
    return sum(SUMS[by](cuts).tolist()) % WORD


@pytest.mark.parametrize("by", SUMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_is_that_of_the_specification_however_a_tensor_is_cut(dtype: torch.dtype, by: str) -> None:
    whole = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole[0, 0, :3] = torch.tensor([0.0, -0.0, math.inf])
    expected = sum_by_hand(whole)
    offsets_and_sizes = {
        "whole": [((0, 0, 0), (7, 5, 6))],
        "by rows": [((0, 0, 0), (4, 5, 6)), ((4, 0, 0), (3, 5, 6))],
        "by columns": [((0, 0, 0), (7, 5, 4)), ((0, 0, 4), (7, 5, 2))],
        "both": [((r, 0, c), (n, 5, 3)) for r, n in ((0, 4), (4, 3)) for c in (0, 3)],
        "in the middle": [((0, 0, 0), (7, 2, 6)), ((0, 2, 0), (7, 3, 6))],
        "three ways": [((0, a, b), (7, n, 2)) for a, n in ((0, 1), (1, 4)) for b in (0, 2, 4)],
    }
    for name, boxes in offsets_and_sizes.items():
        cuts = []
        for offsets, sizes in boxes:
            box = tuple(slice(first, first + size) for first, size in zip(offsets, sizes, strict=True))
            part, numel = whole[box].reshape(-1), math.prod(sizes)
            for start, stop in ((0, numel // 3), (numel // 3, numel // 2 + 1), (numel // 2 + 1, numel)):
                for rows in rows_of((7, 5, 6), offsets, sizes, start, stop):
                    values = part[start + rows.place :][: rows.stop - rows.start]
                    cuts.append(Span(values, None, rows))
        assert sum_of_parts(cuts, by) == expected, name


@pytest.mark.parametrize("by", SUMS)
def test_every_form_of_a_value_has_one_sum_and_any_change_another(by: str) -> None:
    value = torch.randn(70_001, generator=torch.Generator().manual_seed(1))
    (rows,) = rows_of((70_001,), (0,), (70_001,), 0, 70_001)
    param, remainder = split(value)
    forms = {"fp32": Span(value, None, rows), "remainder": Span(param, remainder, rows)}
    by_hand = sum_by_hand(value)
    for name, span in forms.items():
        assert sum_of_parts([span], by) == by_hand, name
    for dtype in (torch.float16, torch.bfloat16):
        narrow = value.to(dtype)
        assert len({sum_of_parts([Span(form, None, rows)], by) for form in (narrow, narrow.float())}) == 1
    wide = value.double()
    exact = sum(term(int(struct.unpack("<Q", struct.pack("<d", x))[0]), i, 32) for i, x in enumerate(wide.tolist()))
    assert sum_of_parts([Span(wide, None, rows)], by) == exact % WORD
    for change in ("flip", "swap", "sign"):
        other = value.clone()
        if change == "flip":
            other.view(torch.int32)[67_777] ^= 1
        elif change == "swap":
            other[[5, 66_005]] = other[[66_005, 5]]
        else:
            other[[3, 4]] *= -1
        assert sum_of_parts([Span(other, None, rows)], by) != by_hand, change


# --- optimizers ------------------------------------------------------------------------------------------------------


def trained(group: Any, params: str, num_steps: int, mesh: bool = False, **config: Any) -> dict[str, Any]:
    """The fingerprint after steps with equal gradients on all ranks; of `DecoupledAdamW` where group is None."""
    groups = make_groups(params, 0)
    named_params = named(groups)
    if group is None:
        optimizer: Any = DecoupledAdamW(groups)
    else:
        ranks = grid("replicate", "shard") if mesh else group
        settings = ShardingConfig(reduce_gradients=False, **config)
        optimizer = ShardedDecoupledAdamW(groups, process_group=ranks, config=settings)
    for step in range(num_steps):
        for index, param in enumerate(named_params.values()):
            param.grad = draw_gradient(param, index, step) if param.requires_grad else None
        optimizer.step()
    made: dict[str, Any] = optimizer.fingerprint().as_dict()
    if group is None:
        for name, param in named_params.items():
            by_hand = {key: value for key, value in optimizer.state[param].items() if key != "param"} | {"param": param}
            for key, value in by_hand.items():
                if value.dtype is not torch.float64:
                    assert made["tensors"][name][key] == f"{sum_by_hand(value.detach()):016x}", f"{key} of {name}"
    return made


@pytest.mark.parametrize("params", ["odd sizes", "several groups", "mixed dtypes", "frozen"])
def test_an_optimizer_has_one_fingerprint_in_every_layout(params: str) -> None:
    like = Moments.LIKE_PARAMETERS
    settings: dict[str, Any] = {"main_parameter": MainParameter.NONE, "moments": like}
    expected = trained(None, params, 2)
    for num_ranks, mesh, cap in ((1, False, 16.0), (2, False, 0.001), (3, False, 16.0), (4, True, 0.001)):
        for made in on_ranks(num_ranks, partial(trained, mesh=mesh, bucket_cap_mb=cap, **settings), params, 2):
            assert made == expected, (num_ranks, mesh)
    assert trained(None, params, 1)["all"] != expected["all"]


@pytest.mark.parametrize("shape", [(300, 1), (40, 7)], ids=str)
def test_how_a_parameter_lies_in_memory_makes_no_difference(shape: tuple[int, int]) -> None:
    weight, gradient = draw_gradient(torch.empty(shape), 1), draw_gradient(torch.empty(shape), 2)
    made = []
    for like in (torch.empty(shape), torch.empty(shape[0], 9)[:, : shape[1]], torch.empty(shape[::-1]).t()):
        param = nn.Parameter(like.copy_(weight))
        optimizer = DecoupledAdamW([("weight", param)], lr=1e-2)
        param.grad = gradient
        optimizer.step()
        made.append(optimizer.fingerprint().as_dict())
    assert made[0] == made[1] == made[2]


def test_both_forms_of_a_main_parameter_have_one_fingerprint() -> None:
    made = [
        on_ranks(num_ranks, partial(trained, main_parameter=form, state_residency=residency), "bf16", 3)[0]
        for num_ranks, form, residency in (
            (1, MainParameter.FP32, StateResidency.DEVICE),
            (2, MainParameter.REMAINDER, StateResidency.DEVICE),
            (3, MainParameter.REMAINDER, StateResidency.HOST),
        )
    ]
    assert made[0] == made[1] == made[2]
    assert set(made[0]["tensors"]["weight"]) == {"param", "main", "exp_avg", "exp_avg_sq", "step"}


DTENSORS = [
    "FSDP2 on 3",
    "HSDP 2x2, sharded",
    "HSDP 2x2, sharded over the replicate axis",
    "TP x data-parallel 2x2, sharded",
    "FSDP2 x TP 2x2",
]


def placed_in(group: Any, layout: str) -> dict[str, dict[str, int]]:
    placed = LAYOUTS[layout].place(group, {})
    return {name: dict(its) for name, its in placed.optimizer.fingerprint().tensors.items()}


@pytest.mark.parametrize("layout", DTENSORS)
def test_parts_of_dtensors_have_the_numbers_of_the_whole(layout: str) -> None:
    expected = {name: sum_by_hand(param.detach()) for name, param in Model().named_parameters()}
    for made in on_ranks(LAYOUTS[layout].num_ranks, placed_in, layout):
        assert {name: its["param"] for name, its in made.items()} == expected


# --- memory that has gone wrong --------------------------------------------------------------------------------------


def flip(group: Any, kind: str, where: int, steps: int) -> str:
    """What the optimizer says after a live run in which one bit flips on one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40), nn.Linear(40, 8))
    optimizer: Any
    if kind == "DDP":
        optimizer = DecoupledAdamW(model.named_parameters())
    else:
        over = grid("replicate", "shard") if kind == "mesh" else group
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=over)
        optimizer.attach(model)
    for step in range(steps):
        model(torch.ones(2, 16) * (step + 1)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.fingerprint(group)
    optimizer.synchronize() if kind != "DDP" else None
    if group.rank() == where:
        tensor = model[1].weight if kind == "sharded" else optimizer.state[model[1].weight]["exp_avg"]
        last = tensor.detach().view(-1).view(torch.int32)[-1:]
        last ^= 1 << 12
    try:
        optimizer.fingerprint(group)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_flipped_bit_in_a_live_run_is_found_and_named_on_every_rank() -> None:
    for said in on_ranks(4, flip, "sharded", 1, 2):
        assert "param of 1.weight on rank 1 is not what it is on ranks 0, 2, 3; 1 tensors differ" in said
    for said in on_ranks(4, flip, "DDP", 2, 2):
        assert "exp_avg of 1.weight on rank 2 is not what it is on ranks 0, 1, 3" in said
    for said in on_ranks(4, flip, "mesh", 2, 2):
        assert "exp_avg of 1.weight on rank 2 is not what it is on rank 0" in said


# --- in checkpoints --------------------------------------------------------------------------------------------------


def saved(group: Any, kind: str, root: Path, num_steps: int = 2, **settings: Any) -> None:
    parts = build(kind, group, **settings)
    for step in range(1, num_steps + 1):
        fit(*parts, 1)
        save_checkpoint(root, step=step, **run(group, *parts))


def loaded(group: Any, kind: str, root: Path, change: str = "", **settings: Any) -> str:
    parts = build(kind, group, seed=1, **settings)
    if change:
        folder = checkpoints(root)[-1]
        if group.rank() == 0:
            manifest = Manifest.read(folder)
            words = manifest.fingerprint["tensors"]["middle.0.weight"]
            words[change] = f"{int(words[change], 16) ^ 1:016x}"
            (folder / "manifest.json").unlink()
            manifest.write(folder)
        dist.barrier(group)
    try:
        load_checkpoint(root, **run(group, *parts))
    except ValueError as error:
        return str(error)
    return ""


NARROW = {"dtype": torch.bfloat16}


def test_what_was_loaded_is_compared_with_what_was_saved(tmp_path: Path) -> None:
    on_ranks(3, partial(saved, **NARROW), "ours, fp32 main", tmp_path / "bf16")
    assert on_ranks(2, partial(loaded, **NARROW), "ours, remainder", tmp_path / "bf16") == [""] * 2
    on_ranks(2, saved, "fsdp2, our law", tmp_path / "a")
    assert on_ranks(3, loaded, "ours", tmp_path / "a") == [""] * 3
    for change in ("exp_avg", "param"):
        for said in on_ranks(3, loaded, "ours", tmp_path / "a", change):
            assert said.startswith(f"{change} of middle.0.weight: expected")
    on_ranks(2, saved_with_drift, tmp_path / "drift")
    assert on_ranks(2, loaded, "ours", tmp_path / "drift") == [""] * 2


def saved_with_drift(group: Any, root: Path) -> None:
    parts = build("ours", group)
    if group.rank() == 1:
        parts[0].get_parameter("decoder.weight").data[0] += 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_checkpoint(root, step=1, **run(group, *parts))
    assert [str(each.message) for each in caught if "param of decoder.weight on rank 1" in str(each.message)]


def test_diff_tells_the_first_step_and_tensor_that_differ(tmp_path: Path) -> None:
    on_ranks(1, partial(saved, **NARROW), "ours, fp32 main", tmp_path / "one")
    on_ranks(2, partial(saved, **NARROW), "ours, remainder", tmp_path / "run" / "two", 3)
    assert difference(tmp_path / "one", tmp_path / "run") is None
    (tmp_path / "two").symlink_to(tmp_path / "run" / "two")
    one, two = (saved_fingerprints(tmp_path / name) for name in ("one", "two"))
    lines = [{"step": 0, "loss": 1.0}, *({"step": step, "fingerprint": its.as_dict()} for step, its in two.items())]
    changed = json.loads(json.dumps(lines))
    changed[3]["fingerprint"]["tensors"]["middle.1.bias"]["exp_avg_sq"] = "0" * 16
    for name, content in (("a.jsonl", lines), ("b.jsonl", changed)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in content))
    assert difference(tmp_path / "one", tmp_path / "a.jsonl") is None and one[2] == two[2]
    said = difference(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert said is not None and said.startswith("step 3: exp_avg_sq of middle.1.bias is ")
    with pytest.raises(ValueError, match=r"of the same step, got step 2 in .*one.* and 3 in"):
        difference(checkpoints(tmp_path / "one")[-1], checkpoints(tmp_path / "two")[-1])
    with pytest.raises(ValueError, match=f"{tmp_path / 'none'}: expected .* got no file or folder"):
        difference(tmp_path / "none", tmp_path / "two")
    lines[3]["fingerprint"]["tensors"]["decoder.weight"]["of a later version"] = "0"
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = difference(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    assert said is not None and said.startswith("step 3: of a later version of decoder.weight is nothing in ")
    lines[3]["fingerprint"]["formula"] = 1
    with pytest.raises(ValueError, match="expected a fingerprint by formula 2, got"):
        Fingerprint.of_dict(lines[3]["fingerprint"])
    (newest := checkpoints(tmp_path / "two")[-1] / "fingerprint.json").write_text("{")
    with pytest.raises(ValueError, match=f"{newest}: expected .* bytes, got 1; the file has been damaged"):
        difference(tmp_path / "one", tmp_path / "two")  # though that of an earlier step is sound


@pytest.mark.parametrize("line", [b'{"step": 1, "fing', b"\xff\xfe", b"3", b'{"fingerprint": {}}', b"[" * 100_000])
def test_a_line_that_is_none_of_metrics_is_named(line: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)
    with pytest.raises(ValueError, match=f"{path}, line 2: expected a line of metrics, got another: "):
        difference(path, path)
