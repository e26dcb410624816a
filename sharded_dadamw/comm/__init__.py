"""The verbs between ranks, and the notes by which ranks agree before they exchange data.

``collectives`` defines the verbs and serves them for one rank and by a backend's own means; ``exchange`` and
``host_memory`` serve ranks on CPUs; ``mesh`` joins two axes; ``connect`` chooses. ``agreement`` turns a disagreement
into an error on every rank. ``in_flight`` has readers of a tensor wait for data that is on its way.

A verb knows flat tensors and ranks. It does not know what a parameter, a gradient or a step is.
"""
