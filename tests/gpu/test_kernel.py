"""Triton's kernel on a GPU: beside the law in fp64, beside itself however it is cut, and beside the CPU's random bits.

The bounds on rounding are derived in ``tests/forms.py``. Whatever else is compared is compared bit by bit.
"""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.fingerprint import Span, sums_of
from sharded_dadamw.kernels.operands import NORMS, Operands, Update
from sharded_dadamw.layout.indices import rows_of
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.precision import join, random_bits, round_stochastically, split, weight_of
from tests.forms import (
    BF16,
    F16,
    F32,
    HYPER,
    HYPER_AMSGRAD,
    I16,
    KINDS,
    Kind,
    apply_reference_,
    assert_obeys,
    copied,
    cut,
    law_in_fp64,
    make_operands,
    same_bits,
    special_operands,
    value_of,
)
from tests.gpu.probes import DEVICE, compilations

ODD_SIZES = (13, 1, 64, 0, 100, 1, 4096, 5003)
RELATIVE_ERROR_OF_NORMS = 1e-6

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
every_kind_with_either_gradient = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(replace(kind, grad=dtype), id=f"{label}; {dtype} gradients".replace("torch.", ""))
        for label, kind in KINDS.items()
        for dtype in (F32, BF16)
    ],
)
every_amsgrad = pytest.mark.parametrize("hyper", [HYPER, HYPER_AMSGRAD], ids=["plain", "amsgrad"])


def on_device(kind: Kind, numels: Sequence[int], hyper: Hyperparameters) -> list[Operands]:
    return make_operands(kind, numels, amsgrad=hyper.amsgrad, device=DEVICE)


def prepared(fragments: Sequence[Operands]) -> Update:
    update = kernels.kernel_for(fragments[0].form)(fragments)
    assert type(update).__module__ == "sharded_dadamw.kernels.triton_kernel"
    return update


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def run(
    fragments: Sequence[Operands],
    hyper: Hyperparameters,
    *,
    divisor: float = 1.0,
    found_inf: float = 0.0,
) -> Tensor:
    """One update, with everything that it can be told: so each kind is compiled once for most of this module."""
    norms = prepared(fragments)(Step([hyper], scalar(divisor), scalar(found_inf)), 0)
    assert norms is not None and norms.shape == (len(fragments), len(NORMS)) and norms.dtype is torch.float64
    return norms


def widened(fragment: Operands, dtype: torch.dtype) -> Operands:
    """The same numbers in memory of their own, all of them in fp32 or fp64."""
    maximum = fragment.max_exp_avg_sq
    return Operands(
        value_of(fragment).to(dtype),
        fragment.grad.to(dtype, copy=True),
        fragment.exp_avg.to(dtype, copy=True),
        fragment.exp_avg_sq.to(dtype, copy=True),
        None if maximum is None else maximum.to(dtype, copy=True),
        None,
        fragment.count,
    )


# --- the law ---


@every_amsgrad
@every_kind_with_either_gradient
def test_the_kernel_obeys_the_law_within_fp32s_rounding(kind: Kind, hyper: Hyperparameters) -> None:
    for divisor, betas in ((1.0, (0.9, 0.95)), (3.7, (0.95, 0.99999)), (0.25, (0.0, 0.0))):
        now = replace(hyper, beta1=betas[0], beta2=betas[1])
        fragments = on_device(kind, ODD_SIZES, now)
        expected = [law_in_fp64(fragment, now, divisor) for fragment in fragments]
        run(fragments, now, divisor=divisor)
        for fragment, one in zip(fragments, expected, strict=True):
            assert_obeys(fragment, one, kind)


@every_amsgrad
@every_kind
def test_zeros_denormals_huge_values_infinities_and_nan_go_where_the_law_sends_them(
    kind: Kind, hyper: Hyperparameters
) -> None:
    """The reference in fp32 overflows and underflows as fp32 does; its moments have the same bits.

    It divides by the root of the second bias correction where the kernel multiplies by its inverse, so the parameters
    differ by a few roundings: of the denominator, of both terms, and of what they are stored in.
    """
    fragment = special_operands(kind, amsgrad=hyper.amsgrad, device=DEVICE)
    (reference,) = copied([fragment])
    before = value_of(fragment)
    run([fragment], hyper)
    apply_reference_(reference, Step([hyper]))
    for got, wanted in zip(moments_of(fragment), moments_of(reference), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=0.0, equal_nan=True)
    got, wanted = value_of(fragment), value_of(reference)
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.isinf(), wanted.isinf())
    digit = 2.0**-19 if fragment.main is not None else max(2.0**-19, torch.finfo(kind.param).eps)
    slack = digit * (before.abs() + (wanted - before).abs()) + torch.finfo(kind.param).smallest_normal * digit
    assert ((got - wanted).abs() <= slack)[wanted.isfinite()].all()


