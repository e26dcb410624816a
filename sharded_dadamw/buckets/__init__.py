"""Buckets: parameters of one kind in one flat buffer, with their gradients and this rank's shard of their state.

``bucket`` holds one bucket and its update, ``weights`` its parameters, and ``gradients`` what ``full_gradients``,
``sharded_gradients`` and ``foreign_gradients`` have in common; ``passes`` adds numbered micro-batches. ``admission``
refuses parameters that ranks do not share, ``arrangement`` decides which go together, and ``build`` makes buckets of
them. ``shards`` has all buckets of an optimizer and the ranks that share them. ``offload`` is a bucket whose
state lives in host memory.

A bucket knows its own memory, and which parameters other live buckets hold. It does not know the step's order.
"""
