"""A pool of gloo ranks that lives for the whole test session.

Starting a process that imports torch costs seconds; a test case costs milliseconds. So four workers start once, on
first use, join one process group, and make a subgroup for each of 1, 2, 3 and 4 ranks. A test then says

    results = on_ranks(2, train_a_little, 0.1)       # train_a_little(process_group, 0.1) on each of two ranks

and gets the results in rank order, by value. `train_a_little` is a function at the top level of a test module.

Invariants:

- A failure on any rank fails the test and shows that rank's traceback; a hang is killed, shown with every stack, and
  fails the test as a hang. Neither reaches the next test, which gets fresh workers.
- Workers never outlive the test process, however it ends.
"""

import atexit
import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

NUM_RANKS = 4
START_TIMEOUT_S = 120.0  # four interpreters importing torch, on a machine that may be busy
CASE_TIMEOUT_S = 60.0  # a case takes milliseconds, and its first one the import of its module besides
GRACE_S = 5.0  # once one rank has failed, how long the others get to finish or fail too
COLLECTIVE_TIMEOUT = timedelta(seconds=150)  # longer than a case, so that a hang is reported as a hang

# Where there is a GPU, ranks are fresh interpreters: whatever has asked for CUDA must not be forked any more.
FORKS = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
"""Starts processes that have imported and compiled already what takes seconds."""
FORKS.set_forkserver_preload(["tests.preloaded"])


class RankFailure(AssertionError):
    """A case failed on one or more ranks; the message carries every failing rank's traceback."""


class RankHang(RankFailure):
    """A case did not finish: some rank waited for something that never came. The message shows where."""


@dataclass(frozen=True)
class Outcome:
    """What one rank made of a case: a value, or the exception that it raised."""

    rank: int
    value: Any = None
    error: str | None = None  # the exception's type name
    message: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return repr(self.value) if self.error is None else f"{self.error}: {self.message}"


def values_of(fn: Callable[..., Any], results: list[Outcome]) -> list[Any]:
    """The values of a case, or RankFailure."""
    __tracebackhide__ = True
    failed = [outcome for outcome in results if outcome.error is not None]
    if failed:
        report = "\n".join(f"--- rank {o.rank} of {len(results)} failed ---\n{o.traceback}" for o in failed)
        raise RankFailure(
            f"{getattr(fn, '__name__', fn)} failed on rank(s) {[o.rank for o in failed]} of {len(results)}\n{report}"
        )
    return [outcome.value for outcome in results]


def describe_hang(headline: str, stacks: dict[int, str], replies: dict[int, Any]) -> str:
    """The message of a RankHang: where the ranks are that hang, and what became of the others."""
    lines = [headline]
    for rank, reply in sorted(replies.items()):
        if isinstance(reply, Outcome) and reply.error is not None:
            lines.append(f"--- rank {rank} had failed ---\n{reply.traceback}")
        else:
            lines.append(f"--- rank {rank} had finished ---")
    for rank, stack in stacks.items():
        lines.append(f"--- rank {rank} hangs here ---\n{stack}")
    return "\n".join(lines)


# --- in the worker ---------------------------------------------------------------------------------------------------


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


_alone: Any = None


def alone() -> Any:
    """In a worker: the process group of this rank and no other, such as a mesh of N x 1 ranks needs."""
    return _alone


def run_case(rank: int, group: Any, blob: bytes) -> Outcome:
    """Runs a pickled (function, arguments) on one rank."""
    try:
        torch.manual_seed(0)
        random.seed(0)
        fn, args = pickle.loads(blob)
        value = fn(group, *args)
        pickle.dumps(value)  # a result that cannot travel is this case's failure
        return Outcome(rank, value)
    except BaseException as error:  # everything is reported to the test
        return Outcome(rank, None, type(error).__name__, str(error), traceback.format_exc())


