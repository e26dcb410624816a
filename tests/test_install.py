"""torch alone is enough: no NumPy, nothing else that torch does not bring along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

TRAIN_WITHOUT_NUMPY = """
import sys, weakref
sys.modules["numpy"] = None  # importing it now fails, as where it is not installed
import torch, torch.distributed as dist
from sharded_dadamw import ShardedDecoupledAdamW
dist.init_process_group("gloo")
group = weakref.ref(dist.group.WORLD)
model = torch.nn.Linear(8, 8)
optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2)
model(torch.randn(4, 8)).square().sum().backward()
optimizer.clip_grad_norm_(1.0)
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
optimizer.param_groups[0]["lr"] = 0.1 + dist.get_rank()
try:
    optimizer.zero_grad()
    optimizer.step()
except RuntimeError as error:
    assert "rank 1 has 1.1" in str(error), error
    # One write a line: two ranks share the pipe.
    sys.stdout.write("trained without NumPy\\n")
dist.destroy_process_group()
assert group() is None, "its threads live on, and may abort the interpreter's exit"
"""


def test_two_ranks_train_and_disagree_without_numpy(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN_WITHOUT_NUMPY)
    root = str(Path(__file__).resolve().parent.parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained without NumPy") == 2


NEWER_TORCH = """
import logging, torch
torch.__version__ = torch.torch_version.TorchVersion("99.1")
logging.basicConfig(level=logging.INFO)
from sharded_dadamw import DecoupledAdamW
DecoupledAdamW([torch.nn.Parameter(torch.zeros(1))])
DecoupledAdamW([torch.nn.Parameter(torch.zeros(1))])
"""


def test_a_torch_that_was_not_tried_is_said_once() -> None:
    result = subprocess.run([sys.executable, "-c", NEWER_TORCH], capture_output=True, text=True, timeout=120)
    assert result.stderr.count("torch 99.1 was not tried") == 1
