"""Inbound: gradients from backward into their buckets, and buckets through their reduction."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Generator, Iterable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sharded_dadamw.buffers import Bucket
from sharded_dadamw.collectives import Collectives, Handle
from sharded_dadamw.gradients import OwnGradients, Stage

_BUCKETS_AHEAD = 1
"""Reductions kept under way while the caller works on a finished one."""


class Reducer:
    """Collects local gradients and reduces them bucket by bucket."""

    def __init__(self, collectives: Collectives) -> None:
        """Reduce over the ranks of ``collectives``."""
        self._collectives = collectives

    def watch(self, bucket: Bucket) -> None:
        """Have backward deliver gradients into the bucket's flat buffer, where it has one."""
        if not isinstance(bucket.gradients, OwnGradients):
            return
        # Hooks live as long as the parameters; through weak references they do not keep the buffers alive as well.
        gradients = weakref.ref(bucket.gradients)
        hooks = [
            member.param.register_post_accumulate_grad_hook(_Delivery(gradients, slot))
            for slot, member in enumerate(bucket.members)
        ]
        weakref.finalize(bucket.gradients, _remove, hooks).atexit = False

    def drain(self, buckets: Iterable[Bucket]) -> Generator[Bucket]:
        """Reduce buckets, and yield each once its gradient shard is the mean, with the next already under way.

        Close the generator where it might not be exhausted: that waits for what has been started.
        """
        under_way: deque[tuple[Bucket, Handle | None]] = deque()
        try:
            for bucket in buckets:
                under_way.append((bucket, self._launch(bucket)))
                if len(under_way) > _BUCKETS_AHEAD:
                    yield _finish(*under_way.popleft())
            while under_way:
                yield _finish(*under_way.popleft())
        finally:
            # Whatever stopped the caller, no message may be left over for the next step to receive.
            while under_way:
                _finish(*under_way.popleft())

    def _launch(self, bucket: Bucket) -> Handle | None:
        return None if bucket.gradients.stage is Stage.REDUCED else bucket.gradients.reduce(self._collectives)


class _Delivery:
    """The hook of one parameter: hands its fresh gradient over."""

    def __init__(self, gradients: weakref.ref[OwnGradients], slot: int) -> None:
        self._gradients, self._slot = gradients, slot

    def __call__(self, _param: Tensor) -> None:
        gradients = self._gradients()
        if gradients is not None:
            gradients.deliver(self._slot)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _finish(bucket: Bucket, reduction: Handle | None) -> Bucket:
    if reduction is not None:
        reduction.wait()
    if bucket.gradients.stage is Stage.LOCAL:
        bucket.gradients.mark(Stage.REDUCED)
    return bucket
