"""Loading a run: model, optimizer, scheduler, random generators, and what it was given of its place in the data.

    ranks agree on a folder -> its files are checked, each by one rank -> names, shapes and dtypes are compared
    -> each rank reads what it needs into host memory -> optimizer, model, scheduler and generators take it

Up to the last arrow nothing that exists is touched, and each arrow is taken by all ranks or by none: what fails on one
is an error on all (`everyone`). A save under way is waited for first.
"""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.files import read_entries
from sharded_dadamw.checkpoint.manifest import FILE_NAME, Manifest, checkpoints, folders, step_of
from sharded_dadamw.checkpoint.matching import collect_optimizer, match_model, match_optimizer
from sharded_dadamw.checkpoint.metadata import read_metadata
from sharded_dadamw.checkpoint.named_state import optimizer_state, refuse_parts
from sharded_dadamw.checkpoint.run_state import RANKS, pack, seed_from, set_random_state, unpack
from sharded_dadamw.checkpoint.saved_entries import SavedEntries
from sharded_dadamw.checkpoint.saving import connect_model, wait_for_latest
from sharded_dadamw.comm.agreement import everyone, require_agreement
from sharded_dadamw.comm.collectives import Collectives


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a checkpoint was, after it has been loaded.

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
        """What this rank gave as ``data``; on another number of ranks what all of them gave, if it was the same.

        None where there were no ranks, as in what was converted.

        Raises:
            ValueError: The number of ranks has changed, and they gave different things.
        """
        if not self.data_of_ranks:
            return None
        if len(self.data_of_ranks) == self.num_ranks:
            return self.data_of_ranks[self.rank]
        first, *others = self.data_of_ranks
        if any(not torch.equal(pack("data", first), pack("data", other)) for other in others):
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
        What was loaded, or None where ``path`` has no checkpoint yet, and nothing has been touched.

    Raises:
        ValueError: A file is damaged: names it, and the checkpoint before it. Or an entry is missing, left over, or of
            another shape, or dtype that would be rounded: names it. Or groups have other parameters, or with a
            scheduler come in another order; or weight decay is that of another law. Model and optimizer are as they
            were.
        OSError: A rank does not see the folder.

    Warns:
        UserWarning: ``fall_back`` was needed; or what was saved of main parameters, or of parameters that were frozen
            from the start, has no place in this optimizer.
    """
    wait_for_latest()
    collectives = connect_model(model, process_group)
    claims = {
        "path": str(path),
        "optimizer": str(optimizer is not None),
        "scheduler": str(scheduler is not None),
        "fall_back": str(fall_back),
    }
    require_agreement(collectives, claims, refuse_parts(model, [] if optimizer is None else [optimizer]))
    found = _find_sound(collectives, Path(path), fall_back)
    if found is None:
        return None
    folder, manifest, metadata = found
    saved = SavedEntries(folder, manifest, metadata)
    live: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    ranks: list[dict[str, Any]] = []

    def look() -> None:
        live["model"] = get_model_state_dict(model)
        live["optimizer"] = None if optimizer is None else optimizer_state(model, optimizer)[0]

    def read() -> None:
        entries: dict[str, Any] = {}
        names = match_model(saved, model, live["model"], entries)
        numbers: list[int] = []
        if optimizer is not None:
            numbers = match_optimizer(saved, optimizer, live["model"], live["optimizer"], names, entries)
        if scheduler is not None and numbers != sorted(numbers):  # its lists have an entry for each group
            raise ValueError(
                f"scheduler: expected groups in the order of {folder}, by which it knows them, got them in the order "
                f"{numbers}; build the optimizer in that order, or pass scheduler=None"
            )
        of_ranks = saved.under(RANKS)
        for entry in of_ranks.values():
            entries[entry] = saved.placeholder(entry)
        read_entries(folder, metadata, entries)
        saved.require_ties(entries)
        weights.update(live["model"])  # some of which may hold nothing that could be read
        weights.update({name: saved.collect(entries, "model", stored) for name, stored in names.items()})
        if optimizer is not None:
            read_state, wide = collect_optimizer(saved, live["optimizer"], numbers, names, entries)
            state.update(read_state)
            weights.update({name: wide[stored] for name, stored in names.items() if stored in wide})
        ranks.extend(unpack(entries[f"{RANKS}.{rank}"]) for rank in range(len(of_ranks)))
        if scheduler is not None and (not ranks or ranks[0]["scheduler"] is None):
            raise ValueError(f"scheduler: expected {folder} to hold the state of one, got none; pass scheduler=None")

    def take_state() -> None:
        if optimizer is None:
            return
        frozen = [p for group in optimizer.param_groups for p in group["params"] if not p.requires_grad]
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

    def take_weights() -> None:
        set_model_state_dict(model, weights)
        if collectives.rank < len(ranks):
            set_random_state(own["random"])
        elif ranks:
            seed_from(own["random"], manifest.step, collectives.rank)

    everyone(collectives, look)
    everyone(collectives, read)
    live.clear()
    own = ranks[collectives.rank] if collectives.rank < len(ranks) else next(iter(ranks), {})
    # Those that may still refuse come first, and what they hold is small or, by their own promise, left as it was.
    if scheduler is not None:
        _take_schedule(collectives, scheduler, own["scheduler"], folder)
    everyone(collectives, take_state)
    everyone(collectives, take_weights)
    data = tuple(rank["data"] for rank in ranks)
    return Resumed(manifest.step, folder, data, collectives.rank, collectives.num_ranks)


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
        everyone(collectives, take)
    except ValueError:
        if before is not None:
            scheduler.load_state_dict(before)
        raise


def _find_sound(collectives: Collectives, path: Path, fall_back: bool) -> tuple[Path, Manifest, Metadata] | None:
    """The checkpoint that is meant, once every byte of it is known to be as it was written. Collective."""

    def look() -> list[str]:
        is_one = step_of(path) is not None or (path / FILE_NAME).exists()
        return [str(path)] if is_one else [str(folder) for folder in folders(path)]

    listed = everyone(collectives, look)[0]
    manifest: Manifest | None = None
    metadata: Metadata | None = None

    def check() -> None:
        nonlocal manifest, metadata
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder, or this rank does not see it; checkpoints need storage that all "
                "ranks share"
            )
        manifest = Manifest.read(folder)
        manifest.require_sizes(folder)
        manifest.require_sums(folder, part=collectives.rank, num_parts=collectives.num_ranks)
        metadata = read_metadata(folder, manifest)

    while listed:
        folder = Path(listed.pop())
        try:
            everyone(collectives, check)
        except ValueError as error:
            if fall_back and listed:
                warnings.warn(f"{error}; going on from {listed[-1]} instead", stacklevel=3)
                continue
            before = [other for other in checkpoints(folder.parent) if (step_of(other) or 0) < (step_of(folder) or 0)]
            hint = f"pass {before[-1]} to go on from there" if before else "there is no complete one before it"
            raise ValueError(f"{error}; {hint}") from error
        assert manifest is not None and metadata is not None
        return folder, manifest, metadata
    return None
