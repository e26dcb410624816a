"""A run saved in one call: model, optimizer, scheduler, step, random generators, place in the data.

    ranks agree -> each takes its state (a copy, if it is to be written behind training) -> each writes its files
    -> the coordinator adds metadata and manifest, and gives the folder its name

What fails on one rank is an error on all (``on_all_or_none``). A save under way is waited for before another, or a
load, begins.
"""

from __future__ import annotations

import importlib.util
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
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sharded_dadamw.checkpoint import run
from sharded_dadamw.checkpoint.dcp import versions, write
from sharded_dadamw.checkpoint.folder import MANIFEST, Manifest, begin, clear, folder_of
from sharded_dadamw.checkpoint.names import name_of
from sharded_dadamw.comm.agreement import on_all_or_none, require_agreement
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.comm.connect import connect, group_in_background


@dataclass(eq=False)
class Saving:
    """A save that may still be under way; only ``save_checkpoint`` makes one.

    Attributes:
        path: The checkpoint's folder, once it is complete.
    """

    path: Path
    _written: Future[None]
    _was_heard: bool = False

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
        failure = None if self._was_heard else self._written.exception()
        self._was_heard = True
        return failure if isinstance(failure, Exception) else None


_latest: Saving | None = None  # only one save at a time, whatever it is of


def wait_for_latest() -> None:
    """Wait for a save that is under way; if it fails, the next one tells of it."""
    if _latest is not None:
        _latest._written.exception()


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
    collectives = run.ranks_of(model, process_group)
    step = index(step) if isinstance(step, SupportsIndex) else step  # NumPy's too
    arguments = {
        "root": root,
        "step": step,
        "keep_last": keep_last,
        "asynchronous": asynchronous,
        "scheduler": scheduler is not None,
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

    def take() -> tuple[dict[str, Any], Manifest]:
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
        return state, manifest

    state, manifest = on_all_or_none(collectives, take)
    name = on_all_or_none(collectives, lambda: _begin(root, final) if collectives.rank == 0 else "")
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
