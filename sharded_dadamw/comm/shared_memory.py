"""The data verbs by memory: ranks of one Linux host read what they need from each other's, and nothing is sent.

Each rank has a nameless file in memory that all ranks map when they connect. Buffers are cut from it, pages exist once
they are touched, and the first page says what the rank has begun and what it has finished:

    file of rank 0   | begun, left | buffer |  free  | buffer |      free ...      |      rank 0 writes, others read
    file of rank 1   | begun, left | buffer |  free  | buffer |      free ...      |      rank 1 writes, others read

A rank begins a verb by saying where its buffer lies. It finishes it by reading the buffers of others, each as soon as
that one has begun the verb as well, and by saying that it has left. Whoever waits for another rank looks at its page
now and then: to wake it through gloo takes longer than to read a megabyte.

No file has a name or stays open, so nothing is left behind after a crash, and the size of /dev/shm does not matter. A
rank that is gone can still be read by those that are slower. A process that was forked, such as a DataLoader's worker,
sees its parent's buffers as they change.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import secrets
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_dadamw.comm.collectives import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, BackendVerbs
from sharded_dadamw.comm.means import PIECE_BYTES, average, sum_dtype
from sharded_dadamw.comm.messages import GlooVerbs
from sharded_dadamw.comm.pending import Pending

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_GONE, _BEGUN, _LEFT, _VERBS = 8, 9, 10, 11
"""Places on the first page, in words of 8 bytes. Before them is the file's name. Of each verb it has three words."""
_MOST_UNDER_WAY = 64
"""Verbs of which a page says where the buffer lies; one more is begun when all ranks have left the oldest."""
_KINDS = ("a reduce-scatter", "an all-gather", "a small exchange")
_PATIENCE_S = 0.1
"""How long to wait for another rank before asking whether its process still lives."""


