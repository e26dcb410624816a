"""Every kernel against the law in fp64, and against itself: cut anywhere, on any threads.

Triton's kernel runs under its interpreter here, on CPU tensors; ``tests/gpu`` runs it on a GPU. The bounds on rounding
are derived in ``tests/forms.py``; everything else is compared bit by bit.
"""

import gc
import importlib
import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterOptions, interpreter_builder

from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels import numba_kernel, torch_kernel, triton_kernel
from sharded_dadamw.kernels.operands import NORMS, Form, Operands
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.hyperparameters import Hyperparameters
from sharded_dadamw.update.precision import weight_of
from tests.forms import (
    BF16,
    F16,
    F32,
    HYPER,
    HYPER_AMSGRAD,
    KINDS,
    UNIT,
    Kind,
    apply_reference_,
    assert_obeys,
    bits_of,
    copied,
    cut,
    law_in_fp64,
    make_operands,
    run,
    same_bits,
    special_operands,
    value_of,
)

KERNELS: dict[str, ModuleType] = {"torch": torch_kernel, "numba": numba_kernel, "triton": triton_kernel}
ODD_SIZES = (13, 0, 64, 1, 4096 + 77)
DIVISOR = 1.7
"""Where a gradient is divided, and by the same in each test: a compiler makes another kernel for none."""


def form_of(kind: Kind, amsgrad: bool) -> Form:
    return make_operands(kind, [1], amsgrad=amsgrad)[0].form


def supported(name: str, kind: Kind) -> bool:
    kernel = KERNELS[name]
    return kernel is torch_kernel or bool(kernel.supports(form_of(kind, False)))


def each(label: str, *also: Any) -> Any:
    """The rows of a table: every kernel that takes a kind, the kind, and what else there is in a row."""
    return [
        pytest.param(KERNELS[name], kind, *also, id=f"{name}: {label}")
        for name, kind in ((name, KINDS[label]) for name in KERNELS)
        if supported(name, kind)
    ]


every_kernel_and_kind = pytest.mark.parametrize(("kernel", "kind"), [row for label in KINDS for row in each(label)])
FEW = ("fp32", "bf16, remainder, bf16 moments", "bf16 alone", "fp16, fp32 main")
"""Of every width and rounding; Triton's kernel is interpreted here, and on a GPU tests/gpu takes all kinds."""
every_kernel_and_kind_but_few_of_tritons = pytest.mark.parametrize(
    ("kernel", "kind"),
    [row for label in KINDS for row in each(label) if row.values[0] is not triton_kernel or label in FEW],
)
PLAIN_TOO = ("fp32", "bf16, remainder", "bf16 alone")
some_kinds = pytest.mark.parametrize(("kernel", "kind"), [row for label in PLAIN_TOO for row in each(label)])
with_amsgrad_and_some_without = pytest.mark.parametrize(
    ("kernel", "kind", "hyper"),
    [row for label in KINDS for row in each(label, HYPER_AMSGRAD)]
    + [row for label in PLAIN_TOO for row in each(label, HYPER)],
)
"""With amsgrad a kernel does all that it does without, and keeps a maximum."""


def test_every_kind_has_a_compiled_kernel_on_each_device() -> None:
    """fp16 on a CPU, where it is hardly trained in, is left to torch."""
    assert [label for label, kind in KINDS.items() if not supported("triton", kind)] == []
    assert [label for label, kind in KINDS.items() if not supported("numba", kind) and F16 not in (kind.param,)] == []


@pytest.fixture(scope="module", autouse=True)
def interpreter_that_prepares_once() -> Iterator[None]:
    """Triton's prepares the language for a launch, and again in every call within it, and looks for overflows.

    That is two thirds of its time, for nothing: what is prepared is there, and nobody is told of the overflows.
    """
    original = InterpretedFunction.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_ours = self.fn.__module__.startswith("sharded_dadamw")  # Triton's own functions know the language elsewhere
        return self.rewrite()(*args, **kwargs) if is_ours else original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call)
        patch.setattr(interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False))
        yield


# --- the law ---


