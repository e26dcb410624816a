"""Norms of parameters that are spread over ranks, and what is made of them.

``global_norm`` counts every element once, in every layout; ``clipping`` has the update apply a clip; ``metrics``
reports the last step, and ``composer`` tells it by Composer's protocol; ``of_buckets`` says what a rank holds.

Nothing here changes a parameter or a gradient.
"""
