"""Ranks that are threads of the test process and take turns: no start, no wire, no waiting.

    results = on_ranks(3, train_a_little, 0.1)       # train_a_little(process_group, 0.1) on each of three ranks

is what it is in `tests.pool`, and a test moves from one to the other by its import. There, each case costs the latency
of a transport between processes. Here, it costs its arithmetic. In the pool belong tests of a transport, of processes
that end, and of what has no rank of its own: profilers, torch.compile, threads that save in the background, the working
folder, FSDP1's state dicts, what patches a module in a rank's function, and counts of what a process holds.

Invariants:

- One rank runs at a time, until it waits for others: no two race, and a case is the same in each run. `seed` chooses
  another interleaving: with it, ranks also change at each collective that they start.
- A collective moves its bytes when a rank waits for it, and not before all ranks have started it. So who reads too
  early, or writes into a buffer that is under way, gets wrong values each time.
- Where no rank can run, they wait for each other forever. This is an error at once, and shows where each one waits.
- Ranks that start different collectives, or in another order, or of other sizes, are all told so.
- What is one per process is one per rank: random numbers, warnings' filters, process groups. Arguments and results are
  pickled, as they are on their way to another process.
"""

from __future__ import annotations

import itertools
import pickle
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh
from torch.distributed import distributed_c10d as c10d

from sharded_dadamw.checkpoint import save
from sharded_dadamw.schedule import in_flight
from tests.pool import CASE_TIMEOUT_S, Outcome, RankHang, describe_hang, run_case, values_of

_set_thread_isolation_mode: Callable[[bool], None] = torch._C._distributed_c10d._set_thread_isolation_mode
_numbers = itertools.count(1)
_here = threading.local()  # .turns and .rank, in a rank's thread


class _Abandoned(BaseException):
    """Ends a rank that would wait forever."""


# --- turns -----------------------------------------------------------------------------------------------------------


_OF_A_PROCESS: tuple[tuple[Any, str], ...] = (
    (warnings, "filters"),
    (warnings, "showwarning"),
    (warnings, "_showwarnmsg_impl"),
    (c10d, "_world"),
    (device_mesh, "threading"),
    (in_flight, "_in_flight"),
    (in_flight, "_lock"),
    (save, "_latest"),
)


class _Globals:
    """What other ranks must not see of one, though it is the process's."""

    def __init__(self, **values: Any) -> None:
        self._numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._values = [values.get(name, getattr(module, name)) for module, name in _OF_A_PROCESS]

    def take(self) -> None:
        self._numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self._values = [getattr(module, name) for module, name in _OF_A_PROCESS]

    def put(self) -> None:
        torch.set_rng_state(self._numbers[0])
        random.setstate(self._numbers[1])
        np.random.set_state(self._numbers[2])
        for (module, name), value in zip(_OF_A_PROCESS, self._values, strict=True):
            setattr(module, name, value)


def _always() -> bool:
    return True


class _Rank:
    def __init__(self, rank: int, globals_: _Globals) -> None:
        self.rank = rank
        self.globals = globals_
        self.can_go_on: Callable[[], bool] | None = _always  # None: it has ended
        self.turn = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.outcome: Outcome | None = None


