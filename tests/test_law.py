"""DecoupledAdamW against the law, written here a second time, naively and in fp64, and the drop-in facts around it.

The law, with t counted from 1:

    decay   = weight_decay * lr / initial_lr        (weight_decay when initial_lr is 0)
    param  *= 1 - decay
    m, v    = moving averages of g, g*g;  vmax = max(vmax, v)
    param  -= lr / (1 - beta1^t) * m / (sqrt(v or vmax) / sqrt(1 - beta2^t) + eps)

Tolerances. fp64 parameters: both sides round at 1.1e-16 some ten times per step, so 1e-13 relative over 25 steps, and
anything wrong in the law (a missing correction, an eps inside the root, a decay off by lr) is many orders larger. fp32
parameters: one rounding of the parameter per step, 6e-8 relative, and a few of its update, which is 1e-3 to 1e-2 of it.
"""

import copy
import inspect
import logging
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR

from sharded_dadamw import DecoupledAdamW
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.hyperparameters import Hyperparameters

TOLERANCE = {
    torch.float64: dict(rtol=1e-13, atol=1e-14),
    torch.float32: dict(rtol=5e-6, atol=5e-7),
}


class NaiveLaw:
    """The law for one parameter: Python floats and fp64 tensors, nothing fused, nothing in place."""

    def __init__(self, param: torch.Tensor, reference_lr: float) -> None:
        self.param = param.detach().double().clone()
        self.m = torch.zeros_like(self.param)
        self.v = torch.zeros_like(self.param)
        self.vmax = torch.zeros_like(self.param)
        self.t = 0
        self.reference_lr = reference_lr

    def step(self, grad: torch.Tensor | None, group: dict[str, Any]) -> None:
        if grad is None:
            return
        self.t += 1
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay = group["weight_decay"] * (lr / self.reference_lr if self.reference_lr else 1.0)
        g = grad.double()
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        self.vmax = torch.maximum(self.vmax, self.v)
        second = self.vmax if group["amsgrad"] else self.v
        denom = second.sqrt() / math.sqrt(1 - beta2**self.t) + group["eps"]
        self.param = self.param * (1 - decay) - lr / (1 - beta1**self.t) * self.m / denom


def make_params(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = ((5, 7), (64,), (), (3, 1, 11))) -> list[Any]:
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradient(param: torch.Tensor, step: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(param.shape, dtype=torch.float64, generator=generator).to(param.dtype)


def train_beside_the_law(
    optimizer: DecoupledAdamW, scheduler: LRScheduler | None, reference_lrs: list[float], num_steps: int = 25
) -> None:
    """Steps both and compares parameters, moments and step count after every step."""
    __tracebackhide__ = True
    pairs = [
        (param, group, NaiveLaw(param, reference_lr))
        for group, reference_lr in zip(optimizer.param_groups, reference_lrs, strict=True)
        for param in group["params"]
    ]
    for step in range(num_steps):
        for index, (param, group, law) in enumerate(pairs):
            param.grad = gradient(param, step, index)
            law.step(param.grad, group)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for param, group, law in pairs:
            tolerance = TOLERANCE[param.dtype]
            state = optimizer.state[param]
            torch.testing.assert_close(param.detach().double(), law.param, **tolerance)
            torch.testing.assert_close(state["exp_avg"].double(), law.m, **tolerance)
            torch.testing.assert_close(state["exp_avg_sq"].double(), law.v, **tolerance)
            if group["amsgrad"]:
                torch.testing.assert_close(state["max_exp_avg_sq"].double(), law.vmax, **tolerance)
            assert state["step"].item() == law.t == step + 1


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler] | None] = {
    "constant": None,
    "LinearLR": lambda o: LinearLR(o, start_factor=0.1, total_iters=8),
    "LinearLR to zero": lambda o: LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=20),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=25),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)),
}


