"""What the tests of this folder run on, and how they notice that the host waited, or that Triton compiled."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tests.models import Groups

DEVICE = "cuda"
FIRST_CASE_TIMEOUT_S = 120.0  # the first case on a rank starts CUDA, and NCCL, and compiles kernels


def on_gpu(groups: Groups) -> Groups:
    for group in groups:
        group["params"] = [(name, nn.Parameter(p.detach().to(DEVICE), p.requires_grad)) for name, p in group["params"]]
    return groups


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that gets the name of every kernel that Triton compiles, or fetches from its cache on disk, inside."""
    runtime = importlib.import_module("triton.knobs").runtime
    names: list[str] = []

    def note(*, repr: str, **_: Any) -> None:
        names.append(repr)

    before, runtime.jit_post_compile_hook = runtime.jit_post_compile_hook, note
    try:
        yield names
    finally:
        runtime.jit_post_compile_hook = before
