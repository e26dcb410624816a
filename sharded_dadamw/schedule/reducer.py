"""Inbound: gradients from backward into their buckets, and buckets through their reduction.

[Note: rounds] A round is one reduction of every bucket, in an order that is the same on all ranks, so that what ranks
send each other cannot get mixed up. Backward begins a round when the first bucket of that order is complete, and goes
on as the next ones are; whoever needs the result launches what is left. With full gradients there is one round per
step; with sharded ones, one per backward pass outside ``no_sync``, which its end completes.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.gradients import Stage
from sharded_dadamw.buckets.hooked_gradients import HookedGradients
from sharded_dadamw.buckets.sharded_gradients import ShardedGradients
from sharded_dadamw.comm.collectives import Collectives, Handle

_BUCKETS_AHEAD = 1
"""Reductions kept under way while the caller works on a finished one; with sharded gradients, while backward does."""
_NO_BACKWARD = -1


class Reducer:
    """Collects local gradients and reduces them bucket by bucket.

    Attributes:
        overlap: Whether reductions begin in backward, and are not waited for there.
        is_accumulating: Whether backward passes leave gradients local.
        num_rounds: Rounds that this rank has completed.
    """

    def __init__(self, collectives: Collectives, device: torch.device, *, overlap: bool) -> None:
        """Reduce over ranks.

        Args:
            collectives: The ranks.
            device: Where gradients are.
            overlap: Whether reductions begin in backward, and are not waited for there.
        """
        self.is_accumulating = False
        self.num_rounds = 0
        self.overlap = overlap
        self._collectives = collectives
        self._device = device
        self._hooked: list[Bucket] = []
        self._others: list[Bucket] = []
        self._position = 0
        self._is_begun = False
        self._holds_means = False
        self._num_rounds_used = 0
        self._kept: list[tuple[Bucket, Tensor]] | None = None  # of a round that was begun after backward
        self._backward = _NO_BACKWARD
        self._under_way: deque[tuple[Bucket, Handle | None]] = deque()
        self._completed: list[Bucket] = []
        self._knows_order = False

    def watch(self, bucket: Bucket) -> None:
        """Reduce a bucket from now on, and have backward deliver its gradients where they are ours to hold."""
        if not isinstance(bucket.gradients, HookedGradients):
            self._others.append(bucket)
            return
        self._hooked.append(bucket)
        self._knows_order = False
        # Hooks live as long as the parameters; through weak references they do not keep the buffers alive as well.
        here, there = weakref.ref(self), weakref.ref(bucket)
        hooks = [
            member.param.register_post_accumulate_grad_hook(_Delivery(here, there, slot))
            for slot, member in enumerate(bucket.members)
        ]
        weakref.finalize(bucket, _remove, hooks).atexit = False

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward only accumulates."""
        before, self.is_accumulating = self.is_accumulating, True
        try:
            yield
        finally:
            self.is_accumulating = before

    def deliver(self, bucket: Bucket, slot: int) -> None:
        """Take a gradient that backward has just accumulated, and launch the buckets whose turn has come.

        Raises:
            RuntimeError: It comes after its bucket was averaged, and before ``zero_grad``.
            ValueError: It is sparse.
        """
        gradients = bucket.gradients
        assert isinstance(gradients, HookedGradients)
        if gradients.stage is Stage.REDUCING and gradients.have_ended(arriving=slot):
            self.settle()  # those before were dropped, and the other ranks' messages are still to be received
        in_parts = isinstance(gradients, ShardedGradients)
        reduces = (self.overlap or in_parts) and not self.is_accumulating
        if reduces and in_parts:
            self._enter_backward()
        gradients.deliver(slot, counts=reduces)
        if not reduces:
            return
        self._is_begun = True
        if gradients.num_missing:
            return
        if not self._knows_order and bucket not in self._completed:
            self._completed.append(bucket)
        while self._position < len(self._hooked) and self._hooked[self._position].gradients.are_complete:
            self._launch_in_backward(self._hooked[self._position])

    def complete_round(self) -> None:
        """Launch what a round that backward has begun still lacks."""
        if self._is_begun:
            for bucket in self._hooked[self._position :]:
                if bucket.gradients.stage in (Stage.LOCAL, Stage.CONSUMED):
                    self._launch_in_backward(bucket)
            self._end_round()

    def prepare(self) -> None:
        """Launch what other ranks may be waiting for in backward, before they and this one compare notes.

        [Note: at least one round] A rank whose backward has begun no round since the last step, for want of a backward
        or of a gradient, cannot know whether the others' have. They may be waiting for it there, and a backend may mix
        up what ranks launch in different orders. So where backward reduces at all, such a rank does its part of a round
        now, with the gradients that it has. Should the ranks then disagree, :meth:`resync` gives it back its own.

        What else is local, such as gradients that were assigned by hand after a clip, is left to :meth:`drain`, after
        the notes. But with sharded gradients backward waits for one reduction before it launches the next.
        """
        self.complete_round()
        is_first = self.num_rounds == self._num_rounds_used
        if self._keeps_shards:
            self._is_begun = is_first or bool(self._rest())
            self.complete_round()
        elif self._hooked and self.overlap and is_first:
            local = [bucket for bucket in self._hooked if bucket.gradients.stage is Stage.LOCAL]
            self._kept = [(bucket, bucket.gradients.shard.clone()) for bucket in local]
            rest = deque(self._hooked)
            while rest or self._under_way:  # done with here: who wants to change its gradients waits for our reading
                self._launch_ahead(rest)
                self._finish_oldest()
            self._is_begun = True
            self._end_round()

    def settle(self) -> None:
        """Finish all there is under way, as before gradients are dropped."""
        self.complete_round()
        while self._under_way:
            self._finish_oldest()
        for bucket in self._hooked:
            if bucket.gradients.stage is Stage.REDUCING and bucket.gradients.have_ended():
                bucket.gradients.mark(Stage.LOCAL)

    def release(self) -> None:
        """Wait until gradients may be written, from anywhere."""
        for bucket in self._hooked:
            bucket.gradients.release()

    def drop(self) -> None:
        """Forget all gradients, which are settled."""
        for bucket in self.buckets():
            bucket.gradients.mark(Stage.LOCAL)
        self._holds_means = False
        self._kept = None

    def resync(self) -> None:
        """Have all ranks complete as many rounds as any has, after they disagreed about a step. Collective.

        What was reduced in rounds that only some ranks began, or began in backward, is worth nothing, on all ranks;
        full gradients then have to be dropped by ``zero_grad``, and sharded ones are.
        """
        mine = [self.num_rounds, -self.num_rounds, self._kept is not None, self._kept is None]
        largest = torch.tensor(mine, dtype=torch.int64, device=self._device)
        self._collectives.all_reduce_(largest, dist.ReduceOp.MAX).wait()
        most, negated_fewest, some_kept, some_did_not = largest.tolist()
        for bucket, own in self._kept or []:
            bucket.gradients.shard.copy_(own)
            bucket.gradients.mark(Stage.LOCAL)
        self._kept = None
        while self.num_rounds < most:
            self._mark_consumed()  # or buckets with means would not take part
            self._is_begun = True
            self.complete_round()
        self.settle()
        if most != -negated_fewest or (some_kept and some_did_not):
            self._mark_consumed()
        self.release()

    @property
    def has_reduced_in_backward(self) -> bool:
        """Whether gradients are averages already, or about to become so, as they were when backward delivered them."""
        return any(bucket.gradients.stage is Stage.REDUCING for bucket in self._hooked)

    def rounds_to_come(self) -> int:
        """Rounds that this rank will have completed after :meth:`drain`; the same on all ranks, if they agree."""
        return self.num_rounds + bool(self._rest())

    def drain(self, ready_order: Sequence[Bucket] = ()) -> Generator[Bucket]:
        """Reduce what is not reduced, and yield each bucket once its gradient shard is the mean, the next under way.

        Close the generator where it might not be exhausted: that waits for what has been started.

        Args:
            ready_order: In which order to yield the buckets whose means are there already.
        """
        self._kept = None
        rest = deque(self._rest())
        self._is_begun = self._is_begun or bool(rest)
        rest += [bucket for bucket in self._others if bucket.gradients.stage is Stage.LOCAL]
        later = [*rest, *(bucket for bucket, _ in self._under_way)]
        ready = [bucket for bucket in self.buckets() if bucket not in later]
        ready.sort(key=lambda bucket: ready_order.index(bucket) if bucket in ready_order else len(ready_order))
        try:
            self._launch_ahead(rest)
            for bucket in ready:
                if bucket.gradients.stage is not Stage.REDUCED:
                    bucket.gradients.mark(Stage.REDUCED)
                yield bucket
            while self._under_way:
                bucket = self._finish_oldest()
                self._launch_ahead(rest)
                if all(bucket is not other for other, _ in self._under_way):
                    bucket.gradients.mark(Stage.REDUCED)
                    yield bucket
        finally:
            # Whatever stopped the caller, no message may be left over for the next step to receive.
            while rest or self._under_way:
                self._launch_ahead(rest)
                self._finish_oldest().gradients.mark(Stage.REDUCED)
            self._end_round()

    def consume(self) -> None:
        """Say that a step has used the gradients."""
        self._mark_consumed()
        self.release()
        self._num_rounds_used = self.num_rounds

    def learn_order(self) -> None:
        """Take over the order in which rank 0's first backward completed buckets. Collective, once per set of them.

        Buckets that it did not complete, for want of a gradient, come last, so that they hold up no other.
        """
        if self._knows_order or not (self.overlap and self._hooked):
            return
        first = [self._hooked.index(bucket) for bucket in self._completed]
        order = first + [index for index in range(len(self._hooked)) if index not in first]
        agreed = torch.tensor(order, dtype=torch.int64).to(self._device)
        self._collectives.broadcast_(agreed)
        self._hooked = [self._hooked[index] for index in agreed.tolist()]
        self._completed, self._knows_order = [], True

    def buckets(self) -> list[Bucket]:
        """All that are watched, in the order in which they are reduced."""
        return [*self._hooked, *self._others]

    def _enter_backward(self) -> None:
        """See to it that the end of this backward pass completes its round."""
        current = torch._C._current_graph_task_id()
        if current != self._backward:
            self.complete_round()  # of a pass that was broken off
            self._backward = current
            Variable._execution_engine.queue_callback(_End(weakref.ref(self)))

    def end_backward(self) -> None:
        """Complete the round of a backward pass whose gradients are to be sharded."""
        self._backward = _NO_BACKWARD
        self.complete_round()

    def _mark_consumed(self) -> None:
        for bucket in self.buckets():
            bucket.gradients.mark(Stage.CONSUMED)
        self._holds_means = False

    @property
    def _keeps_shards(self) -> bool:
        return any(isinstance(bucket.gradients, ShardedGradients) for bucket in self._hooked[:1])

    def _rest(self) -> list[Bucket]:
        """The buckets of a round without which gradients cannot be used."""
        local = [bucket for bucket in self._hooked if bucket.gradients.stage is Stage.LOCAL]
        if not local:
            return []
        if self._holds_means and not any(bucket.gradients.are_partly_local for bucket in local):
            return []
        return local

    def _launch_in_backward(self, bucket: Bucket) -> None:
        self._launch(bucket)
        self._position += 1
        # What is under way with sharded gradients holds a buffer.
        while isinstance(bucket.gradients, ShardedGradients) and len(self._under_way) > _BUCKETS_AHEAD * self.overlap:
            self._finish_oldest()

    def _launch_ahead(self, rest: deque[Bucket]) -> None:
        while rest and len(self._under_way) <= _BUCKETS_AHEAD:
            self._launch(rest.popleft())

    def _launch(self, bucket: Bucket) -> None:
        self._under_way.append((bucket, bucket.gradients.reduce(self._collectives)))

    def _finish_oldest(self) -> Bucket:
        bucket, reduction = self._under_way.popleft()
        if reduction is not None:
            reduction.arrive()
        return bucket

    def _end_round(self) -> None:
        self._position = 0
        if self._is_begun:
            self._is_begun = False
            self.num_rounds += 1
            self._holds_means = self._keeps_shards


class _Delivery:
    """The hook of one parameter: hands its fresh gradient over."""

    def __init__(self, reducer: weakref.ref[Reducer], bucket: weakref.ref[Bucket], slot: int) -> None:
        self._reducer, self._bucket, self._slot = reducer, bucket, slot

    def __call__(self, _param: Tensor) -> None:
        reducer, bucket = self._reducer(), self._bucket()
        if reducer is not None and bucket is not None:
            reducer.deliver(bucket, self._slot)


class _End:
    """What autograd calls at the end of a backward pass."""

    def __init__(self, reducer: weakref.ref[Reducer]) -> None:
        self._reducer = reducer

    def __call__(self) -> None:
        if (reducer := self._reducer()) is not None:
            reducer.end_backward()


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
