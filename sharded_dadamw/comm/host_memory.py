"""Memory that the processes of one Linux host can read from each other, so that ranks need not send what they hold.

Each process has one *arena*: a nameless file in memory, as large as the machine's memory, of which pages exist once
they are touched. Buffers are cut from it; when the last tensor on a buffer dies, its pages go back to the system.

    arena of this process   | token | buffer | free    | buffer |      free ...      |   memory, read and written here
    arena of a peer         | token |      buffer      | free | buffer |  free ...   |   the peer's memory, mapped here

:class:`Notes` tell them what to read, and when. They go through pipes, and not through gloo: each would have to wake
threads on both sides first, which takes longer than to read a megabyte.

Nothing has a name, so nothing is left behind after a crash, and the size of /dev/shm does not matter. A process that
was forked, such as a DataLoader's worker, sees the memory of its parent as it changes; it never frees it.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import select
import struct
import sys
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Arena:
    """Memory of this process that others on the host can map.

    Buffers keep it alive. Its mapping and its file descriptors go when it dies.
    """

    def __init__(self) -> None:
        """Reserve addresses; no memory yet.

        Raises:
            OSError: The system has no such memory to give.
        """
        if sys.platform != "linux":
            raise OSError("memory without a name that others can map is Linux's")
        self._size = size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._name = f"sharded_dadamw-{secrets.token_hex(16)}"
        self._boot_id = _BOOT_ID.read_text().strip()
        self.pid = os.getpid()
        self._fd = os.memfd_create(self._name)
        weakref.finalize(self, os.close, self._fd).atexit = False
        os.ftruncate(self._fd, size)
        self.mapping = _mapped(self._fd, size)
        self.mapping[: len(self._name)] = self._name.encode()
        self._address = tensor_at(self.mapping, 0, 1, torch.uint8).data_ptr()
        self._lock = threading.Lock()
        self._free = [(mmap.PAGESIZE, size)]
        self._returned: deque[tuple[int, int]] = deque()

    def new_buffer(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zero-filled memory [numel] that begins on a page of its own.

        Raises:
            MemoryError: No stretch of addresses is long enough.
        """
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        nbytes = numel * dtype.itemsize
        start = self._take(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        # The tensor's storage owns this view, and whatever shares the storage shares it; where torch moves a storage
        # elsewhere, as share_memory_() does, it dies.
        view = memoryview(self.mapping)[start : start + nbytes]
        weakref.finalize(view, self._give_back, start, nbytes).atexit = False
        return torch.frombuffer(view, dtype=dtype)

    def offset_of(self, tensor: Tensor) -> int | None:
        """Where a contiguous tensor begins, in bytes; None where it lies elsewhere."""
        offset = tensor.data_ptr() - self._address
        return offset if 0 <= offset < self._size else None

    def invitation(self) -> str:
        """What another process needs to map this arena: a text for :func:`map_arena`."""
        return json.dumps([self._boot_id, self.pid, self._fd, self._name, self._size])

    def _take(self, nbytes: int) -> int:
        with self._lock:
            while self._returned:
                insort(self._free, self._returned.popleft())
            self._free = _joined(self._free)
            for index, (start, stop) in enumerate(self._free):
                if stop - start >= nbytes:
                    self._free[index] = start + nbytes, stop
                    return start
        raise MemoryError(f"no {nbytes} bytes in a row are left of {self._size}")

    def _give_back(self, start: int, nbytes: int) -> None:
        """Runs where the last reference dies, in any thread and in the middle of anything, so it takes no lock."""
        if os.getpid() != self.pid:  # a forked child must not take its parent's memory away
            return
        nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.mapping.madvise(mmap.MADV_REMOVE, start, nbytes)
        self._returned.append((start, start + nbytes))


def _mapped(fd: int, size: int) -> mmap.mmap:
    mapping = mmap.mmap(fd, size)
    mapping.madvise(mmap.MADV_DONTDUMP)  # to dump core would touch every page, and so fill the machine's memory
    return mapping


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges, without empty ones, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        elif start < stop:
            joined.append((start, stop))
    return joined


_arena: weakref.ref[Arena] | None = None
_mapped_peers: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def arena_of_this_process() -> Arena:
    """The one that all groups of this process share; a new one where there is none.

    Raises:
        OSError: The system has no such memory to give.
    """
    global _arena
    with _lock:
        arena = None if _arena is None else _arena()
        if arena is None or arena.pid != os.getpid():
            arena = Arena()
            _arena = weakref.ref(arena)
        return arena


def tensor_at(mapping: mmap.mmap, offset: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Memory [numel] that begins so many bytes into an arena; the tensor keeps it mapped."""
    if numel == 0:
        return torch.zeros(0, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=numel, offset=offset)


def map_arena(invitation: str) -> mmap.mmap:
    """Map the arena of a process on this host.

    Raises:
        OSError: It cannot be reached from here: it is on another host or in another container, or may not be read.
    """
    boot_id, pid, fd, name, size = json.loads(invitation)
    if boot_id != _BOOT_ID.read_text().strip():
        raise OSError("that process runs on another host")
    with _lock:
        mapping = _mapped_peers.get(name)
        if mapping is None:
            opened = _opened(pid, fd, name, os.O_RDWR)
            try:
                mapping = _mapped(opened, size)
            finally:
                os.close(opened)
            if mapping[: len(name)] != name.encode():
                raise OSError(f"{name} is a copy here")
            _mapped_peers[name] = mapping
        return mapping


def _opened(pid: int, fd: int, name: str, flags: int) -> int:
    """Open what another process of this host has open, if it is what it should be."""
    path = f"/proc/{pid}/fd/{fd}"
    if name not in os.readlink(path):  # in another container numbers mean other processes
        raise OSError(f"{path} is something else here")
    return os.open(path, flags)


class Notes:
    """Pairs of numbers, a kind and a value, that processes of one host send each other.

    There is a pipe for each pair and direction. A process that ends closes its pipes, so that whoever waits for it
    hears of that.
    """

    def __init__(self, peers: Sequence[int], timeout_s: float) -> None:
        """Open pipes for peers, who are called by numbers, to write to.

        Raises:
            OSError: There are no more to open.
        """
        self._timeout_s = timeout_s
        self._open: set[int] = set()
        weakref.finalize(self, _close, self._open).atexit = False
        self._inboxes: dict[int, int] = {}
        self._for_peers: dict[int, int] = {}
        self._outboxes: dict[int, int] = {}
        self._pollers: dict[int, select.poll] = {}
        self._unread: dict[tuple[int, int], deque[int]] = {}
        for peer in peers:
            self._inboxes[peer], self._for_peers[peer] = ends = os.pipe()
            self._open.update(ends)
            self._pollers[peer] = select.poll()
            self._pollers[peer].register(self._inboxes[peer], select.POLLIN)

    def invitation(self) -> str:
        """What peers need for :meth:`accept`."""
        ends = {peer: [end, os.readlink(f"/proc/self/fd/{end}")] for peer, end in self._for_peers.items()}
        return json.dumps([os.getpid(), ends])

    def accept(self, peer: int, invitation: str, *, called: int) -> None:
        """Open the pipe to a peer, who calls this process by a number.

        Raises:
            OSError: It cannot be reached from here.
        """
        pid, ends = json.loads(invitation)
        fd, name = ends[str(called)]
        self._outboxes[peer] = _opened(pid, fd, name, os.O_WRONLY)
        self._open.add(self._outboxes[peer])

    def seal(self) -> None:
        """Leave the ends that are for peers to them, once all have opened theirs."""
        for end in self._for_peers.values():
            os.close(end)
            self._open.remove(end)
        self._for_peers.clear()

    def send(self, peer: int, kind: int, value: int) -> None:
        """Send a note.

        Raises:
            RuntimeError: The peer is gone.
        """
        try:
            os.write(self._outboxes[peer], _NOTE.pack(kind, value))
        except BrokenPipeError as error:
            raise _gone(peer) from error

    def receive(self, peer: int, kind: int) -> int:
        """The next note of a kind from a peer; waits for it.

        Raises:
            RuntimeError: The peer is gone, or silent for longer than the timeout.
        """
        unread = self._unread.setdefault((peer, kind), deque())
        while not unread:
            if not self._pollers[peer].poll(min(self._timeout_s * 1000, 2**31 - 1)):
                raise RuntimeError(f"rank {peer} of the process group has not come for {self._timeout_s:.0f} s")
            arrived = os.read(self._inboxes[peer], 256 * _NOTE.size)
            if not arrived:
                raise _gone(peer)
            for each, value in _NOTE.iter_unpack(arrived):  # pipes deliver small notes whole
                self._unread.setdefault((peer, each), deque()).append(value)
        return unread.popleft()


_NOTE = struct.Struct("=qq")


def _gone(peer: int) -> RuntimeError:
    return RuntimeError(f"rank {peer} of the process group has ended, or let go of its optimizer")


def _close(fds: set[int]) -> None:
    for fd in fds:
        os.close(fd)