class _Turns:
    """Who runs. All methods but `start` and `give_up` are called by the rank whose turn it is."""

    def __init__(self, num_ranks: int, seed: int | None) -> None:
        number = next(_numbers)
        self.ranks = [_Rank(rank, _of_a_new_rank(number, rank)) for rank in range(num_ranks)]
        self.calls: dict[Any, _Call] = {}
        self.stored: dict[str, bytes] = {}
        self.stacks: dict[int, str] = {}  # of the ranks that wait forever
        self.over = False
        self.has_ended = threading.Event()
        self._choice = None if seed is None else random.Random(seed)

    def start(self) -> None:
        self._pick(after=-1)

    def wait_until(self, can_go_on: Callable[[], bool]) -> None:
        """Lets others run until a condition holds."""
        rank = self.ranks[_here.rank]
        if self.over:
            raise _Abandoned
        rank.can_go_on = can_go_on
        rank.globals.take()
        self._pick(after=rank.rank)
        rank.turn.acquire()
        rank.can_go_on = _always  # what the condition refers to may go
        rank.globals.put()
        if self.over:
            raise _Abandoned

    def begin(self) -> None:
        self.ranks[_here.rank].turn.acquire()
        self.ranks[_here.rank].globals.put()

    def end(self) -> None:
        self.ranks[_here.rank].can_go_on = None
        self._pick(after=_here.rank)

    def may_interrupt(self) -> None:
        """Lets another rank go first, where a seed says so."""
        if self.over:
            raise _Abandoned
        if self._choice is not None:
            self.wait_until(_always)

    def _pick(self, after: int) -> None:
        left = [rank for rank in self.ranks if rank.can_go_on is not None]
        if not left:
            self.has_ended.set()
            return
        ready = [rank for rank in left if self.over or rank.can_go_on()]  # type: ignore[misc]
        if not ready:
            self.give_up()
            ready = left
        next_one = min(ready, key=lambda rank: (rank.rank <= after, rank.rank))
        (next_one if self._choice is None else self._choice.choice(ready)).turn.release()

    def give_up(self) -> None:
        """Notes where ranks are, and ends each of them as soon as it waits or no longer does."""
        frames = sys._current_frames()
        for rank in self.ranks:
            if rank.can_go_on is not None and rank.thread is not None and rank.thread.ident in frames:
                self.stacks[rank.rank] = "".join(traceback.format_stack(frames[rank.thread.ident]))
        self.over = True


def _of_a_new_rank(case: int, rank: int) -> _Globals:
    # torch caches by groups' names and by meshes, which differ by their thread, whose number the next one may have.
    number = 1000 * case + rank
    world: Any = SimpleNamespace(default_pg=None, comms=[], group_count=1000 * case)
    names = (
        "pg_map",
        "pg_names",
        "pg_group_ranks",
        "pg_backend_config",
        "tags_to_pg",
        "pg_to_tag",
        "pg_coalesce_state",
    )
    for name in names:
        setattr(world, name, {})
    return _Globals(
        _world=world,
        threading=SimpleNamespace(get_ident=lambda: number),
        filters=list(warnings.filters),
        _in_flight={},
        _lock=threading.RLock(),
        _latest=None,
    )


# --- collectives -----------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """A collective, from the first rank that starts it on."""

    num_ranks: int
    started: dict[int, str] = field(default_factory=dict)  # what, by rank
    data: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # with which tensors

    @property
    def is_complete(self) -> bool:
        return len(self.started) == self.num_ranks

    def finish(self, move: Callable[..., None]) -> None:
        if len(set(self.started.values())) > 1:
            raise RuntimeError(f"ranks have started different collectives: {dict(sorted(self.started.items()))}")
        if self.data:
            by_rank = [self.data[rank] for rank in range(self.num_ranks)]
            _wire.submit(_carry, move, by_rank).result()
            self.data.clear()


def _carry(move: Callable[..., None], by_rank: list[tuple[Any, ...]]) -> None:
    with torch.no_grad():
        move(*zip(*by_rank, strict=True))


_wire = ThreadPoolExecutor(1, "wire", torch.set_num_threads, (1,))
"""A thread that moves the bytes, since a transport knows nothing of the modes and transforms that a rank is in."""


class _Work(dist.Work):
    def __init__(self, turns: _Turns, call: _Call, move: Callable[..., None], outputs: Any) -> None:
        super().__init__()
        self._turns, self._call, self._move, self._outputs = turns, call, move, outputs

    def wait(self, timeout: timedelta | None = None) -> bool:
        if not self._call.is_complete:
            self._turns.wait_until(lambda: self._call.is_complete)
        self._call.finish(self._move)
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        """For DDP, whose C++ would wait without letting others run: over before it is given."""
        self.wait()
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._outputs)
        return future

    def is_completed(self) -> bool:
        if self._call.is_complete:
            self._call.finish(self._move)
        return self._call.is_complete


_REDUCE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.AVG: torch.add,
    dist.ReduceOp.MIN: torch.minimum,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.BAND: torch.bitwise_and,
    dist.ReduceOp.BOR: torch.bitwise_or,
}


