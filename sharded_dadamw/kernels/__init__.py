"""The update rule again: one pass over memory that decays, updates and measures, where there is a kernel for it.

``operands`` says what an update reads and writes, and ``tiles`` cuts it up. ``choose`` takes ``numba_kernel`` on a CPU,
``triton_kernel`` on CUDA, and ``torch_kernel``, which makes several passes, where those are missing or do not fit. What
the compiled ones are written in is ``numba_language`` and ``triton_language``.
``ready`` keeps prepared updates from step to step. ``fingerprint`` and ``exact_squares`` add up numbers that have no
order of addition, by ``numba_fingerprint``, ``triton_fingerprint`` and ``numba_exact_squares`` where there are those;
``triton_sums`` adds up squared norms.

A kernel knows fragments of tensors and the scalars of a step. It does not know which rank it runs on, or why.
"""
