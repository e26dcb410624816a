"""A run loaded in one call, all of it or none.

    ranks agree on a folder -> its files are checked, each by one rank -> names, shapes and dtypes are compared
    -> each rank reads what it needs into host memory -> scheduler, optimizer, model and generators take it

Up to the last arrow nothing that exists is touched, and each arrow is taken by all ranks or by none
(``on_all_or_none``).
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sharded_dadamw.checkpoint import run
from sharded_dadamw.checkpoint.entries import Entries
from sharded_dadamw.checkpoint.folder import Manifest, checkpoints, folders, is_one, older, require_root
from sharded_dadamw.checkpoint.matching import Match
from sharded_dadamw.checkpoint.save import wait_for_latest
from sharded_dadamw.comm.agreement import on_all_or_none, require_agreement
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import Collectives


@dataclass(frozen=True, slots=True)
class Resumed:
    """A checkpoint that has been loaded.

    Attributes:
        step: The step that was given when it was saved.
        path: Its folder.
        data_of_ranks: What each rank that saved it gave as ``data``, by rank; empty for what was converted.
        rank: This rank's number now.
        num_ranks: How many there are now.
    """

    step: int
    path: Path
    data_of_ranks: tuple[Any, ...]
    rank: int
    num_ranks: int

    @property
    def data(self) -> Any:
        """Return what this rank gave as ``data``; on another number of ranks what all of them gave, if it was the same.

        None where there were no ranks, as in what was converted.

        Raises:
            ValueError: The number of ranks has changed, and they gave different things.
        """
        if not self.data_of_ranks:
            return None
        if len(self.data_of_ranks) == self.num_ranks:
            return self.data_of_ranks[self.rank]
        first, *others = self.data_of_ranks
        if any(not torch.equal(run.pack("data", first), run.pack("data", other)) for other in others):
            raise ValueError(
                f"data: expected the same from each of the {len(self.data_of_ranks)} ranks that saved {self.path}, "
                f"since there are {self.num_ranks} now, got different ones; work out this rank's from data_of_ranks"
            )
        return first


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    fall_back: bool = False,
) -> Resumed | None:
    """Load a checkpoint, all of it or none, on any number of ranks. Collective, with equal arguments.

    All files are checked first, and everything is compared with what is there; nothing is rounded, and nothing in a
    file is run. Hyperparameters come from the checkpoint, as in torch: ``lr``, ``initial_lr``, ``weight_decay``, all
    there is in a group; so does everything of the scheduler. Random generators are set where this rank had them; a rank
    that the saved run did not have seeds them from rank 0's seed, the step and its own number. What was converted from
    another optimizer's checkpoint has neither generators nor scheduler: they are left alone, and ``scheduler`` is None.

    Args:
        path: One checkpoint, or a root of them: then the newest.
        model: Gets the weights, by name, whatever either side is wrapped in.
        optimizer: Gets its state and hyperparameters; None to leave the checkpoint's alone.
        scheduler: Gets its state; None to leave the checkpoint's alone.
        process_group: The ranks that hold the model and the optimizer together; by default all.
        fall_back: Where the newest of a root is damaged, warn and take the one before it.

    Returns:
        What was loaded, or None where ``path`` is empty or not there yet, and nothing has been touched.

    Raises:
        ValueError: A file is damaged: names it, and the checkpoint before it. Or what was loaded has another
            fingerprint than what was saved: names the tensor. Or an entry is missing, left over, or of
            another shape, or dtype that would be rounded: names it. Or groups have other parameters or come in another
            order; or weight decay means something else. Model and optimizer are as they were.
        OSError: A rank does not see the folder.

    Warns:
        UserWarning: ``fall_back`` was needed; or what was saved of main parameters, or of parameters that were frozen
            from the start, has no place in this optimizer.
    """
    wait_for_latest()
    enter("load_checkpoint()")
    collectives = run.ranks_of(model, process_group)
    arguments = {
        "path": path,
        "optimizer": optimizer is not None,
        "scheduler": scheduler is not None,
        "fall_back": fall_back,
    }
    refusal = run.refuse_parts(model, [] if optimizer is None else [optimizer])
    require_agreement(collectives, arguments, refusal, advice="load with equal arguments on every rank")
    saved = _find_sound(collectives, Path(path), fall_back)
    if saved is None:
        return None
    manifest = saved.manifest

    def look() -> tuple[dict[str, Any], dict[str, Any] | None]:
        return get_model_state_dict(model), None if optimizer is None else run.optimizer_state(model, optimizer)[0]

    def read() -> tuple[Match, dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
        match = Match(saved, model, live[0], optimizer, live[1])
        of_ranks = saved.under(run.RANKS)
        match.entries.update(saved.wholes(of_ranks))
        saved.read(match.entries)
        ranks = [run.unpack(match.entries[of_ranks[str(rank)]]) for rank in range(len(of_ranks))]
        if scheduler is not None and (not ranks or ranks[0]["scheduler"] is None):
            raise ValueError(
                f"scheduler: expected {saved.folder} to hold the state of one, got none; pass scheduler=None"
            )
        return match, *match.collect(), ranks

    def take_weights() -> None:
        set_model_state_dict(model, weights)
        if collectives.rank < len(ranks):
            run.set_random_state(own["random"])
        elif ranks:
            run.seed_from(own["random"], manifest.step, collectives.rank)

    live = on_all_or_none(collectives, look)
    match, weights, state, ranks = on_all_or_none(collectives, read)
    own = ranks[collectives.rank] if collectives.rank < len(ranks) else next(iter(ranks), {})
    # Those that may still refuse come first, and what they hold is small or, by their own promise, left as it was.
    if scheduler is not None:
        _take_schedule(collectives, scheduler, own["scheduler"], saved.folder)
    on_all_or_none(collectives, lambda: None if optimizer is None else _take_state(model, optimizer, state))
    on_all_or_none(collectives, take_weights)
    loaded = None
    if optimizer is not None and manifest.fingerprint:
        loaded = run.fingerprint_of(model, optimizer, collectives, called=match.stored_names)
    if loaded is not None and (wrong := match.wrong(loaded)) is not None:
        raise ValueError(
            f"{wrong}: expected what the fingerprint in {saved.folder} says, got other bits; model and optimizer hold "
            "what was loaded: load another checkpoint, or report this"
        )
    data = tuple(rank["data"] for rank in ranks)
    return Resumed(manifest.step, saved.folder, data, collectives.rank, collectives.num_ranks)


def _take_schedule(collectives: Collectives, scheduler: Any, state: Any, folder: Path) -> None:
    """Load a scheduler on all ranks, or leave it as it was on all. Collective."""
    before = None

    def take() -> None:
        nonlocal before
        try:
            before = copy.deepcopy(scheduler.state_dict())
            scheduler.load_state_dict(state)
        except Exception as error:  # nobody says what a scheduler raises on another's state
            raise ValueError(
                f"scheduler: the state in {folder} is not one of {type(scheduler).__name__}: "
                f"{type(error).__name__}: {error}; build the scheduler that was saved, or pass scheduler=None"
            ) from error

    try:
        on_all_or_none(collectives, take)
    except ValueError:
        if before is not None:
            scheduler.load_state_dict(before)
        raise


def _take_state(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, by names, and its groups."""
    frozen = [
        p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad and p.is_floating_point()
    ]
    for param in frozen:  # of which torch's function would drop the state
        param.requires_grad_(True)
    try:
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(strict=False))
    finally:
        for param in frozen:
            param.requires_grad_(False)
    for group, loaded in zip(optimizer.param_groups, state["param_groups"], strict=True):
        if not group["params"]:  # by which torch's function finds a group; it leaves nothing in this one
            group.update({key: value for key, value in loaded.items() if key not in ("params", "param_names")})


def _find_sound(collectives: Collectives, path: Path, fall_back: bool) -> Entries | None:
    """Return the checkpoint that is meant, once every byte of it is known to be as it was written. Collective."""

    def look() -> list[Path]:
        found = [path] if is_one(path) else folders(path)
        if not found:
            require_root(path)
        return found

    def check() -> Entries:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder, or this rank does not see it; checkpoints need storage that all "
                "ranks share"
            )
        manifest = Manifest.read(folder)
        for wrong in manifest.damage(folder, slice(collectives.rank, None, collectives.num_ranks)):
            raise ValueError(wrong)
        return Entries(folder, manifest)

    names = [str(found) for found in on_all_or_none(collectives, look)]
    candidates = json.loads(collectives.gather_texts(json.dumps(names))[0])
    while candidates:
        folder = Path(candidates.pop())
        try:
            return on_all_or_none(collectives, check)
        except ValueError as error:
            if fall_back and candidates:
                warnings.warn(f"{error}; going on from {candidates[-1]} instead", stacklevel=3)
                continue
            before = [other for other in older(folder) if other in checkpoints(folder.parent)]
            hint = f"pass {before[-1]} to go on from there" if before else "there is no complete one before it"
            raise ValueError(f"{error}; {hint}") from error
    return None
