"""Every form of update a kernel can meet, with random operands, and the law in fp64 with a bound on fp32's rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import ModuleType

import torch
from torch import Tensor

from sharded_dadamw.kernels.operands import Operands
from sharded_dadamw.update.adamw import Step, adamw_
from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.precision import join, split

F32, F16, BF16, I16 = torch.float32, torch.float16, torch.bfloat16, torch.int16

HYPER = Hyperparameters(lr=3e-3, initial_lr=6e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, amsgrad=False)
HYPER_AMSGRAD = replace(HYPER, amsgrad=True)

UNIT = 2.0**-24
"""Half a unit in the last place of fp32, relative: what one rounding costs at most."""
SMALLEST = 2.0**-148
"""Two denormals: what is lost where fp32 underflows."""


@dataclass(frozen=True)
class Kind:
    """A form, and whether its moments are rounded stochastically."""

    param: torch.dtype
    grad: torch.dtype
    moments: torch.dtype
    main: torch.dtype | None = None
    stochastic: bool = False


KINDS = {
    "fp32": Kind(F32, F32, F32),
    "fp32, bf16 moments": Kind(F32, F32, BF16, stochastic=True),
    "bf16, fp32 main": Kind(BF16, BF16, F32, F32),
    "bf16, fp32 main and gradients": Kind(BF16, F32, F32, F32),
    "bf16, fp32 main, bf16 moments": Kind(BF16, BF16, BF16, F32, stochastic=True),
    "bf16, remainder": Kind(BF16, BF16, F32, I16),
    "bf16, remainder, bf16 moments": Kind(BF16, BF16, BF16, I16, stochastic=True),
    "bf16 alone": Kind(BF16, BF16, BF16),
    "bf16, fp32 moments": Kind(BF16, BF16, F32),
    "fp16, fp32 main": Kind(F16, F16, F32, F32),
    "fp16 alone": Kind(F16, F16, F16),
}


def make_operands(kind: Kind, numels: Sequence[int], *, amsgrad: bool, device: str = "cpu") -> list[Operands]:
    """Fragments with values as in training: steps from 1 on, some moments still zero, gradients of many sizes.

    They lie end to end in flat tensors.
    """
    draw = torch.Generator().manual_seed(0)
    total = sum(numels)

    def normal() -> Tensor:
        return torch.randn(total, generator=draw)

    value = normal() * 0.1
    grad = normal() * torch.exp2(torch.randint(-12, 3, (total,), generator=draw).float())
    exp_avg = normal() * 0.01
    exp_avg_sq = (normal() * 0.02).square()
    maximum = exp_avg_sq * (0.5 + torch.rand(total, generator=draw))
    exp_avg[::5] = exp_avg_sq[::5] = maximum[::5] = 0.0
    grad[::7] = 0.0
    if kind.main is I16:
        param, main = split(value)
    else:
        param, main = value.to(kind.param), value.clone() if kind.main is F32 else None
    flat = [
        param,
        grad.to(kind.grad),
        exp_avg.to(kind.moments),
        exp_avg_sq.to(kind.moments),
        maximum.to(kind.moments) if amsgrad else None,
        main,
    ]
    flat = [None if tensor is None else tensor.to(device) for tensor in flat]
    fragments, start = [], 0
    for index, numel in enumerate(numels):
        parts = [None if tensor is None else tensor[start : start + numel] for tensor in flat]
        step = torch.tensor(float((1, 2, 17, 1000, 123_456)[index % 5]), device=device)
        first_element = 2**32 - 50 + start if kind.stochastic else None
        fragments.append(Operands(*parts, step, first_element))  # type: ignore[arg-type]
        start += numel
    return fragments


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, -1e-30, 1e-20, 1.0, 1e19, -1e30, 3e38, float("inf"), float("nan")]


def special_operands(kind: Kind, *, amsgrad: bool, device: str = "cpu") -> Operands:
    """A fragment in which every special value of a gradient meets every one of the moments."""
    values = torch.tensor(SPECIAL, device=device)
    grid = torch.cartesian_prod(values, values)
    (fragment,) = make_operands(kind, [len(grid)], amsgrad=amsgrad, device=device)
    fragment.grad.copy_(grid[:, 0])
    fragment.exp_avg.copy_(grid[:, 1])
    fragment.exp_avg_sq.copy_(grid[:, 1].abs())
    if fragment.max_exp_avg_sq is not None:
        fragment.max_exp_avg_sq.copy_(grid[:, 0].abs())
    return fragment


def copied(fragments: Sequence[Operands]) -> list[Operands]:
    """The same values in memory of their own."""
    return [
        Operands(
            *(None if tensor is None else tensor.clone() for tensor in fragment.tensors),  # type: ignore[arg-type]
            fragment.count.clone(),
            fragment.first_element,
        )
        for fragment in fragments
    ]


def cut(fragment: Operands, *at: int) -> list[Operands]:
    """The same memory as several fragments."""
    edges = [0, *at, fragment.param.numel()]
    return [
        Operands(
            *(None if tensor is None else tensor[start:stop] for tensor in fragment.tensors),  # type: ignore[arg-type]
            fragment.count,
            None if fragment.first_element is None else fragment.first_element + start,
        )
        for start, stop in pairwise(edges)
    ]


def bits_of(fragments: Sequence[Operands]) -> list[Tensor]:
    """Everything an update writes, as integers, so that nan equals itself."""
    width = {2: torch.int16, 4: torch.int32}
    return [
        tensor.view(width[tensor.element_size()])
        for fragment in fragments
        for name, tensor in zip(("param", "grad", "m", "v", "max", "main"), fragment.tensors, strict=True)
        if tensor is not None and name != "grad"
    ]


def same_bits(some: Sequence[Operands], others: Sequence[Operands]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits_of(some), bits_of(others), strict=True))


def value_of(fragment: Operands) -> Tensor:
    """What the law acts on, as stored, in fp64."""
    if fragment.main is None:
        return fragment.param.double()
    return (join(fragment.param, fragment.main) if fragment.main.dtype is I16 else fragment.main).double()


@dataclass
class Expected:
    """The law in fp64, and how far fp32 arithmetic may be from it, before anything is stored in fewer bits."""

    values: dict[str, Tensor]
    slack: dict[str, Tensor]


def law_in_fp64(fragment: Operands, hyper: Hyperparameters, divisor: float = 1.0) -> Expected:
    """One update.

    The slack counts roundings. exp_avg: two constants, two products, the division and the sum, at most 4 units of the
    sum of the terms' sizes. exp_avg_sq: 7 units, all terms being positive. The update: half of the latter for the root,
    a few for each bias correction, the division and the products, and what exp_avg brings along: 24 units. The
    parameter: one unit, and the update's.
    """
    assert not isinstance(hyper.lr, Tensor)
    p, g = value_of(fragment), fragment.grad.double() / divisor
    m, v = fragment.exp_avg.double(), fragment.exp_avg_sq.double()
    step = float(fragment.count)
    size_m = hyper.beta1 * m.abs() + (1 - hyper.beta1) * g.abs()
    m = hyper.beta1 * m + (1 - hyper.beta1) * g
    v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    second = v if fragment.max_exp_avg_sq is None else torch.maximum(fragment.max_exp_avg_sq.double(), v)
    denom = (second / (1 - hyper.beta2**step)).sqrt() + hyper.eps
    decay = hyper.weight_decay * (hyper.lr / hyper.initial_lr if hyper.initial_lr else 1.0)
    rate = hyper.lr / (1 - hyper.beta1**step)
    update = decay * p + rate * m / denom
    size_update = decay * p.abs() + rate * size_m / denom
    return Expected(
        values={"param": p - update, "exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": second, "update": update, "g": g},
        slack={
            "param": UNIT * (p - update).abs() + 24 * UNIT * size_update + SMALLEST,
            "exp_avg": 4 * UNIT * size_m + SMALLEST,
            "exp_avg_sq": 7 * UNIT * v + SMALLEST,
            "max_exp_avg_sq": 7 * UNIT * second + SMALLEST,
            "update": 24 * UNIT * size_update + SMALLEST,
        },
    )


def assert_obeys(fragment: Operands, expected: Expected, kind: Kind, *, decays_apart: bool = False) -> None:
    """What is stored is the law's result within fp32's slack and, where it is narrower, one rounding of that.

    With ``decays_apart`` the parameter was rounded twice more: 1 - decay, and the parameter multiplied by that.
    """
    stored = {
        "exp_avg": fragment.exp_avg,
        "exp_avg_sq": fragment.exp_avg_sq,
        "max_exp_avg_sq": fragment.max_exp_avg_sq,
        "param": fragment.param if fragment.main is None else value_of(fragment),
    }
    for name, tensor in stored.items():
        if tensor is None:
            continue
        exact, slack = expected.values[name], expected.slack[name]
        if name == "param" and decays_apart:
            slack = slack + 2 * UNIT * exact.abs()
        if tensor.dtype in (BF16, F16):
            half_a_digit = {BF16: 2.0**-8, F16: 2.0**-11}[tensor.dtype]
            stochastic = kind.stochastic and name != "param"
            # Half a last digit to the nearest, a whole one stochastically; fp16 has denormals from 2**-14 on down.
            slack = slack + (2 if stochastic else 1) * half_a_digit * exact.abs() * 1.001
            slack = slack + (2.0**-24 if tensor.dtype is F16 else 2.0**-133)
        error = (tensor.double() - exact).abs()
        worst = int((error - slack).argmax()) if error.numel() else 0
        assert (error <= slack).all(), (
            f"{name}[{worst}] is {tensor[worst].item()}, expected {exact[worst].item()} within {slack[worst].item()}"
        )
    if fragment.main is not None:
        image = split(value_of(fragment).float())[0] if kind.param is BF16 else value_of(fragment).to(F16)
        assert torch.equal(fragment.param, image), "the parameter is not the image of its main parameter"


def run(
    kernel: ModuleType,
    fragments: Sequence[Operands],
    hyper: Hyperparameters,
    *,
    divisor: float | None = None,
    found_inf: float | None = None,
) -> Tensor | None:
    """One update by a kernel's module; the norms if it fuses them."""
    device = fragments[0].param.device
    scalars = (None if value is None else torch.tensor(value, device=device) for value in (divisor, found_inf))
    norms: Tensor | None = kernel.Update(fragments)(Step([hyper], *scalars), 0)
    return norms


def apply_reference_(fragment: Operands, step: Step, group: int = 0) -> None:
    """One update by the reference."""
    adamw_(
        fragment.param,
        fragment.grad,
        fragment.exp_avg,
        fragment.exp_avg_sq,
        fragment.max_exp_avg_sq,
        fragment.count,
        step,
        group,
        main=fragment.main,
        first_element=fragment.first_element,
    )