@with_amsgrad_and_some_without
def test_a_kernel_obeys_the_law_within_fp32s_rounding_and_tells_the_norms(
    kernel: ModuleType, kind: Kind, hyper: Hyperparameters
) -> None:
    """Norms are those of what is stored, and of the update applied."""
    is_narrow = not kind.stochastic and kind.moments in (BF16, F16)  # whose second moments would freeze
    divisor = DIVISOR if hyper.amsgrad else 0.25
    if hyper.amsgrad:
        hyper = replace(hyper, beta1=0.95, beta2=0.99 if is_narrow else 0.9999)
    elif not is_narrow:
        hyper = replace(hyper, beta1=0.0, beta2=0.0)
    fragments = make_operands(kind, ODD_SIZES, amsgrad=hyper.amsgrad)
    laws = [law_in_fp64(fragment, hyper, divisor) for fragment in fragments]
    gradients = [fragment.grad.clone() for fragment in fragments]
    norms = run(kernel, fragments, hyper, divisor=divisor)
    assert all(torch.equal(fragment.grad, grad) for fragment, grad in zip(fragments, gradients, strict=True))
    for fragment, law in zip(fragments, laws, strict=True):
        assert_obeys(fragment, law, kind, decays_apart=kernel is torch_kernel)
    assert (norms is not None) == kernel.Update.fuses_norms
    if norms is None:
        return
    assert norms.shape == (len(fragments), len(NORMS)) and norms.dtype == torch.float64
    for row, fragment, law in zip(norms, fragments, laws, strict=True):
        stored = (law.values["g"], value_of(fragment), fragment.exp_avg.double(), law.values["update"])
        expected = torch.stack([tensor.square().sum() for tensor in stored])
        # The update is only as exact as fp32 makes it; gradients are divided in fp32.
        slack = torch.zeros(4, dtype=torch.float64)
        slack[0] = 2 * UNIT * expected[0]
        slack[3] = (2 * law.values["update"].abs() * law.slack["update"]).sum()
        assert ((row - expected).abs() <= 2e-6 * expected + slack).all(), f"{row} instead of {expected}"


@some_kinds
def test_without_an_initial_lr_the_whole_decay_applies(kernel: ModuleType, kind: Kind) -> None:
    hyper = replace(HYPER, lr=0.0, initial_lr=0.0, weight_decay=0.25)
    fragments = make_operands(kind, (100, 1), amsgrad=False)
    expected = [law_in_fp64(fragment, hyper) for fragment in fragments]
    run(kernel, fragments, hyper)
    for fragment, one in zip(fragments, expected, strict=True):
        assert_obeys(fragment, one, kind)


