"""The session's pool of ranks ends with the session, and everything runs on one thread beside it."""

import os

import pytest
import torch

from tests.pool import pool

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels then run on the CPU, slowly; read at its import


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "clients: with other frameworks, the launcher, or processes that die")
    torch.set_num_threads(1)  # tensors are tiny, and idle threads would spin on the cores that the ranks need


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is dear: files are handed out in this order, and the last one is waited for."""
    items.sort(key=lambda item: item.get_closest_marker("clients") is None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool.close()