def _worker(rank: int, port: int, connection: Connection, stack_file: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test process decides when to stop
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stacks = open(stack_file, "w")  # noqa: SIM115 - stays open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=False)
    torch.set_num_threads(1)
    # Ranks meet on the loopback interface: no name resolution, no firewall.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=COLLECTIVE_TIMEOUT)

    def group_of(members: Iterable[int]) -> Any:
        return dist.new_group([*members], timeout=COLLECTIVE_TIMEOUT, backend="gloo")

    global _alone
    groups = [group_of(range(num_ranks)) for num_ranks in range(1, NUM_RANKS + 1)]
    _alone = [group_of([other]) for other in range(NUM_RANKS)][rank]
    connection.send_bytes(pickle.dumps("ready"))
    with contextlib.suppress(EOFError):
        while True:
            case, num_ranks, blob = pickle.loads(connection.recv_bytes())
            # torch names a new group by counting on each rank, and a case on two ranks counts on these alone.
            dist.distributed_c10d._world.group_count = 1000 * case
            connection.send_bytes(pickle.dumps(run_case(rank, groups[num_ranks - 1], blob)))
    os._exit(0)


# --- in the test process ---------------------------------------------------------------------------------------------


class Pool:
    """Owns the workers. Use the module's `on_ranks` and `outcomes`, which share one pool."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._store: dist.TCPStore | None = None
        self._stack_folder: tempfile.TemporaryDirectory[str] | None = None
        self._owner_pid = 0
        self._num_cases = 0

    def outcomes(
        self, num_ranks: int, fn: Callable[..., Any], *args: Any, timeout_s: float = CASE_TIMEOUT_S
    ) -> list[Outcome]:
        """Runs `fn(process_group, *args)` on the first `num_ranks` ranks and returns each rank's outcome.

        Raises:
            RankHang: some rank did not finish.
            RankFailure: a worker process died.
        """
        __tracebackhide__ = True
        assert 1 <= num_ranks <= NUM_RANKS, f"expected 1 to {NUM_RANKS} ranks, got {num_ranks}"
        blob = pickle.dumps((fn, args))
        self._start_if_needed()
        self._num_cases += 1
        with self._closed_by_failure():
            for connection in self._connections[:num_ranks]:
                connection.send_bytes(pickle.dumps((self._num_cases, num_ranks, blob)))
            results: list[Outcome] = self._collect(range(num_ranks), timeout_s)
        if any(outcome.error is not None for outcome in results):
            self.close()  # a message may be left behind, which nobody may ever receive
        return results

    def on_ranks(
        self, num_ranks: int, fn: Callable[..., Any], *args: Any, timeout_s: float = CASE_TIMEOUT_S
    ) -> list[Any]:
        """Runs `fn(process_group, *args)` on the first `num_ranks` ranks and returns the results in rank order.

        Raises:
            RankFailure: with the traceback of every rank that failed.
            RankHang: some rank did not finish.
        """
        __tracebackhide__ = True
        return values_of(fn, self.outcomes(num_ranks, fn, *args, timeout_s=timeout_s))

    def close(self) -> None:
        """Stops every worker; the next case starts new ones."""
        if os.getpid() != self._owner_pid:  # a forked child must not stop its parent's workers
            return
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        if self._stack_folder is not None:
            self._stack_folder.cleanup()
        self._processes, self._connections, self._store, self._stack_folder = [], [], None, None

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def _start_if_needed(self) -> None:
        __tracebackhide__ = True
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.close()
        self._owner_pid = os.getpid()
        self._stack_folder = tempfile.TemporaryDirectory()
        # The store lives here, so that it outlives any worker and its port is known to be free.
        self._store = dist.TCPStore("127.0.0.1", 0, NUM_RANKS, is_master=True, wait_for_workers=False)
        for rank in range(NUM_RANKS):
            ours, theirs = FORKS.Pipe()
            stack_file = str(Path(self._stack_folder.name) / str(rank))
            process = FORKS.Process(
                target=_worker, args=(rank, self._store.port, theirs, stack_file), name=f"rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        with self._closed_by_failure():
            self._collect(range(NUM_RANKS), START_TIMEOUT_S)

    @contextlib.contextmanager
    def _closed_by_failure(self) -> Iterator[None]:
        """Whatever interrupts a conversation with the workers (a hang, Ctrl-C) makes them useless."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _collect(self, ranks: range, timeout_s: float) -> list[Any]:
        """One reply from each rank, or RankHang / RankFailure."""
        __tracebackhide__ = True
        replies: dict[int, Any] = {}
        start = time.monotonic()
        deadline = start + timeout_s
        while len(replies) < len(ranks):
            waiting = {self._connections[rank]: rank for rank in ranks if rank not in replies}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                stuck = sorted(waiting.values())
                headline = f"hang: rank(s) {stuck} did not finish within {time.monotonic() - start:.0f} s"
                raise RankHang(describe_hang(headline, {rank: self._stack_of(rank) for rank in stuck}, replies))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting[connection]
                try:
                    replies[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1.0)
                    raise RankFailure(f"rank {rank} died, exit code {self._processes[rank].exitcode}") from None
                if isinstance(replies[rank], Outcome) and replies[rank].error is not None:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return [replies[rank] for rank in ranks]

    def _stack_of(self, rank: int) -> str:
        assert self._stack_folder is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGUSR1)
        time.sleep(0.2)
        return Path(self._stack_folder.name, str(rank)).read_text()


pool = Pool()
on_ranks = pool.on_ranks
outcomes = pool.outcomes
atexit.register(pool.close)
