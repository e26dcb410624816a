"""Without a CUDA device the whole folder is skipped; collecting it needs neither a device nor Triton."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
