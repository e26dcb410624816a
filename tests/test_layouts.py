"""The same numbers in every layout: every norm of every parameter, the clipping, and where training leads.

Five steps, with clipping and with learning rates that change between them, beside the control in `tests/layouts.py`.
Each layout trains once, and every test here looks at what came of it.
"""

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from sharded_dadamw import DecoupledAdamW, ShardedDecoupledAdamW
from tests import pool
from tests.harness import ranks, same_gradients
from tests.layouts import (
    BETAS,
    EPS,
    F32,
    LAYOUTS,
    LR_FACTORS,
    MAX_NORM,
    NUM_STEPS,
    Hyper,
    Model,
    Record,
    assert_close,
    control_of_the_model,
    fsdp2_over,
    grid,
    in_flat_parameters,
    loss_of,
    of_parameters,
)
from tests.simulated import on_ranks

# --- training in a layout ---


def stripped(name: str) -> str:
    """A parameter's name without what wrappers put in front."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")


def stripped_keys(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics as numbers, under names as the control has them."""
    plain = {}
    for key, value in metrics.items():
        assert type(value) in (Tensor, float), f"{key} is a {type(value).__name__}"
        assert not (isinstance(value, Tensor) and (value.dim() or value.requires_grad)), f"{key}: not 0-d, or a graph"
        kind, _, name = key.rpartition("/")
        plain[f"{kind}/{stripped(name)}".lstrip("/")] = float(value)
    return plain


def as_composer_calls_it(model: nn.Module, optimizer: DecoupledAdamW, record: Record) -> None:
    """What its OptimizerMonitor does at the end of a batch."""
    collected: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if p.grad is not None and p.requires_grad:
            collected.update(optimizer.report_per_parameter_metrics(p, name, collected))
    record.reported.append(stripped_keys(collected))
    record.reduced.append(stripped_keys(optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(collected))))


