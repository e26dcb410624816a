"""A run saved and loaded in one call: model, optimizer, scheduler, step, random generators, place in the data.

    save:  ranks agree -> each takes its state (a copy, if it is to be written behind training) -> each writes its files
           -> the coordinator adds metadata and manifest, and gives the folder its name
    load:  ranks agree on a folder -> its files are checked, each by one rank -> names, shapes and dtypes are compared
           -> each rank reads what it needs into host memory -> optimizer, model, scheduler and generators take it

Up to the last arrow nothing that exists is touched, and each arrow is taken by all ranks or by none: what fails on one
is an error on all (`on_all_or_none`). A save under way is waited for before another, or a load, begins.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

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
from sharded_dadamw.checkpoint.dcp import versions, write
from sharded_dadamw.checkpoint.entries import Entries
from sharded_dadamw.checkpoint.folder import (
    MANIFEST,
    Manifest,
    begin,
    checkpoints,
    clear,
    folder_of,
    folders,
    is_one,
    older,
    require_root,
)
from sharded_dadamw.checkpoint.matching import Match
from sharded_dadamw.checkpoint.names import name_of
from sharded_dadamw.comm.agreement import on_all_or_none, require_agreement
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.connect import connect, group_in_background


class Saving:
    """A save that may still be under way.

    Attributes:
        path: The checkpoint's folder, once it is complete.
    """

    def __init__(self, path: Path, written: Future[None]) -> None:
        """Only ``save_checkpoint`` makes one."""
        self.path = path
        self._written = written
        self._was_heard = False

    @property
    def done(self) -> bool:
        """Return whether it has ended, well or not."""
        return self._written.done()

    def wait(self) -> Path:
        """Wait until the checkpoint is complete.

        Raises:
            OSError: It could not be written, such as on a full disk; what was there before is as it was.
            RuntimeError: It failed otherwise.
        """
        failure = self._written.exception()
        self._was_heard = True
        if failure is not None:
            raise failure
        return self.path

    def _unheard_failure(self) -> Exception | None:
        """Wait, and return the failure that nobody has been told of, once."""
        failure = self._written.exception()
        was_heard, self._was_heard = self._was_heard, True
        return failure if isinstance(failure, Exception) and not was_heard else None


_latest: Saving | None = None  # only one save at a time, whatever it is of


def save_checkpoint(
    root: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: Any = None,
    data: Any = None,
    process_group: dist.ProcessGroup | DeviceMesh | None = None,
    keep_last: int | None = None,
    asynchronous: bool = False,
) -> Saving:
    """Save a run as ``root/step_00000100``, whole or not at all. Collective, with equal arguments but for ``data``.

    A save that is under way is waited for first. The folder gets its name after every byte is on the disk; one of the
    same step is replaced. What dead saves left in ``root`` is removed, so no two jobs may save into the same ``root``.

    Args:
        root: A folder on storage that all ranks share; made if need be.
        step: What to call it.
        model: Plain, wrapped or sharded; names are those of the bare model, and tied weights are stored once.
        optimizer: Its hyperparameters are saved along, and come back on loading.
        scheduler: Anything with ``state_dict()`` and ``load_state_dict()``.
        data: This rank's place in the data: numbers, texts, tensors, and containers of them. Small.
        process_group: The ranks that hold the model and the optimizer together; by default all.
        keep_last: Remove older checkpoints, once this one is complete, so that so many are left; by default none.
        asynchronous: Copy what is to be saved into host memory, return, and write it in a thread beside training. For
            all ranks together only; wait for the last one before the process group is destroyed.

    Returns:
        A handle. Without ``asynchronous`` the checkpoint is complete.

    Raises:
        TypeError: ``root``, ``model`` or ``optimizer`` is none. On this rank; on the others a ValueError says so.
        ValueError: An argument is wrong, or ``data`` could not be read back safely; on every rank.
        ImportError: There are several ranks and no NumPy, by which torch.distributed.checkpoint exchanges plans.
        OSError: It could not be written; on every rank. Earlier checkpoints are as they were, and nothing is left over.
        RuntimeError: It could not be written for another reason; or the save before this one failed in the background
            and nobody had asked: then this one has not begun, and can be called again.

    Warns:
        UserWarning: Ranks that should hold the same values do not; the checkpoint is written, without a fingerprint.
    """
    global _latest
    enter("save_checkpoint()")
    collectives = _connect(model, process_group)
    step = index(step) if isinstance(step, SupportsIndex) else step  # NumPy's too
    arguments = {
        "root": str(root),
        "step": str(step),
        "keep_last": str(keep_last),
        "asynchronous": str(asynchronous),
        "scheduler": str(scheduler is not None),
    }
    refusal = None if _latest is None else _latest._unheard_failure()
    packed = None
    try:
        refusal = refusal or _refuse(root, step, model, optimizer, keep_last, asynchronous, collectives)
        its = None if scheduler is None else scheduler.state_dict()
        packed = run.pack("data and scheduler", {"random": run.random_state(), "data": data, "scheduler": its})
    except Exception as error:  # a scheduler may raise what it likes, and a file system too
        refusal = refusal or error
    require_agreement(collectives, arguments, refusal, advice="save with equal arguments on every rank")
    root = Path(root).absolute()  # a save in the background must not follow the working directory
    final = folder_of(root, step)
    writing: Collectives = collectives
    if asynchronous and collectives.num_ranks > 1:
        writing = connect(group_in_background(collectives), torch.device("cpu"), exchange=None)

    try:
        fingerprint = run.fingerprint_of(model, optimizer, collectives)
    except RuntimeError as error:  # on every rank
        warnings.warn(f"the checkpoint of step {step} gets no fingerprint: {error}", stacklevel=2)
        fingerprint = None

    def take() -> tuple[dict[str, Any], Manifest, str]:
        weights, aliases = run.model_state(model)
        its, has_stepped = run.optimizer_state(model, optimizer)
        run.require_plain(weights, its["param_groups"])  # after whatever is collective above
        manifest = Manifest(
            step,
            collectives.num_ranks,
            versions(),
            aliases,
            its["param_groups"],
            name_of(optimizer),
            {} if fingerprint is None else fingerprint.as_dict(),
        )
        state = {
            "model": weights,
            "optimizer": its if has_stepped else {**its, "state": {}},
            run.RANKS: {str(collectives.rank): packed},
        }
        if asynchronous:
            state = run.on_host(state)  # here, since memory may run out on one rank
        return state, manifest, _begin(root, final) if collectives.rank == 0 else ""

    try:
        state, manifest, name = on_all_or_none(collectives, take)
    except Exception:
        with contextlib.suppress(OSError):
            if collectives.rank == 0:
                clear(root)
        raise
    folder = root / collectives.gather_texts(name)[0]
    write_all = partial(write, state, folder, final, manifest, writing, keep_last=keep_last)
    if asynchronous:
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        written = executor.submit(write_all)
        executor.shutdown(wait=False)
    else:
        write_all()
        written = Future()
        written.set_result(None)
    _latest = Saving(final, written)
    return _latest


def _begin(root: Path, final: Path) -> str:
    """Make a folder for a checkpoint to be, after what dead saves have left behind is cleared away."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        clear(root)
        return begin(final).name
    except OSError as error:
        hint = "give a folder in which this user may make others"
        raise OSError(error.errno, f"{root} cannot be written: {error}; {hint}") from error