@pytest.mark.parametrize(
    ("schedule", "amsgrad", "dtype"),
    [
        ("constant", False, torch.float64),
        ("constant", True, torch.float32),
        ("LinearLR", True, torch.float64),
        ("LinearLR to zero", False, torch.float32),
        ("CosineAnnealingLR", True, torch.float64),
        ("LambdaLR", False, torch.float32),
    ],
)
def test_training_follows_the_law_under_a_schedule(schedule: str, amsgrad: bool, dtype: torch.dtype) -> None:
    optimizer = DecoupledAdamW(make_params(dtype), lr=3e-3, weight_decay=1e-2, amsgrad=amsgrad)
    make = SCHEDULES[schedule]
    train_beside_the_law(optimizer, None if make is None else make(optimizer), reference_lrs=[3e-3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_every_group_follows_the_law_with_its_own_hyperparameters(dtype: torch.dtype) -> None:
    a, b, c, d = make_params(dtype)
    optimizer = DecoupledAdamW(
        [
            {"params": [a], "lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 1e-3},
            {"params": [b], "eps": 1e-4, "weight_decay": 0.0},
            {"params": [c, d], "amsgrad": True, "betas": [0.9, 0.99]},
        ],
        lr=2e-3,
        weight_decay=1e-4,
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=25)
    train_beside_the_law(optimizer, scheduler, reference_lrs=[1e-2, 2e-3, 2e-3])


def test_one_cycle_follows_the_law_with_its_betas_cycling_and_max_lr_as_the_reference() -> None:
    optimizer = DecoupledAdamW(make_params(torch.float64), lr=1e-2, weight_decay=1e-2)
    scheduler = OneCycleLR(optimizer, max_lr=1e-2, total_steps=26)
    betas_seen = set()

    def spy(*_: Any) -> None:
        betas_seen.add(optimizer.param_groups[0]["betas"][0])

    optimizer.register_step_pre_hook(spy)
    train_beside_the_law(optimizer, scheduler, reference_lrs=[1e-2])
    assert len(betas_seen) > 10, "OneCycleLR did not cycle the betas, so this proves nothing about them"


def test_lr_zero_still_moves_the_moments_and_nothing_else() -> None:
    params = make_params(torch.float64)
    before = copy.deepcopy(params)
    optimizer = DecoupledAdamW(params, lr=1e-3, weight_decay=1e-2)
    optimizer.param_groups[0]["lr"] = 0.0
    train_beside_the_law(optimizer, None, reference_lrs=[1e-3], num_steps=3)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_with_initial_lr_zero_the_whole_decay_applies_at_every_lr(lr: float) -> None:
    params = make_params(torch.float64)
    before = copy.deepcopy(params)
    optimizer = DecoupledAdamW(params, lr=0.0, weight_decay=0.25)
    optimizer.param_groups[0]["lr"] = lr
    train_beside_the_law(optimizer, None, reference_lrs=[0.0], num_steps=2)
    if lr == 0.0:
        assert all(torch.equal(p, q * 0.75 * 0.75) for p, q in zip(params, before, strict=True))


def test_a_closure_is_run_with_gradients_enabled_and_its_loss_returned() -> None:
    params = make_params(torch.float64)
    optimizer = DecoupledAdamW(params, lr=1e-2)
    laws = [NaiveLaw(p, 1e-2) for p in params]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in params), torch.zeros((), dtype=torch.float64))
        loss.backward()
        return loss

    for _ in range(4):
        expected_loss = sum(law.param.square().sum() for law in laws)
        for law in laws:
            law.step(2 * law.param, optimizer.param_groups[0])
        loss = optimizer.step(closure=closure)
        assert isinstance(loss, torch.Tensor)
        assert loss.item() == pytest.approx(float(expected_loss), rel=1e-12)
    for p, law in zip(params, laws, strict=True):
        torch.testing.assert_close(p.detach(), law.param, **TOLERANCE[torch.float64])


# --- the decay really applied: zero gradients keep the moments at zero, so a step multiplies a weight by 1 - decay ---


def measure_decays(
    optimizer: DecoupledAdamW, scheduler: LRScheduler, num_steps: int
) -> tuple[list[float], list[float]]:
    (param,) = optimizer.param_groups[0]["params"]
    decays, lrs = [], []
    for _ in range(num_steps):
        with torch.no_grad():
            param.fill_(1.0)
        param.grad = torch.zeros_like(param)
        lrs.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
        decays.append(1.0 - param.item())
    return decays, lrs


@pytest.mark.parametrize(("constructor_lr", "div_factor"), [(2e-2, 25.0), (1e-3, 4.0), (5e-2, 25.0)])
def test_under_one_cycle_the_decay_never_exceeds_weight_decay(constructor_lr: float, div_factor: float) -> None:
    weight_decay = 1e-2
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = DecoupledAdamW([param], lr=constructor_lr, weight_decay=weight_decay)
    scheduler = OneCycleLR(optimizer, max_lr=2e-2, total_steps=40, div_factor=div_factor)  # its peak falls on step 11
    decays, lrs = measure_decays(optimizer, scheduler, 39)
    assert max(decays) == pytest.approx(weight_decay, rel=1e-9), "the peak of the cycle is the peak of the decay"
    assert max(lrs) == pytest.approx(2e-2)
    assert decays == pytest.approx([weight_decay * lr / 2e-2 for lr in lrs], rel=1e-9)


@pytest.mark.parametrize("lr", [1e-4, 1.0, torch.tensor(1e-2, dtype=torch.float64)])
def test_the_decay_follows_the_schedule_and_not_the_lr(lr: float | torch.Tensor) -> None:
    param = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = DecoupledAdamW([param], lr=lr, weight_decay=1e-2)
    assert type(optimizer.param_groups[0]["initial_lr"]) is float
    decays, _ = measure_decays(optimizer, LinearLR(optimizer, start_factor=0.5, total_iters=4), 6)
    assert decays == pytest.approx([0.5e-2, 0.625e-2, 0.75e-2, 0.875e-2, 1e-2, 1e-2], rel=1e-9)


def test_a_tensor_lr_trains_like_the_same_number() -> None:
    results = []
    for lr in (torch.tensor(0.0078125), 0.0078125):
        params = make_params(torch.float32)
        run(params, DecoupledAdamW(params, lr=lr, weight_decay=1e-4), range(5))
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


# --- a drop-in for composer.optim.DecoupledAdamW ---


def test_the_signature_and_defaults_are_composers() -> None:
    parameters = inspect.signature(DecoupledAdamW.__init__).parameters
    expected = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-5, "amsgrad": False}
    assert list(parameters)[:7] == ["self", "params", *expected]
    assert {name: parameters[name].default for name in expected} == expected
    positional = DecoupledAdamW(make_params(torch.float32), 2e-3, (0.8, 0.9), 1e-6, 1e-4, True)
    group = positional.param_groups[0]
    got = {name: group[name] for name in (*expected, "initial_lr")}
    assert got == dict(lr=2e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=1e-4, amsgrad=True, initial_lr=2e-3)
    assert issubclass(DecoupledAdamW, AdamW) and DecoupledAdamW.__qualname__ == "DecoupledAdamW"
    assert set(group) - set(AdamW(make_params(torch.float32)).param_groups[0]) == {"initial_lr"}
    assert set(AdamW(make_params(torch.float32)).param_groups[0]) <= set(group)


