"""Ctrl-C at any place in backward, clip, step and zero_grad, and then `zero_grad()` and on, as in a notebook.

The control has never been interrupted. The experiment is broken off at one call inside the package after the other, on
all ranks at the same one, and goes on; what it then computes must be the bits of the control.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import sharded_dadamw
from sharded_dadamw import Exchange, ShardedDecoupledAdamW
from sharded_dadamw.comm import messages, shared_memory
from tests.harness import SHARDED, loss_of, small
from tests.models import reduce_for_control
from tests.pool import on_ranks

PACKAGE = str(Path(sharded_dadamw.__file__).parent)
NOT_IN = ("_has_ended", "collectives.py", "messages.py", "Pending.__init__")
"""How often a rank asks after others depends on their pace; and a message that gloo has begun cannot be dropped."""


@contextmanager
def interrupted(at: int) -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at one call inside the package; yields how many there were."""
    count = [0]

    def trace(frame: FrameType, event: str, _argument: Any) -> None:
        code = frame.f_code
        where = f"{code.co_filename}: {code.co_qualname}"
        if event == "call" and where.startswith(PACKAGE) and not any(name in where for name in NOT_IN):
            count[0] += 1
            if count[0] == at:
                raise KeyboardInterrupt(where)

    before = sys.gettrace()
    gc.disable()  # what is collected here or there may call functions of the package
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)
        gc.enable()


def build(group: Any, attached: bool, **config: Any) -> tuple[nn.Module, ShardedDecoupledAdamW]:
    model, optimizer = small(group, bucket_cap_mb=1e-3, **config)
    if attached:
        optimizer.attach(model)
    return model, optimizer


def train(model: nn.Module, optimizer: ShardedDecoupledAdamW, rank: int, step: int) -> None:
    with optimizer.no_sync():
        loss_of(model, rank, step).backward()
    loss_of(model, rank, step + 100).backward()
    optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model, rank)  # where parameters that are in flight arrive


def interrupt_everywhere(group: Any, every: int, attached: bool, config: dict[str, Any]) -> int:
    """Returns at how many places it was interrupted."""
    gc.collect()  # an optimizer that lives on looks at every step, so ranks would count other calls
    model, optimizer = build(group, attached, **config)
    twin, control = build(group, attached, **config)
    rank = 0 if group is None else group.rank()
    for step in range(2):
        train(model, optimizer, rank, step)
        train(twin, control, rank, step)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(twin, control, rank, 2)
    control.synchronize()
    at, num_interrupts = 1, 0
    while True:
        where = "nowhere"
        with interrupted(at) as count:
            try:
                train(model, optimizer, rank, 2)
            except KeyboardInterrupt as error:
                where = str(error)
                num_interrupts += 1
        optimizer.zero_grad()
        train(model, optimizer, rank, 3)
        optimizer.synchronize()
        if group is not None:
            whole = torch.cat([param.detach().flatten() for param in model.parameters()])
            (mean,) = reduce_for_control(group, [whole])
            assert torch.equal(mean, whole), f"ranks differ after an interrupt in {where}"
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(model, optimizer, rank, 2)
        optimizer.synchronize()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, theirs), f"after an interrupt in {where}"
        if count[0] < at:
            return num_interrupts
        at += every


def step_after_all(group: Any, config: dict[str, Any]) -> None:
    """Without zero_grad() a mean that was broken off is refused, and nothing has changed."""
    model, optimizer = build(group, False, **config)
    before = [param.detach().clone() for param in model.parameters()]
    for clears in (False, True):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for module in (messages, shared_memory):
                patch.setattr(module, "average", interrupt)
            train(model, optimizer, group.rank(), 0)
        if clears:
            optimizer.zero_grad()
            train(model, optimizer, group.rank(), 1)
        else:
            with pytest.raises(RuntimeError, match=r"broken off.*zero_grad\(\)"):
                optimizer.step()
            assert all(map(torch.equal, model.parameters(), before))
            optimizer.zero_grad()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("case", ["full", "sharded"])
def test_a_mean_that_was_broken_off_is_not_stepped_with(case: str) -> None:
    on_ranks(2, step_after_all, CASES[case][1])


CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "full": (False, {}),
    "sharded": (False, {"gradient_residency": SHARDED}),
    "without overlap": (False, {"overlap": False}),
    "attached, sharded, by messages": (
        True,
        {"gradient_residency": SHARDED, "exchange": Exchange.RANK_ORDER},
    ),
}


@pytest.mark.parametrize(("num_ranks", "case"), [(1, "full"), *((2, case) for case in CASES)])
def test_the_optimizer_goes_on_from_wherever_it_was_interrupted(num_ranks: int, case: str) -> None:
    counts = on_ranks(num_ranks, interrupt_everywhere, 13, *CASES[case])
    assert min(counts) == max(counts) >= 20
