"""Saving a run in one call: model, optimizer, scheduler, step, random generators, place in the data.

    ranks agree -> each takes its state (a copy, if it is to be written behind training) -> each writes its files
    -> the coordinator adds metadata and manifest, and gives the folder its name

Up to the last arrow nothing that exists is touched, and each arrow is taken by all ranks or by none: what fails on one
is an error on all (`everyone`). A save under way is waited for before another begins.
"""

from __future__ import annotations

import importlib.util
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sharded_dadamw.checkpoint.files import Writer, on_host, versions, write
from sharded_dadamw.checkpoint.manifest import FILE_NAME, Manifest, begin, clear, folder_of
from sharded_dadamw.checkpoint.named_state import model_state, name_of, optimizer_state, refuse_parts, require_plain
from sharded_dadamw.checkpoint.run_state import RANKS, pack, random_state
from sharded_dadamw.comm.agreement import everyone, require_agreement
from sharded_dadamw.comm.collectives import Collectives, NativeVerbs
from sharded_dadamw.comm.connect import connect, group_in_background


class Saving:
    """A save that may still be under way.

    Attributes:
        path: The checkpoint's folder, once it is complete.
    """

    def __init__(self, path: Path, written: Future[None]) -> None:
        """Only :func:`save_checkpoint` makes one."""
        self.path = path
        self._written = written
        self._was_heard = False

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._written.done()

    def wait(self) -> Path:
        """Wait until the checkpoint is complete.

        Raises:
            OSError: It could not be written, such as on a full disk; what was there before is as it was.
            RuntimeError: It failed otherwise.
        """
        failure = self._failure()
        self._was_heard = True
        if failure is not None:
            raise failure
        return self.path

    def _failure(self) -> Exception | None:
        error = self._written.exception()
        return error if error is None or isinstance(error, Exception) else RuntimeError(str(error))

    def _unheard_failure(self) -> Exception | None:
        failure = None if self._was_heard else self._failure()
        self._was_heard = True
        return failure


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
    """
    global _latest
    collectives = connect_model(model, process_group)
    previous = None if _latest is None else _latest._unheard_failure()
    claims = {
        "root": str(root),
        "step": str(step),
        "keep_last": str(keep_last),
        "asynchronous": str(asynchronous),
        "scheduler": str(scheduler is not None),
    }
    refusal = previous
    packed = None
    try:
        refusal = refusal or _refuse(root, step, model, optimizer, keep_last, asynchronous, collectives)
        its = None if scheduler is None else scheduler.state_dict()
        packed = pack("data and scheduler", {"random": random_state(), "data": data, "scheduler": its})
    except Exception as error:  # a scheduler may raise what it likes, and a file system too
        refusal = refusal or error
    require_agreement(collectives, claims, refusal)
    root = Path(root).absolute()  # a save in the background must not follow the working directory
    final = folder_of(root, step)
    group = None
    if isinstance(collectives, NativeVerbs) and collectives.num_ranks > 1:
        group = group_in_background(collectives) if asynchronous else collectives.group

    state: dict[str, Any] = {}
    manifest = None
    folder = Path()

    def take() -> str:
        nonlocal manifest
        state[RANKS] = {str(collectives.rank): packed}
        state["model"], aliases = model_state(model)
        state["optimizer"], has_stepped = optimizer_state(model, optimizer)
        if not has_stepped:
            state["optimizer"]["state"] = {}
        groups = state["optimizer"]["param_groups"]
        require_plain(state["model"], groups)  # after whatever is collective above
        manifest = Manifest(step, collectives.num_ranks, versions(), aliases, groups, name_of(optimizer))
        if asynchronous:
            state.update(on_host(state))  # here, since memory may run out on one rank
        return begin(root, step).name if collectives.rank == 0 else ""

    try:
        folder = root / everyone(collectives, take)[0]
    except Exception:
        if collectives.rank == 0 and root.is_dir():
            clear(root)
        raise
    assert manifest is not None
    writer = Writer(folder, final, manifest, keep_last)

    def write_all() -> None:
        write(state, writer, group, tidies_up=collectives.rank == 0)

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


def wait_for_latest() -> None:
    """Wait until no save is under way; of one that fails the next save tells."""
    if _latest is not None:
        _latest._failure()


def connect_model(model: nn.Module, process_group: dist.ProcessGroup | DeviceMesh | None) -> Collectives:
    """The verbs between the ranks that hold a model, on its device."""
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
    if (Path(root) / FILE_NAME).exists():  # or it would always be the one that is loaded
        return ValueError(f"root: expected a folder of checkpoints, got {root}, which is one itself; choose another")
    if (refusal := refuse_parts(model, [optimizer])) is not None:
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