@pytest.mark.parametrize(("weight_decay", "warns"), [(1e-3, True), (0.1, True), (9.9e-4, False), (0.0, False)])
def test_a_weight_decay_that_belongs_to_coupled_adamw_is_warned_about(
    weight_decay: float, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        DecoupledAdamW(make_params(torch.float32), weight_decay=weight_decay)
    messages = [r.getMessage() for r in caplog.records if r.name.split(".")[0] == "sharded_dadamw"]
    assert bool(messages) == warns
    if warns:
        assert str(weight_decay) in messages[0]


def test_every_group_has_its_initial_lr_also_one_added_later() -> None:
    a, b, c, _ = make_params(torch.float32)
    optimizer = DecoupledAdamW([{"params": [a], "lr": 5e-3}, {"params": [b]}], lr=2e-3)
    optimizer.param_groups[0]["lr"] = 1e-9
    optimizer.add_param_group({"params": [c], "lr": 7e-3})
    assert [group["initial_lr"] for group in optimizer.param_groups] == [5e-3, 2e-3, 7e-3]


def test_state_is_there_from_construction_on_under_torchs_keys() -> None:
    params = make_params(torch.float32)
    optimizer = DecoupledAdamW([{"params": params[:2]}, {"params": params[2:], "amsgrad": True}])
    for index, p in enumerate(params):
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if index > 1 else set())
        assert not any(value.count_nonzero() for value in state.values())
        assert state["step"].shape == () and state["step"].dtype == torch.float32
        assert all(value.shape == p.shape and value.dtype == p.dtype for key, value in state.items() if key != "step")


