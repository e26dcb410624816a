"""Norms of parameters that are spread over ranks, and what is made of them.

``global_norm`` counts every element once, in every layout; ``clipping`` has the update apply a clip; ``step_report``
tells of a step, and ``composer`` tells it by Composer's protocol; ``held`` says what a rank holds, and ``norm_ranks``
adds that up, over the ranks that it finds.

Nothing here changes a parameter or a gradient.
"""
