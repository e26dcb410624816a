"""A step has the same bits on any number of ranks: `ShardingConfig(micro_batches=K)`."""

import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_dadamw import (
    DecoupledAdamW,
    Exchange,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
    StateResidency,
)
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.checkpoint.difference import difference
from sharded_dadamw.comm.connect import connect
from sharded_dadamw.comm.tree import fitting
from sharded_dadamw.kernels import exact_squares
from sharded_dadamw.norms import held
from sharded_dadamw.norms.global_norm import exact_norm
from tests import pool
from tests.harness import ranks
from tests.layouts import grid
from tests.simulated import on_ranks

SHARDED = GradientResidency.SHARDED
ROWS = 3
"""Of a micro-batch."""


class Model(nn.Module):
    """Matrices, vectors, a scalar, and a parameter that no micro-batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 37)
        self.gain = nn.Parameter(torch.tensor(1.1))
        self.down = nn.Linear(37, 5)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.gain)


def loss_of(model: nn.Module, step: int, number: int) -> Tensor:
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1000 * step + number))
    return model(x.to(next(model.parameters()).dtype)).square().mean() * 4.0 ** (number % 5)


def trained(
    group: Any,
    micro_batches: int,
    num_steps: int = 3,
    *,
    mesh: bool = False,
    dtype: torch.dtype = torch.float32,
    attach: bool = False,
    clip: str = "in step",
    wide_gradients: bool = False,
    root: Path | None = None,
    **config: Any,
) -> list[str]:
    """The fingerprints after each step, and the norms to which gradients were clipped, on this rank.

    With `root` the run goes on from its newest checkpoint, and is saved in the end.
    """
    model: nn.Module = Model().to(dtype)
    if wide_gradients:
        for param in model.parameters():
            param.grad_dtype = torch.float32
    optimizer = ShardedDecoupledAdamW(
        model.named_parameters(),
        lr=1e-2,
        process_group=grid("replicate", "shard") if mesh else group,
        config=ShardingConfig(micro_batches=micro_batches, **config),
        max_grad_norm=0.5 if clip == "in step" else None,
    )
    if attach:
        optimizer.attach(model)
    resumed = None if root is None else load_checkpoint(root, model=model, optimizer=optimizer)
    found = []
    for step in range(resumed.step if resumed else 0, num_steps):
        for number in optimizer.micro_batches:
            loss_of(model, step, number).backward()
        norm = optimizer.clip_grad_norm_(0.5) if clip == "before it" else None
        optimizer.step()
        norm = optimizer.metrics()["grad_norm"] if clip == "in step" else norm
        optimizer.zero_grad()
        found.append(f"{optimizer.fingerprint()} {'' if norm is None else float(norm).hex()}")
    if root is not None:
        save_checkpoint(root, step=num_steps, model=model, optimizer=optimizer)
    return found


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, sharded gradients": {"gradient_residency": SHARDED, "bucket_cap_mb": 0.0005},
    "fp32, in step": {
        "overlap": False,
        "state_residency": StateResidency.HOST,
        "clip": "before it",
        "bucket_cap_mb": 0.001,
    },
    "fp32, attached": {"attach": True, "bucket_cap_mb": 0.0005, "clip": "no"},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, remainders": {
        "dtype": torch.bfloat16,
        "main_parameter": MainParameter.REMAINDER,
        "moments": Moments.BF16,
        "wide_gradients": True,
    },
    "bf16, alone": {
        "dtype": torch.bfloat16,
        "main_parameter": MainParameter.NONE,
        "moments": Moments.LIKE_PARAMETERS,
        "gradient_residency": SHARDED,
        "overlap": False,
    },
}


CASES = [(4, settings) for settings in SETTINGS] + [
    (micro_batches, settings)
    for micro_batches in (6, 12, 16)
    for settings in ("fp32, sharded gradients", "fp32, attached", "bf16, remainders")
]


@pytest.mark.parametrize(("micro_batches", "settings"), CASES)
def test_a_step_has_the_same_bits_on_any_number_of_ranks(micro_batches: int, settings: str) -> None:
    run = partial(trained, **SETTINGS[settings])
    (expected,) = on_ranks(1, run, micro_batches)
    assert len(set(expected)) == 3
    for num_ranks in [n for n in fitting(micro_batches) if 1 < n <= 8]:
        for found in on_ranks(num_ranks, run, micro_batches, seed=num_ranks):
            assert found == expected, num_ranks
    if micro_batches in (4, 16) and settings != "fp32, attached":
        for found in on_ranks(4, partial(run, mesh=True), micro_batches):
            assert found == expected, "2-D mesh"


@pytest.mark.parametrize("exchange", list(Exchange)[:2])
def test_ranks_that_are_processes_have_the_same_bits(exchange: Exchange) -> None:
    run = partial(trained, bucket_cap_mb=0.001, exchange=exchange)
    for micro_batches in (4, 12):
        (expected,) = pool.on_ranks(1, run, micro_batches)
        for num_ranks in [n for n in fitting(micro_batches) if 1 < n <= 4]:
            for found in pool.on_ranks(num_ranks, run, micro_batches):
                assert found == expected, num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_step_is_the_mean_over_micro_batches(num_ranks: int) -> None:
    """As two steps of DecoupledAdamW with the mean of four gradients, added in pairs."""
    model = Model()
    optimizer = DecoupledAdamW(model.named_parameters(), lr=1e-2)
    for step in range(2):
        gradients = []
        for number in range(4):
            model.zero_grad()
            loss_of(model, step, number).backward()
            gradients.append([param.grad for param in model.parameters()])
        for param, (a, b, c, d) in zip(model.parameters(), zip(*gradients, strict=True), strict=True):
            param.grad = None if a is None else ((a + b) + (c + d)) / 4
        optimizer.step()
    for found in on_ranks(num_ranks, partial(trained, clip="no"), 4, 2):
        assert found[-1].strip() == str(optimizer.fingerprint())


# --- the norm --------------------------------------------------------------------------------------------------------


def norm_of(group: Any, cuts: list[list[Tensor]]) -> float:
    ranks = connect(group, torch.device("cpu"), exchange=None)
    return float(exact_norm(cuts[group.rank()], collectives=ranks, device=torch.device("cpu")))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30, 0.0, 1e-42])
def test_a_norm_has_the_same_bits_however_it_is_cut(scale: float) -> None:
    whole = torch.randn(70_001, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 1, 70_001) * scale
    expected = math.sqrt(math.fsum(float(value) ** 2 for value in whole.double()))
    found = {
        norm
        for num_ranks, order in ((1, 1), (2, 7), (3, 1000))
        for norm in on_ranks(num_ranks, norm_of, deal(whole, num_ranks, order))
    }
    with mock.patch.object(exact_squares, "compiled_kernel", lambda _: None):
        found.update(on_ranks(2, norm_of, deal(whole, 2, 7)))
    assert len(found) == 1
    assert found.pop() == pytest.approx(expected, rel=2**-23, abs=1e-45)


def test_the_norm_that_clips_a_step_is_the_exact_one() -> None:
    with mock.patch.object(held, "global_norm", None):  # whose last bit an order of addition seldom changes
        assert trained(None, 2, 1) and trained(None, 2, 1, clip="before it")


def deal(whole: Tensor, num_ranks: int, size: int) -> list[list[Tensor]]:
    """Pieces of a tensor, in any order, for each of some ranks."""
    pieces = torch.split(whole, max(size, len(whole) // 50))[::-1]
    return [list(pieces[rank::num_ranks]) for rank in range(num_ranks)]


@pytest.mark.parametrize(("odd", "expected"), [(math.inf, math.inf), (math.nan, math.nan), (-math.inf, math.inf)])
def test_a_norm_of_what_is_not_finite_is_not_either(odd: float, expected: float) -> None:
    cuts = [[torch.ones(5)], [torch.tensor([1.0, odd])]]
    assert str([expected] * 2) == str(on_ranks(2, norm_of, cuts))


# --- resumed elsewhere -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_with_other_numbers_of_ranks_ends_as_one_that_nothing_happened_to(tmp_path: Path) -> None:
    run = partial(trained, dtype=torch.bfloat16, main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)
    (expected,) = on_ranks(1, partial(run, root=tmp_path / "undisturbed"), 12, 6)
    for num_ranks, last in ((3, 1), (6, 3), (1, 4), (6, 6)):
        for found in on_ranks(num_ranks, partial(run, root=tmp_path / "elsewhere"), 12, last):
            assert found == expected[last - len(found) : last]
    assert difference(tmp_path / "undisturbed", tmp_path / "elsewhere") is None


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(group: Any, what: str) -> str:
    model = Model()
    try:
        if what == "DTensors":
            fully_shard(model.up)
        number = {"ranks": 4}.get(what, 2 * group.size())
        config = ShardingConfig(micro_batches=number)
        optimizer = ShardedDecoupledAdamW(model.named_parameters(), process_group=group, config=config)
        passes = {"too few": 1, "too many": 3}.get(what, 2)
        for number in range(passes):
            loss_of(model, 0, number).backward()
        if what == "by hand":
            model.unused.grad = torch.ones(3)
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


ERRORS = {
    "ranks": "micro_batches: expected 4 to be shared out among 1, 2, 4 ranks, which leaves each",
    "DTensors": "expected a plain parameter with micro_batches, got a DTensor",
    "too few": "expected it from 2 backward passes, this rank's share of",
    "too many": "once more than the 2 times that are this rank's share of",
    "by hand": "gradient of unused: expected it from 2 backward passes, this rank's share of "
    "ShardingConfig(micro_batches=...), or from none, got it from 0 and one that was assigned",
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_would_change_the_bits_is_refused_on_every_rank(what: str) -> None:
    for said in on_ranks(3, refused, what):
        assert ERRORS[what] in said


def refused_gradients(group: Any, residency: GradientResidency) -> list[str]:
    """What a constructor and ``add_param_group`` say of parameters with gradients, and a step of one just unfrozen."""
    model, said = Model(), []
    late = {"params": [("unused", model.unused)]}
    if group.rank() == 1:
        model.unused.grad = torch.ones(3)
    model.down.bias.requires_grad_(False)
    config = ShardingConfig(micro_batches=4, gradient_residency=residency)
    for params in ([late], [*model.up.named_parameters(), ("bias", model.down.bias)]):
        try:
            optimizer = ShardedDecoupledAdamW(params, lr=1e-2, process_group=group, config=config)
        except ValueError as error:
            said.append(str(error))
    with pytest.raises(ValueError, match=r"in p\.grad"):
        optimizer.add_param_group(late)
    model.unused.grad = None
    optimizer.add_param_group(late)
    model.down.bias.requires_grad_(True)
    for _ in range(2):
        for number in optimizer.micro_batches:
            loss_of(model, 0, number).backward()
        try:
            optimizer.step()
        except RuntimeError as error:
            said.append(str(error))
            optimizer.zero_grad()
    return [*said, str(optimizer.fingerprint())]


@pytest.mark.parametrize("residency", list(GradientResidency))
def test_gradients_that_no_micro_batch_has_brought_are_refused(residency: GradientResidency) -> None:
    found = on_ranks(2, refused_gradients, residency)
    for of_constructor, of_step, fingerprint in found:
        assert "unused: expected a parameter without a gradient with micro_batches" in of_constructor
        assert "added up before it was unfrozen here; call optimizer.zero_grad(), and run all passes" in of_step
        assert fingerprint == found[0][-1]


@ranks(2)
def test_a_model_whose_gradients_ddp_averages_is_warned_of(group: Any) -> None:
    model = Model()
    del model.unused
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=group)
    config = ShardingConfig(micro_batches=4)
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2, process_group=group, config=config)
    for number in optimizer.micro_batches:
        wrapped(torch.ones(ROWS, 16) * number).square().mean().backward()
    with pytest.warns(UserWarning, match="DistributedDataParallel, call the model itself, for micro_batches are added"):
        optimizer.step()


@ranks(6)
def test_rows_of_a_mesh_whose_sums_are_no_nodes_of_the_tree_are_refused(_: Any) -> None:
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match=r"expected rows of a 2-D mesh to have 1, 2, 4, 8 \.\.\. ranks, got 3"):
        ShardedDecoupledAdamW(Model().parameters(), process_group=mesh, config=ShardingConfig(micro_batches=6))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"micro_batches": 0}, ValueError),
        ({"micro_batches": True}, TypeError),
        ({"micro_batches": 4, "reduce_gradients": False}, ValueError),
        ({"micro_batches": 4, "wire_dtype": torch.bfloat16}, ValueError),
        ({"micro_batches": 4, "exchange": Exchange.BACKEND}, ValueError),
    ],
)
def test_a_config_that_would_depend_on_the_ranks_is_refused(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="micro_batches: expected"):
        ShardingConfig(**settings)
