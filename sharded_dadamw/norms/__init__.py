"""Norms of parameters that are spread over ranks, and what is made of them.

``global_norm`` counts every element once, in every layout; ``clipping`` has the update apply a clip; ``metrics``
tells of a step, and ``composer`` tells it by Composer's protocol; ``of_buckets`` and ``of_parameters`` say what a rank
holds; ``reporting`` remembers what an optimizer needs for all that.

Nothing here changes a parameter or a gradient.
"""