@pytest.mark.parametrize("label", ["bf16 alone", "fp16 alone"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_moments_rounded_to_the_nearest_go_to_even_from_a_tie(kernel: ModuleType, label: str) -> None:
    kind = KINDS[label]
    digit = 2.0**-7 if kind.moments is BF16 else 2.0**-10
    (fragment,) = make_operands(kind, [70], amsgrad=False)
    fragment.exp_avg.copy_(1.0 + digit * (torch.arange(70) % 4))
    fragment.grad.copy_(fragment.exp_avg.float() + digit)
    run(kernel, [fragment], replace(HYPER, beta1=0.5))
    half_way = torch.tensor([0.0, 2.0, 2.0, 4.0])[torch.arange(70) % 4]
    assert torch.equal(fragment.exp_avg.float(), 1.0 + digit * half_way)


@with_amsgrad_and_some_without
def test_zeros_denormals_huge_values_infinities_and_nan_go_where_the_law_sends_them(
    kernel: ModuleType, kind: Kind, hyper: Hyperparameters
) -> None:
    """The fp32 reference says where: it overflows and underflows as fp32 does."""
    fragment = special_operands(kind, amsgrad=hyper.amsgrad)
    (reference,) = copied([fragment])
    moments_are_finite = (fragment.exp_avg * 2).isfinite() & fragment.grad.isfinite()
    divisor = DIVISOR if hyper.amsgrad else 1.0
    run(kernel, [fragment], hyper, divisor=divisor)
    apply_reference_(reference, Step([hyper], torch.tensor(divisor)))
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        got, wanted = getattr(fragment, name), getattr(reference, name)
        if wanted is None:
            continue
        if kernel is torch_kernel:  # it interpolates, so that an infinite moment, minus itself, becomes nan
            got, wanted = got[moments_are_finite], wanted[moments_are_finite]
        # Another rounding may tip a value into the neighbouring one of its dtype; a fraction of an fp32 denormal may
        # be lost; fp16's range ends at the scale of these values, so that a last digit is large.
        digit = {F32: 1e-5, BF16: 2.0**-7, F16: 2.0**-10}[got.dtype]
        smallest = {F32: 1e-44, BF16: 2e-40, F16: 1e-7}[got.dtype]
        torch.testing.assert_close(got, wanted, rtol=digit, atol=smallest, equal_nan=True)


# --- bits ---


@every_kernel_and_kind_but_few_of_tritons
def test_a_cut_anywhere_changes_no_bit(kernel: ModuleType, kind: Kind) -> None:
    if kernel is triton_kernel:
        numel, cuts = triton_kernel._TILE + 77, [1, 7, 64, 1001, 1024, 2048]
    else:
        numel = 2 * 4096 + 77
        cuts = [1, 3, 7, 13, 100, 1001, numel - 1, *range(64, numel, 192)]
    whole = make_operands(kind, [numel], amsgrad=True)
    start = copied(whole)
    run(kernel, whole, HYPER_AMSGRAD, divisor=DIVISOR)
    for at in cuts:
        sliced = copied(start)
        run(kernel, cut(sliced[0], at), HYPER_AMSGRAD, divisor=DIVISOR)
        assert same_bits(sliced, whole), f"cut at {at}"


@pytest.mark.parametrize("label", ["fp32", "bf16, remainder, bf16 moments"])
def test_the_number_of_threads_changes_no_bit_on_a_cpu(label: str) -> None:
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        try:
            fragments = make_operands(KINDS[label], (200_003, 13, 70_000), amsgrad=True)
            norms = run(numba_kernel, fragments, HYPER_AMSGRAD, divisor=DIVISOR)
        finally:
            torch.set_num_threads(1)
        results.append((fragments, norms))
    for fragments, norms in results[1:]:
        assert same_bits(fragments, results[0][0])
        assert torch.equal(norms, results[0][1])


@pytest.mark.parametrize(
    ("kernel", "kind"), [row for label, kind in KINDS.items() if kind.stochastic for row in each(label)]
)
def test_every_kernel_rounds_stochastically_with_the_same_bits(kernel: ModuleType, kind: Kind) -> None:
    """Operands of few digits, on which fp32 makes no error in any order of operations: then all bits must agree."""
    hyper = replace(HYPER_AMSGRAD, beta1=0.5, beta2=0.5)
    for step in (1.0, 2.0, 70_000.0):
        (fragment,) = make_operands(kind, [1500], amsgrad=True)
        draw = torch.Generator().manual_seed(int(step))
        fragment.grad.copy_(torch.randint(-99, 99, (1500,), generator=draw) / 64)
        fragment.exp_avg.copy_(torch.randint(-120, 120, (1500,), generator=draw))
        for tensor in (fragment.exp_avg_sq, fragment.max_exp_avg_sq):
            assert tensor is not None
            tensor.copy_(torch.randint(1, 120, (1500,), generator=draw))
        fragment.count.fill_(step)
        reference = copied([fragment])
        run(kernel, [fragment], hyper)
        apply_reference_(reference[0], Step([hyper]))
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(getattr(fragment, name), getattr(reference[0], name)), name


# --- norms ---


def test_norms_of_twenty_million_elements_are_right_to_1e6_and_the_same_bits_every_time() -> None:
    """Twenty times the same million and three elements, so that the truth is twenty times that of one."""
    (block,) = make_operands(KINDS["fp32"], [1_000_003], amsgrad=True)
    columns = [None if tensor is None else tensor.repeat(20) for tensor in block.tensors]
    fragment = Operands(*columns, block.count)  # type: ignore[arg-type]
    (start,) = copied([fragment])
    law = law_in_fp64(block, HYPER_AMSGRAD, DIVISOR)
    norms = run(numba_kernel, [fragment], HYPER_AMSGRAD, divisor=DIVISOR)
    truth = [law.values["g"], fragment.param[:1_000_003].double(), fragment.exp_avg[:1_000_003].double()]
    expected = torch.stack([20 * tensor.square().sum() for tensor in (*truth, law.values["update"])])
    assert norms is not None
    torch.testing.assert_close(norms[0].sqrt(), expected.sqrt(), rtol=1e-6, atol=0.0)
    again = run(numba_kernel, [start], HYPER_AMSGRAD, divisor=DIVISOR)
    assert again is not None and torch.equal(norms, again)


# --- skipping ---


@every_kernel_and_kind
def test_a_skipped_update_leaves_every_byte_and_its_norms_say_so(kernel: ModuleType, kind: Kind) -> None:
    fragments = make_operands(kind, (13, 1, 200, 300), amsgrad=True)
    fragments[2].grad[17] = float("nan")
    fragments[3].exp_avg[9] = float("nan")  # what must not be laundered into another nan either
    before = copied(fragments)
    norms = run(kernel, fragments, HYPER_AMSGRAD, divisor=DIVISOR, found_inf=1.0)
    assert same_bits(fragments, before)
    assert (norms is not None) == kernel.Update.fuses_norms
    if norms is not None:
        assert norms[2, 0].isnan() and norms[3, 2].isnan() and norms[:2].isfinite().all()
        assert not norms[:, 3].any(), "nothing was subtracted"
        expected = torch.stack([value_of(fragment).square().sum() for fragment in fragments])
        torch.testing.assert_close(norms[:, 1], expected, rtol=1e-6, atol=0.0)
    control = copied(before)
    run(kernel, fragments[:2], HYPER_AMSGRAD, divisor=DIVISOR, found_inf=0.0)
    run(kernel, control[:2], HYPER_AMSGRAD, divisor=DIVISOR)
    assert same_bits(fragments[:2], control[:2]), "a flag of 0 is no skip"


# --- weights that were written into ---

TIE = 1 + 2**-8
WRITTEN = [0.0, 1e-40, -1e-20, 1.0, 1 + 2**-7, TIE, -TIE, 1e19, math.inf, math.nan]


@pytest.mark.parametrize(
    ("kernel", "kind"), [row for label, kind in KINDS.items() if kind.main is F32 for row in each(label)]
)
@pytest.mark.parametrize("found_inf", [None, 1.0])
def test_a_weight_that_was_written_into_counts_and_not_its_main_parameter(
    kernel: ModuleType, kind: Kind, found_inf: float | None
) -> None:
    """Every value of one meets every value of the other; a tie that others have rounded is none that was written."""
    grid = torch.cartesian_prod(torch.tensor(WRITTEN), torch.tensor(WRITTEN))
    (written,) = make_operands(kind, [len(grid)], amsgrad=False)
    written.param.copy_(grid[:, 0])
    main, param = grid[:, 1], written.param
    is_rounded = (main.to(kind.param) == param) | (weight_of(main, kind.param) == param)
    (control,) = copied([replace(written, main=torch.where(is_rounded, main, param.float()))])
    assert written.main is not None and 10 <= is_rounded.sum() < len(grid)
    written.main.copy_(main)
    norms = [run(kernel, [one], HYPER, divisor=DIVISOR, found_inf=found_inf) for one in (written, control)]
    assert found_inf is not None or same_bits([written], [control])
    assert norms[0] is None or torch.equal(norms[0].nan_to_num(), norms[1].nan_to_num())


# --- long runs ---


@pytest.mark.parametrize("kernel", [torch_kernel, numba_kernel], ids=["torch", "numba"])
def test_a_remainder_gives_the_bits_of_an_fp32_main_parameter(kernel: ModuleType) -> None:
    """With moments in bf16, which both round with the same random bits. Long runs are in tests/test_precision.py."""
    (remainder,) = make_operands(KINDS["bf16, remainder, bf16 moments"], [517], amsgrad=True)
    main = replace(copied([remainder])[0], main=value_of(remainder).float())
    for step in range(20):
        for one in (remainder, main):
            one.grad.copy_(torch.randn(517, generator=torch.Generator().manual_seed(step)))
            one.count.fill_(step + 1.0)
            run(kernel, [one], HYPER_AMSGRAD, divisor=DIVISOR)
    assert torch.equal(value_of(remainder), value_of(main))
    assert same_bits(*([replace(one, main=None)] for one in (remainder, main)))


# --- the choice ---


def test_a_cpu_runs_numba_cuda_runs_triton_and_the_rest_runs_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "_DEVICE_TYPE", "cuda")  # as without the interpreter
    fp32 = form_of(KINDS["fp32"], False)
    assert kernels.kernel_for(fp32) is numba_kernel.Update
    assert kernels.kernel_for(fp32._replace(device=torch.device("cuda"))) is triton_kernel.Update
    assert (
        kernels.kernel_for(fp32._replace(param=torch.float64, grad=torch.float64, moments=torch.float64))
        is torch_kernel.Update
    )
    assert kernels.kernel_for(fp32._replace(device=torch.device("meta"))) is torch_kernel.Update


def test_without_the_compiler_torchs_kernel_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    kernels.compiled_kernel.cache_clear()
    try:
        with caplog.at_level(logging.INFO, "sharded_dadamw"):
            for _ in range(3):
                assert kernels.kernel_for(form_of(KINDS["fp32"], False)) is torch_kernel.Update
        (record,) = caplog.records
        assert "pip install 'sharded_dadamw[cpu]'" in record.getMessage()
    finally:
        kernels.compiled_kernel.cache_clear()


@pytest.mark.parametrize("kernel", [numba_kernel, triton_kernel], ids=["numba", "triton"])
def test_a_prepared_update_keeps_no_tensor_alive(kernel: ModuleType) -> None:
    fragments = make_operands(KINDS["fp32"], (100,), amsgrad=True)
    update = kernel.Update(fragments)
    watched = weakref.ref(fragments[0].grad)
    del fragments
    gc.collect()
    assert watched() is None
    assert update.keeps_tensors is False


def test_an_update_of_nothing_is_nothing() -> None:
    for kernel in KERNELS.values():
        fragments = make_operands(KINDS["fp32"], (0, 0), amsgrad=False)
        norms = run(kernel, fragments, HYPER)
        assert (norms is not None) == kernel.Update.fuses_norms
        assert norms is None or (norms.shape == (2, 4) and not norms.any())
    assert bits_of(make_operands(KINDS["fp32"], (0,), amsgrad=False))[0].numel() == 0


# --- memory that is not what it seems ---


def test_wrapped_negated_and_foreign_tensors_are_updated_by_torchs_operations() -> None:
    """A kernel that goes by addresses would read what is not there."""
    (plain,) = make_operands(KINDS["fp32"], [100], amsgrad=False)
    (control,) = copied([plain])
    run(numba_kernel, [control], HYPER)
    grad, half = plain.grad, plain.exp_avg_sq.bfloat16()
    disguised = {
        "negated": replace(plain, grad=torch._neg_view(-grad)),
        "wrapped": replace(plain, grad=TwoTensor(grad, grad.clone())),
        "counted in fp64": replace(plain, count=plain.count.double()),
        "of two dtypes": replace(plain, exp_avg_sq=half),
    }
    for name, fragment in disguised.items():
        assert kernels.kernel_for(fragment.form) is torch_kernel.Update, name
        if name != "of two dtypes":
            (fragment,) = [
                replace(fragment, **{k: getattr(plain, k).clone() for k in ("param", "exp_avg", "exp_avg_sq")})
            ]
            run(torch_kernel, [fragment], HYPER)
            torch.testing.assert_close(fragment.param, control.param, rtol=1e-6, atol=1e-7)


def test_a_damaged_or_missing_cache_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    control = make_operands(KINDS["fp32"], [99], amsgrad=False)
    updated = []
    for keep_bytes in (20, None):
        updated.append(copied(control))
        numba_kernel._compile.cache_clear()
        run(numba_kernel, updated[-1], HYPER)
        kept = [file for file in tmp_path.rglob("*") if file.suffix in (".nbi", ".nbc")]
        assert kept, "nothing was kept"
        for file in kept:
            file.write_bytes(file.read_bytes()[:keep_bytes])
    numba_kernel._compile.cache_clear()
    assert all(same_bits(each, updated[0]) for each in updated) and not same_bits(updated[0], control)
