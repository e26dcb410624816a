"""The verbs between ranks, and how ranks agree before they exchange data.

``collectives`` defines the verbs and serves them for one rank and by a backend's own means. ``messages`` and
``shared_memory`` serve ranks on CPUs, ``mesh`` joins two axes, and ``connect`` chooses. ``pending`` is a verb under
way, ``means`` how values are averaged, and ``tree`` the order in which micro-batches are added. ``agreement`` turns a
disagreement into an error on every rank, and ``calls`` tells who is missing where a verb fails. ``dtensors`` takes this
rank's part of a tensor of torch's that is spread over ranks.

A verb knows flat tensors and ranks. But for ``dtensors`` nothing here knows what a parameter or a gradient is.
"""