class MemoryFile:
    """A rank's file, as one of the ranks has mapped it; buffers on it keep it mapped."""

    def __init__(self, pid: int, fd: int, name: str, size: int) -> None:
        """Map what a process of this host has open; an OSError where it is in another container, or may not be read."""
        path = f"/proc/{pid}/fd/{fd}"
        if name not in os.readlink(path):  # in another container numbers mean other processes
            raise OSError(f"{path} is something else here")
        opened = os.open(path, os.O_RDWR)
        try:
            # Python's own mapping would keep a file descriptor.
            address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, opened, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), f"{size} bytes cannot be mapped")
        finally:
            os.close(opened)
        weakref.finalize(self, _libc().munmap, address, size).atexit = False
        self._address, self._size = address, size
        if ctypes.string_at(address, len(name)) != name.encode():
            raise OSError(f"{name} is a copy here")
        # To dump core would touch every page, and so fill the machine's memory.
        _libc().madvise(address, size, mmap.MADV_DONTDUMP)
        self.pid = pid
        self.page = (ctypes.c_int64 * (mmap.PAGESIZE // 8)).from_address(address)
        self._live: dict[int, int] = {}

    def new_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled memory [numel] in this rank's file, on a page of its own; a MemoryError if there is no room."""
        if not numel:
            return torch.zeros(0, dtype=dtype)
        nbytes = -(-numel * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        start = mmap.PAGESIZE
        for taken, stop in sorted(self._live.copy().items()):
            if start + nbytes <= taken:
                break
            start = stop
        if start + nbytes > self._size:
            raise MemoryError(f"no {nbytes} bytes in a row are left of {self._size}")
        self._live[start] = start + nbytes
        # The tensor's storage owns this view, and whatever shares the storage shares it; where torch moves a storage
        # elsewhere, as share_memory_() does, it dies.
        view = self._view(start, nbytes)
        weakref.finalize(view, self._give_back, start, nbytes).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=numel)

    def _view(self, start: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
        view = (ctypes.c_char * nbytes).from_address(self._address + start)
        view.file = self  # type: ignore[attr-defined]  # or it could be unmapped meanwhile
        return view

    def tensor_at(self, offset: int, like: Tensor) -> Tensor:
        """What lies so many bytes into the file, in the size and dtype of another tensor."""
        return torch.frombuffer(self._view(offset, like.nbytes), dtype=like.dtype) if like.nbytes else like

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where a contiguous tensor begins, in bytes; None where it lies elsewhere."""
        offset = tensor.data_ptr() - self._address
        return offset if 0 <= offset < self._size else None

    def _give_back(self, start: int, nbytes: int) -> None:
        """Runs where the last reference dies, in any thread and in the middle of anything, so it takes no lock."""
        if os.getpid() == self.pid:  # a forked child must not take its parent's memory away
            _libc().madvise(self._address + start, nbytes, mmap.MADV_REMOVE)
            del self._live[start]


def map_files(verbs: BackendVerbs) -> list[MemoryFile] | None:
    """Make a file on every rank, and map those of all, in rank order. Collective.

    None on all ranks where one of them cannot: they run on several hosts or in containers of their own, or not on
    Linux.
    """
    offer = ""
    files: list[MemoryFile] = []
    with ExitStack() as stack:
        try:
            # Ranks hold alike buffers, so none needs more than its share of the machine. The rest is for gaps.
            size = 2 * os.sysconf("SC_PHYS_PAGES") // verbs.num_ranks * mmap.PAGESIZE
            name = f"sharded_dadamw-{secrets.token_hex(16)}"
            fd = os.memfd_create(name)
            stack.callback(os.close, fd)
            os.pwrite(fd, name.encode(), 0)
            os.ftruncate(fd, size)
            offer = json.dumps([_BOOT_ID.read_text(), [os.getpid(), fd, name, size]])
        except Exception:  # whatever it is, there is another way, and the other ranks are waiting to hear of it
            pass
        offers = verbs.gather_texts(offer)
        try:
            for boot_id, where in map(json.loads, offers):
                if boot_id != _BOOT_ID.read_text():
                    raise OSError("that process runs on another host")
                files.append(MemoryFile(*where))
        except Exception:  # as above
            files = []
        return files if all(verbs.gather_texts("mapped" if files else "")) else None


class SharedMemoryVerbs(GlooVerbs):
    """Ranks of one host read what they need from each other's memory.

    ``new_buffer`` gives memory that others can read; what lies elsewhere is copied there first.
    """

    gathers_by_itself = False

    def __init__(self, group: dist.ProcessGroup, device: torch.device, files: Sequence[MemoryFile]) -> None:
        super().__init__(group, device)
        self._own, self._files = files[self.rank], files
        self._timeout_s: float = group._get_backend(device).options._timeout.total_seconds()
        self._under_way: deque[Pending] = deque()
        self._num_begun = 0
        self._scratch: dict[torch.dtype, Tensor] = {}
        weakref.finalize(self, _depart, self._own)

    def new_buffer(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert device.type == "cpu"
        return self._own.new_buffer(numel, dtype)

    def _begin_mean(self, buffer: Tensor, out: Tensor, sent: torch.dtype, add: bool) -> Pending:
        """As ``reduce_scatter_mean``: ``(g_0 + g_1 + ...) / N`` in rank order, rounded once.

        No wire is involved. Values are rounded as if there were one, as they are read, and counted so.
        """
        readable = self._readable(buffer, self._peers)
        number = self._begin(0, readable)

        def finish() -> None:
            ranks = range(self.num_ranks)
            parts = [buffer if rank == self.rank else self._buffer_of(rank, number, buffer) for rank in ranks]
            own_slices = (self._slices(part)[self.rank] for part in parts)
            numel = PIECE_BYTES // buffer.itemsize
            total = self._scratch_of(sum_dtype(sent, out.dtype), numel)
            for piece, *pieces in zip(*(torch.split(each, numel) for each in (out, *own_slices)), strict=True):
                average(pieces, sent=sent, out=piece, total=total, add=add, divisor=self._divisor)
            self._leave(number, readable is not buffer)

        return Pending(REDUCE_SCATTER, [finish], self.explaining, self._under_way, lambda: self._await_others(number))

    def _begin_gather(self, buffer: Tensor, slices: Sequence[Tensor]) -> Pending:
        readable = self._readable(buffer, [self.rank])
        number = self._begin(1, readable)

        def finish() -> None:
            for peer in self._peers:
                slices[peer].copy_(self._slices(self._buffer_of(peer, number, buffer))[peer])
            self._leave(number, readable is not buffer)

        return Pending(ALL_GATHER, [finish], self.explaining, self._under_way, lambda: self._await_others(number))

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """See ``BackendVerbs._gather``; copies, of any shape. Ranks that are out of step hear of it at once."""
        readable = self._own.new_buffer(tensor.numel(), tensor.dtype)
        number = self._begin(2, readable.copy_(tensor.reshape(-1)))
        gathered = [tensor.clone() for _ in range(self.num_ranks)]

        def finish() -> None:
            for peer in self._peers:
                gathered[peer].copy_(self._buffer_of(peer, number, readable).view(tensor.shape))
            self._leave(number, is_copy=True)

        Pending(ALL_REDUCE, [finish], self.explaining, self._under_way).wait()
        return gathered

    def _scratch_of(self, dtype: torch.dtype, numel: int) -> Tensor:
        """Memory for sums, kept: new memory costs a page fault for every 4 KiB, as much as the sum itself."""
        if dtype not in self._scratch or self._scratch[dtype].numel() < numel:
            self._scratch[dtype] = torch.empty(numel, dtype=dtype)
        return self._scratch[dtype]

    def _readable(self, buffer: Tensor, ranks: Iterable[int]) -> Tensor:
        """The buffer, or one that has its slices of some ranks, in memory that peers can read."""
        assert buffer.is_contiguous()
        if not buffer.numel() or self._own.offset_of(buffer) is not None:
            return buffer
        copied = self._own.new_buffer(buffer.numel(), buffer.dtype)  # of which only pages that are written exist
        theirs, ours = self._slices(copied), self._slices(buffer)
        for rank in ranks:
            theirs[rank].copy_(ours[rank])
        return copied

    def _begin(self, kind: int, buffer: Tensor) -> int:
        """Tell the others where this rank's buffer is; returns the number of the verb, equal on all ranks."""
        while len(self._under_way) >= _MOST_UNDER_WAY:
            self._under_way[0].finish()
        self._await_others(self._num_begun + 1 - _MOST_UNDER_WAY)
        self._num_begun += 1
        place, page = _place_of(self._num_begun), self._own.page
        page[place : place + 3] = [self._own.offset_of(buffer) or 0, buffer.nbytes, kind]
        _order_memory()
        page[_BEGUN] = self._num_begun
        return self._num_begun

    def _buffer_of(self, peer: int, number: int, like: Tensor) -> Tensor:
        """The peer's buffer, once it has begun a verb."""
        file = self._files[peer]
        if not self._wait(file, _BEGUN, number):
            self._fail(f"rank {peer} has ended, let go of its optimizer, or given up")
        place = _place_of(number)
        (offset, *theirs), (_, *ours) = (each.page[place : place + 3] for each in (file, self._own))
        if theirs != ours:
            does, does_here = (f"{_KINDS[kind]} of {nbytes} bytes" for nbytes, kind in (theirs, ours))
            self._fail(f"ranks are out of step: rank {peer} has begun {does}, and rank {self.rank} {does_here}")
        return file.tensor_at(offset, like)

    def _fail(self, message: str) -> NoReturn:
        self._own.page[_GONE] = 1  # so that nobody waits for this rank
        raise RuntimeError(message)

    def _leave(self, number: int, is_copy: bool) -> None:
        """Tell the others that this rank has read their buffers; nobody else keeps a copy until they have read it."""
        _order_memory()
        self._own.page[_LEFT] = number
        if is_copy:
            self._await_others(number)

    def _await_others(self, number: int) -> None:
        """Wait until nobody reads this rank's buffer of a verb any more, because all have left it or are gone."""
        for peer in self._peers:
            self._wait(self._files[peer], _LEFT, number)

    def _wait(self, file: MemoryFile, what: int, number: int) -> bool:
        """Wait until a rank has begun or left a verb; False if it has not and will not, and an error if it is late."""
        start = time.perf_counter()
        while True:
            waited_s = time.perf_counter() - start
            is_gone = file.page[_GONE] or (waited_s > _PATIENCE_S and _has_ended(file.pid))
            if file.page[what] >= number:
                _order_memory()
                return True
            if is_gone:
                return False
            if waited_s > self._timeout_s:
                self._fail(f"rank {self._files.index(file)} has not come for {self._timeout_s:.0f} s")
            time.sleep(min(waited_s / 16, 2e-3))


def _place_of(number: int) -> int:
    return _VERBS + 3 * (number % _MOST_UNDER_WAY)


_lock = threading.Lock()


def _order_memory() -> None:
    """See that others see what was written before this first, and that this rank reads in that order.

    Processors may move loads and stores into a section under a lock, from before it and from behind it, but not across
    two of them.
    """
    for _ in range(2):
        with _lock:
            pass


def _has_ended(pid: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except OSError as error:
        return isinstance(error, ProcessLookupError)  # a system without these says nothing
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        return bool(poller.poll(0))
    finally:
        os.close(fd)


def _depart(own: MemoryFile) -> None:
    if os.getpid() == own.pid:
        own.page[_GONE] = 1


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    of_bytes, number = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = (*of_bytes, number, number, number, ctypes.c_long), ctypes.c_void_p
    libc.munmap.argtypes, libc.madvise.argtypes = of_bytes, (*of_bytes, number)
    return libc
