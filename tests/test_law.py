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
import itertools
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, OneCycleLR

from sharded_dadamw import DecoupledAdamW
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.hyperparameters import Hyperparameters

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F64: dict(rtol=1e-13, atol=1e-14), F32: dict(rtol=5e-6, atol=5e-7)}


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
    return torch.randn(param.shape, dtype=F64, generator=generator).to(param.dtype)


OF_GROUPS: list[dict[str, Any]] = [
    {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 1e-3},
    {"eps": 1e-4, "weight_decay": 0.0},
    {"amsgrad": True, "betas": [0.9, 0.99]},
]


COSINE: Callable[[Optimizer], LRScheduler] = lambda o: CosineAnnealingLR(o, T_max=25)  # noqa: E731


def one_cycle(div_factor: float) -> Callable[[Optimizer], LRScheduler]:
    return lambda o: OneCycleLR(o, max_lr=2e-2, total_steps=26, div_factor=div_factor)


@pytest.mark.parametrize(
    ("dtype", "hyper", "schedule", "options"),
    [
        (F64, {}, None, {}),
        (F32, {"amsgrad": True}, None, {}),
        (F64, {"amsgrad": True}, lambda o: LinearLR(o, start_factor=0.1, total_iters=8), {}),
        (F32, {}, lambda o: LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=20), {}),
        (F64, {"amsgrad": True}, COSINE, {}),
        (F32, {}, lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)), {}),
        (F64, {"lr": 2e-3, "weight_decay": 1e-4}, COSINE, {"of_groups": OF_GROUPS, "references": [1e-2, 2e-3, 2e-3]}),
        (F32, {"lr": 2e-3, "weight_decay": 1e-4}, COSINE, {"of_groups": OF_GROUPS, "references": [1e-2, 2e-3, 2e-3]}),
        # The peak of a cycle is the reference, whatever lr the optimizer was made with; the betas cycle as well.
        (F64, {"lr": 1e-3}, one_cycle(4.0), {"references": [2e-2]}),
        (F64, {"lr": 5e-2}, one_cycle(25.0), {"references": [2e-2]}),
        (F64, {"lr": torch.tensor(1e-2, dtype=F64)}, COSINE, {"references": [1e-2]}),
        (F32, {"lr": torch.tensor(0.0078125)}, None, {"references": [0.0078125]}),
        (F64, {}, None, {"lr_later": 0.0}),
        (F64, {"lr": 0.0, "weight_decay": 0.25}, None, {"references": [0.0], "num_steps": 2}),
        (F64, {"lr": 0.0, "weight_decay": 0.25}, None, {"references": [0.0], "lr_later": 1e-3, "num_steps": 2}),
        (F32, {"weight_decay": 0.5}, None, {"skips": True, "num_steps": 7}),
    ],
    ids=itertools.count(),
)
def test_training_follows_the_law(
    dtype: torch.dtype, hyper: dict[str, Any], schedule: Any, options: dict[str, Any]
) -> None:
    train_beside_the_law(dtype, {"lr": 3e-3, "weight_decay": 1e-2, **hyper}, schedule, **options)


def train_beside_the_law(
    dtype: torch.dtype,
    hyper: dict[str, Any],
    schedule: Callable[[Optimizer], LRScheduler] | None,
    *,
    of_groups: Sequence[dict[str, Any]] = ({},),
    references: Sequence[float] = (3e-3,),
    lr_later: float | None = None,
    num_steps: int = 25,
    skips: bool = False,
) -> None:
    """Steps both and compares parameters, moments and step count after every step.

    Args:
        of_groups: What each group has of its own; the last one has all parameters that are left.
        references: The lr of each group to which its decay is proportional.
        lr_later: Set once the optimizer is made.
        skips: A third of the parameters have no gradient, in turn.
    """
    __tracebackhide__ = True
    params = make_params(dtype)
    cuts = [*range(len(of_groups)), len(params)]
    members = [params[first:stop] for first, stop in pairwise(cuts)]
    optimizer = DecoupledAdamW([{"params": p, **of} for p, of in zip(members, of_groups, strict=True)], **hyper)
    assert all(type(group["initial_lr"]) is float for group in optimizer.param_groups)
    if lr_later is not None:
        optimizer.param_groups[0]["lr"] = lr_later
    scheduler = None if schedule is None else schedule(optimizer)
    pairs = [
        (param, group, NaiveLaw(param, reference))
        for group, reference in zip(optimizer.param_groups, references, strict=True)
        for param in group["params"]
    ]
    for step in range(num_steps):
        for index, (param, group, law) in enumerate(pairs):
            param.grad = None if skips and (step + index) % 3 == 0 else gradient(param, step, index)
            law.step(param.grad, group)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        for param, group, law in pairs:
            state, tolerance = optimizer.state[param], TOLERANCE[dtype]
            torch.testing.assert_close(param.detach().double(), law.param, **tolerance)
            torch.testing.assert_close(state["exp_avg"].double(), law.m, **tolerance)
            torch.testing.assert_close(state["exp_avg_sq"].double(), law.v, **tolerance)
            if group["amsgrad"]:
                torch.testing.assert_close(state["max_exp_avg_sq"].double(), law.vmax, **tolerance)
            assert state["step"].item() == law.t


