"""How a rank finds the others, and hears that it is to end, whatever has started it."""

import datetime
import os
import signal
import time
import uuid
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

START_AGAIN = 75
"""The exit code of a run that has more to do and was asked to end: sysexits' EX_TEMPFAIL."""


signals_to_stop: list[int] = []
"""Those that this process has been sent, and has listened to."""


def listen_for(names: Sequence[str]) -> None:
    """From now on take note of signals, such as TERM, instead of dying of them."""
    for name in names:
        signal.signal(signal.Signals[f"SIG{name}"], lambda number, _: signals_to_stop.append(number))


def local_rank() -> int:
    """The number of this rank on its host; 0 is the one that does what a host needs once."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_per_host() -> int:
    """How many ranks torchrun has started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def join(timeout_s: float | None) -> torch.device:
    """Open the default process group, of one rank where torchrun did not start us, and choose this rank's device.

    Args:
        timeout_s: seconds after which an exchange has failed; None leaves it to torch.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count() >= ranks_per_host():
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    timeout = None if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    url = "env://" if "MASTER_ADDR" in os.environ else "tcp://127.0.0.1:0"
    store, _, _ = next(rendezvous(url, rank, world_size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(name_of_start(store, rank, world_size, timeout or default_pg_timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def name_of_start(store: Store, rank: int, world_size: int, timeout: datetime.timedelta) -> str:
    """Agree on a name that no earlier start of these ranks had.

    torchrun keeps its store when it starts ranks again, and in it the addresses of those that died. How often it has
    done so is no such name: agents count for themselves, and one that joined later has another count.

    Raises:
        TimeoutError: some rank did not ask within `timeout`.
    """
    own = uuid.uuid4().hex
    store.set_timeout(timeout)
    if rank:
        store.set(f"question of rank {rank}", own)
        name: str = store.get(f"answer to {own}").decode()
        store.add(f"heard {name}", 1)
        return name
    give_up = time.monotonic() + timeout.total_seconds()
    # A question may be that of a dead rank, until its successor asks: so answer until as many as there are have heard.
    while (heard := store.add(f"heard {own}", 0)) < world_size - 1:
        if time.monotonic() > give_up:
            raise TimeoutError(f"expected {world_size} ranks to start, got {heard + 1}")
        for question in [f"question of rank {other}" for other in range(1, world_size)]:
            if store.check([question]):
                store.set(f"answer to {store.get(question).decode()}", own)
        time.sleep(0.01)
    return own
