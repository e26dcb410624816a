"""A plan to be looked at: what a rank holds over the number of ranks, and what one step does when."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from sharded_dadamw.plan.memory import KINDS
from sharded_dadamw.plan.report import Plan

_COLORS = {
    "backward": "tab:blue",
    "forward": "tab:cyan",
    "update": "tab:orange",
    "reduce": "tab:red",
    "gather": "tab:green",
}


def draw(plan: Plan, path: Path) -> None:
    """Write a picture, in the format that the file's name says.

    Raises:
        ModuleNotFoundError: There is no matplotlib.
        ValueError: It knows no such format.
    """
    if not importlib.util.find_spec("matplotlib"):
        raise ModuleNotFoundError("--plot needs matplotlib; install it with: pip install 'sharded_dadamw[plot]'")
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(10, 7), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=(3, 2))
    _draw_bytes(plan, upper)
    _draw_step(plan, lower)
    figure.suptitle(f"{plan.model}: {plan.num_parameters / 1e9:,.1f} G parameters in {plan.settings['parameters']}")
    figure.savefig(path, dpi=120)


def _draw_bytes(plan: Plan, axes: Any) -> None:
    names = [f"{ranks:,}" for ranks in plan.by_ranks]
    bottom = [0.0] * len(names)
    for kind in KINDS:
        heights = [getattr(held, kind) / 1e9 for held in plan.by_ranks.values()]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, label=kind.replace("_", " "))
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    axes.axhline(plan.memory / 1e9, color="black", linestyle=":", label=f"memory of {plan.gpu}")
    axes.set(xlabel="ranks that share the state", ylabel="GB on the device of each, without what is in flight")
    axes.legend()


def _draw_step(plan: Plan, axes: Any) -> None:
    """The lanes of a step, above each other."""
    lanes = list(dict.fromkeys(span.lane for span in plan.time.spans))[::-1]
    seen: dict[str, Any] = {}
    for height, lane in enumerate(lanes):
        for phase, color in _COLORS.items():
            spans = [span for span in plan.time.spans if span.lane == lane and span.what.startswith(phase)]
            if spans:
                bars = [(1e3 * span.start, 1e3 * (span.end - span.start)) for span in spans]
                seen[phase] = axes.broken_barh(bars, (height - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.2)
    axes.set(xlabel=f"ms of one step on {plan.ranks:,} ranks", yticks=range(len(lanes)), yticklabels=lanes)
    if seen:
        axes.legend(seen.values(), seen.keys(), ncols=len(seen), loc="upper center", bbox_to_anchor=(0.5, 1.2))
    else:
        axes.text(0.5, 0.5, "the compute time of a step was not told", ha="center", transform=axes.transAxes)