# --- a drop-in for composer.optim.DecoupledAdamW ---


def test_the_signature_and_defaults_are_composers() -> None:
    parameters = inspect.signature(DecoupledAdamW.__init__).parameters
    expected = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 1e-5, "amsgrad": False}
    assert list(parameters)[:7] == ["self", "params", *expected]
    assert {name: parameters[name].default for name in expected} == expected
    positional = DecoupledAdamW(make_params(F32), 2e-3, (0.8, 0.9), 1e-6, 1e-4, True)
    group = positional.param_groups[0]
    got = {name: group[name] for name in (*expected, "initial_lr")}
    assert got == dict(lr=2e-3, betas=(0.8, 0.9), eps=1e-6, weight_decay=1e-4, amsgrad=True, initial_lr=2e-3)
    assert issubclass(DecoupledAdamW, AdamW) and DecoupledAdamW.__qualname__ == "DecoupledAdamW"
    assert set(group) - set(AdamW(make_params(F32)).param_groups[0]) == {"initial_lr"}
    assert set(AdamW(make_params(F32)).param_groups[0]) <= set(group)


@pytest.mark.parametrize(("weight_decay", "warns"), [(1e-3, True), (0.1, True), (9.9e-4, False), (0.0, False)])
@pytest.mark.parametrize("in_group", [False, True])
def test_a_weight_decay_that_belongs_to_coupled_adamw_is_warned_about(
    weight_decay: float, in_group: bool, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, *rest = make_params(F32)
    if in_group:
        DecoupledAdamW([{"params": [first], "weight_decay": weight_decay}, {"params": rest}])
    else:
        DecoupledAdamW([first], weight_decay=weight_decay)
    messages = [r.getMessage() for r in caplog.records if r.name.split(".")[0] == "sharded_dadamw"]
    assert len(messages) == warns and all(str(weight_decay) in message for message in messages)


def test_every_group_has_its_initial_lr_also_one_added_later() -> None:
    a, b, c, _ = make_params(F32)
    optimizer = DecoupledAdamW([{"params": [a], "lr": 5e-3}, {"params": [b]}], lr=2e-3)
    optimizer.param_groups[0]["lr"] = 1e-9
    optimizer.add_param_group({"params": [c], "lr": 7e-3})
    assert [group["initial_lr"] for group in optimizer.param_groups] == [5e-3, 2e-3, 7e-3]


def test_state_is_there_from_construction_on_under_torchs_keys() -> None:
    params = make_params(F32)
    optimizer = DecoupledAdamW([{"params": params[:2]}, {"params": params[2:], "amsgrad": True}])
    for index, p in enumerate(params):
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if index > 1 else set())
        assert not any(value.count_nonzero() for value in state.values())
        assert state["step"].shape == () and state["step"].dtype == F32
        assert all(value.shape == p.shape and value.dtype == p.dtype for key, value in state.items() if key != "step")


def test_the_static_method_is_one_update_of_the_law() -> None:
    params = [p.detach() for p in make_params(F64)]
    laws = [NaiveLaw(p, 4e-3) for p in params]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(3)]
    grads, steps = [gradient(p, 1, i) for i, p in enumerate(params)], [torch.ones(()) for _ in params]
    hyper: dict[str, Any] = dict(amsgrad=True, lr=1e-3, weight_decay=1e-2, eps=1e-8)
    DecoupledAdamW.adamw(params, grads, *zeros, steps, **hyper, beta1=0.9, beta2=0.95, initial_lr=4e-3)
    for p, grad, law in zip(params, grads, laws, strict=True):
        law.step(grad, hyper | {"betas": (0.9, 0.95)})
        torch.testing.assert_close(p, law.param, **TOLERANCE[F64])
    assert steps == [1.0] * len(steps), "the caller counts the steps"


