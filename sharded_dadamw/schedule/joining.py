"""Ranks that run out of data before others, within torch.distributed.algorithms.Join.

A rank that has left its loop repeats what it did in its last step, with zeros for gradients, until all have left
theirs. So a mean is the sum over the ranks with data, divided by the number of all ranks, as by default in torch.

Source: torch.distributed.optim.ZeroRedundancyOptimizer, which repeats a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.gradients import HookedGradients
from sharded_dadamw.buckets.shards import Shards
from sharded_dadamw.comm.calls import enter
from sharded_dadamw.norms.clipping import PendingClip
from sharded_dadamw.schedule.reducer import Reducer

_WITHOUT_DATA = "a rank that has no more data comes along within torch.distributed.algorithms.Join([optimizer])"


class Joining:
    """One rank within ``Join``. It is changed in place and never replaced, since proxies of an optimizer share it.

    Attributes:
        clips: The ``max_norm`` and ``norm_type`` of each clip of the last step.
        clips_now: Those of the step to come.
    """

    _join_config: Any = None  # what Join says; by these three it knows its own

    def __init__(self, shards: Shards) -> None:
        self.join_device = shards.device
        self.clips: list[tuple[float, float]] = []
        self.clips_now: list[tuple[float, float]] = []
        self._shards = shards
        self._has_data = True
        self._present: Mapping[Bucket, Sequence[bool]] = {}
        self._is_announced = False

    @property
    def join_process_group(self) -> Any:
        """The ranks that hold the same parameters; None for this one alone."""
        return self._shards.collectives.everyone.group

    def announce(self, call: str) -> None:
        """Enter a call. Tell ranks without data that this one has some, once per step and ahead of all collectives."""
        enter(call, _WITHOUT_DATA)
        if self._join_config is not None and self._has_data and not self._is_announced:
            self._is_announced = True
            Join.notify_join_context(self)  # type: ignore[arg-type]

    @contextmanager
    def agreeing(self, call: str, clip: PendingClip) -> Iterator[None]:
        """Announce a call, in whose context ranks agree on it. Forgets clips that are gone with their gradients.

        Then ``clip``, which waits for the step, is empty.
        """
        self.announce(call)
        try:
            yield
        except Exception:
            self._is_announced = False  # it ends the step, and leaves ``Join`` on some ranks
            raise
        if not clip:
            self.clips_now.clear()

    def end_step(self, present: Mapping[Bucket, Sequence[bool]]) -> None:
        """Remember a step, in which these parameters had a gradient."""
        self._is_announced = False
        self._present, self.clips, self.clips_now = present, self.clips_now, []

    def objection(self, reducer: Reducer) -> str | None:
        """Return why zeros of this rank would be wrong, if they are."""
        if self._has_data:
            return None
        if self._shards.adds_in_tree:
            return "this rank is out of data, and ShardingConfig(micro_batches=...) has each rank run its share of them"
        are_ours = all(isinstance(bucket.gradients, HookedGradients) for bucket in self._shards.buckets)
        may_be_alone = self._join_config.is_first_joinable and not reducer.knows_source
        if are_ours and (reducer.averages_alone or may_be_alone):
            return None
        return (
            "this rank is out of data, within torch.distributed.algorithms.Join, and has no averages where something "
            "else makes them, such as DistributedDataParallel; leave that out and use Join([optimizer]), with the "
            "optimizer averaging by itself (ShardingConfig(reduce_gradients=True))"
        )

    @contextmanager
    def without_data(self) -> Iterator[None]:
        """A context with zeros for the gradients that the last step had, or in the first step for all."""
        for bucket in self._shards.buckets:
            if isinstance(bucket.gradients, HookedGradients):
                bucket.gradients.bring_zeros(self._present.get(bucket, [True] * len(bucket.members)))
        self._has_data = False
        try:
            yield
        finally:
            self._has_data = True


class JoinableOptimizer(Joinable):
    """The part of an optimizer that ``Join`` calls."""

    _joining: Joining

    @property
    def _join_config(self) -> Any:
        return self._joining._join_config

    @_join_config.setter
    def _join_config(self, config: Any) -> None:
        self._joining._join_config = config if config.enable else None

    @property
    def join_device(self) -> torch.device:
        """The parameters' device."""
        return self._joining.join_device

    @property
    def join_process_group(self) -> Any:
        """The ranks that hold the same parameters; None for this one alone."""
        return self._joining.join_process_group

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return what a rank without data does, within ``torch.distributed.algorithms.Join([optimizer], ...)``.

        It repeats the last step with zeros for gradients, ``clip_grad_norm_`` before it included.

        Args:
            kwargs: Of ``Join``. ``scheduler`` is stepped after each of these steps: without it the lr of this rank
                falls behind, which is an error on every rank.
        """
        return _Repetition(self, kwargs.get("scheduler"))


class _Repetition(JoinHook):
    """A rank without data takes part in the steps of the others."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler

    def main_hook(self) -> None:
        """Take part in one step."""
        self._optimizer.zero_grad()
        with self._optimizer._joining.without_data():
            for max_norm, norm_type in self._optimizer._joining.clips:
                self._optimizer.clip_grad_norm_(max_norm, norm_type)
            self._optimizer.step()
        if self._scheduler is not None:
            self._scheduler.step()

    def post_hook(self, is_last_joiner: bool) -> None:
        """Leave ``Join``."""
        self._optimizer.synchronize()
        self._optimizer._joining._join_config = None