def _connect(model: nn.Module, process_group: dist.ProcessGroup | DeviceMesh | None) -> Collectives:
    """Return the verbs between the ranks that hold a model, on its device."""
    params = model.parameters() if isinstance(model, nn.Module) else iter(())  # what is none is refused on all ranks
    device = next((p.device for p in params), torch.device("cpu"))
    return connect(process_group, device, exchange=None)


def _refuse(
    root: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    keep_last: int | None,
    asynchronous: bool,
    collectives: Collectives,
) -> Exception | None:
    if not isinstance(root, str | os.PathLike):
        return TypeError(f"root: expected a path, got {root!r}")
    if os.path.exists(root) and not os.path.isdir(root):
        return ValueError(f"root: expected a folder, or one that is not there yet, got {root}, which is a file")
    if os.path.exists(Path(root) / MANIFEST):  # or it would always be the one that is loaded
        return ValueError(f"root: expected a folder of checkpoints, got {root}, which is one itself; choose another")
    if (refusal := run.refuse_parts(model, [optimizer])) is not None:
        return refusal
    if not isinstance(step, int) or step < 0:
        return ValueError(f"step: expected a whole number from 0 on, got {step!r}")
    if keep_last is not None and (not isinstance(keep_last, int) or keep_last < 1):
        return ValueError(f"keep_last: expected a whole number from 1 on, or None to keep all, got {keep_last!r}")
    if not isinstance(asynchronous, bool):
        return ValueError(
            f"asynchronous: expected True, to write in a thread beside training, or False, got {asynchronous!r}"
        )
    if collectives.num_ranks > 1 and importlib.util.find_spec("numpy") is None:
        return ImportError("torch.distributed.checkpoint needs NumPy to save from several ranks: pip install numpy")
    return None


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
            another shape, or dtype that would be rounded: names it. Or groups have other parameters, or with a
            scheduler come in another order; or weight decay means something else. Model and optimizer are as they were.
        OSError: A rank does not see the folder.

    Warns:
        UserWarning: ``fall_back`` was needed; or what was saved of main parameters, or of parameters that were frozen
            from the start, has no place in this optimizer.
    """
    if _latest is not None:
        _latest._written.exception()  # of which the next save tells
    enter("load_checkpoint()")
    collectives = _connect(model, process_group)
    arguments = {
        "path": str(path),
        "optimizer": str(optimizer is not None),
        "scheduler": str(scheduler is not None),
        "fall_back": str(fall_back),
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
        numbers, of_ranks = match.group_numbers, saved.under(run.RANKS)
        if scheduler is not None and numbers != sorted(numbers):  # its lists have an entry for each group
            raise ValueError(
                f"scheduler: expected groups in the order of {saved.folder}, by which it knows them, got them in the "
                f"order {numbers}; build the optimizer in that order, or pass scheduler=None"
            )
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