def test_the_static_method_is_one_update_of_the_law() -> None:
    params = [p.detach() for p in make_params(torch.float64)]
    laws = [NaiveLaw(p, 4e-3) for p in params]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    steps = [torch.tensor(0.0) for _ in params]
    group = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2, amsgrad=True)
    for t in range(1, 4):
        grads = [gradient(p, t, i) for i, p in enumerate(params)]
        for step in steps:
            step += 1
        DecoupledAdamW.adamw(
            *(params, grads, *zeros, steps),
            amsgrad=True,
            beta1=0.9,
            beta2=0.95,
            lr=1e-3,
            initial_lr=4e-3,
            weight_decay=1e-2,
            eps=1e-8,
        )
        for law, grad in zip(laws, grads, strict=True):
            law.step(grad, group)
        assert [step.item() for step in steps] == [float(t)] * len(steps), "the caller counts the steps"
    for p, law in zip(params, laws, strict=True):
        torch.testing.assert_close(p, law.param, **TOLERANCE[torch.float64])


# --- what torch.optim users do ---


def run(params: list[Any], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        optimizer.step()


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("copier", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_a_copy_continues_exactly_like_the_original(copier: Callable[[Any], Any]) -> None:
    params = make_params(torch.float32)
    optimizer = DecoupledAdamW(params, lr=3e-3, weight_decay=1e-4, amsgrad=True)
    optimizer.param_groups[0]["lr"] = 1e-3
    run(params, optimizer, range(4))
    copied_params, copied = copier((params, optimizer))
    run(params, optimizer, range(4, 8))
    assert not any(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True)), "the copy moved along"
    run(copied_params, copied, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))
    assert type(copied) is DecoupledAdamW
    assert copied.param_groups[0]["initial_lr"] == 3e-3