# --- what torch.optim users do ---


def run(params: list[Any], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for index, p in enumerate(params):
            p.grad = gradient(p, step, index)
        optimizer.step()


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_continues_exactly_like_the_original(copier: Callable[[Any], Any]) -> None:
    params = make_params(F32)
    optimizer = DecoupledAdamW(params, lr=3e-3, weight_decay=1e-4, amsgrad=True, max_grad_norm=0.5)
    optimizer.param_groups[0]["lr"] = 1e-3
    run(params, optimizer, range(4))
    copied_params, copied = copier((params, optimizer))
    run(params, optimizer, range(4, 8))
    assert not any(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True)), "the copy moved along"
    run(copied_params, copied, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, copied_params, strict=True))
    assert type(copied) is DecoupledAdamW
    assert copied.param_groups[0]["initial_lr"] == 3e-3 and copied.metrics()["grad_norm"] > 0.5


# What a step may have made ready for the next one, of which this is the first parameter.
CHANGES: dict[str, Callable[[DecoupledAdamW, Any], object]] = {
    "nothing": lambda o, first: None,
    "a gradient is missing": lambda o, first: setattr(first, "grad", None),
    "gradient in another memory format": lambda o, first: setattr(first, "grad", first.grad.t().contiguous().t()),
    "memory is swapped": lambda o, first: setattr(first, "data", first.data.clone()),
    "memory is set": lambda o, first: first.data.set_(first.data.clone()),
    "another memory format in place": lambda o, first: setattr(first, "data", first.data.reshape(7, 5).t()),
    "another memory format": lambda o, first: setattr(first, "data", first.data.t().contiguous().t()),
    "state is replaced": lambda o, first: o.state[first].update(
        {key: value.clone() for key, value in o.state[first].items()}
    ),
    "state is moved": lambda o, first: setattr(
        o.state[first]["exp_avg"], "data", o.state[first]["exp_avg"].data.clone()
    ),
    "a count of state is moved": lambda o, first: setattr(o.state[first]["step"], "data", torch.ones(())),
    "state is loaded": lambda o, first: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "a group is added": lambda o, first: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]}),
    "another switch": lambda o, first: o.param_groups[0].update(amsgrad=True),
    "frozen": lambda o, first: first.requires_grad_(False),
    "shared memory": lambda o, first: [value.data.share_memory_() for value in (first, *o.state[first].values())],
}


@pytest.mark.parametrize(
    ("what", "dtype"), [*((what, F32) for what in CHANGES), *((what, F64) for what in CHANGES if "state" in what)]
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
            CHANGES[what](optimizer, params[0])
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
    params = make_params(F32)
    optimizer = DecoupledAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    references = [weakref.ref(p.grad) for p in params]
    optimizer.step()
    optimizer.zero_grad()
    assert not any(reference() is not None for reference in references)


# --- the reference that the fused kernels fall back to ---


@pytest.mark.parametrize(("reference_lr", "amsgrad"), [(4e-3, True), (0.0, False)])
def test_the_reference_function_is_the_law_too(reference_lr: float, amsgrad: bool) -> None:
    group = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2, amsgrad=amsgrad)
    hyper = Hyperparameters.from_group(group | dict(initial_lr=reference_lr))
    param = torch.randn(5, 7, dtype=F64)
    law = NaiveLaw(param, reference_lr)
    m, v, vmax = (torch.zeros_like(param) for _ in range(3))
    for t in range(1, 10):
        grad = gradient(param, t, 0)
        scaled, before = grad * 8.0, [each.clone() for each in (param, m, v, vmax)]
        for found_inf in (1.0, 0.0):
            step = Step([hyper], torch.tensor(8.0), torch.tensor(found_inf))
            adamw_(param, scaled, m, v, vmax if amsgrad else None, torch.tensor(float(t)), step)
            assert not found_inf or all(map(torch.equal, (param, m, v, vmax), before))
        assert torch.equal(scaled, grad * 8.0), "the gradient is only read"
        law.step(grad, group)
        torch.testing.assert_close(param, law.param, **TOLERANCE[F64])
        torch.testing.assert_close(v, law.v, **TOLERANCE[F64])
