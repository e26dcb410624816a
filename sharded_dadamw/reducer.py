"""Inbound: gradients from backward into their buckets, and buckets through their reduction.

[Note: where a gradient lives] A parameter without a gradient has ``p.grad is None``, as everywhere in torch, so that
an unused parameter stays untouched. The first gradient that backward produces is moved into the bucket's flat buffer by
a hook, at once, so that two copies never coexist for more than one parameter; later ones accumulate into that view.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sharded_dadamw.buffers import Bucket, Gradients
from sharded_dadamw.collectives import Collectives, Handle

_BUCKETS_AHEAD = 1
"""Reductions kept under way while the caller works on a finished one."""


class Reducer:
    """Collects local gradients and reduces them bucket by bucket."""

    def __init__(self, collectives: Collectives, *, reduce_gradients: bool) -> None:
        """Reduce over ``collectives``, or only read gradients where ``reduce_gradients`` is False."""
        self._collectives = collectives
        self._reduce_gradients = reduce_gradients

    def watch(self, bucket: Bucket) -> None:
        """Have backward deliver the bucket's gradients into its flat buffer."""
        if not self._reduce_gradients:
            return
        # Hooks live as long as the parameters; through weak references they do not keep the buffers alive as well.
        weak_bucket = weakref.ref(bucket)
        handles = [
            member.param.register_post_accumulate_grad_hook(_Delivery(weak_bucket, slot))
            for slot, member in enumerate(bucket.members)
        ]
        weakref.finalize(bucket, _remove, handles).atexit = False

    def collect(self, bucket: Bucket) -> tuple[bool, ...]:
        """Bring in gradients that were assigned by hand, and tell which slots have one.

        Raises:
            RuntimeError: The gradients are those that the last step has used.
            ValueError: A gradient is sparse, or in another dtype than its parameter.
        """
        if bucket.marked_gradients_ended():
            bucket.mark_gradients(Gradients.LOCAL)
        if bucket.gradients is Gradients.CONSUMED:
            raise _uncleared(bucket)
        if self._reduce_gradients and bucket.gradients is Gradients.LOCAL:
            for slot in range(len(bucket.members)):
                bucket.adopt_gradient(slot)
        return tuple(member.param.grad is not None and member.param.requires_grad for member in bucket.members)

    def unscale_(self, buckets: Iterable[Bucket], scale: Tensor) -> Tensor | None:
        """Undo a loss scale on gradients that have not been reduced yet.

        Each rank's scaler adapts to what that rank has seen, so scales may differ, and sums over ranks make sense only
        of unscaled gradients.

        Args:
            buckets: All buckets.
            scale: 0-d; gradients are this many times too large.

        Returns:
            What is left for the update to divide by: ``scale`` where gradients are only read or already reduced, else
            None.
        """
        pending = [bucket for bucket in buckets if bucket.gradients is Gradients.LOCAL]
        if not self._reduce_gradients or not pending:
            return scale
        for bucket in pending:
            assert bucket.grad_buffer is not None
            bucket.grad_buffer.div_(scale)
        return None

    def drain(self, buckets: Iterable[Bucket]) -> Iterator[Bucket]:
        """Reduce buckets, and yield each as soon as its ``grad_shard`` is the mean, with the next already under way."""
        under_way: deque[tuple[Bucket, Handle | None]] = deque()
        for bucket in buckets:
            under_way.append((bucket, self._launch(bucket)))
            if len(under_way) > _BUCKETS_AHEAD:
                yield _finish(*under_way.popleft())
        while under_way:
            yield _finish(*under_way.popleft())

    def _launch(self, bucket: Bucket) -> Handle | None:
        if bucket.gradients is Gradients.REDUCED:
            return None
        if bucket.grad_buffer is None:
            bucket.copy_own_gradients()
            return None
        return self._collectives.reduce_scatter_mean_(bucket.grad_buffer)


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class _Delivery:
    """The hook of one parameter: moves its fresh gradient into the bucket."""

    def __init__(self, bucket: weakref.ref[Bucket], slot: int) -> None:
        self._bucket, self._slot = bucket, slot

    def __call__(self, _param: Tensor) -> None:
        bucket = self._bucket()
        if bucket is None:
            return
        if bucket.marked_gradients_ended(arriving=self._slot):
            bucket.mark_gradients(Gradients.LOCAL)
        if bucket.gradients is Gradients.CONSUMED:
            raise _uncleared(bucket)
        if bucket.gradients is Gradients.REDUCED:
            raise RuntimeError(
                f"backward reached {bucket.members[self._slot].name} between clip_grad_norm_() and step(): its "
                "gradient has already been averaged over ranks; run every backward of a step before clipping"
            )
        bucket.adopt_gradient(self._slot)


def _uncleared(bucket: Bucket) -> RuntimeError:
    names = [member.name for member in bucket.members if member.param.grad is not None]
    return RuntimeError(
        f"the gradient of {names[0]} is the one that the last step() has used (averaged in place); call "
        "optimizer.zero_grad() between a step and the next backward"
    )


def _finish(bucket: Bucket, reduction: Handle | None) -> Bucket:
    if reduction is not None:
        reduction.wait()
    if bucket.gradients is Gradients.LOCAL:
        bucket.mark_gradients(Gradients.REDUCED)
    return bucket