def moments_of(fragment: Operands) -> list[Tensor]:
    moments = (fragment.exp_avg, fragment.exp_avg_sq, fragment.max_exp_avg_sq)
    return [moment for moment in moments if moment is not None]


# --- bits ---


@every_amsgrad
@every_kind
def test_every_kind_stores_the_bits_of_fp32_arithmetic_rounded_as_on_the_cpu(
    kind: Kind, hyper: Hyperparameters
) -> None:
    """The kernel's own fp32 results for the same numbers, rounded by ``precision`` on the CPU, are what it stores."""
    fragments = on_device(kind, ODD_SIZES, hyper)
    if kind.stochastic:
        fragments += [replace(fragment, first_element=2**40 + 3) for fragment in on_device(kind, (3000,), hyper)]
    before = copied(fragments)
    wide = [widened(fragment, F32) for fragment in fragments]
    run(wide, hyper, divisor=1.7)
    run(fragments, hyper, divisor=1.7)
    for fragment, old, new in zip(fragments, before, wide, strict=True):
        value = new.param.cpu()
        if kind.main is I16:
            param, remainder = split(value)
            assert fragment.main is not None
            assert torch.equal(fragment.param.cpu(), param) and torch.equal(fragment.main.cpu(), remainder)
            assert torch.equal(join(fragment.param, fragment.main), new.param)
        elif kind.main is F32:
            assert fragment.main is not None and torch.equal(fragment.main, new.param)
            assert torch.equal(fragment.param.cpu(), weight_of(value, kind.param))
        else:
            assert torch.equal(fragment.param.cpu(), value.to(kind.param))
        rounded = [new.exp_avg.cpu().to(kind.moments), new.exp_avg_sq.cpu().to(kind.moments)]
        if fragment.first_element is not None:
            elements = torch.arange(fragment.first_element, fragment.first_element + len(value))
            bits = random_bits(fragment.count.cpu(), elements)
            rounded = [
                round_stochastically(moment.cpu(), of_moment)
                for moment, of_moment in zip((new.exp_avg, new.exp_avg_sq), bits, strict=True)
            ]
        assert torch.equal(fragment.exp_avg.cpu(), rounded[0])
        assert torch.equal(fragment.exp_avg_sq.cpu(), rounded[1])
        if fragment.max_exp_avg_sq is not None and old.max_exp_avg_sq is not None:
            assert torch.equal(fragment.max_exp_avg_sq.cpu(), torch.maximum(old.max_exp_avg_sq.cpu(), rounded[1]))


@every_amsgrad
@every_kind
def test_a_cut_anywhere_changes_no_bit(kind: Kind, hyper: Hyperparameters) -> None:
    """Cut in two at every multiple of 64 and at odd places, and cut into all those pieces at once."""
    numel = 3 * 4096 + 77
    odd = [1, 3, 7, 13, 100, 1001, 4095, 4097, numel - 1]
    even = list(range(64, numel, 64))
    whole = on_device(kind, [numel], hyper)
    start = copied(whole)
    run(whole, hyper, divisor=1.7)
    for at in [*([each] for each in odd + even), odd, even, sorted(odd + even)]:
        pieces = copied(start)
        run(cut(pieces[0], *at), hyper, divisor=1.7)
        assert same_bits(pieces, whole), f"cut at {at}"


@every_amsgrad
@every_kind
def test_a_skipped_update_leaves_every_byte(kind: Kind, hyper: Hyperparameters) -> None:
    """Whatever the gradients hold; and its norms say that nothing was subtracted."""
    fragments = on_device(kind, ODD_SIZES, hyper)
    for fragment in fragments:
        fragment.grad[::3] = float("nan")
        fragment.grad[1::3] = float("inf")
    before = copied(fragments)
    norms = run(fragments, hyper, found_inf=1.0)
    assert same_bits(fragments, before)
    for fragment, old, norm in zip(fragments, before, norms, strict=True):
        assert torch.equal(fragment.grad.nan_to_num(1.0, 2.0), old.grad.nan_to_num(1.0, 2.0))
        assert norm[NORMS.index("update")] == 0.0
        assert_norm(norm[NORMS.index("param")], value_of(old))
        assert_norm(norm[NORMS.index("moment")], old.exp_avg)


# --- norms ---


def assert_norm(square: Tensor, tensor: Tensor, slack: float = 0.0) -> None:
    torch.testing.assert_close(square.sqrt(), tensor.double().norm(), rtol=RELATIVE_ERROR_OF_NORMS, atol=slack)


