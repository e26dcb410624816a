"""The update alone, in every precision, beside a copy of memory and beside other optimizers' updates."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice, pairwise, product
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from scripts.bench import harness
from scripts.bench.harness import Clock, OnDevice, Report, median, spread
from scripts.bench.peers import HYPER, PEERS_OF_AN_UPDATE, STEP
from sharded_dadamw.kernels import choose
from sharded_dadamw.kernels.operands import Form, Operands
from sharded_dadamw.layout.bucket_layout import ALIGNMENT
from sharded_dadamw.update.adamw import Step

PIECES = 1000
MAX_PLACES = 64  # parts of the arena that take turns, at most
SAMPLE_S, MAX_CALLS = 0.01, 16  # what a sample should last, if no more calls are needed for that
HEAD_START_CYCLES = 4_000_000  # about 2 ms of a GPU's time, in which the host can hand over a whole sample

COPY, FUSED = "copy", "torch._fused_adamw_, "
LINES = (
    "GB/s and % of copy count what one pass has to read and write (B/element), however many passes were made. "
    "torch's copy_ of fp32, counted in the same way, is the 100 %; a processor may first fetch the lines that a copy "
    "is about to overwrite, which nobody counts, so that an update can exceed it.",
    "Our updates yield squared norms, which peers do not.",
    "Times on a GPU are its own: the host hands over a sample's calls while the GPU waits, for about 2 ms.",
)


class Precision(NamedTuple):
    """In what dtypes an optimizer keeps what it updates.

    Attributes:
        fused: Of torch's fused kernel beside it: what has the same dtypes, or where there is none, fp32.
    """

    title: str
    param: torch.dtype
    main: torch.dtype | None
    moments: torch.dtype
    is_stochastic: bool = False
    fused: str = "fp32"


FP32 = Precision("fp32", torch.float32, None, torch.float32)
PRECISIONS = (
    FP32,
    Precision("fp32, moments bf16", torch.float32, None, torch.bfloat16, is_stochastic=True),
    Precision("bf16, main fp32", torch.bfloat16, torch.float32, torch.float32),
    Precision("bf16, remainder int16", torch.bfloat16, torch.int16, torch.float32),
    Precision("bf16, remainder int16, moments bf16", torch.bfloat16, torch.int16, torch.bfloat16, is_stochastic=True),
    Precision("bf16 throughout", torch.bfloat16, None, torch.bfloat16, fused="bf16 throughout"),
)
CASES = [*((*case, 1) for case in product(PRECISIONS, (False, True))), (FP32, False, PIECES)]
"""Precision, amsgrad, and the number of fragments."""


@dataclass(frozen=True, kw_only=True)
class Kernel(OnDevice):
    """Time the update alone, beside a copy of memory and other optimizers' updates.

    An update is bound by memory, so what counts is how close it comes to a plain copy. Everybody updates the same
    tensors, parts of one arena; successive calls go to different parts, so that no call finds in a cache what an
    earlier one has left there.
    """

    packages = ("numba", "triton", "torchao", "torch-optimi", "mosaicml")

    numel: Annotated[
        str | None, typer.Option(help="Sizes in millions of elements. [default: 1,16,50; on a GPU 1,64,256,1000]")
    ] = None
    threads: Annotated[str, typer.Option(help="On the CPU: numbers of torch's threads.")] = "1,2"
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each row.")] = 10
    peers: Annotated[bool, typer.Option(help="Whether to time others' optimizers too.")] = True

    def run(self) -> None:
        warnings.simplefilter("ignore")  # peers warn about their own use of what torch has deprecated
        on_gpu = self.torch_device.type == "cuda"
        rows: list[dict[str, str]] = []
        remarks, rounds = [], []
        for threads in [1] if on_gpu else harness.numbers(self.threads):
            torch.set_num_threads(threads)
            torch.compiler.reset()  # what torch compiles for CPUs, as peers have it do, is for a number of threads
            for size in (self.numel or ("1,64,256,1000" if on_gpu else "1,16,50")).split(","):
                numel = max(1, round(float(size) * 1e6 / ALIGNMENT)) * ALIGNMENT
                try:
                    case = Case(numel, self.torch_device, with_peers=self.peers)
                except torch.OutOfMemoryError:
                    remarks.append(f"{millions(numel)}: does not fit")
                    continue
                case.measure(self.rounds)
                for row in case.table():
                    rows.append({**row, "threads": str(threads)})
                    harness.say(" ".join(rows[-1].values()))
                remarks += case.remarks
                seconds = {name: one.tolist() for name, one in case.seconds.items()}
                rounds.append({"numel": numel, "threads": threads, "seconds": seconds})
                del case  # its tensors, before there are the next one's
        lines = [
            f"{self.rounds} rounds; medians, with quartiles in brackets; ratios are taken within a round.",
            *(*LINES, *dict.fromkeys(remarks)),
        ]
        self.publish(Report(rows, lines, {"rounds": rounds}))


class Arena:
    """The tensors that everybody updates, of random elements, none denormal; a place is a part of them.

    The values of a bf16 row that has an fp32 main parameter are the fp32 rows' parameters.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
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
        self._steps = torch.full((PIECES,), STEP, device=device).unbind()

    def operands(self, precision: Precision, amsgrad: bool, bounds: Sequence[int], start: int) -> list[Operands]:
        """Fragments between neighbouring bounds, which are counted from ``start``; each has a step count of its own."""
        param, grad, main = self._param[precision.param], self._grad[precision.param], self._main[precision.main]
        exp_avg, exp_avg_sq = self._exp_avg[precision.moments], self._exp_avg_sq[precision.moments]
        maximum = self._max_exp_avg_sq[precision.moments] if amsgrad else None
        fragments = []
        for number, (begin, end) in enumerate(pairwise(bounds)):
            tensors = (param, grad, exp_avg, exp_avg_sq, maximum, main)
            parts = (None if tensor is None else tensor[start + begin : start + end] for tensor in tensors)
            first_element = start + begin if precision.is_stochastic else None
            fragments.append(Operands(*parts, self._steps[number], first_element))
        return fragments

    def copy(self) -> Callable[[], object]:
        """The yardstick: one large copy, of something that may overwrite what is there."""
        return partial(self._max_exp_avg_sq[torch.float32].copy_, self._exp_avg_sq[torch.float32])


