"""Time the update alone, in every precision, beside a copy of memory and beside other optimizers' updates.

    python -m scripts.bench kernel                                     on the GPU if there is one, else on the CPU
    python -m scripts.bench kernel --device cpu --numel 1,16 --threads 1,2 --rounds 20
    python -m scripts.bench kernel --json kernel.json --markdown kernel.md

An update is bound by memory, so what counts is how close it comes to a plain copy:

    GB/s = bytes that one pass has to read and write, counted from the dtypes / measured time
    % of copy = that, as a share of what torch's copy_ of a large fp32 tensor reads and writes per second

Everybody updates the same tensors, parts of one arena; successive calls go to different parts, so that no call finds in
a cache what an earlier one has left there. In every round each contender is timed once, in an order that rotates, and
those that are compared in the same dtypes stand next to each other; ratios are taken within a round.
"""

import importlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cache, partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from scripts.bench import harness
from scripts.bench.harness import Clock, Spread
from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.kernels.operands import Form, Operands
from sharded_dadamw.layout.bucket_layout import ALIGNMENT
from sharded_dadamw.update.adamw import Step
from sharded_dadamw.update.hyperparameters import Hyperparameters

LAW = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 1e-5}
HYPER = Hyperparameters(**LAW, initial_lr=1e-5, amsgrad=False)
BETAS = (HYPER.beta1, HYPER.beta2)
STEP = 10.0
SEED = 0

PIECES = 1000
CRUMBS, CRUMB = 10_000, 13
"""A case of its own: so many parameters of so few elements."""
UNIT = 256
"""Sizes are multiples of it: torchao's moments in 8 bits come in such blocks."""

MAX_PLACES = 64
"""Parts of the arena that take turns, at most."""
MAX_FRAGMENTS = 50_000
"""Fragments of all places together, above which making them ready takes longer than timing them."""
BYTES_PER_ELEMENT = 44
"""32 in the arena, and 12 for what peers keep and compute in between."""
MAX_8BIT_ON_CPU = 4_000_000
"""Elements, above which quantising them takes longer than everything else."""
SAMPLE_S = 0.01
"""What a sample should last, if no more than MAX_CALLS calls are needed for that."""
MAX_CALLS = 16
HEAD_START_CYCLES = 4_000_000
"""About 2 ms of a GPU's time, in which the host can hand over a whole sample."""


class Device(StrEnum):
    """Where to measure."""

    CPU = "cpu"
    CUDA = "cuda"


DEFAULT_NUMEL = {Device.CPU: "1,16,50", Device.CUDA: "1,64,256,1000"}
DEFAULT_ROUNDS = {Device.CPU: 10, Device.CUDA: 20}


class Precision(NamedTuple):
    """A row of the table: in what dtypes an optimizer keeps what it updates.

    Attributes:
        fused: Torch's fused kernel in the same dtypes, where there is one.
    """

    title: str
    param: torch.dtype
    main: torch.dtype | None
    moments: torch.dtype
    is_stochastic: bool = False
    fused: str | None = None


FUSED_FP32 = "torch._fused_adamw_, fp32"
FP32 = Precision("fp32", torch.float32, None, torch.float32, fused=FUSED_FP32)
PRECISIONS = (
    FP32,
    Precision("fp32, moments bf16", torch.float32, None, torch.bfloat16, is_stochastic=True),
    Precision("bf16, main fp32", torch.bfloat16, torch.float32, torch.float32),
    Precision("bf16, remainder int16", torch.bfloat16, torch.int16, torch.float32),
    Precision("bf16, remainder int16, moments bf16", torch.bfloat16, torch.int16, torch.bfloat16, is_stochastic=True),
    Precision("bf16 throughout", torch.bfloat16, None, torch.bfloat16, fused="torch._fused_adamw_, bf16"),
)


