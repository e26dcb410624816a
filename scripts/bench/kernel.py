"""The update alone, in every precision, beside a copy of memory and beside other optimizers' updates."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from scripts.bench import harness
from scripts.bench.harness import Benchmark, Clock, Device, Report, Spread
from scripts.bench.peers import HYPER, LAW, STEP, Peer, peers_of_an_update
from sharded_dadamw.kernels import choose
from sharded_dadamw.kernels.operands import Form, Operands
from sharded_dadamw.layout.bucket_layout import ALIGNMENT
from sharded_dadamw.update.adamw import Step

PIECES = 1000
CRUMBS, CRUMB = 10_000, 13  # a case of its own: so many parameters of so few elements
MAX_PLACES = 64  # parts of the arena that take turns, at most
MAX_FRAGMENTS = 50_000  # of all places together: making more of them ready takes longer than timing them
BYTES_PER_ELEMENT = 44  # 32 in the arena, and 12 for what peers keep and compute in between
SAMPLE_S, MAX_CALLS = 0.01, 16  # what a sample should last, if no more calls are needed for that
HEAD_START_CYCLES = 4_000_000  # about 2 ms of a GPU's time, in which the host can hand over a whole sample

COPY, IN_PLACE = "copy", "in place"
LINES = (
    "GB/s and % of copy count what one pass has to read and write (B/element), however many passes were made. "
    "torch's copy_ of fp32, counted in the same way, is the 100 %.",
    "Our updates yield squared norms, which peers do not. Torch fused is torch's kernel on the same fragments in the "
    "same dtypes, or, where it has none in these, in fp32, and then marked (fp32).",
)
LINE_OF_DEVICE = {
    Device.CPU: "A processor may first fetch the lines that a copy is about to overwrite, which nobody counts; an "
    "update has read them anyway. So it can exceed 100 %; 'in place' is what memory yields where every line that is "
    "written was read.",
    Device.CUDA: "Times are the GPU's own: the host hands over a sample's calls while the GPU waits, for about 2 ms.",
}


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


@dataclass(frozen=True, kw_only=True)
class Kernel(Benchmark):
    """Time the update alone, beside a copy of memory and other optimizers' updates.

    An update is bound by memory, so what counts is how close it comes to a plain copy. Everybody updates the same
    tensors, parts of one arena; successive calls go to different parts, so that no call finds in a cache what an
    earlier one has left there.
    """

    packages = ("numba", "triton", "torchao", "torch-optimi", "mosaicml")

    device: Annotated[Device | None, typer.Option(help="By default a GPU, if there is one.")] = None
    numel: Annotated[
        str | None, typer.Option(help="Sizes in millions of elements. [default: 1,16,50; on a GPU 1,64,256,1000]")
    ] = None
    threads: Annotated[str, typer.Option(help="On the CPU: numbers of torch's threads.")] = "1,2"
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each row.")] = 10
    peers: Annotated[bool, typer.Option(help="Whether to time others' optimizers too.")] = True

    def torch_device(self, local_rank: int = 0) -> torch.device:
        return harness.device_of(self.device)

    def run(self) -> None:
        warnings.simplefilter("ignore")  # peers warn about their own use of what torch has deprecated
        device, remarks = self.torch_device(), []
        on_gpu = device.type == "cuda"
        cached = cache_bytes(device)
        free = torch.cuda.mem_get_info(device)[0] if on_gpu else math.inf

        def num_places(numel: int) -> int:
            """So many that they do not fit into the cache, in the narrowest dtypes: 8 bytes per element."""
            return min(MAX_PLACES, math.ceil(cached / (8 * numel)))

        sizes = [CRUMBS * CRUMB]
        for size in (self.numel or ("1,64,256,1000" if on_gpu else "1,16,50")).split(","):
            numel = max(1, round(float(size) * 1e6 / ALIGNMENT)) * ALIGNMENT
            if (needed := BYTES_PER_ELEMENT * numel * num_places(numel)) <= 0.9 * free:
                sizes.append(numel)
            else:
                remarks.append(f"{millions(numel)}: needs {needed / 1e9:.0f} GB, of which {free / 1e9:.0f} are free")
        arena = Arena(max(numel * num_places(numel) for numel in sizes), device)
        cases = []
        for threads in [None] if on_gpu else harness.numbers(self.threads):
            if threads is not None:
                torch.set_num_threads(threads)
                torch.compiler.reset()  # what torch compiles for CPUs, as peers have it do, is for a number of threads
            for numel in sizes:
                case = Case(arena, numel, num_places(numel), threads)
                case.fill(self.peers)
                case.measure(self.rounds)
                harness.say(case.yardsticks)
                cases.append(case)
        rows = [row for case in cases for row in case.table()]
        lines = [
            f"{self.rounds} rounds; medians, with quartiles in brackets; ratios are taken within a round.",
            *(case.yardsticks for case in cases),
            *LINES,
            LINE_OF_DEVICE[Device(device.type)],
            *dict.fromkeys([*remarks, *(remark for case in cases for remark in case.remarks)]),
        ]
        rounds = [
            {"numel": one.numel, "threads": one.threads, "seconds": {k: s.tolist() for k, s in one.seconds.items()}}
            for one in cases
        ]
        self.publish(Report(list(rows[0]), [list(row.values()) for row in rows], lines, {"rounds": rounds}))


class Arena:
    """The tensors that everybody updates, of ``numel`` random elements, none denormal; a place is a part of them.

    The values of a bf16 row that has an fp32 main parameter are the fp32 rows' parameters.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.device, self.numel = device, numel
        random = torch.Generator(device).manual_seed(0)

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

    def copies(self) -> dict[str, Callable[[], object]]:
        """The yardstick: one large copy, of something that may overwrite what is there. And the same in place."""
        source, target = self._exp_avg_sq[torch.float32], self._max_exp_avg_sq[torch.float32]
        in_place = {IN_PLACE: partial(target.mul_, 1.0)} if self.device.type == "cpu" else {}
        return {COPY: partial(target.copy_, source), **in_place}


