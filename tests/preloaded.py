"""What the fork server imports and computes once, so that its forks need not: all of training, and what loads late."""

import tempfile

import torch
import torch._dynamo  # optimizers import it late
from torch import nn

import tests.forked
import tests.harness  # noqa: F401
from launch.options import read_settings
from sharded_dadamw import ShardedDecoupledAdamW
from sharded_dadamw.checkpoint import load_checkpoint, save_checkpoint
from sharded_dadamw.kernels.exact_squares import exact_squares

torch.set_num_threads(1)
read_settings([])
exact_squares(torch.zeros(1), torch.ones((), dtype=torch.float64))
model = nn.Linear(3, 3)
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer = ShardedDecoupledAdamW(model.named_parameters(), max_grad_norm=1.0)
optimizer.step()
with tempfile.TemporaryDirectory() as folder:
    save_checkpoint(folder, step=1, model=model, optimizer=optimizer)
    load_checkpoint(folder, model=model, optimizer=optimizer)
del model, optimizer, parameter