class Arena:
    """The tensors that everybody updates, of ``numel`` random elements, none denormal; a place is a part of them.

    The values of a bf16 row that has an fp32 main parameter are the fp32 rows' parameters.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.device = device
        random = torch.Generator(device).manual_seed(SEED)

        def empty(dtype: torch.dtype) -> Tensor:
            return torch.empty(numel, dtype=dtype, device=device)

        dtypes = (torch.float32, torch.bfloat16)
        self._param = {dtype: empty(dtype).normal_(std=0.02, generator=random) for dtype in dtypes}
        self._grad = {dtype: empty(dtype).normal_(std=1e-2, generator=random) for dtype in dtypes}
        self._exp_avg = {dtype: empty(dtype).normal_(std=1e-2, generator=random) for dtype in dtypes}
        self._exp_avg_sq = {dtype: empty(dtype).uniform_(0.5e-4, 1.5e-4, generator=random) for dtype in dtypes}
        self._max_exp_avg_sq = {dtype: moment.clone() for dtype, moment in self._exp_avg_sq.items()}
        remainder = empty(torch.int16).random_(-(2**15), 2**15, generator=random)
        self._main = {None: None, torch.float32: self._param[torch.float32], torch.int16: remainder}
        self._steps = torch.full((CRUMBS,), STEP, device=device).unbind()

    def operands(self, precision: Precision, amsgrad: bool, bounds: Sequence[int], start: int = 0) -> list[Operands]:
        """Fragments between neighbouring bounds, which are counted from ``start``; each has a step count of its own."""
        param, grad, main = self._param[precision.param], self._grad[precision.param], self._main[precision.main]
        exp_avg, exp_avg_sq = self._exp_avg[precision.moments], self._exp_avg_sq[precision.moments]
        maximum = self._max_exp_avg_sq[precision.moments] if amsgrad else None
        tensors = (param, grad, exp_avg, exp_avg_sq, maximum, main)
        fragments = []
        for number, (begin, end) in enumerate(pairwise(bounds)):
            parts = (None if tensor is None else tensor[start + begin : start + end] for tensor in tensors)
            first_element = start + begin if precision.is_stochastic else None
            fragments.append(Operands(*parts, self._steps[number], first_element))
        return fragments

    def copies(self) -> dict[str, "Task"]:
        """The yardstick: one large copy, of something that may overwrite what is there. And the same in place."""
        source, target = self._exp_avg_sq[torch.float32], self._max_exp_avg_sq[torch.float32]
        tasks = {"copy": Task([partial(target.copy_, source)], 2 * source.nbytes)}
        if self.device.type == "cpu":
            tasks["in place"] = Task([partial(target.mul_, 1.0)], 2 * source.nbytes)
        return tasks


class Task(NamedTuple):
    """What is timed.

    Attributes:
        calls: The same work in different places, each to be done in its turn.
        num_bytes: What one call has to read and write.
    """

    calls: Sequence[Callable[[], object]]
    num_bytes: float


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        kernel: Which of ours runs, if it is about ours.
        plain: The task that it is about, by name; also the line's title.
        fused: Torch's fused kernel on the same fragments, in the same dtypes if it has them.
        in_other_dtypes: Whether it has not, and ``fused`` is the one in fp32.
        flat: The same on one flat tensor, where ``plain`` is about many.
    """

    kernel: str
    bytes_per_element: float
    plain: str
    fused: str | None = None
    in_other_dtypes: bool = False
    flat: str | None = None


def bytes_per_element(form: Form) -> int:
    """What one pass over an element reads and writes."""
    once, both = [form.grad], [form.moments] * (3 if form.amsgrad else 2)
    if form.main is torch.float32:
        once.append(form.param)  # the image of its main parameter, never read
        both.append(form.main)
    else:
        both += [form.param] if form.main is None else [form.param, form.main]
    return 2 * sum(dtype.itemsize for dtype in both) + sum(dtype.itemsize for dtype in once)


def kernel_name(form: Form) -> str:
    """Which of our kernels updates this form."""
    return kernels.kernel_for(form).__name__.rpartition(".")[2].removesuffix("_kernel")