@dataclass(frozen=True)
class Row:
    """What is timed, and a line of the table.

    Attributes:
        section: Where it stands in the table: ours, torch's fused kernel, or others. None: it is a yardstick.
        calls: The same work in different places, each to be done in its turn.
        size: Bytes per element that one call has to read and write.
        kernel: Which of ours runs.
        fused: Torch's fused kernel on the same fragments, by name.
        in_other_dtypes: Whether it has none in these dtypes, and ``fused`` is the one in fp32.
        flat: The same on one flat tensor, by name, where this is about many.
    """

    section: int | None
    calls: Sequence[Callable[[], object]]
    size: float
    kernel: str = ""
    fused: str | None = None
    in_other_dtypes: bool = False
    flat: str | None = None


OURS, FUSED, OTHERS = range(3)


class Case:
    """One size on one number of threads.

    Attributes:
        numel: Elements that every row updates.
        rows: By name, in the order in which they stand next to each other.
        seconds: Per call of every row that could be run, [rounds] each.
        remarks: What is not in the table, and why.
    """

    def __init__(self, arena: Arena, numel: int, num_places: int, threads: int | None) -> None:
        self.numel = numel
        self.threads = threads
        size = 8 * arena.numel / numel
        self.rows = {name: Row(None, [copy], size) for name, copy in arena.copies().items()}
        self.seconds: dict[str, Tensor] = {}
        self.remarks: list[str] = []
        self._arena = arena
        self._num_places = num_places
        self._clock = Clock(arena.device)
        self._turns = count()

    def fill(self, with_peers: bool) -> None:
        """Everything in this size; or, if it is that of the crumbs, many parameters of few elements beside one."""
        if self.numel == CRUMBS * CRUMB:
            self._add(FP32)
            self._add(FP32, pieces=CRUMBS)
            return
        for precision in PRECISIONS:
            for amsgrad in (False, True):
                self._add(precision, amsgrad=amsgrad)
        self._add(FP32, pieces=PIECES)
        for peer in peers_of_an_update() if with_peers else ():
            self._add_peer(peer)

    def _add(self, precision: Precision, *, amsgrad: bool = False, pieces: int = 1) -> None:
        """Our update, and beside it torch's fused one where it has these dtypes."""
        places = self._places(precision, amsgrad=amsgrad, pieces=pieces)
        form = places[0][0].form
        size = bytes_per_element(form)
        cut = f", {pieces:,} pieces" if pieces > 1 else ""
        flat, flat_fused = (
            f"{title}{', amsgrad' if amsgrad else ''}" for title in (precision.title, precision.fused or FUSED_FP32)
        )
        kernel = choose.kernel_for(form).__module__.rpartition(".")[2].removesuffix("_kernel")
        step = Step([replace(HYPER, amsgrad=amsgrad)])
        calls = [partial(choose.kernel_for(form)(fragments), step, 0) for fragments in places]
        is_apart, of_flat = precision.fused is None, flat if cut else None
        self.rows[flat + cut] = Row(OURS, calls, size, kernel, flat_fused + cut, is_apart, of_flat)
        if not is_apart:
            calls = [fused(fragments) for fragments in places]
            self.rows[flat_fused + cut] = Row(FUSED, calls, size, flat=flat_fused if cut else None)

    def _add_peer(self, peer: Peer) -> None:
        """An update of fp32 parameters, if it is installed."""
        try:
            calls = [peer.build(fragments[0]) for fragments in self._places(FP32)]
        except ImportError:
            self.remarks.append(f"{peer.title}: not installed: pip install {peer.package}")
        else:
            self.rows[peer.title] = Row(OTHERS, calls, 7 * 4, fused=FUSED_FP32)

    def _places(self, precision: Precision, *, amsgrad: bool = False, pieces: int = 1) -> list[list[Operands]]:
        # Equal pieces, on multiples of ALIGNMENT if they are that large.
        unit = min(ALIGNMENT, self.numel // pieces)
        bounds = [number * (self.numel // unit) // pieces * unit for number in range(pieces)] + [self.numel]
        num_places = max(1, min(self._num_places, MAX_FRAGMENTS // pieces))
        return [self._arena.operands(precision, amsgrad, bounds, place * self.numel) for place in range(num_places)]

    def measure(self, rounds: int) -> None:
        """Time every row in every round; first drop what cannot be run."""
        samplers = {}
        for name, row in self.rows.items():
            try:
                self._sample(row, len(row.calls))  # compiles, allocates and touches everything once
                (seconds,) = min(self._sample(row, 1) for _ in range(2))
            except Exception as error:
                failure = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
                reason = "does not fit" if isinstance(error, torch.OutOfMemoryError) else failure
                self.remarks.append(f"{name}, {millions(self.numel)}: {reason}")
            else:
                num_calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_S / seconds)))
                samplers[name] = partial(self._sample, row, num_calls)
        samples = harness.interleave(list(samplers.values()), rounds)
        self.seconds = dict(zip(samplers, samples[:, :, 0].T, strict=True))

    def _sample(self, row: Row, num_calls: int, index: int = 0) -> list[float]:
        """Seconds of a call, over so many calls; on a GPU its own time, with a head start for the host."""
        self._clock.settle()
        if self._arena.device.type == "cuda":
            torch.cuda._sleep(HEAD_START_CYCLES)
        start = self._clock.mark()
        for turn in islice(self._turns, num_calls):
            row.calls[turn % len(row.calls)]()
        end = self._clock.mark()
        self._clock.settle()
        return [self._clock.seconds(start, end) / num_calls]

    def _gb_per_s(self, name: str) -> Tensor:
        """In every round."""
        return self.rows[name].size * self.numel / self.seconds[name] / 1e9

    @property
    def yardsticks(self) -> str:
        """What memory yields, to be read."""
        names = [name for name in (COPY, IN_PLACE) if name in self.seconds]
        rates = (f"{name} {Spread.of(self._gb_per_s(name)).median:.1f} GB/s" for name in names)
        on = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{millions(self.numel)} elements{on}: {', '.join(rates)}"

    def table(self) -> list[dict[str, str]]:
        """Texts by the titles of their columns, for every row that could be run."""

        def ratio(name: str, to: str | None) -> str:
            return str(Spread.of(self.seconds[name] / self.seconds[to])) if to in self.seconds else ""

        shown = [name for name in self.seconds if self.rows[name].section is not None]
        table = []
        for name in sorted(shown, key=lambda name: self.rows[name].section or 0):
            row, rates = self.rows[name], self._gb_per_s(name)
            over_fused = ratio(name, row.fused)
            table.append(
                {
                    "update": name,
                    "elements": millions(self.numel),
                    "threads": str(self.threads or "-"),
                    "kernel": row.kernel,
                    "B/element": f"{row.size:.3g}",
                    "ms": f"{1e3 * Spread.of(self.seconds[name]).median:.3g}",
                    "GB/s": f"{Spread.of(rates).median:.3g}",
                    "% of copy": f"{100 * Spread.of(rates / self._gb_per_s(COPY)).median:.0f}",
                    "time / torch fused": over_fused + " (fp32)" * (row.in_other_dtypes and bool(over_fused)),
                    "time / one flat tensor": ratio(name, row.flat),
                }
            )
        return table


def bytes_per_element(form: Form) -> int:
    """What one pass over an element reads and writes."""
    once, both = [form.grad], [form.moments] * (3 if form.amsgrad else 2)
    if form.main is torch.float32:
        once.append(form.param)  # rounded from its main parameter, never read
        both.append(form.main)
    else:
        both += [form.param] if form.main is None else [form.param, form.main]
    return 2 * sum(dtype.itemsize for dtype in both) + sum(dtype.itemsize for dtype in once)


def fused(fragments: Sequence[Operands]) -> Callable[[], object]:
    """Torch's fused kernel, ready to be called."""
    *columns, maxima, _ = ([*column] for column in zip(*(each.tensors for each in fragments), strict=True))
    amsgrad = maxima[0] is not None
    steps = [each.count for each in fragments]
    update = partial(torch._fused_adamw_, **LAW, amsgrad=amsgrad, maximize=False)
    return partial(update, *columns, maxima if amsgrad else [], steps)


def millions(numel: int) -> str:
    """A number of elements, to be read."""
    return f"{numel / 1e6:.3g} M" if numel < 1e9 else f"{numel / 1e9:.3g} B"


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that the device is known to have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes if size.endswith("K")), default=2**25)
