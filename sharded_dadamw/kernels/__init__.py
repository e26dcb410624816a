"""The update rule again, fused: one pass over memory that decays, updates and measures.

``operands`` says what an update reads and writes, and ``tiles`` cuts it up. ``choose`` takes numba on a CPU, Triton on
CUDA, and torch's own kernels where those are missing or do not fit. ``ready`` keeps prepared updates from step to step.

A kernel knows fragments of tensors and the scalars of a step. It does not know which rank it runs on, or why.
"""