def test_a_parameter_without_gradient_is_untouched_and_so_is_its_state() -> None:
    a, b, c, d = make_params(torch.float32)
    before = copy.deepcopy([a, b, c, d])
    optimizer = DecoupledAdamW([a, b, c, d], lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        a.grad, c.grad = torch.ones_like(a), torch.ones_like(c)
        optimizer.step()
    assert torch.equal(b, before[1]) and torch.equal(d, before[3])
    assert not torch.equal(a, before[0]) and not torch.equal(c, before[2])
    assert not any(value.count_nonzero() for p in (b, d) for value in optimizer.state[p].values())
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert optimizer.state[b]["step"].item() == 1 and optimizer.state[a]["step"].item() == 4


def change(params: list[Any], optimizer: DecoupledAdamW, what: str) -> None:
    """Change what a step may have made ready for the next one."""
    first = params[0]
    state = optimizer.state[first]
    if what == "gradients are missing":
        first.grad = params[2].grad = None
    elif what == "gradients in another memory format":
        first.grad = first.grad.t().contiguous().t()
    elif what == "a parameter's memory is swapped":
        first.data = first.data.clone()
    elif what == "a parameter's memory is set":
        first.data.set_(first.data.clone())
    elif what == "a parameter in another memory format":
        first.data = first.data.t().contiguous().t()
    elif what == "state is replaced":
        state.update({key: value.clone() for key, value in state.items()})
    elif what == "state is moved":
        state["exp_avg"].data = state["exp_avg"].data.clone()
    elif what == "state is loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == "a group is added":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    elif what == "another switch":
        optimizer.param_groups[0]["amsgrad"] = True
    elif what == "frozen":
        first.requires_grad_(False)
    elif what == "shared memory":
        for value in (first, *state.values()):
            value.data.share_memory_()


CHANGES = (
    *("nothing", "gradients are missing", "gradients in another memory format", "a parameter's memory is swapped"),
    *("a parameter's memory is set", "a parameter in another memory format", "state is replaced", "state is moved"),
    *("state is loaded", "a group is added", "another switch", "frozen", "shared memory"),
)


@pytest.mark.parametrize(
    ("what", "dtype"),
    [*((what, torch.float32) for what in CHANGES), *((what, torch.float64) for what in CHANGES if "state" in what)],
)
def test_whatever_changes_between_steps_training_is_that_of_an_optimizer_that_knows_nothing_of_earlier_ones(
    what: str, dtype: torch.dtype
) -> None:
    """The other one is copied before each step, and has made nothing ready."""
    params = make_params(dtype)
    optimizer = DecoupledAdamW(params, lr=1e-2, weight_decay=5e-4)
    for step in range(6):
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        if step in (2, 4):
            change(params, optimizer, what)
        others, other = copy.deepcopy((params, optimizer))
        for p, q in zip(params, others, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        other.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(value, other.state[q][key]) for key, value in optimizer.state[p].items())
        params[0].requires_grad_()


@pytest.mark.parametrize("what", ["another dtype", "another shape", "memory after a meta device", "another parameter"])
def test_state_follows_parameters_that_change_before_the_first_step(what: str) -> None:
    draw = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    param: Any = torch.nn.Parameter(draw.to("meta") if "meta" in what else draw.clone())
    optimizer = DecoupledAdamW([param], lr=1e-2)
    if what == "another dtype":
        param.data = draw.to(torch.bfloat16)
    elif what == "another shape":  # as FSDP1 does with original parameters
        param.data = draw.flatten()[:13].clone()
    elif "meta" in what:
        param = torch.nn.Parameter(draw.clone())
        torch.utils.swap_tensors(param, optimizer.param_groups[0]["params"][0])
        param = optimizer.param_groups[0]["params"][0]
    else:
        param = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(draw.clone())
    twin = torch.nn.Parameter(param.detach().clone())
    other = DecoupledAdamW([twin], lr=1e-2)
    for step in range(2):
        saved, expected = optimizer.state_dict()["state"][0], other.state_dict()["state"][0]
        assert all(
            torch.equal(saved[key], value) and saved[key].dtype == value.dtype for key, value in expected.items()
        )
        param.grad, twin.grad = gradient(param, step, 0), gradient(param, step, 0)
        optimizer.step()
        other.step()
        assert torch.equal(param, twin)
    assert list(optimizer.state) == [param]


def test_what_a_step_makes_ready_keeps_no_gradient_and_no_parameter_that_is_gone() -> None:
    params = make_params(torch.float32)
    optimizer = DecoupledAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    references = [weakref.ref(p.grad) for p in params]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(reference() is not None for reference in references)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    dense = torch.nn.Parameter(torch.ones(3))
    before = table.weight.detach().clone()
    optimizer = DecoupledAdamW([dense, table.weight])
    (table(torch.tensor([1, 2])) * dense).sum().backward()
    with pytest.raises(RuntimeError, match=r"gradient of param_groups\[0\]\['params'\]\[1\]: .*sparse"):
        optimizer.step()
    assert torch.equal(table.weight, before) and torch.equal(dense, torch.ones(3))


# --- bits do not depend on where an element lies: what sharding stands on ---


def updated(
    tensors: list[torch.Tensor], grads: list[list[torch.Tensor]], amsgrad: bool
) -> list[tuple[torch.Tensor, ...]]:
    """Per tensor itself after the steps, and its moments: these show a difference in rounding first."""
    params = [t.requires_grad_() for t in tensors]
    optimizer = DecoupledAdamW(params, lr=3e-3, weight_decay=5e-4, amsgrad=amsgrad)
    for step_grads in grads:
        for p, g in zip(params, step_grads, strict=True):
            p.grad = g
        optimizer.step()
    assert all(optimizer.state[p]["step"] == len(grads) for p in params)
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")
    return [(p.detach(), *(optimizer.state[p][key] for key in keys)) for p in params]


def equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def joined(pieces: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def tensor_and_gradients(numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    whole = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(dtype)
    scales = 10.0 ** (-3 * torch.rand(numel, generator=torch.Generator().manual_seed(4)))
    return whole, [gradient(whole, step, 0) * scales.to(dtype) for step in range(8)]


@pytest.mark.parametrize(("dtype", "amsgrad"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, True)])
def test_a_cut_anywhere_changes_no_bit(dtype: torch.dtype, amsgrad: bool) -> None:
    numel = 150
    whole, grads = tensor_and_gradients(numel, dtype)
    (expected,) = updated([whole.clone()], [[g] for g in grads], amsgrad)
    for cut in (0, 1, 7, 8, 13, 64, 75, 128, 149, 150):
        pieces = [whole[:cut].clone(), whole[cut:].clone()]
        got = updated(pieces, [[g[:cut].clone(), g[cut:].clone()] for g in grads], amsgrad)
        assert equal(joined(got), expected), f"cut at {cut}"
        # The same elements as views, at an address that no vector register is aligned to.
        views = updated([whole.clone()[:cut], whole.clone()[cut:]], [[g[:cut], g[cut:]] for g in grads], amsgrad)
        assert equal(joined(views), expected), f"views cut at {cut}"


def test_a_transposed_parameter_is_updated_like_its_contiguous_copy() -> None:
    start = torch.randn(7, 13, generator=torch.Generator().manual_seed(6))
    grads = [torch.randn(13, 7, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    (transposed,) = updated([start.clone().t()], [[g] for g in grads], True)
    (contiguous,) = updated([start.t().contiguous()], [[g] for g in grads], True)
    assert not transposed[0].is_contiguous()
    assert equal(transposed, contiguous)


# --- the reference that the fused kernels fall back to ---


@pytest.mark.parametrize(("reference_lr", "amsgrad"), [(4e-3, True), (0.0, False)])
def test_the_reference_function_is_the_law_too(reference_lr: float, amsgrad: bool) -> None:
    group = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2, amsgrad=amsgrad)
    hyper = Hyperparameters.from_group(group | dict(initial_lr=reference_lr))
    param = torch.randn(5, 7, dtype=torch.float64)
    law = NaiveLaw(param, reference_lr)
    m, v, vmax = torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param)
    for t in range(1, 10):
        grad = gradient(param, t, 0)
        scaled = grad * 8.0
        skipped = (param.clone(), m.clone(), v.clone(), vmax.clone())
        for found_inf, divisor in ((1.0, 8.0), (0.0, 8.0)):
            adamw_(
                param,
                scaled,
                m,
                v,
                vmax if amsgrad else None,
                torch.tensor(float(t)),
                Step([hyper], torch.tensor(divisor), torch.tensor(found_inf)),
            )
            if found_inf:
                assert equal((param, m, v, vmax), skipped)
        assert torch.equal(scaled, grad * 8.0), "the gradient is only read"
        law.step(grad, group)
        torch.testing.assert_close(param, law.param, **TOLERANCE[torch.float64])
        torch.testing.assert_close(v, law.v, **TOLERANCE[torch.float64])