@every_amsgrad
@every_kind
def test_norms_are_those_of_what_is_stored(kind: Kind, hyper: Hyperparameters) -> None:
    fragments = on_device(kind, (*ODD_SIZES, 300_001), hyper)
    before = copied(fragments)
    norms = run(fragments, hyper, divisor=3.7)
    for fragment, old, norm in zip(fragments, before, norms, strict=True):
        of = dict(zip(NORMS, norm, strict=True))
        assert_norm(of["grad"], old.grad.double() / 3.7)
        assert_norm(of["param"], value_of(fragment))
        assert_norm(of["moment"], fragment.exp_avg)
        # Taken before the parameter is rounded, so what the law subtracts, and not what memory shows to have gone. Both
        # of its terms have their roundings; where they cancel, in a fragment of one element, those count for more.
        law = law_in_fp64(old, hyper, 3.7)
        assert_norm(of["update"], law.values["update"], float(law.slack["update"].norm()))


@pytest.mark.parametrize("num_fragments", [1, 10_000])
def test_norms_of_a_hundred_million_elements_are_exact_to_a_millionth_and_the_same_in_every_run(
    num_fragments: int,
) -> None:
    numel = 100_000_000
    draw = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(numel, device=DEVICE, generator=draw)

    whole = Operands(normal(0.1), normal(1.0), normal(0.01), normal(0.02).square(), None, None, scalar(17.0))
    wide = widened(whole, torch.float64)
    before = wide.param.clone()
    apply_reference_(wide, Step([HYPER], scalar(3.7)))
    after = (wide.grad / 3.7, wide.param, wide.exp_avg, before - wide.param)
    expected = torch.stack([tensor.square().sum() for tensor in after])
    del wide, before, after
    edges = range(numel // num_fragments + 1, numel, numel // num_fragments + 1)
    results = []
    for _ in range(2):
        again = copied([whole])
        results.append(run(cut(again[0], *edges), HYPER, divisor=3.7))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0].sum(0).sqrt(), expected.sqrt(), rtol=RELATIVE_ERROR_OF_NORMS, atol=0.0)


# --- what a step costs besides ---


@pytest.mark.parametrize("label", ["fp32", "bf16, remainder, bf16 moments"])
def test_no_value_of_a_step_makes_triton_compile_again(label: str) -> None:
    kind = KINDS[label]
    fragments = on_device(kind, (13, 4096, 100), HYPER)
    update = prepared(fragments)
    flags = torch.zeros(9, device=DEVICE)
    divisors = torch.arange(1.0, 10.0, device=DEVICE)

    def step(hyper: Hyperparameters, index: int) -> None:
        for fragment in fragments:
            fragment.count.add_(index)
        update(Step([hyper], divisors[index], flags[index]), 0)

    for lr in (3e-3, scalar(3e-3)):
        step(replace(HYPER, lr=lr), 0)
        step(replace(HYPER, lr=lr), 1)
    with compilations() as compiled:
        for index, lr in enumerate((0.0, 1.0, 1e-3, 16.0, 1e-30, 2.0)):
            for rate in (lr, scalar(lr)):
                now = replace(HYPER, lr=rate, initial_lr=lr, weight_decay=lr, beta1=0.1 * index, eps=10.0**-index)
                step(now, index)
                step(now, index + 1)
    assert compiled == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_fingerprint_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    whole = torch.randn(300, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    spans = []
    for first, last in ((0, 1001), (0, 700), (700, 701)):
        part = whole[:, first:last].contiguous().view(-1)
        for start, stop in ((0, 1), (1, 77), (77, len(part))):
            (rows,) = rows_of(whole.shape, (0, first), (300, last - first), start, stop)
            remainder = torch.arange(start, stop).to(torch.int16) if dtype is torch.bfloat16 else None
            spans += [Span(part[start:stop], each, rows) for each in dict.fromkeys([None, remainder])]
    on_device = [
        Span(values.to(DEVICE), None if remainder is None else remainder.to(DEVICE), rows)
        for values, remainder, rows in spans
    ]
    assert sums_of(on_device).tolist() == sums_of(spans).tolist()


def test_compilations_are_noticed() -> None:
    """Else the test above would prove nothing."""
    fragments = on_device(replace(KINDS["fp32"], grad=F16), [5], HYPER)  # which no other test here has
    with compilations() as compiled:
        prepared(fragments)(Step([HYPER]), 0)
    assert sum("_update_kernel" in name for name in compiled) == 1  # beside the sums', where this test is the first


def test_an_update_keeps_no_tensor_alive() -> None:
    (fragment,) = on_device(KINDS["bf16, remainder"], [100], HYPER_AMSGRAD)
    update = prepared([fragment])
    references = [weakref.ref(tensor) for tensor in (*fragment.tensors, fragment.count) if tensor is not None]
    update(Step([HYPER_AMSGRAD]), 0)
    del fragment
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert not update.keeps_tensors
