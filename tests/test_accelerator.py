"""Both optimizers on a pretended accelerator: no tensors of two devices mix, and the host waits for none of its work.

What can be seen without a GPU of what tests/gpu sees on one; tests/elsewhere.py says how. Kernels are torch's own.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sharded_dadamw import (
    DecoupledAdamW,
    GradientResidency,
    MainParameter,
    Moments,
    ShardedDecoupledAdamW,
    ShardingConfig,
)
from sharded_dadamw.comm.collectives import Collectives
from sharded_dadamw.kernels import choose as kernels
from sharded_dadamw.schedule.handshake import Handshake
from tests.elsewhere import ELSEWHERE, parameters_elsewhere, pretended_device, put_elsewhere, without_waiting
from tests.models import BF16, F64, draw_gradient, make_groups, named

LAW: dict[str, Any] = dict(lr=3e-3, weight_decay=2e-4)
NUM_STEPS = 5
QUIET = 2
"""The first step that waits for nothing: before, ranks find out who averages, and who counts what for norms."""

SHARDED = GradientResidency.SHARDED
NARROW: dict[str, Any] = dict(main_parameter=MainParameter.REMAINDER, moments=Moments.BF16)
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("odd sizes", {}),
    "mixed dtypes, some buckets": ("mixed dtypes", dict(bucket_cap_mb=1e-3)),
    "remainder, bf16 moments, void steps": ("bf16", dict(skip_nonfinite=True, **NARROW)),
    "sharded gradients": ("bf16", dict(gradient_residency=SHARDED, bucket_cap_mb=1e-3)),
    "micro-batches": ("odd sizes", dict(micro_batches=3)),
    "micro-batches, sharded gradients": ("bf16", dict(micro_batches=2, gradient_residency=SHARDED)),
    "rounded on the wire": ("odd sizes", dict(wire_dtype=BF16)),
    "averaged by others": ("several groups", dict(reduce_gradients=False)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by the step": dict(max_grad_norm=0.1),
    "metrics in the step": dict(metrics_in_step=True, max_grad_norm=0.1),
}


@pytest.fixture(autouse=True)
def kernels_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "COMPILERS", {})
        kernels.compiled_kernel.cache_clear()
        yield
    kernels.compiled_kernel.cache_clear()


def training(parameters: str, is_there: bool, has_scaler: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    """Everything that comes of a few steps: with gradients missing now and then, clipped, or under a loss scaler."""
    config: ShardingConfig | None = options.get("config")
    num_passes = (config and config.micro_batches) or 1
    found: dict[str, Tensor] = {}
    with pretended_device() if is_there else nullcontext() as pretence:
        params = named(make_groups(parameters, seed=0))
        params = parameters_elsewhere(params) if is_there else params
        place = put_elsewhere if is_there else lambda tensor: tensor
        optimizer: Any = (DecoupledAdamW if config is None else ShardedDecoupledAdamW)(params.items(), **LAW, **options)
        for step in range(NUM_STEPS):
            given = [
                (p.view_as(p), place(draw_gradient(torch.empty(p.shape, dtype=p.dtype), step, number, index)))
                for number in range(num_passes)
                for index, p in enumerate(params.values())
                if (step + index) % 3
            ]
            with without_waiting(pretence) if pretence is not None and step >= QUIET else nullcontext():
                for number in range(num_passes):
                    of_pass = given[number * len(given) // num_passes : (number + 1) * len(given) // num_passes]
                    torch.autograd.backward(*zip(*of_pass, strict=True))
                if has_scaler:  # which leaves these with an optimizer that it calls
                    optimizer.found_inf, optimizer.grad_scale = (
                        place(torch.tensor(value)) for value in (float(step == QUIET), 4.0)
                    )
                elif step % 2:
                    found[f"norm at {step}"] = optimizer.clip_grad_norm_(0.1, 2.0 if step < QUIET else math.inf)
                optimizer.step()
                found |= {f"{key} at {step}": value for key, value in optimizer.metrics().items()}
            found[f"fingerprint at {step}"] = place(torch.tensor(optimizer.fingerprint().all >> 1))
            optimizer.zero_grad()
        found |= {name: p.detach().clone() for name, p in params.items()}
        found |= {f"{name}.{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()}
    if is_there:
        assert [key for key, value in found.items() if not hasattr(value, "is_elsewhere")] == []
    return found


def assert_trains_there_as_here(parameters: str, *, has_scaler: bool = False, **options: Any) -> None:
    here, there = (training(parameters, is_there, has_scaler, options) for is_there in (False, True))
    assert list(there) == list(here)
    assert [key for key, value in here.items() if not torch.equal(there[key].nan_to_num(), value.nan_to_num())] == []


@pytest.mark.parametrize("label", CONFIGS)
def test_a_sharded_step_mixes_no_devices_and_waits_for_none(label: str) -> None:
    parameters, settings = CONFIGS[label]
    assert_trains_there_as_here(parameters, config=ShardingConfig(**settings))


@pytest.mark.parametrize("label", OPTIONS)
@pytest.mark.parametrize("has_scaler", [False, True], ids=["no scaler", "loss scaler"])
@pytest.mark.parametrize("config", [None, ShardingConfig()], ids=["unsharded", "sharded"])
def test_clipping_metrics_and_a_loss_scaler_mix_no_devices_and_wait_for_none(
    config: ShardingConfig | None, has_scaler: bool, label: str
) -> None:
    options = OPTIONS[label] | ({} if config is None else {"config": config})
    assert_trains_there_as_here("odd sizes", has_scaler=has_scaler, **options)


@pytest.mark.parametrize(
    ("describes", "updates", "outcome"),
    [
        ("step()", True, "the step before this call; .*; that has changed nothing"),
        ("another", True, "the step before this call; .*; that was taken with wrong numbers, so go back to .*"),
        ("another", False, r"the clip_grad_norm_\(\) before this call; .*; that has changed nothing"),
    ],
)
def test_a_disagreement_is_told_in_the_next_call_with_what_came_of_it(
    describes: str, updates: bool, outcome: str
) -> None:
    """Of a rank that is in step(), and another one that says what it is in, and has multiplied gradients by 2."""
    refused: list[bool] = []
    with pretended_device() as pretence:
        ranks = Beside(describes)
        handshake = Handshake(ranks, ELSEWHERE, after_refusal=lambda *, differ: refused.append(differ))

        def check(**given: Any) -> Tensor | None:
            nothing = dict(found_inf=None, grad_scale=None, sums=None, refusal=None)
            return handshake.check(lambda: {"the call": "step()"}, b"step()", tolerance=0.0, **nothing | given)

        with without_waiting(pretence):
            void = check(factors=[put_elsewhere(torch.ones(2, dtype=F64))], updates=updates)
        assert void is not None and void == 1.0
        with pytest.raises(RuntimeError, match=f"^ranks disagreed about {outcome}$"):
            check(factors=[], updates=True)
        assert refused == [True]
        ranks.differs = False
        assert check(factors=[], updates=True) is None
        assert check(factors=[], updates=True) is None


class Beside(Collectives):
    """One rank beside another that is not there, while they differ."""

    def __init__(self, describes: str) -> None:
        super().__init__(0, 2)
        self.describes, self.differs = describes, True

    def all_reduce_(self, tensor: Tensor, op: Any) -> None:
        """See Collectives.all_reduce_; of a handshake's digest and factors, and of both with the other sign."""
        if self.differs:
            tensor[1] += self.describes != "step()"
            tensor[5] = put_elsewhere(torch.tensor(2.0, dtype=F64)).view(torch.int64)

    def gather_texts(self, text: str) -> list[str]:
        """See Collectives.gather_texts."""
        return [text, text.replace("step()", self.describes)]
