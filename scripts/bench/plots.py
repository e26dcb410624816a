"""Pictures of committed results, for the README and docs/."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from launch.contenders import imported
from scripts.bench import harness
from scripts.bench.harness import Benchmark

RESULTS = Path(__file__).parent / "results"
WIDTH = 84
"""Of a title, in letters."""
OURS, THEIRS, GREY = "#d9822b", "#4a8fc7", "#808080"
"""Mid-tones, which can be read on white and on black."""
LINES = ("-", "--", "-.", ":")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "the same bytes from the same results",
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
}


@dataclass(frozen=True, kw_only=True)
class Plots(Benchmark):
    """Draw what was committed to scripts/bench/results as pictures for the docs."""

    out: Annotated[Path, typer.Option(help="Folder to write.")] = harness.CHECKOUT / "docs" / "pictures"

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        for name, (draw, pattern) in PICTURES.items():
            if not (paths := sorted(RESULTS.glob(pattern))):
                harness.say(f"{name}: left out, since {RESULTS} has no {pattern}")
                continue
            with imported("matplotlib", "rc_context")(STYLE):
                figure = imported("matplotlib.figure", "Figure")(figsize=(7.2, 3.6), layout="constrained")
                axes = figure.subplots()
                axes.set_title(subtitle_of(paths[-1]), loc="left")
                draw(axes, paths)
                figure.savefig(self.out / f"{name}.svg", transparent=True, metadata={"Date": None})
            harness.say(f"{self.out / name}.svg from {', '.join(path.name for path in paths)}")


def table_in(path: Path) -> list[dict[str, str]]:
    """The rows of the table in a result, by title."""
    lines = [line[1:-1].split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    lines = [list(map(str.strip, line)) for line in lines]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def subtitle_of(path: Path) -> str:
    """What was measured, of the first note that counts parameters, and on what: date and hardware."""
    text = path.read_text()
    about = re.findall(r"[\d.]+ M \w+ parameters[^;\n]*?(?=;|, \d+ ranks|\n)", text)
    around = re.findall(r"(?:^|- )(\d{4}-\d\d-\d\d, [^;]*);", text, re.MULTILINE)
    return "\n".join(line for part in (*about[:1], *around[:1]) for line in textwrap.wrap(part, WIDTH))


def values_in(text: str) -> list[float]:
    """The numbers in a cell."""
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def is_ours(name: str) -> bool:
    """Whether a row is about an optimizer or a kernel of this package."""
    return not re.match(r"ddp-adamw|torch|fairscale|fsdp2|deepspeed|composer|optimi|adamw", name, re.IGNORECASE)


def draw_bars(axes: Any, names: list[str], bars: list[list[float]], digits: int) -> None:
    """Horizontal bars, the first at the top, with whiskers where a bar has quartiles."""
    whiskers = [[bar[0] - bar[1], bar[2] - bar[0]] if len(bar) > 2 else [0.0, 0.0] for bar in bars]
    colors = [OURS if is_ours(name) else THEIRS for name in names]
    axes.barh(names, [bar[0] for bar in bars], color=colors, xerr=[*zip(*whiskers, strict=True)], ecolor=GREY)
    for name, bar in zip(names, bars, strict=True):
        axes.annotate(f" {bar[0]:.{digits}f}", (max(bar[:3]), name), va="center")
    axes.invert_yaxis()


def draw_step(axes: Any, paths: list[Path]) -> None:
    """Time of a training step over that of the baseline."""
    rows = [row for row in table_in(paths[-1]) if not row["step ms"].startswith("not installed")]
    (title,) = (title for title in rows[0] if title.startswith("ratio to"))
    draw_bars(axes, [row["contender"] for row in rows], [values_in(row[title]) for row in rows], 2)
    axes.axvline(1.0, color=GREY, linestyle=":")
    axes.set_xlabel("time of a training step over that of DDP + torch's fused AdamW, with quartiles")


def draw_kernel(axes: Any, paths: list[Path]) -> None:
    """Share of a copy's bandwidth, for flat tensors."""
    rows = [row for row in table_in(paths[-1]) if row["elements"] == "64 M"]
    rows = [row for row in rows if not re.search("^copy|pieces|amsgrad", row["update"])]
    draw_bars(axes, [row["update"] for row in rows], [values_in(row["% of copy"]) for row in rows], 0)
    axes.set_xlabel("bandwidth of an update of 64 M elements, % of that of a plain copy")


def draw_overlap(axes: Any, paths: list[Path]) -> None:
    """Milliseconds per step over the speed of a link."""
    curves = {}
    for row in table_in(paths[-1]):
        name, *cells = row.items()
        curves[name[1]] = [(values_in(link)[0], values_in(cell)[0]) for link, cell in cells if "GB/s" in link]
    draw_curves(axes, curves)
    axes.set(xscale="log", yscale="log", xlabel="modelled link, GB/s per rank and direction", ylabel="ms per step")


def draw_memory(axes: Any, paths: list[Path]) -> None:
    """Bytes per parameter between steps over the number of ranks, a file for each."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for path in paths:
        ranks = float(re.findall(r"(\d+) ranks", path.read_text())[0])
        for row in table_in(path):
            curves.setdefault(row["contender"], []).append((ranks, float(row["at rest"])))
    draw_curves(axes, curves)
    axes.set(xticks=sorted({ranks for points in curves.values() for ranks, _ in points}), ylim=(0, None))
    axes.set(xlabel="ranks", ylabel="bytes per parameter and rank, at rest")


def draw_curves(axes: Any, curves: dict[str, list[tuple[float, float]]]) -> None:
    """A line per contender; ours in one colour, and others in another."""
    lines = {True: iter(LINES), False: iter(LINES)}
    for name, points in curves.items():
        color, line = (OURS if is_ours(name) else THEIRS), next(lines[is_ours(name)])
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=color, linestyle=line)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


PICTURES: dict[str, tuple[Callable[[Any, list[Path]], None], str]] = {
    "step": (draw_step, "cpu-*-step.md"),
    "kernel": (draw_kernel, "h200-*-kernel.md"),
    "overlap": (draw_overlap, "cpu-*-overlap.md"),
    "memory": (draw_memory, "cpu-*-memory-*.md"),
}
"""How each is drawn, and from which results: the latest one, where one is enough."""
