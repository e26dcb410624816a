"""Which call every rank is in: asked only after a verb has failed, for its error.

While all goes well a rank notes where it is, for itself. A rank whose verb fails leaves its call at the process group's
store, and waits a moment for the others to do so. Who has left nothing is missing, and was last where the last verb
ended in which all took part.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

_GRACE_S = 1.2
"""How long a rank that has failed waits for the others, which fail as soon as they notice that it did."""
_STORE_S = 0.5
"""How much longer it waits for the store."""


class _Here(threading.local):
    call = "an exchange"
    hint = ""


here = _Here()
"""What this thread is in."""

last_met: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()
"""The call that all ranks of a group are known to have come to."""
left: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
"""The groups at whose stores this rank has left a call."""


def enter(call: str, hint: str = "") -> None:
    """Say in which call this thread is from now on, and what to do where not all ranks come to it."""
    here.call, here.hint = call, hint


class RankError(RuntimeError):
    """Ranks did not come to the same call, or one of them is gone."""


class Meetings:
    """Why some ranks did not meet; ``failure`` is what to say of any further verb, once one has failed."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.failure = ""
        self._rank, self._num_ranks = rank, num_ranks

    def take_back(self, group: dist.ProcessGroup) -> None:
        """Remove what this rank has left at the store: all have come to a later call."""
        left.discard(group)
        with suppress(Exception):
            _get_process_group_store(group).delete_key(_key(self._rank))

    def explain(self, group: dist.ProcessGroup, error: Exception) -> RankError:
        """Return what to raise in place of a verb's error, which says who is where. It takes two seconds at most."""
        if not self.failure:
            call, last = here.call, last_met.get(group, "init_process_group()")
            self.failure = self._describe(call, self._ask(group, call), last, str(error).strip().partition("\n")[0])
        return RankError(self.failure)

    def _ask(self, group: dist.ProcessGroup, call: str) -> dict[int, str]:
        """The calls of the ranks that have failed as well; empty where the store is gone."""
        found: dict[int, str] = {}

        def ask() -> None:
            with suppress(Exception):  # then the store is gone, too
                store = _get_process_group_store(group)
                keys = [_key(rank) for rank in range(self._num_ranks)]
                store.set(keys[self._rank], call)
                found[self._rank] = call
                while not store.check(keys) and time.monotonic() < deadline:
                    time.sleep(0.02)
                for rank, key in enumerate(keys):
                    if store.check([key]):
                        found[rank] = store.get(key).decode()

        deadline = time.monotonic() + _GRACE_S
        asking = threading.Thread(target=ask, daemon=True)  # whoever serves the store may have stopped
        asking.start()
        asking.join(_GRACE_S + _STORE_S)
        left.add(group)
        return dict(found)

    def _describe(self, call: str, calls: Mapping[int, str], last: str, reason: str) -> str:
        missing = [rank for rank in range(self._num_ranks) if rank not in calls]
        elsewhere = [f"rank {rank} is in {other}" for rank, other in calls.items() if other != call]
        parts = []
        if not calls:
            parts.append(f"a rank did not come to {call}, such as rank 0, which may serve the store that is gone, too")
        elif missing:
            ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
            parts.append(f"{ranks} did not come to {'the end of ' * (last == call)}{call}")
        if elsewhere:
            parts.append(f"rank {self._rank} is in {call}, and {', '.join(elsewhere)}")
        if not parts:
            parts.append(f"all ranks came to {call}, some of them too late, or the network failed")
        if last != call:
            parts.append(f"all were last in {last}")
        who = "; ".join(parts)
        advice = f"{'make the same calls on every rank, and ' * bool(elsewhere)}start again from a checkpoint"
        advice += f"; {here.hint}" * bool(here.hint)
        return f"{who}; {advice} ({reason.partition('. ')[0]})"


def _key(rank: int) -> str:
    return f"sharded_dadamw/{rank}"