class Row(NamedTuple):
    """What is timed, and a line of the table.

    Attributes:
        calls: The same work in different places, each to be done in its turn.
        size: Bytes per element that one call has to read and write.
        kernel: Which of ours runs.
        fused: Torch's fused kernel on fragments as large, by name.
    """

    calls: Sequence[Callable[[], object]]
    size: float
    kernel: str = ""
    fused: str | None = None


class Case:
    """One size.

    Attributes:
        numel: Elements that every row updates.
        seconds: Per call of every row that could be run, [rounds] each.
        remarks: What is not in the table, and why.
    """

    def __init__(self, numel: int, device: torch.device, *, with_peers: bool) -> None:
        self.numel = numel
        self.seconds: dict[str, Tensor] = {}
        self.remarks: list[str] = []
        # So many places that they do not fit into the cache, in the narrowest dtypes: 8 bytes per element.
        self._num_places = min(MAX_PLACES, math.ceil(cache_bytes(device) / (8 * numel)))
        self._clock, self._turns = Clock(device), count()
        self._arena = Arena(numel * self._num_places, device)  # kernels keep nothing but addresses
        self._rows = {COPY: Row([self._arena.copy()], 8 * self._num_places)}
        for precision, amsgrad, pieces in CASES:
            places = self._places(precision, amsgrad=amsgrad, pieces=pieces)
            also = ", amsgrad" * amsgrad + f", {pieces:,} pieces" * (pieces > 1)
            kernel, size = choose.kernel_for(places[0][0].form), bytes_per_element(places[0][0].form)
            step = Step([replace(HYPER, amsgrad=amsgrad)])
            calls = [partial(kernel(fragments), step, 0) for fragments in places]
            name = kernel.__module__.rpartition(".")[2].removesuffix("_kernel")
            beside = FUSED + precision.fused + also
            self._rows[precision.title + also] = Row(calls, size, name, beside)
            if precision.fused == precision.title:
                self._rows[beside] = Row(list(map(fused, places)), size)
        for title, build in PEERS_OF_AN_UPDATE.items() if with_peers else ():
            try:
                calls = [build(fragments[0]) for fragments in self._places(FP32)]
            except ImportError as error:
                self.remarks.append(f"{title}: not installed: {error}")
            else:
                self._rows[title] = Row(calls, 7 * 4, fused=FUSED + FP32.fused)

    def _places(self, precision: Precision, *, amsgrad: bool = False, pieces: int = 1) -> list[list[Operands]]:
        """Equal pieces in each place, on multiples of ALIGNMENT if they are that large."""
        unit = min(ALIGNMENT, max(1, self.numel // pieces))
        bounds = [number * (self.numel // unit) // pieces * unit for number in range(pieces)] + [self.numel]
        places = range(self._num_places)
        return [self._arena.operands(precision, amsgrad, bounds, place * self.numel) for place in places]

    def measure(self, rounds: int) -> None:
        """Time every row in every round; first drop what cannot be run."""
        samplers = {}
        for name, row in self._rows.items():
            try:
                self._sample(row, len(row.calls))  # compiles, allocates and touches everything once
                (seconds,) = min(self._sample(row, 1) for _ in range(2))
            except Exception as error:
                failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self.remarks.append(f"{name}, {millions(self.numel)}: failed: {failure}")
            else:
                num_calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_S / seconds)))
                samplers[name] = partial(self._sample, row, num_calls)
        samples = harness.interleave(list(samplers.values()), rounds)
        self.seconds = dict(zip(samplers, samples[:, :, 0].T, strict=True))

    def _sample(self, row: Row, num_calls: int, index: int = 0) -> list[float]:
        """Seconds of a call, over so many calls; on a GPU its own time, with a head start for the host."""
        self._clock.settle()
        if self._clock.on_gpu:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start = self._clock.mark()
        for turn in islice(self._turns, num_calls):
            row.calls[turn % len(row.calls)]()
        end = self._clock.mark()
        self._clock.settle()
        return [self._clock.seconds(start, end) / num_calls]

    def table(self) -> Iterator[dict[str, str]]:
        """Texts by the titles of their columns, for every row that could be run."""
        rates = {name: self._rows[name].size * self.numel / one / 1e9 for name, one in self.seconds.items()}
        for name, rate in rates.items():
            row, seconds = self._rows[name], self.seconds[name]
            yield {
                "update": name,
                "elements": millions(self.numel),
                "kernel": row.kernel,
                "B/element": f"{row.size:.3g}",
                "ms": f"{1e3 * median(seconds):.3g}",
                "GB/s": f"{median(rate):.3g}",
                "% of copy": f"{100 * median(rate / rates[COPY]):.0f}",
                "time over": row.fused or "",
                "": spread(seconds / self.seconds[row.fused]) if row.fused in self.seconds else "",
            }


def bytes_per_element(form: Form) -> int:
    """What one pass over an element reads and writes."""
    both = [form.param, *[form.moments] * (3 if form.amsgrad else 2), *([form.main] if form.main else [])]
    return form.grad.itemsize + 2 * sum(dtype.itemsize for dtype in both)


def fused(fragments: Sequence[Operands]) -> Callable[[], object]:
    """Torch's fused kernel, ready to be called."""
    *columns, maxima, _ = ([*column] for column in zip(*(each.tensors for each in fragments), strict=True))
    amsgrad = maxima[0] is not None
    steps = [each.count for each in fragments]
    law = {key: getattr(HYPER, key) for key in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    update = partial(torch._fused_adamw_, **law, amsgrad=amsgrad, maximize=False)
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
