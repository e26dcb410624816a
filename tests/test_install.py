"""torch alone is enough: no NumPy, nothing else that torch does not bring along."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients

TRAIN_WITHOUT_NUMPY = """
import logging, os, sys, weakref
sys.modules["numpy"] = None  # importing it now fails, as where it is not installed
import torch, torch.distributed as dist
torch.__version__ = torch.torch_version.TorchVersion("99.1")
logging.basicConfig(level=logging.INFO, format="%(message)s")
from sharded_dadamw import ShardedDecoupledAdamW

def train(rank):
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    group = weakref.ref(dist.group.WORLD)
    model = torch.nn.Linear(8, 8)
    other = ShardedDecoupledAdamW(torch.nn.Linear(2, 2).named_parameters())
    optimizer = ShardedDecoupledAdamW(model.named_parameters(), lr=1e-2)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.1 + rank
    optimizer.zero_grad()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "rank 1 has 1.1" in str(error), error
        print("trained without NumPy", flush=True)
    dist.destroy_process_group()
    assert group() is None, "its threads live on, and may abort the interpreter's exit"

child = os.fork()
train(int(child != 0))
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_two_ranks_train_and_disagree_without_numpy_on_a_torch_that_was_not_tried(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN_WITHOUT_NUMPY)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    names = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    result = subprocess.run(command, env=names, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("\n", "") == "trained without NumPy" * 2  # they may write at one moment
    assert result.stderr.count("torch 99.1 was not tried") == 2  # once on each rank