def bounds_of(numel: int, pieces: int) -> list[int]:
    """Where to cut into so many about equal pieces; on multiples of ALIGNMENT, if they are that large."""
    unit = min(ALIGNMENT, numel // pieces)
    return [number * (numel // unit) // pieces * unit for number in range(pieces)] + [numel]


def fused(fragments: Sequence[Operands]) -> Callable[[], object]:
    """Torch's fused kernel, ready to be called."""
    *columns, maxima, _ = ([*column] for column in zip(*(each.tensors for each in fragments), strict=True))
    amsgrad = maxima[0] is not None
    steps = [each.count for each in fragments]
    law = partial(torch._fused_adamw_, **LAW, amsgrad=amsgrad, maximize=False)
    return partial(law, *columns, maxima if amsgrad else [], steps)


def torch_foreach(at: Operands) -> Callable[[], object]:
    """torch.optim.AdamW in its foreach flavour."""
    optimizer = torch.optim.AdamW([at.param], HYPER.lr, BETAS, HYPER.eps, HYPER.weight_decay, foreach=True)
    optimizer.state[at.param] = {"step": torch.tensor(STEP), "exp_avg": at.exp_avg, "exp_avg_sq": at.exp_avg_sq}
    at.param.grad = at.grad
    return optimizer.step


def installed(module: str, name: str, at: Operands, **options: Any) -> Callable[[], object]:
    """An optimizer of another package; keeps moments of its own."""
    make = getattr(importlib.import_module(module), name)
    optimizer = make([at.param], lr=HYPER.lr, betas=BETAS, eps=HYPER.eps, weight_decay=HYPER.weight_decay, **options)
    at.param.grad = at.grad
    return optimizer.step


@cache
def composer_adamw() -> Callable[..., None] | None:
    """Composer's own, if it is installed and can be imported."""
    try:
        return importlib.import_module("composer.optim").DecoupledAdamW.adamw
    except ImportError:
        return None


def composer_loop(at: Operands) -> Callable[[], object]:
    """Composer's function, or what it does."""
    if (adamw := composer_adamw()) is None:
        return partial(transcribed_adamw, at)
    lists = [[at.param], [at.grad], [at.exp_avg], [at.exp_avg_sq], [], [at.count]]
    return partial(adamw, *lists, **LAW, initial_lr=HYPER.initial_lr, amsgrad=False)


def transcribed_adamw(at: Operands) -> None:
    """The operations of ``composer.optim.DecoupledAdamW.adamw``, in its order; like that one it waits for the step."""
    step = at.count.item()
    at.param.mul_(1 - HYPER.weight_decay * (HYPER.lr / HYPER.initial_lr))
    at.exp_avg.mul_(HYPER.beta1).add_(at.grad, alpha=1 - HYPER.beta1)
    at.exp_avg_sq.mul_(HYPER.beta2).addcmul_(at.grad, at.grad, value=1 - HYPER.beta2)
    denom = (at.exp_avg_sq.sqrt() / math.sqrt(1 - HYPER.beta2**step)).add_(HYPER.eps)
    at.param.addcdiv_(at.exp_avg, denom, value=-HYPER.lr / (1 - HYPER.beta1**step))


class Peer(NamedTuple):
    """An update of one flat fp32 parameter, by other means than our kernels.

    Attributes:
        build: Makes it ready to be called, for a place.
        package: What to install where that raises ImportError.
        moments: Bytes of a moment per element.
    """

    title: str
    build: Callable[[Operands], Callable[[], object]]
    package: str = "torch"
    moments: float = torch.float32.itemsize


BYTES_8BIT = 1 + 4 / UNIT
"""A code, and a share of the scale of its block."""


def peers() -> list[Peer]:
    """Those that may be installed."""
    composer = "Composer's loop, transcribed" if composer_adamw() is None else "composer.optim.DecoupledAdamW.adamw"
    optimi = partial(installed, "optimi", "AdamW", decouple_lr=True)
    torchao, torchao_8bit = (partial(installed, "torchao.optim", name) for name in ("_AdamW", "AdamW8bit"))
    return [
        Peer("torch.optim.AdamW(foreach=True), fp32", torch_foreach),
        Peer(f"{composer}, fp32", composer_loop),
        Peer("optimi.AdamW(decouple_lr=True), fp32", optimi, "torch-optimi"),
        Peer("torchao.optim._AdamW, fp32", torchao, "torchao"),
        Peer("torchao.optim.AdamW8bit, fp32", torchao_8bit, "torchao", BYTES_8BIT),
    ]


class Case:
    """One size: what is timed, and the rows that are made of it.

    Attributes:
        numel: Elements that every task updates.
        tasks: By name, in the order in which they stand next to each other.
        rows: In the order of the table.
        fused_rows: Of torch's fused kernel, otherwise a yardstick; not yet among ``rows``.
        remarks: What is not in the table, and why.
    """

    def __init__(self, arena: Arena, numel: int, num_places: int) -> None:
        self.numel = numel
        self.tasks = arena.copies()
        self.rows: list[Row] = []
        self.fused_rows: list[Row] = []
        self.remarks: list[str] = []
        self._arena = arena
        self._num_places = num_places

    def add(self, precision: Precision, *, amsgrad: bool = False, pieces: int = 1) -> None:
        """Our update, and beside it torch's fused one where it has these dtypes."""
        places = self._places(precision, amsgrad=amsgrad, pieces=pieces)
        form = places[0][0].form
        size = bytes_per_element(form)
        variant = ", amsgrad" if amsgrad else ""
        cut = f", {pieces:,} pieces" if pieces > 1 else ""
        flat, flat_fused = f"{precision.title}{variant}", f"{precision.fused or FUSED_FP32}{variant}"
        plain, yardstick = f"{flat}{cut}", f"{flat_fused}{cut}"
        row = Row(kernel_name(form), size, plain, yardstick, in_other_dtypes=precision.fused is None)
        self.rows.append(replace(row, flat=flat) if cut else row)

        updates = [kernels.prepare(fragments) for fragments in places]
        step = Step([replace(HYPER, amsgrad=amsgrad)])
        self._time(plain, size, [partial(update, step, 0) for update in updates])
        if precision.fused is not None:
            self._time(yardstick, size, [fused(fragments) for fragments in places])
            self.fused_rows.append(Row("", size, yardstick, flat=flat_fused if cut else None))

    def add_peer(self, peer: Peer) -> None:
        """An update of fp32 parameters, if it is installed."""
        in_8_bits = peer.moments == BYTES_8BIT
        if in_8_bits and self._arena.device.type == "cpu" and self.numel > MAX_8BIT_ON_CPU:
            self.remarks.append(f"{peer.title}, {millions(self.numel)}: left out, since torchao takes seconds on a CPU")
            return
        places = [fragments[0] for fragments in self._places(FP32)]
        try:
            calls = [peer.build(at) for at in places]
        except ImportError:
            self.remarks.append(f"{peer.title}: not installed: pip install {peer.package}")
            return
        size = 3 * 4 + 2 * 2 * peer.moments
        self.rows.append(Row("", size, peer.title, fused=FUSED_FP32, in_other_dtypes=in_8_bits))
        self._time(peer.title, size, calls)

    def _places(self, precision: Precision, *, amsgrad: bool = False, pieces: int = 1) -> list[list[Operands]]:
        bounds = bounds_of(self.numel, pieces)
        num_places = max(1, min(self._num_places, MAX_FRAGMENTS // pieces))
        return [self._arena.operands(precision, amsgrad, bounds, place * self.numel) for place in range(num_places)]

    def _time(self, name: str, size: float, calls: Sequence[Callable[[], object]]) -> None:
        self.tasks[name] = Task(calls, size * self.numel)


def full_case(arena: Arena, numel: int, num_places: int, *, with_peers: bool) -> Case:
    """Everything in one size."""
    case = Case(arena, numel, num_places)
    for precision in PRECISIONS:
        for amsgrad in (False, True):
            case.add(precision, amsgrad=amsgrad)
    case.add(FP32, pieces=PIECES)
    case.rows += case.fused_rows
    for peer in peers() if with_peers else []:
        case.add_peer(peer)
    return case


def crumbs_case(arena: Arena, num_places: int) -> Case:
    """Many parameters of a few elements each, and one of as many elements as all of them."""
    case = Case(arena, CRUMBS * CRUMB, num_places)
    case.add(FP32)
    case.add(FP32, pieces=CRUMBS)
    case.rows += case.fused_rows
    return case


class Meter:
    """Takes samples; remembers whose turn it is among the places, whatever is timed."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = Clock(device)
        self._turns = count()

    def seconds(self, task: Task, num_calls: int) -> float:
        """Time of a call, over so many calls; on a GPU its own time, with a head start for the host."""
        self._clock.settle()
        if self._on_gpu:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start = self._clock.mark()
        for turn in islice(self._turns, num_calls):
            task.calls[turn % len(task.calls)]()
        end = self._clock.mark()
        self._clock.settle()
        return self._clock.seconds(start, end) / num_calls


def measure(case: Case, meter: Meter, rounds: int) -> dict[str, Tensor]:
    """Seconds per call of every task in every round, [rounds] each; first drops what cannot be run."""
    num_calls = {}
    for name, task in list(case.tasks.items()):
        try:
            meter.seconds(task, len(task.calls))  # compiles, allocates and touches everything once
            seconds = min(meter.seconds(task, 1) for _ in range(2))
        except Exception as error:
            del case.tasks[name]
            failure = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            reason = "does not fit" if isinstance(error, torch.OutOfMemoryError) else failure
            case.remarks.append(f"{name}, {millions(case.numel)}: {reason}")
        else:
            num_calls[name] = min(MAX_CALLS, max(1, math.ceil(SAMPLE_S / seconds)))
    names = list(num_calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number * len(names) // rounds
        order = names[first:] + names[:first]
        for name in order if number % 2 == 0 else reversed(order):
            samples[name].append(meter.seconds(case.tasks[name], num_calls[name]))
    return {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in samples.items()}


@dataclass(frozen=True)
class Result:
    """A row's figures; those relative to others are None where there is nothing of the kind.

    Attributes:
        ratio: To torch's fused kernel, in time.
        ratio_to_flat: Of many fragments to one, in time.
    """

    row: Row
    numel: int
    threads: int | None
    seconds: Spread
    gb_per_s: float
    percent_of_copy: Spread
    ratio: Spread | None
    ratio_to_flat: Spread | None

    @property
    def cells(self) -> dict[str, str]:
        """Texts by the titles of their columns."""
        mark = " (fp32)" if self.row.in_other_dtypes else ""
        return {
            "update": self.row.plain,
            "elements": millions(self.numel),
            "threads": str(self.threads or ""),
            "kernel": self.row.kernel,
            "B/element": f"{self.row.bytes_per_element:.3g}",
            "ms": f"{1e3 * self.seconds.median:.3g}",
            "GB/s": f"{self.gb_per_s:.3g}",
            "% of copy": f"{self.percent_of_copy.median:.0f}",
            "time / torch fused": f"{self.ratio}{mark}" if self.ratio else "",
            "time / one flat tensor": str(self.ratio_to_flat or ""),
        }


def results_of(case: Case, samples: dict[str, Tensor], threads: int | None) -> list[Result]:
    """One per row of what could be run; ratios are taken within rounds."""

    def ratio(name: str | None, to: str | None) -> Spread | None:
        return Spread.of(samples[name] / samples[to]) if name in samples and to in samples else None

    def percent_of_copy(name: str) -> Spread:
        rates = {task: case.tasks[task].num_bytes / samples[task] for task in (name, "copy")}
        return Spread.of(100 * rates[name] / rates["copy"])

    results = []
    for row in case.rows:
        if row.plain not in samples:
            continue
        seconds = Spread.of(samples[row.plain])
        results.append(
            Result(
                row,
                case.numel,
                threads,
                seconds,
                gb_per_s=case.tasks[row.plain].num_bytes / seconds.median / 1e9,
                percent_of_copy=percent_of_copy(row.plain),
                ratio=ratio(row.plain, row.fused),
                ratio_to_flat=ratio(row.plain, row.flat),
            )
        )
    return results


def millions(numel: int) -> str:
    """A number of elements, to be read."""
    return f"{numel / 1e6:.3g} M" if numel < 1e9 else f"{numel / 1e9:.3g} B"


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that the device is known to have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=2**25)


def free_bytes(device: torch.device) -> float:
    """Memory that can be allocated, as far as that is known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), math.inf)


def heading(around: dict[str, Any], rounds: int) -> list[str]:
    """Date, hardware and versions."""
    return [
        harness.sentence_of(around),
        f"{rounds} rounds; medians, with quartiles in brackets; ratios are taken within a round.",
    ]


NOTES = (
    "GB/s and % of copy count what one pass has to read and write (B/element), however many passes were made. "
    "torch's copy_ of fp32, counted in the same way, is the 100 %.",
    "Our updates yield squared norms, which peers do not. Torch fused is torch's kernel on the same fragments in the "
    "same dtypes, or, where it has none in these, in fp32, and then marked (fp32).",
)
CPU_NOTE = (
    "A processor may first fetch the lines that a copy is about to overwrite, which nobody counts; an update has read "
    "them anyway. So it can exceed 100 %; 'in place' is what memory yields where every line that is written was read."
)
GPU_NOTE = "Times are the GPU's own: the host hands over a sample's calls while the GPU waits, for about 2 ms."


def table_of(results: Sequence[Result], hidden: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, without the hidden columns."""
    rows = [{title: text for title, text in result.cells.items() if title not in hidden} for result in results]
    return list(rows[0]) if rows else [], [list(row.values()) for row in rows]


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    device: Device
    numels: tuple[int, ...]
    threads: tuple[int | None, ...]
    rounds: int
    with_peers: bool


class Benchmark:
    """All cases of a plan, one after the other.

    Attributes:
        results: In the order of the table.
        rounds: Per case its seconds per call, by task.
        remarks: What is not in the table, and why.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan = plan
        self.results: list[Result] = []
        self.rounds: list[dict[str, Any]] = []
        self.remarks: list[str] = []
        self._console = console
        self._device = torch.device(plan.device.value)
        self._cache_bytes = cache_bytes(self._device)

    def run(self) -> None:
        """Measure, and print each case when it is done."""
        sizes = sorted(filter(self._fits, self.plan.numels))
        arena = Arena(max(numel * self._num_places(numel) for numel in [*sizes, CRUMBS * CRUMB]), self._device)
        for threads in self.plan.threads:
            if threads is not None:
                torch.set_num_threads(threads)
                torch.compiler.reset()  # what torch compiles for CPUs, as peers have it do, is for a number of threads
            self._measure(crumbs_case(arena, self._num_places(CRUMBS * CRUMB)), threads)
            for numel in sizes:
                case = full_case(arena, numel, self._num_places(numel), with_peers=self.plan.with_peers)
                self._measure(case, threads)

    def _num_places(self, numel: int) -> int:
        """So many that they do not fit into the cache, in the narrowest dtypes: 8 bytes per element."""
        return min(MAX_PLACES, math.ceil(self._cache_bytes / (8 * numel)))

    def _fits(self, numel: int) -> bool:
        needed, free = BYTES_PER_ELEMENT * numel * self._num_places(numel), free_bytes(self._device)
        if needed > 0.9 * free:
            self.remarks.append(f"{millions(numel)}: needs {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")
        return needed <= 0.9 * free

    def _measure(self, case: Case, threads: int | None) -> None:
        samples = measure(case, Meter(self._device), self.plan.rounds)
        results = results_of(case, samples, threads)
        on = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
        medians = {name: float(samples[name].median()) for name in ("copy", "in place") if name in samples}
        rates = (f"{name} {case.tasks[name].num_bytes / median / 1e9:.1f} GB/s" for name, median in medians.items())
        title = f"{millions(case.numel)} elements{on}: {', '.join(rates)}"
        harness.print_table(self._console, *table_of(results, ("elements", "threads")), title)
        self.results += results
        self.remarks += [remark for remark in case.remarks if remark not in self.remarks]
        seconds = {name: values.tolist() for name, values in samples.items()}
        self.rounds.append({"numel": case.numel, "threads": threads, "seconds": seconds})


def main(
    device: Annotated[Device | None, typer.Option(help="By default a GPU, if there is one.")] = None,
    numel: Annotated[str | None, typer.Option(help="Sizes in millions of elements, separated by commas.")] = None,
    threads: Annotated[str, typer.Option(help="On the CPU: numbers of torch's threads, separated by commas.")] = "1,2",
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples of each row.")] = None,
    peers: Annotated[bool, typer.Option(help="Whether to time others' optimizers too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write, with all samples.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="File to write, with the table.")] = None,
) -> None:
    """Time the update alone, beside a copy of memory and other optimizers' updates."""
    warnings.simplefilter("ignore")  # peers warn about their own use of what torch has deprecated
    device = device or (Device.CUDA if torch.cuda.is_available() else Device.CPU)
    sizes = [float(size) * 1e6 for size in (numel or DEFAULT_NUMEL[device]).split(",")]
    plan = Plan(
        device=device,
        numels=tuple(max(1, round(size / UNIT)) * UNIT for size in sizes),
        threads=tuple(int(number) for number in threads.split(",")) if device is Device.CPU else (None,),
        rounds=rounds or DEFAULT_ROUNDS[device],
        with_peers=peers,
    )
    console = harness.console_of(240)
    packages = ("numba", "triton", "torchao", "torch-optimi", "mosaicml")
    around = harness.surroundings(*packages, device=torch.device(device.value))
    lines = heading(around, plan.rounds)
    harness.print_lines(console, lines)
    benchmark = Benchmark(plan, console)
    benchmark.run()
    notes = [*NOTES, CPU_NOTE if device is Device.CPU else GPU_NOTE, *benchmark.remarks]
    harness.print_lines(console, notes)
    if json_file is not None:
        record = {
            "plan": asdict(plan),
            "surroundings": around,
            "rows": [asdict(result) for result in benchmark.results],
            "rounds": benchmark.rounds,
            "remarks": benchmark.remarks,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")
    if markdown_file is not None:
        table = harness.markdown_table(*table_of(benchmark.results, () if device is Device.CPU else ("threads",)))
        markdown_file.write_text("\n".join([*lines, "", *table, "", *(f"- {note}" for note in notes)]) + "\n")