def whole_parameters(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with warnings.catch_warnings(), FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {stripped(name): p.detach().clone() for name, p in model.named_parameters()}
    return {
        stripped(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def train(group: Any, layout: str, amsgrad: bool, same_batch: bool) -> Record:
    hyper: Hyper = dict(betas=BETAS, eps=EPS, amsgrad=amsgrad)
    model, optimizer, part, num_parts, after_backward = LAYOUTS[layout].place(group, hyper)
    if same_batch:
        part, num_parts = 0, 1
    scheduler = LambdaLR(optimizer, [lambda step, f=factors: (f + f[-1:])[step] for factors in LR_FACTORS])
    record = Record()
    for step in range(NUM_STEPS):
        loss_of(model, step, part, num_parts).backward()
        after_backward()
        norm = optimizer.clip_grad_norm_(MAX_NORM)
        assert type(norm) is Tensor and norm.shape == () and norm.dtype == F32
        record.norms.append(float(norm))
        optimizer.step()
        scheduler.step()  # monitors read after it, and the step was another's
        if step % 2:
            as_composer_calls_it(model, optimizer, record)
        metrics = optimizer.metrics()
        assert all(value.dtype == F32 for value in metrics.values())
        record.metrics.append(stripped_keys(metrics))
        if not step % 2:
            as_composer_calls_it(model, optimizer, record)
        optimizer.zero_grad()
    record.params = whole_parameters(model)
    return record


@cache
def records(layout: str, amsgrad: bool, same_batch: bool = False) -> list[Record]:
    """Of every rank."""
    # Of parameters that FSDP2 and TP cut unevenly, torch gathers unequal slices, which simulated ranks refuse.
    run = pool.on_ranks if "FSDP2 x TP" in layout else on_ranks
    return run(LAYOUTS[layout].num_ranks, train, layout, amsgrad, same_batch)


@pytest.mark.parametrize("layout", ["DDP", "FSDP1", "HSDP 2x2, sharded", "TP x data-parallel 2x2, sharded"])
def test_processes_do_as_simulated_ranks(layout: str) -> None:
    of_processes = pool.on_ranks(LAYOUTS[layout].num_ranks, train, layout, False, False)
    for simulated, record in zip(records(layout, False), of_processes, strict=True):
        for name, param in record.params.items():
            assert torch.equal(simulated.params[name], param), name
        assert_close(simulated.metrics[-1], record.metrics[-1], layout)


def in_layout(metrics: list[dict[str, float]], layout: str) -> list[dict[str, float]]:
    """What is known of whole parameters, under the names that they have there."""
    return [in_flat_parameters(of_step) for of_step in metrics] if LAYOUTS[layout].flat else metrics


def test_the_control_clips_some_steps_and_not_others_and_amsgrad_changes_it() -> None:
    clipped = [norm > MAX_NORM for norm in control_of_the_model(False).norms]
    assert clipped[0] and clipped[-1] and not all(clipped)
    plain, amsgrad = (
        control_of_the_model(choice).metrics[-1]["l2_norm/update/block.up.weight"] for choice in (False, True)
    )
    assert abs(plain / amsgrad - 1) > 1e-3


# A layout knows nothing of amsgrad: most run with it only, which has one tensor of state more.
@pytest.mark.parametrize(
    ("layout", "amsgrad"),
    [*((layout, True) for layout in LAYOUTS), ("single process", False), ("FSDP1 flat", False), ("FSDP2 on 3", False)],
)
def test_norms_metrics_and_parameters_are_those_of_the_whole_model(layout: str, amsgrad: bool) -> None:
    """In every step and on every rank: beside the control, and beside a single process."""
    control, (single,), (first, *others) = (
        control_of_the_model(amsgrad),
        records("single process", amsgrad),
        records(layout, amsgrad),
    )
    expected, of_single = in_layout(control.metrics, layout), in_layout(single.metrics, layout)
    for step in range(NUM_STEPS):
        assert_close(first.metrics[step], expected[step], f"step {step}")
        assert_close(first.metrics[step], of_single[step], f"step {step}, beside a single process")
        # Composer's protocol yields every norm of every parameter; sorted, since what wrappers put in front has gone.
        found, by_parameter = dict(sorted(first.reduced[step].items())), of_parameters(expected[step])
        assert_close(found, dict(sorted(by_parameter.items())), f"step {step}, reduced")
        # Metrics describe the gradient after clipping.
        clipped = pytest.approx(min(first.norms[step], MAX_NORM), rel=2e-6, abs=0)
        assert first.metrics[step]["l2_norm/grad/global"] == clipped
    assert first.norms == pytest.approx(control.norms, rel=1e-6, abs=0)
    # 1e-6 of the largest step and of the value: an element whose gradients nearly cancel keeps their roundings.
    assert sorted(first.params) == sorted(control.params)
    for name, param in first.params.items():
        for other in (control.params[name], single.params[name]):
            torch.testing.assert_close(
                param.double(), other.double(), rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )
    for other in others:
        for ours, theirs in ((other.metrics, first.metrics), (other.reduced, first.reduced)):
            assert [list(step.items()) for step in ours] == [list(step.items()) for step in theirs]
        assert other.norms == first.norms
        assert all(torch.equal(other.params[name], param) for name, param in first.params.items())
    if layout in ("single process", "DDP") or "sharded" in layout:
        # What a rank reports needs no reduction: under DDP Composer logs what it is told.
        for reported, metrics in zip(first.reported, first.metrics, strict=True):
            assert reported.items() <= metrics.items() and reported.keys() == of_parameters(metrics).keys()


@same_gradients
@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.exact])
def test_bit_for_bit_where_every_rank_sees_the_same_batch(layout: str) -> None:
    """The mean of two equal numbers is exact, and so is the mean of two such means; clipping is by one fp64 sum."""
    (single,) = records("single process", amsgrad=True, same_batch=True)
    for record in records(layout, amsgrad=True, same_batch=True):
        assert record.norms == single.norms
        for name, param in record.params.items():
            assert torch.equal(param, single.params[name]), f"{name} differs"


# --- HSDP ---


def eventful_training(cls: type[DecoupledAdamW], group: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Accumulated, zeroed in place, edited between steps, with a parameter that joins late and one that rests."""
    model = fsdp2_over(grid("replicate", "shard"), Model())
    late, *first = model.named_parameters()
    optimizer = cls(first, lr=1e-2, weight_decay=2e-4, amsgrad=True)
    params = dict(model.named_parameters())
    seen = []
    for step in range(NUM_STEPS):
        for micro in (0, 1):
            loss_of(model, (step + micro) % NUM_STEPS, group.rank(), group.size()).backward()
        if step == 2:
            params["readout.bias"].grad = None
        optimizer.clip_grad_norm_(MAX_NORM)
        optimizer.step()
        seen.append(stripped_keys(optimizer.metrics()))
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        if step == 1:
            optimizer.add_param_group({"params": [late], "lr": 0.1})
            model.zero_grad()
        with torch.no_grad():
            params["block.up.weight"].mul_(0.9)
    return seen, whole_parameters(model)


@ranks(4)
def test_state_spread_over_the_replicas_follows_whatever_happens_between_steps(group: Any) -> list[Any]:
    (ours, our_params), (theirs, their_params) = (
        eventful_training(cls, group) for cls in (ShardedDecoupledAdamW, DecoupledAdamW)
    )
    for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(found, expected, f"step {step}")
    for name, param in our_params.items():
        assert torch.equal(param, their_params[name]), f"{name} differs"
    return [list(found.items()) for found in ours]


# --- what is sharded already ---


@pytest.mark.parametrize("layout", ["FSDP1", "FSDP1 flat", "FSDP2"])
@pytest.mark.parametrize(("with_group", "num_ranks"), [(True, 2), (False, 4)])  # without a group it is everybody
@ranks()
def test_what_is_sharded_already_is_refused_in_favour_of_the_optimizer_that_takes_it(
    group: Any, layout: str, with_group: bool
) -> None:
    model = LAYOUTS[layout].place(group, {}).model
    with pytest.raises((TypeError, ValueError), match="use DecoupledAdamW"):
        ShardedDecoupledAdamW(model.named_parameters(), process_group=group if with_group else None)