def _reduce(tensors: Sequence[Tensor], op: Any) -> Tensor:
    """In rank order, in their dtype."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = _REDUCE[op](total, tensor)
    return total.div_(len(tensors)) if op == dist.ReduceOp.AVG else total


def _write(target: Tensor, value: Tensor) -> None:
    """As a transport does, of whose writes autograd does not know."""
    target.data.copy_(value)


def _size_of(tensors: Any) -> list[Any]:
    if isinstance(tensors, Tensor):
        return [tensors.dtype, tensors.numel()]
    return [_size_of(tensor) for tensor in tensors]


class _Group(dist.ProcessGroup):
    """The collectives that torch.distributed, DTensor, FSDP2 and torch.distributed.checkpoint ask for."""

    def __init__(self, options: Any, _: Any) -> None:
        super().__init__(options.group_rank, options.group_size)
        self._turns: _Turns = _here.turns
        self._name = options.group_id
        self._count = 0

    @property
    def _device_types(self) -> list[torch.device]:  # type: ignore[override]
        return [torch.device("cpu")]

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._name

    def getBackendName(self) -> str:
        return "simulated"

    def _post(self, what: str, move: Callable[..., None], *data: Any, size: Any = None) -> _Work:
        """Starts a collective; `move` gets a sequence over ranks for each of `data`."""
        if threading.current_thread() is not self._turns.ranks[_here.rank].thread:
            raise RuntimeError("a simulated rank has one thread")
        self._turns.may_interrupt()
        self._count += 1
        key = self._name, self._count
        call = self._turns.calls.setdefault(key, _Call(self.size()))
        call.started[self.rank()] = f"{what} of {_size_of(data[-1]) if size is None else size}"
        call.data[self.rank()] = data
        if call.is_complete:
            del self._turns.calls[key]
        return _Work(self._turns, call, move, data[0] if data else None)

    def allreduce(self, tensors: Any, opts: Any = None) -> _Work:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        op = dist.ReduceOp.SUM if opts is None else getattr(opts, "reduceOp", opts)
        op = getattr(op, "op", op)

        def move(lists: Sequence[list[Tensor]]) -> None:
            for same in zip(*lists, strict=True):
                total = _reduce(same, op)
                for tensor in same:
                    _write(tensor, total)

        return self._post(f"all-reduce ({op})", move, tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> _Work:
        def move(lists: Sequence[list[Tensor]]) -> None:
            for tensor, *_ in lists:
                if tensor is not lists[opts.rootRank][0]:
                    _write(tensor, lists[opts.rootRank][0])

        return self._post(f"broadcast from {opts.rootRank}", move, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        def move(outputs: Sequence[list[list[Tensor]]], inputs: Sequence[list[Tensor]]) -> None:
            for (of_rank,) in outputs:
                for output, (tensor,) in zip(of_rank, inputs, strict=True):
                    output.detach().copy_(tensor)

        return self._post("all-gather", move, outputs, inputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> _Work:
        return self.allgather([self._parts(output.view(-1))], [tensor.reshape(-1)], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> _Work:
        return self._last(self.all_gather_single, outputs, inputs, opts)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> _Work:
        def move(outputs: Sequence[list[Tensor]], inputs: Sequence[list[list[Tensor]]]) -> None:
            totals = [_reduce(parts, opts.reduceOp.op) for parts in zip(*(parts for (parts,) in inputs), strict=True)]
            for (output,), total in zip(outputs, totals, strict=True):
                output.detach().copy_(total)

        return self._post(f"reduce-scatter ({opts.reduceOp.op})", move, outputs, inputs)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> _Work:
        return self.reduce_scatter([output.view(-1)], [self._parts(tensor.reshape(-1))], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> _Work:
        return self._last(self.reduce_scatter_single, outputs, inputs, opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> _Work:
        def move(outputs: Sequence[list[Tensor]], inputs: Sequence[list[Tensor]]) -> None:
            for rank, of_rank in enumerate(outputs):
                for output, parts in zip(of_rank, inputs, strict=True):
                    _write(output, parts[rank])

        return self._post("all-to-all", move, outputs, inputs, size=len(inputs))

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], sizes: list[int], opts: Any = None
    ) -> _Work:
        return self.alltoall(self._parts(output, output_sizes), self._parts(tensor, sizes), opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> _Work:
        def move(outputs: Sequence[list[list[Tensor]]], inputs: Sequence[list[Tensor]]) -> None:
            for output, (tensor,) in zip(outputs[opts.rootRank][0], inputs, strict=True):
                _write(output, tensor)

        return self._post(f"gather to {opts.rootRank}", move, outputs, inputs)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> _Work:
        def move(outputs: Sequence[list[Tensor]], inputs: Sequence[list[list[Tensor]]]) -> None:
            for (output,), tensor in zip(outputs, inputs[opts.rootRank][0], strict=True):
                _write(output, tensor)

        return self._post(f"scatter from {opts.rootRank}", move, outputs, inputs, size=_size_of(outputs))

    def barrier(self, opts: Any = None) -> _Work:
        return self._post("barrier", lambda: None, size=0)

    # What torch 2.11 calls them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    def _parts(self, tensor: Tensor, sizes: Sequence[int] = ()) -> list[Tensor]:
        return list(tensor.split(sizes)) if sizes else list(tensor.tensor_split(self.size()))

    @staticmethod
    def _last(start: Callable[..., _Work], outputs: list[Tensor], inputs: list[Tensor], opts: Any) -> _Work:
        *others, last = [start(output, tensor, opts) for output, tensor in zip(outputs, inputs, strict=True)]
        for work in others:
            work.wait()
        return last


dist.Backend.register_backend("simulated", _Group, extended_api=True, devices=["cpu"])


@contextmanager
def started(group: Any) -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The collectives that are started on a group of simulated ranks in here: what they are, and with which tensors."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    post = group._post

    def noting(what: str, move: Any, *data: Any, **kwargs: Any) -> Any:
        calls.append((what.split(" ")[0], data))
        return post(what, move, *data, **kwargs)

    group._post = noting
    try:
        yield calls
    finally:
        del group._post


# --- cases -----------------------------------------------------------------------------------------------------------


def alone() -> Any:
    """In a rank: the process group of this rank and no other, such as a mesh of N x 1 ranks needs."""
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def _run(turns: _Turns, rank: int, blob: bytes) -> None:
    _here.turns, _here.rank = turns, rank
    turns.begin()
    try:
        num_ranks = len(turns.ranks)
        dist.init_process_group("simulated", store=dist.HashStore(), rank=rank, world_size=num_ranks)
        turns.ranks[rank].outcome = pickle.loads(pickle.dumps(run_case(rank, dist.group.WORLD, blob)))
        if not turns.over:
            dist.destroy_process_group()
    finally:
        turns.end()


def outcomes(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    timeout_s: float = CASE_TIMEOUT_S,
) -> list[Outcome]:
    """Runs `fn(process_group, *args)` on `num_ranks` ranks, which are the world, and returns each rank's outcome.

    Args:
        seed: Chooses an interleaving. None: a rank runs until it has to wait, and then the next one.

    Raises:
        RankHang: Ranks wait for each other, or one does not finish in time.
    """
    __tracebackhide__ = True
    blob = pickle.dumps((fn, args))
    here, excepthook = _Globals(), sys.excepthook
    turns = _Turns(num_ranks, seed)
    for rank in turns.ranks:
        rank.thread = threading.Thread(
            target=_run, args=(turns, rank.rank, blob), name=f"rank-{rank.rank}", daemon=True
        )
    _set_thread_isolation_mode(True)
    try:
        for rank in turns.ranks:
            assert rank.thread is not None
            rank.thread.start()
        turns.start()
        if not turns.has_ended.wait(timeout_s):
            turns.give_up()
    except BaseException:
        turns.give_up()
        raise
    finally:
        _set_thread_isolation_mode(False)
        here.put()
        sys.excepthook = excepthook
    if turns.stacks:
        finished = {rank.rank: rank.outcome for rank in turns.ranks if rank.rank not in turns.stacks}
        raise RankHang(describe_hang("ranks wait forever", turns.stacks, finished))
    return [rank.outcome for rank in turns.ranks if rank.outcome is not None]


def on_ranks(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    timeout_s: float = CASE_TIMEOUT_S,
) -> list[Any]:
    """Runs `fn(process_group, *args)` on `num_ranks` ranks and returns the results in rank order.

    Raises:
        RankFailure: With the traceback of every rank that failed.
        RankHang: As `outcomes` does.
    """
    __tracebackhide__ = True
    return values_of(fn, outcomes(num_ranks, fn, *args, seed=seed, timeout_s=timeout_s))
