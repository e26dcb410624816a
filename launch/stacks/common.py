"""What the examples share: options, model, text and schedule; and the control, one process with torch's AdamW.

Every step takes the next items of the text, whichever rank takes which, so all examples train on the same data. The
clip always bites, and the schedule warms up and falls: a wrong mean, clip or decay shows in the weights.
"""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from launch.data import Corpus
from launch.model import GPT
from launch.options import GPTConfig

LR, BETAS, EPS = 3e-3, (0.9, 0.95), 1e-4
WEIGHT_DECAY = 0.3
"""torch's; per step at the peak of the schedule it is LR times that."""
OURS: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": LR * WEIGHT_DECAY}
MAX_NORM = 0.5
BATCH, CONTEXT, NUM_ITEMS = 2, 32, 4096
STEPS, WARMUP, SAVE_AT = 20, 5, 10


@dataclass(frozen=True)
class Options:
    """What an example is told on the command line."""

    folder: Path
    resume: bool
    ddp: bool
    micro_batches: int


def options() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train for 20 steps, with a checkpoint after 10.")
    parser.add_argument("--folder", type=Path, default=Path("runs/stacks"), help="where checkpoints and results go")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint that is there")
    parser.add_argument("--ddp", action="store_true", help="let the stack's own DDP average, where the stack has one")
    parser.add_argument("--micro-batches", type=int, default=2, help="a step's backwards on each rank")
    torch.set_num_threads(1)
    return Options(**vars(parser.parse_args()))


def switch_on_fsdp2_for_cpus(**plugin: Any) -> None:
    """Tell accelerate to train by FSDP2 on CPUs, which it can and does not; on GPUs ``fsdp_plugin=`` is enough.

    Args:
        plugin: Arguments of ``accelerate.FullyShardedDataParallelPlugin``.
    """
    accelerate = importlib.import_module("accelerate")
    state = accelerate.Accelerator(cpu=True).state  # of which there is one in a process
    accelerate.PartialState().distributed_type = state.distributed_type = accelerate.DistributedType.FSDP
    state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(**plugin)


def build() -> nn.Module:
    """The model, the same on every rank; ``model(tokens, targets)`` is the loss."""
    return GPT(GPTConfig(vocab_size=256, width=32, num_layers=2, num_heads=2, context=CONTEXT))


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the batch."""
    return model(batch["input_ids"], batch["labels"])  # type: ignore[no-any-return]


class Items(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows of text, in their order, as ``input_ids`` and ``labels``."""

    def __init__(self) -> None:
        self._text = Corpus.read(Path(argparse.__file__), CONTEXT).training.long()

    def __len__(self) -> int:
        return NUM_ITEMS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * 977 % (len(self._text) - CONTEXT - 1)
        window = self._text[start : start + CONTEXT + 1]
        return {"input_ids": window[:-1], "labels": window[1:]}


def factor(step: int) -> float:
    """Of the learning rate, as transformers' linear schedule has it."""
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def micro_batches(items: Items, step: int, number: int, rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """What a rank trains on in a step of so many micro-batches, where the loop is our own."""
    per_step = BATCH * number * ranks
    mine = [items[step * per_step + place] for place in range(rank, per_step, ranks)]
    return [
        {key: torch.stack([item[key] for item in mine[first : first + BATCH]]) for key in mine[0]}
        for first in range(0, len(mine), BATCH)
    ]


def keep(folder: Path, model: nn.Module, norms: list[float]) -> None:
    """Write what came of it, for who compares."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in named.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save({"weights": weights, "norms": norms}, folder / "result.pt")
        print(f"norms {norms[:1]} to {norms[-1:]}; weights are in {folder / 'result.pt'}", flush=True)


def control(
    model: nn.Module,
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    number: int,
    factor: Callable[[int], float] = factor,
) -> dict[str, Any]:
    """Train in one process, on so many micro-batches a step; returns ``weights``, ``norms``, and ``start``."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    decaying = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decaying}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    schedule, norms, items = LambdaLR(optimizer, factor), [], Items()
    for step in range(STEPS):
        for batch in micro_batches(items, step, number, 0, 1):
            (loss_of(model, batch) / number).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}, "norms": norms, "start": start}
