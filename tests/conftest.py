"""The session's pool of ranks ends with the session, and everything runs on one thread beside it."""

import pytest
import torch

from tests.pool import pool


def pytest_configure() -> None:
    torch.set_num_threads(1)  # tensors are tiny, and idle threads would spin on the cores that the ranks need


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool.close()
