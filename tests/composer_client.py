"""Composer's Trainer as a client: what one rank does for `tests/test_composer.py`.

Composer makes the process group, from the environment, and reads that once per process; so each rank is a process that
does one run after the other, and leaves in a folder what they logged.

Two packages that Composer imports at its start are replaced by empty ones, because nothing here uses them:
torchvision, of which not every torch has a build for CPUs, and mcli, the client of a cloud service.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
import torchmetrics  # noqa: F401 - ahead of the empty torchvision, which it would look into
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sharded_dadamw import DecoupledAdamW


class Empty(types.ModuleType):
    """Whatever is imported from it is a class of nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # as others look for, who could use it
        sys.modules[name] = self

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


for name in ("", ".datasets", ".models", ".models.resnet", ".ops", ".transforms", ".transforms.functional", ".utils"):
    Empty(f"torchvision{name}")
Empty("mcli")
os.environ.setdefault("NODE_RANK", "0")  # Composer wants it, and torchrun does not set it

import composer  # noqa: E402
import composer.optim  # noqa: E402
from composer.algorithms import GradientClipping  # noqa: E402
from composer.callbacks import OptimizerMonitor  # noqa: E402
from composer.loggers import InMemoryLogger, Logger  # noqa: E402
from composer.models import ComposerClassifier  # noqa: E402
from composer.utils import dist  # noqa: E402
from composer.utils.parallelism import FSDP2Config, FSDPConfig, ParallelismConfig  # noqa: E402

from sharded_dadamw.stacks.composer import ShardedDecoupledAdamW  # noqa: E402

NUM_STEPS = 6
BATCH_SIZE = 8  # of all ranks together
MAX_NORM = 0.5  # which every step's gradient exceeds
# beta2 is so low that exp_avg_sq falls within these steps, and AMSGrad's maximum differs from it.
HYPER: dict[str, Any] = dict(lr=1e-2, betas=(0.9, 0.6), eps=1e-8, weight_decay=1e-3)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "composer": composer.optim.DecoupledAdamW,
    "decoupled": DecoupledAdamW,
    "sharded": ShardedDecoupledAdamW,
}
LAYOUTS: dict[str, Callable[[], ParallelismConfig | None]] = {
    "plain": lambda: None,  # on several ranks the Trainer wraps the model in DistributedDataParallel
    "fsdp1": lambda: fsdp1(),
    "fsdp1 flat": lambda: fsdp1(use_orig_params=False),
    "fsdp2": lambda: ParallelismConfig(fsdp2=FSDP2Config()),
}


def fsdp1(**options: Any) -> ParallelismConfig:
    return ParallelismConfig(fsdp=FSDPConfig(state_dict_type="sharded", **options))  # a full one needs CUDA


