"""Inbound: gradients from backward into their buckets, and buckets through their reduction.

    backward    | layer 2 | layer 1 | layer 0 | rest, and wait |
    wire                  |=== bucket 0 ===|=== bucket 1 ===|

A round is one reduction of every bucket, in an order that is the same on all ranks, so that what ranks send each other
cannot get mixed up. A reduction is launched and finished, a round is begun and completed. A backward pass outside
``no_sync`` is a round: hooks launch each bucket whose turn has come, and the end of backward launches the others and
finishes all. So nobody ever finds a gradient under way. With ``overlap=False``, in the first step and on one rank, full
gradients wait for ``step``.

[Note: nested backwards] Reentrant activation checkpointing runs a backward of its own for each part, within the
backward of a ``torch.autograd.Function``. Only the outermost end is that of the round. Where no gradient came in the
outermost backward itself, autograd tells us of no such end; what is missing after the last inner one is then completed
by the next call.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import cast

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from sharded_dadamw.buckets.bucket import Bucket
from sharded_dadamw.buckets.gradients import HookedGradients, Stage
from sharded_dadamw.buckets.sharded_gradients import ShardedGradients
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.config import ShardingConfig
from sharded_dadamw.schedule.launches import Launches
from sharded_dadamw.update.adamw import Step


class Reducer:
    """Collects local gradients and reduces them bucket by bucket.

    Attributes:
        is_accumulating: Whether backward passes leave gradients local.
        keeps_shards: Whether of averaged gradients there is nothing but this rank's shard.
        knows_source: Whether ranks have found out if something else averages these gradients.
        launches: Those of this optimizer, and of others on the process group.
        num_rounds: Rounds since gradients were last used or dropped, or a call was refused by all ranks.
    """

    def __init__(self, collectives: Collectives, config: ShardingConfig, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._config = config
        self.is_accumulating = False
        self.keeps_shards = False
        self.num_rounds = 0
        self._collectives = collectives
        self.launches = Launches(collectives)
        self.knows_source = collectives.everyone.num_ranks == 1
        self._overlap = config.overlap and not self.knows_source  # one rank has nothing to wait for
        self._is_overlapping = False  # in the first step we look at gradients first
        self._remembers = not self.knows_source
        self._is_replaced = False  # by an optimizer that has taken some of the parameters
        self._hooked: list[Bucket] = []
        self._others: list[Bucket] = []
        self._is_begun = False
        self._launched: set[Bucket] = set()
        self._under_way: deque[Bucket] = deque()
        self._backward: int | None = None  # the outermost one, where its end will be told
        self._graph_task: int | None = None  # the one whose gradients come in
        self._completed: list[Bucket] = []
        self._knows_order = False

    def watch(self, bucket: Bucket) -> None:
        """Reduce a bucket from now on, and have backward deliver its gradients where they are ours to hold."""
        is_hooked = isinstance(bucket.gradients, HookedGradients)
        (self._hooked if is_hooked else self._others).append(bucket)
        self._knows_order = self._knows_order and not is_hooked
        self.keeps_shards |= isinstance(bucket.gradients, ShardedGradients)
        self.hook(bucket)

    def hook(self, bucket: Bucket) -> None:
        """Have backward deliver a bucket's gradients to this optimizer, and to none that had the parameters before."""
        if not isinstance(bucket.gradients, HookedGradients):
            return
        # Hooks live as long as the parameters; through weak references they do not keep the buffers alive as well.
        here, there = weakref.ref(self), weakref.ref(bucket)
        self._is_replaced = False
        hooks = []
        for slot, member in enumerate(bucket.members):
            param, is_trained = member.param, member.param.requires_grad
            self._unhook(param)
            param.requires_grad_(True)  # it may be frozen for now
            hooks.append(param.register_post_accumulate_grad_hook(_Delivery(here, there, slot)))
            param.requires_grad_(is_trained)
        weakref.finalize(bucket, _remove, hooks).atexit = False

    def _unhook(self, param: Tensor) -> None:
        """Remove the hooks of whatever optimizer had a parameter; others fall silent with all of theirs."""
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        if hooks is not None:
            for key, hook in [(key, hook) for key, hook in hooks.items() if isinstance(hook, _Delivery)]:
                if (earlier := hook.reducer()) not in (None, self):
                    earlier._is_replaced = True
                del hooks[key]
            # torch.utils.swap_tensors, which model.to may use, leaves them here and does not call them any more.
            param._post_accumulate_grad_hooks = hooks

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which backward only accumulates; a RuntimeError where something else reduces gradients."""
        if not self._config.reduce_gradients:
            raise RuntimeError(
                "reduce_gradients=False: the wrapper that reduces the gradients has the no_sync() to use"
            )
        before, self.is_accumulating = self.is_accumulating, True
        try:
            yield
        finally:
            self.is_accumulating = before

    def deliver(self, bucket: Bucket, slot: int) -> None:
        """Take a gradient that backward has just accumulated; raises as ``HookedGradients.deliver``."""
        if self._is_replaced:  # no step can use them
            return
        gradients = cast(HookedGradients, bucket.gradients)  # isinstance() of an abstract class costs 1 us
        reduces = self._reduces_in_backward and not self.is_accumulating and gradients.is_last_pass(slot)
        graph_task = torch._C._current_graph_task_id()
        is_first, self._graph_task = graph_task != self._graph_task, graph_task
        if reduces:
            if is_first:
                self._enter_backward(graph_task)
            # Not when the last gradient of a bucket comes, but when the next one does: by then the user's own hooks
            # on that gradient have run as well, and see it as it is on this rank, whatever the buckets.
            self._launch_complete()
            if bucket in self._launched:  # it comes from another pass
                self._complete_round()
        elif self._remembers and is_first:
            Variable._execution_engine.queue_callback(self._remember)
        gradients.deliver(slot, counts=reduces)
        if reduces:
            self._is_begun = True
            if gradients.are_complete and not self._knows_order and bucket not in self._completed:
                self._completed.append(bucket)

    def catch_up(self, *, begin: bool = False) -> None:
        """Complete a round that backward has begun, where that was broken off or could not be told its end. Collective.

        Args:
            begin: Do a round also where there was none since the last step, as where no gradient came on this rank:
                others may be waiting for its part.
        """
        self._is_begun = self._is_begun or (begin and self._reduces_in_backward and not self.num_rounds)
        self._backward = None
        self._complete_round()

    def learn_source(self, *, are_equal: bool) -> None:
        """Take note whether gradients were the same on all ranks before we have averaged them; warns if they were."""
        self.knows_source = True
        self._remembers = not are_equal
        if are_equal and self._hooked:
            self._overlap = False
            instead = (
                "call the model itself, for micro_batches are added in one order"
                if self._config.micro_batches is not None
                else "pass ShardingConfig(reduce_gradients=False)"
            )
            warnings.warn(
                "gradients are the same on all ranks before ShardedDecoupledAdamW has averaged them; if something else "
                f"does, such as DistributedDataParallel, {instead}; from now on they are averaged in step() only, "
                "which is right in either case",
                stacklevel=2,
            )

    def still_local(self) -> list[Bucket]:
        """The buckets of backward's gradients that are still to be reduced, which have to be the same on all ranks."""
        local = [bucket for bucket in self._hooked if bucket.gradients.stage is Stage.LOCAL]
        return list(self._hooked) if local and self.keeps_shards else local

    def reduce_each(self, *, last_first: bool = False) -> Generator[Bucket]:
        """Reduce what backward has left, one bucket ahead, and yield each bucket once its gradient shard is the mean.

        Collective. Close the generator where it might not be exhausted: that waits for what has been started. With
        ``last_first`` everything is reduced first, and buckets come in the reverse order: what forward reads first,
        backward delivers last.
        """
        rest = deque(self.still_local())
        rest += [bucket for bucket in self._others if bucket.gradients.stage is Stage.LOCAL]
        later = set(rest)
        finished = [bucket for bucket in self.buckets() if bucket not in later]
        try:
            if last_first:
                deque(self._finish_each(rest), maxlen=0)
                finished = self.buckets()[::-1]
            self._launch_ahead(rest)
            for bucket in finished:
                bucket.gradients.set_read()
                yield bucket
            yield from self._finish_each(rest)
        finally:
            # Whatever stopped the caller, no message may be left over for the next step to receive.
            deque(self._finish_each(rest), maxlen=0)

    def reduce_all(self) -> None:
        """Average the gradients of all buckets. Collective."""
        deque(self.reduce_each(), maxlen=0)

    def end_step(self) -> None:
        """Say that a step has used the gradients. Collective where the order of buckets is still to be learnt."""
        for bucket in self.buckets():
            bucket.gradients.consume()
        self.num_rounds = 0
        self._learn_order()
        self._is_overlapping = self._overlap and self.knows_source

    def after_refusal(self, *, differ: bool) -> None:
        """Say that all ranks have refused a call. Where they differ, averages are of no use; what is local stays."""
        self.num_rounds = 0
        for bucket in self._hooked if differ else ():
            if bucket.gradients.stage in (Stage.REDUCED, Stage.READ):
                bucket.gradients.consume()

    def drop(self) -> None:
        """Forget all gradients, once no other rank waits for them; the next round is the first of its step."""
        self.num_rounds = 0
        self.launches.drop()
        self._under_way.clear()
        for bucket in self.buckets():
            bucket.gradients.drop()

    def changes(self, *, is_unscaled: bool) -> dict[Bucket, Tensor]:
        """By what factors gradients were multiplied, as ``Gradients.change`` says; empty where nobody did that.

        Where somebody did, the buckets that nobody touched are there with a factor of 1, or nan without a gradient.
        """
        unused = [bucket for bucket in self._hooked if bucket.gradients.stage is not Stage.CONSUMED]
        factors = {bucket: bucket.gradients.change(is_unscaled=is_unscaled) for bucket in unused}
        if all(factor is None for factor in factors.values()):
            return {}
        found = {}
        for bucket, factor in factors.items():
            untouched = 1.0 if any(bucket.gradients.present) else torch.nan
            like = bucket.gradients.shard
            found[bucket] = like.new_full((1,), untouched, dtype=torch.float64) if factor is None else factor
        return found

    def buckets(self) -> list[Bucket]:
        """All that are watched, in the order in which they are reduced."""
        return [*self._hooked, *self._others]

    def _enter_backward(self, current: int) -> None:
        """See to it that the end of this backward pass, or of the one around it, finishes the round."""
        self._announce("backward")
        is_nested = _is_nested()
        if is_nested:
            will_be_told = self._backward is not None
        else:
            will_be_told = self._backward == current
            if self._backward is not None and not will_be_told:
                self._complete_round()  # of a pass that was broken off
            self._backward = current
        if not will_be_told:
            Variable._execution_engine.queue_callback(partial(self._end_backward, is_nested=is_nested))

    def _remember(self) -> None:
        """Take note of what backward has left, so that ``changes`` tells what was done to it since."""
        for bucket in self._hooked:
            bucket.gradients.remember()

    def _end_backward(self, *, is_nested: bool) -> None:
        """Complete the round of a backward pass; of a nested one, finish what can be launched by now."""
        if is_nested:
            self._launch_complete()
            self._finish_all()
            if len(self._launched) < len(self._hooked):
                return
        else:
            self._backward = None
        self._complete_round()

    def _learn_order(self) -> None:
        """Take over the order in which rank 0's first backward completed buckets, once per set of them.

        Buckets that it did not complete, for want of a gradient, come last, so that they hold up no other.
        """
        if self._knows_order or not (self._is_overlapping and self._hooked):
            return
        first = [self._hooked.index(bucket) for bucket in self._completed]
        order = first + [index for index in range(len(self._hooked)) if index not in first]
        agreed = torch.tensor(order, dtype=torch.int64).to(self._hooked[0].gradients.shard.device)
        self._collectives.broadcast_(agreed)
        self._hooked = [self._hooked[index] for index in agreed.tolist()]
        self._completed, self._knows_order = [], True

    @property
    def averages_alone(self) -> bool:
        """Whether ranks know that nothing else averages these gradients."""
        return self.knows_source and self._remembers

    @property
    def _reduces_in_backward(self) -> bool:
        return bool(self._hooked) and (self._is_overlapping or self.keeps_shards)

    def _launch_complete(self) -> None:
        """Launch the buckets whose turn has come."""
        while len(self._launched) < len(self._hooked):
            bucket = self._hooked[len(self._launched)]
            if not cast(HookedGradients, bucket.gradients).are_complete:
                return
            self._launch_in_backward(bucket)

    def _launch_in_backward(self, bucket: Bucket) -> None:
        bucket.gradients.look()
        self._launch(bucket)
        self._launched.add(bucket)
        if self.keeps_shards:  # what is under way holds a buffer
            self._finish_all_but(self._collectives.reductions_ahead if self._overlap else 0)

    def _finish_all_but(self, num_ahead: int) -> None:
        while len(self._under_way) > num_ahead:
            self._finish_oldest()

    def _launch_ahead(self, rest: deque[Bucket]) -> None:
        while rest and len(self._under_way) <= self._collectives.reductions_ahead:
            self._launch(rest.popleft())

    def _finish_each(self, rest: deque[Bucket]) -> Iterator[Bucket]:
        """Finish what is under way, launch the rest meanwhile, and yield the buckets in this order."""
        self._launch_ahead(rest)
        while self._under_way:
            bucket = self._finish_oldest()
            self._launch_ahead(rest)
            bucket.gradients.set_read()
            yield bucket

    def _launch(self, bucket: Bucket) -> None:
        self.launches.note(bucket.members[0].name)
        bucket.gradients.reduce(self._collectives)
        self._under_way.append(bucket)

    def _finish_oldest(self) -> Bucket:
        bucket = self._under_way.popleft()
        bucket.gradients.wait()
        return bucket

    def _complete_round(self) -> None:
        """Launch what a round that has begun still lacks, and finish all of it."""
        if self._is_begun:
            self._launch_complete()
            for bucket in self._hooked[len(self._launched) :]:
                self._launch_in_backward(bucket)
                self._finish_all_but(self._collectives.reductions_ahead)
            self._finish_all()
            self._is_begun = False
            self._launched.clear()
            self.num_rounds += 1

    def _finish_all(self) -> None:
        # Verbs on CPUs finish what was started before first, so that all of our part is sent before we wait for any;
        # of the backend's own the last one is waited for first, which waits for all.
        for bucket in reversed(self._under_way):
            bucket.gradients.wait()
        self._under_way.clear()


def fetched(buckets: Iterable[Bucket], step: Step) -> Iterator[Bucket]:
    """Begin to bring in what updates of buckets read, some ahead, and yield the buckets in order, to be updated."""
    waiting: deque[Bucket] = deque()
    for bucket in buckets:
        bucket.fetch_(step)
        waiting.append(bucket)
        if len(waiting) > bucket.num_ahead:
            yield waiting.popleft()
    yield from waiting


class _Delivery:
    """The hook of one parameter: hands its fresh gradient over."""

    def __init__(self, reducer: weakref.ref[Reducer], bucket: weakref.ref[Bucket], slot: int) -> None:
        self.reducer, self._bucket, self._slot = reducer, bucket, slot

    def __call__(self, _param: Tensor) -> None:
        reducer, bucket = self.reducer(), self._bucket()
        if reducer is not None and bucket is not None:
            reducer.deliver(bucket, self._slot)


def _is_nested() -> bool:
    """Whether this thread is in a backward that the backward of a Python function runs. [Note: nested backwards]."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            return True
        frame = frame.f_back
    return False


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
