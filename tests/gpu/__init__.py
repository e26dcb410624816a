"""What only a CUDA machine can show: `python -m pytest tests/gpu`. Skipped elsewhere."""
