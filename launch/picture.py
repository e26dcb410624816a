"""The picture of a run."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure


def draw(
    path: Path,
    *,
    title: str,
    losses: Mapping[int, float],
    num_steps: int,
    held_out: tuple[float, float],
    model_bytes: int,
    state_bytes: tuple[int, int],
) -> None:
    """Draw the loss of every step, and memory per rank beside what it would be unsharded.

    Args:
        path: the file to write.
        title: what ran.
        losses: nats per byte, by step.
        num_steps: of the whole run.
        held_out: the same before and after training.
        model_bytes: of the parameters; the gradients take as much.
        state_bytes: of the optimizer, unsharded and in this run.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    curve, memory = figure.subplots(1, 2, width_ratios=(2, 1))
    curve.plot([step + 1 for step in losses], list(losses.values()), linewidth=1, label="training, mean over ranks")
    curve.plot([0, num_steps], held_out, "o", label="held out")
    curve.set(xlabel="step", ylabel="loss, nats per byte", title=title)
    curve.grid(alpha=0.3)
    curve.legend()
    base = [0.0, 0.0]
    for label, sizes in (
        ("parameters", (model_bytes, model_bytes)),
        ("gradients", (model_bytes, model_bytes)),
        ("optimizer state", state_bytes),
    ):
        heights = [size / 1e6 for size in sizes]
        bars = memory.bar(["unsharded", "this run"], heights, bottom=base, label=label)
        memory.bar_label(bars, [f"{height:.1f}" for height in heights], label_type="center", color="white")
        base = [low + height for low, height in zip(base, heights, strict=True)]
    memory.set(ylabel="MB per rank", title="memory", ylim=(0, 1.4 * max(base)))
    memory.legend(loc="upper right", fontsize="small")
    figure.savefig(path, dpi=120)
