"""``DecoupledAdamW`` on a GPU: the host never waits, a step can be captured in a CUDA graph, and costs few launches."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.profiler import ProfilerActivity, profile

from sharded_dadamw import DecoupledAdamW
from tests.forms import BF16, F32
from tests.gpu.probes import DEVICE, no_host_sync
from tests.harness import SCHEDULES

NUM_STEPS = 8


def everything(optimizer: Optimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Parameters and state."""
    values = {name: p.detach() for name, p in params.items()}
    for name, p in params.items():
        values.update({f"{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()})
    return values


def assert_same_bits(some: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert list(some) == list(others)
    different = [name for name in some if not torch.equal(some[name], others[name])]
    assert different == []


# --- the host ---


def test_a_wait_for_the_device_is_noticed() -> None:
    """Else the tests in test_sharded.py would prove nothing, in which both optimizers must not wait."""
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_host_sync():
        value.item()


def test_zero_grad_frees_the_gradients() -> None:
    """Nothing that a step has made ready for the next keeps them."""
    params = [nn.Parameter(torch.ones(size, 1024, device=DEVICE)) for size in (4096, 1, 3)]
    optimizer = DecoupledAdamW(params)

    def step() -> list[weakref.ref[Tensor]]:
        for p in params:
            p.grad = torch.ones_like(p)
        references = [weakref.ref(p.grad) for p in params if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        return references

    assert [reference() for reference in step()] == [None] * len(params)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        assert [reference() for reference in step()] == [None] * len(params)
        assert torch.cuda.memory_allocated() == held
    state = sum(value.nbytes for of_param in optimizer.state.values() for value in of_param.values())
    assert state == 2 * sum(p.nbytes for p in params) + 4 * len(params)


def test_a_step_over_ten_thousand_parameters_launches_few_kernels() -> None:
    """One for the update, one for its norms, and those of torch that count the steps: each takes 110 tensors."""
    params = [nn.Parameter(torch.ones(13, device=DEVICE)) for _ in range(10_000)]
    optimizer = DecoupledAdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    events = profiler.events()
    assert events is not None
    launched = [event.name for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    ours = [kernel for name in launched for kernel in ("_update_kernel", "_sum_kernel") if kernel in name]
    assert sorted(ours) == ["_sum_kernel", "_update_kernel"]
    assert len(launched) - len(ours) <= math.ceil(len(params) / 110), sorted(set(launched))


# --- CUDA graphs ---


class Graphed:
    """A model, its optimizer with an lr on the device, and one training step over a fixed batch."""

    def __init__(self, schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(24, 65), nn.GELU(), nn.Linear(65, 3)).to(DEVICE, dtype)
        self.params = dict(self.model.named_parameters())
        self.batch = torch.zeros(32, 24, device=DEVICE, dtype=dtype)
        biases = [p for name, p in self.params.items() if name.endswith("bias")]
        weights = [p for name, p in self.params.items() if not name.endswith("bias")]
        self.optimizer = DecoupledAdamW(
            [
                {"params": weights, "lr": torch.tensor(2e-2, device=DEVICE)},
                {"params": biases, "lr": torch.tensor(1e-2, device=DEVICE), "weight_decay": 0.0},
            ],
            weight_decay=2e-4,
            amsgrad=amsgrad,
        )
        self.scheduler = schedule(self.optimizer)

    def load(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.batch.copy_(torch.randn(self.batch.shape, generator=draw).to(self.batch.dtype))

    def backward(self) -> None:
        self.optimizer.zero_grad()
        (self.model(self.batch).float() - 1).square().mean().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


class Pair:
    """Two of the same, one to train eagerly, one to train by graphs."""

    def __init__(self, schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool) -> None:
        self.eager, self.captured = (Graphed(schedule, dtype, amsgrad) for _ in range(2))
        self.rates: list[float] = []
        self.kept: list[list[Tensor | None]] = []

    def advance(self, num_times: int, captured_step: Callable[[], Any]) -> None:
        """Steps of both, each time on a batch and at learning rates of its own, after which they must be equal."""
        for _ in range(num_times):
            for one in (self.eager, self.captured):
                one.load(len(self.rates))
            self.eager.step()
            captured_step()
            self.rates.append(float(self.captured.optimizer.param_groups[0]["lr"]))
            assert len(set(self.rates)) == len(self.rates), "the learning rate was to change"
            for one in (self.eager, self.captured):
                one.scheduler.step()
            assert_same_bits(
                everything(self.captured.optimizer, self.captured.params),
                everything(self.eager.optimizer, self.eager.params),
            )

    def step_elsewhere(self) -> None:
        """A step on gradients at addresses that were never used before, and never will be again."""
        self.captured.step()
        self.kept.append([p.grad for p in self.captured.params.values()])


def on_a_side_stream(step: Callable[[], Any]) -> Callable[[], None]:
    """As torch asks for before a capture of a backward."""

    def aside() -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)

    return aside


def fill_free_memory() -> list[Tensor]:
    """Overwrites what small blocks of memory were given back, on the device and of the host's that it can read."""
    torch.cuda.synchronize()
    zeros = [torch.zeros(64, dtype=torch.int64, device=DEVICE) for _ in range(10_000)]
    for numel in (32, 64, 128, 256):
        zeros += [torch.zeros(numel, dtype=torch.int64, pin_memory=True) for _ in range(32)]
    return zeros


@pytest.mark.parametrize(
    ("schedule", "dtype", "amsgrad"),
    [
        pytest.param(SCHEDULES["LambdaLR"], F32, False, id="LambdaLR, fp32"),
        pytest.param(lambda o: CosineAnnealingLR(o, T_max=64), F32, True, id="CosineAnnealingLR, fp32, amsgrad"),
        pytest.param(SCHEDULES["LambdaLR"], BF16, False, id="LambdaLR, bf16"),
        pytest.param(
            lambda o: OneCycleLR(o, max_lr=[2e-2, 1e-2], total_steps=50, cycle_momentum=False),
            F32,
            False,
            id="OneCycleLR, fp32",
        ),
    ],
)
def test_a_captured_training_step_replays_to_the_bits_of_eager_steps_while_the_lr_changes(
    schedule: Callable[[Optimizer], LRScheduler], dtype: torch.dtype, amsgrad: bool
) -> None:
    """Forward, backward and step in one graph; between replays a scheduler writes the lr."""
    pair = Pair(schedule, dtype, amsgrad)
    pair.advance(3, on_a_side_stream(pair.captured.step))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.captured.step()
    pair.advance(NUM_STEPS, graph.replay)
    pair.advance(3, pair.step_elsewhere)
    filler = fill_free_memory()
    pair.advance(NUM_STEPS, graph.replay)  # does what it did, whatever was stepped on in between
    del filler
