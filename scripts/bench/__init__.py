"""The benchmarks, `python -m scripts.bench COMMAND`, run from the checkout."""