@dataclass(frozen=True)
class Run:
    """An optimizer under a trainer: "composer", "decoupled" or "sharded", and a layout."""

    optimizer: str
    layout: str = "plain"
    grouped: bool = True  # matrices and vectors in groups of their own, one parameter frozen; else one group, named
    amsgrad: bool = True

    @property
    def name(self) -> str:
        return f"{self.optimizer} {self.layout}"

    def build_model(self) -> ComposerClassifier:
        torch.manual_seed(5)
        layers = nn.Linear(7, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
        layers[3]._fsdp_wrap = True  # a unit inside the root's
        if self.grouped:
            layers[2].weight.requires_grad_(False)
        return ComposerClassifier(nn.Sequential(*layers), num_classes=3)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        build = OPTIMIZERS[self.optimizer]
        if not self.grouped:
            return build(model.named_parameters(), **HYPER, amsgrad=self.amsgrad)
        matrices = {"params": [p for p in model.parameters() if p.ndim > 1]}
        vectors = {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 3e-3, "weight_decay": 5e-4}
        return build([matrices, vectors], **HYPER, amsgrad=self.amsgrad)


def build_batches() -> DataLoader[Any]:
    """The same batches on any number of ranks: a rank takes every other sample, a single process all in that order."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(NUM_STEPS * BATCH_SIZE, 7, generator=generator)
    targets = torch.randint(0, 3, (len(inputs),), generator=generator)
    order = torch.arange(len(inputs))
    if dist.get_world_size() == 1:
        order = order.view(NUM_STEPS, BATCH_SIZE // 2, 2).transpose(1, 2).flatten()
    samples = TensorDataset(inputs[order], targets[order])
    sampler = dist.get_sampler(samples, shuffle=False, drop_last=True)
    return DataLoader(samples, batch_size=BATCH_SIZE // dist.get_world_size(), sampler=sampler)


class Witness(composer.Callback):
    """Writes down what goes into every update and what comes out of it, without asking the optimizer."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.steps: list[dict[str, dict[str, Any]]] = []

    def after_train_batch(self, state: composer.State, logger: Logger) -> None:
        del logger
        if not self.enabled:
            return
        names = {param: name for name, param in state.model.named_parameters()}
        step = {}
        for group in state.optimizers[0].param_groups:
            hyper = {key: float(group[key]) for key in ("lr", "initial_lr", "weight_decay")}
            for param in group["params"]:
                if param.grad is not None:
                    step[names[param]] = hyper | {"before": copy_of(param), "grad": copy_of(param.grad)}
        self.steps.append(step)

    def batch_end(self, state: composer.State, logger: Logger) -> None:
        del logger
        for name, param in state.model.named_parameters():
            if self.enabled and name in self.steps[-1]:
                self.steps[-1][name]["after"] = copy_of(param)


def copy_of(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


the_device = torch.cuda.current_device


def cpu_for_composer() -> Any:
    """Composer takes CUDA for granted when it wraps in FSDP1 and when its own optimizer reduces norms; no one else."""
    asked_by = sys._getframe(1).f_globals["__name__"]
    return torch.device("cpu") if asked_by.startswith("composer.") else the_device()


def train(
    run: Run,
    *,
    until: int = NUM_STEPS,
    save_first: Path | None = None,
    save: Path | None = None,
    load: str | None = None,
) -> dict[str, Any]:
    """Train until a step, saving before the first and after the last if told where: what was logged and seen."""
    model = run.build_model()
    memory, witness, saved = InMemoryLogger(), Witness(run.layout == "plain"), None
    trainer = composer.Trainer(
        model=model,
        train_dataloader=build_batches(),
        device_train_microbatch_size=BATCH_SIZE // 2,
        optimizers=run.build_optimizer(model),
        schedulers=composer.optim.LinearScheduler(alpha_i=1.0, alpha_f=0.25, t_max=f"{NUM_STEPS}ba"),
        step_schedulers_every_batch=True,
        max_duration=f"{until}ba",
        algorithms=[GradientClipping("norm", MAX_NORM)],
        callbacks=[OptimizerMonitor(log_optimizer_metrics=True, batch_log_interval=1), witness],
        loggers=[memory],
        parallelism_config=LAYOUTS[run.layout](),
        device="cpu",
        precision="fp32",
        seed=17,
        run_name="run",
        progress_bar=False,
        dist_timeout=60.0,
        load_path=load,
    )
    if save_first is not None:
        trainer.save_checkpoint(str(save_first))
    trainer.fit()
    if save is not None:
        file = trainer.save_checkpoint(str(save))
        saved = str(save) if run.layout == "plain" else str(Path(file).parent)  # one file, or a folder of one per rank
    trainer.close()
    return {
        "norms": {key: [value for _, value in log] for key, log in memory.data.items() if key.startswith("l2_norm/")},
        "losses": [value for _, value in memory.data["loss/train/total"]],
        "steps": witness.steps,
        "saved": saved,
    }


def train_in_parts(run: Run, folder: Path) -> dict[str, Any]:
    """A run in one go, which on two ranks saves ahead of its first step; one that saves halfway; one from there on."""
    saves_first = folder / "first" if dist.get_world_size() > 1 else None
    half = train(run, until=NUM_STEPS // 2, save=folder / "half")
    return {"whole": train(run, save_first=saves_first), "second half": train(run, load=half["saved"])}


def do_all(folder: Path) -> None:
    """The results of every run, by its name and then by the part of it."""
    torch.cuda.current_device = cpu_for_composer
    folder /= f"{dist.get_world_size()} ranks"
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        grouped = layout != "fsdp1 flat"  # which takes one group, and no frozen parameter beside others
        run = Run("decoupled", layout, grouped)
        results[run.name] = train_in_parts(run, folder / run.name)
        if dist.get_world_size() == 1 or layout != "fsdp2":  # where Composer's own fails in its reduction
            run = Run("composer", layout, grouped, amsgrad=False)
            results[run.name] = {"whole": train(run, until=NUM_STEPS if layout == "plain" else 1)}
    theirs = train(Run("composer", amsgrad=False), until=NUM_STEPS // 2, save=folder / "theirs")
    results["composer plain"]["second half"] = train(Run("decoupled", amsgrad=False), load=theirs["saved"])
    if dist.get_world_size() == 1:
        train(Run("composer", grouped=False), until=NUM_STEPS // 2, save=folder / "to import")
        results["composer plain ungrouped"] = {"whole": train(Run("composer", grouped=False))}
    results["sharded plain"] = train_in_parts(Run("sharded"), folder / "sharded")
    torch.save(results, folder / f"rank{dist.get_global_rank()}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
